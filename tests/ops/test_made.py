"""made on every implementation that runs here, against its definition in fp64."""

import functools
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import genkernels as gk
from genkernels import ops
from genkernels._options import SCALE_CONSTANTS, ScaleMap, Spline
from genkernels.ops.made import METHODS
from genkernels.ops.made import SCALE_MAPS as ALL_MAPS
from genkernels.reference import made as definition
from genkernels.reference._made_maps import Splines
from genkernels.reference.made import degree_mask, degrees_of, made_forward, plan
from tests.checks import assert_as_accurate, behind, beside_forbidden_memory, opcheck_backward, pairwise
from tests.implementations import interpreted_few, slow_few

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

compiled = pytest.mark.implementations(reference=False)
quick = pytest.mark.implementations(slow=False)
linear = pytest.mark.implementations(torch_op="masked_linear")
inverse = pytest.mark.implementations(torch_op="made_inverse")
splines = pytest.mark.implementations(torch_op="made_spline_inverse")


def sample(device="cpu", dtype=F64):
    """The inverse through a small network with a context: `(function of tensors, tensors)`; the function returns a
    tuple of tensors."""
    generator = torch.Generator().manual_seed(1)
    degrees = [torch.tensor(d, device=device) for d in ([2, 1, 3], [0, 1, 1, 2], [0, 1, 2, 2])]
    order, counts = plan(degrees)
    shapes = [(2, 3), (2, 4), (4, 3), (4,), (4, 4), (4,), (6, 4), (6,)]
    tensors = (torch.randn(s, generator=generator, dtype=F64).to(device, dtype) for s in shapes)

    def function(z, context, w0, b0, w1, b1, w2, b2):
        layers = (w0, w1, w2), (b0, b1, b2)
        return ops.made_inverse(z, *layers, order, counts, context=context, scale_map="sigmoid")

    return function, tuple(tensors)


def sample_linear(device="cpu", dtype=F64):
    """The layer of `made`, unsorted degrees, one output that sees nothing."""
    generator = torch.Generator().manual_seed(1)
    shapes = (3, 4), (5, 4), (5,)
    tensors = (torch.randn(s, generator=generator, dtype=F64).to(device, dtype) for s in shapes)
    into, out = torch.tensor([1, 3, 2, 4], device=device), torch.tensor([1, 4, 2, 3, 0], device=device)
    return lambda x, weight, bias: (ops.masked_linear(x, weight, bias, into, out),), tuple(tensors)


def sample_splines(device="cpu", dtype=F64):
    """As `sample`, of splines of two bins."""
    generator = torch.Generator().manual_seed(1)
    order, counts = plan([torch.tensor(d, device=device) for d in ([2, 1, 3], [0, 1, 1, 2])])
    shapes = [(2, 3), (2, 4), (4, 3), (4,), (15, 4), (15,)]
    tensors = (torch.randn(s, generator=generator, dtype=F64).to(device, dtype) for s in shapes)

    def function(z, context, w0, b0, w1, b1):
        return ops.made_spline_inverse(z, (w0, w1), (b0, b1), order, counts, context=context, bound=3.0)

    return function, tuple(tensors)


def sample_forward(device="cpu", dtype=F64):
    """As `sample`, the other way."""
    _, tensors = sample(device, dtype)
    order, counts = plan([torch.tensor(d, device=device) for d in ([2, 1, 3], [0, 1, 1, 2], [0, 1, 2, 2])])

    def forward(x, context, w0, b0, w1, b1, w2, b2):
        layers = (w0, w1, w2), (b0, b1, b2)
        return ops.made_forward(x, *layers, order, counts, context=context, scale_map="sigmoid")

    return forward, tensors


SAMPLES = {
    "made": sample,
    "made_forward": sample_forward,
    "masked_linear": sample_linear,
    "made_spline_inverse": sample_splines,
}
LOWER_UNDER_AUTOCAST = {"masked_linear"}


# ------------------------------------------------------------------------------------------------------- masked linear

#: rows, in, out: single numbers, odd ones, several register tiles and chunks, more rows than a chunk
SHAPES = [(1, 1, 1), (3, 5, 7), (33, 40, 70), (100, 130, 61), (300, 17, 29), (0, 4, 3), (5, 1, 90)]
DEGREES = {
    "sorted": lambda n: torch.randint(0, 9, (n,)).sort().values,
    "any": lambda n: torch.randint(0, 9, (n,)),
    "halves": lambda n: torch.arange(n) % max((n + 1) // 2, 1) + 1,
    "nothing": lambda n: torch.full((n,), 20),
}


def linear_case(shape, into, out, dtype, device):
    rows, n, m = shape
    draw = lambda *s: torch.randn(s, dtype=F64).to(dtype).to(device)  # noqa: E731
    return draw(rows, n), draw(m, n), draw(m), DEGREES[into](n).to(device), DEGREES[out](m).to(device), draw(rows, m)


def run_linear(x, weight, bias, into, out, grad, strict):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = ops.masked_linear(*leaves, into, out, strict=strict)
    return {"y": y.detach(), **dict(zip(("x", "weight", "bias"), torch.autograd.grad(y, leaves, grad), strict=True))}


@pytest.mark.implementations(when=lambda i, shape, **_: not i.is_slow or shape[0] < 10)
@linear
@pytest.mark.every_build
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "into,out", [("sorted", "sorted"), ("any", "halves"), ("sorted", "halves"), ("any", "any"), ("nothing", "sorted")]
)
def test_masked_linear(implementation, device, poisoned_memory, shape, into, out, dtype):
    for strict in (False, True):
        case = linear_case(shape, into, out, dtype, device)
        ours = run_linear(*case, strict)
        with gk.use_backend("reference"):
            same = run_linear(*case, strict)
            exact = run_linear(*(t.double().cpu() if t.is_floating_point() else t.cpu() for t in case), strict)
        for name, value in ours.items():
            assert_as_accurate(f"{name} {strict}", value, same[name], exact[name], 16)
        dead = ~degree_mask(case[3], case[4], strict)
        assert (ours["weight"][dead] == 0).all()


@linear
def test_dead_weights_are_not_multiplied(implementation, device):
    x, weight, bias, into, out, grad = linear_case((9, 30, 40), "any", "halves", F32, device)
    dead = ~degree_mask(into, out, True)
    clean = run_linear(x, weight, bias, into, out, grad, True)
    dirty = run_linear(x, weight.masked_fill(dead, float("nan")), bias, into, out, grad, True)
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name


@linear
def test_masked_linear_takes_any_strides_and_leading_dimensions(implementation, device):
    x, weight, bias, into, out, _ = linear_case((24, 10, 12), "any", "any", F64, device)
    expected = ops.masked_linear(x, weight, bias, into, out)
    wide = torch.randn(24, 30, dtype=F64, device=device)
    wide[:, 5:25:2] = x
    transposed = weight.t().contiguous().t()
    assert torch.equal(ops.masked_linear(wide[:, 5:25:2], transposed, bias, into, out), expected)
    assert torch.equal(ops.masked_linear(x.view(2, 3, 4, 10), weight, bias, into, out), expected.view(2, 3, 4, 12))
    without, with_zeros = (ops.masked_linear(x, weight, b, into, out) for b in (None, 0 * bias))
    # cuBLAS may pick another kernel for a product without a bias; on a CPU they are one
    torch.testing.assert_close(without, with_zeros, **({"rtol": 0, "atol": 0} if device == "cpu" else {}))


@linear
@compiled
@quick
def test_masked_linear_gradients(implementation, device):
    x, weight, bias, into, out, _ = linear_case((3, 4, 5), "any", "any", F64, device)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    function = lambda *t: ops.masked_linear(*t, into, out, strict=True)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)
    torch.library.opcheck(torch.ops.genkernels.masked_linear.default, (*leaves, into, out, True))
    for t in leaves:
        t.requires_grad_(False)
    torch.library.opcheck(
        torch.ops.genkernels.masked_linear_grad_input.default,
        (torch.randn(3, 5, dtype=F64, device=device), weight, into, out, True),
    )
    torch.library.opcheck(
        torch.ops.genkernels.masked_linear_grad_weight.default,
        (torch.randn(3, 5, dtype=F64, device=device), x, into, out, True),
    )


@linear
def test_masked_linear_under_autocast(implementation, device):
    x, weight, bias, into, out, _ = linear_case((7, 10, 12), "any", "any", F32, device)
    with torch.autocast(device, dtype=BF16):
        y = ops.masked_linear(x, weight, bias, into, out)
        assert y.dtype == BF16
        assert ops.masked_linear(x.double(), weight.double(), bias.double(), into, out).dtype == F64
    halves = [t.bfloat16() for t in (x, weight, bias)]
    torch.testing.assert_close(y, ops.masked_linear(*halves, into, out))


@linear
@compiled
def test_a_sample_alone_gives_its_bits_in_a_batch(implementation, device):
    x, weight, bias, into, out, _ = linear_case((300, 50, 70), "any", "halves", F32, device)
    whole = ops.masked_linear(x, weight, bias, into, out)
    assert torch.equal(whole, ops.masked_linear(x, weight, bias, into, out))
    if implementation.name == "cpu":  # cuBLAS picks another kernel for another batch
        assert torch.equal(whole[37:38], ops.masked_linear(x[37:38], weight, bias, into, out))


# --------------------------------------------------------------------------------------------------------- the inverse


def network(
    features,
    hidden,
    *,
    batch=5,
    context=False,
    residual=False,
    order="natural",
    dtype=F64,
    device="cpu",
    scale=1.0,
    params=2,
):
    """`(z, weights, biases, order, counts, options)`: sorted random degrees, weights whose outputs stay near 1."""
    first = {
        "natural": torch.arange(features),
        "reversed": torch.arange(features).flip(0),
        "random": torch.randperm(features),
    }[order] + 1
    low = 0 if context or features == 1 else 1
    units = torch.randint(low, max(features, low + 1), (hidden[0],)).sort().values
    degrees = [
        first,
        *(units if residual else torch.randint(low, max(features, low + 1), (h,)).sort().values for h in hidden),
    ]
    steps, counts = plan(degrees)
    sizes = [features, *hidden, params * features]
    draw = lambda *s: (torch.randn(s, dtype=F64) * scale).to(dtype).to(device)  # noqa: E731
    weights = [draw(m, n) * n**-0.5 for n, m in itertools.pairwise(sizes)]
    biases = [0.3 * draw(m) for m in sizes[1:]]
    options = {"residual": residual, "context": draw(batch, hidden[0]) if context else None}
    return draw(batch, features) / scale, weights, biases, steps.to(device), counts.to(device), options


def run_inverse(z, weights, biases, order, counts, options, scale_map="exp", method="blocked", grads=None):
    """Outputs and, given their gradients, all gradients, by name."""
    leaves = {"z": z, **{f"w{i}": w for i, w in enumerate(weights)}, **{f"b{i}": b for i, b in enumerate(biases)}}
    if options["context"] is not None:
        leaves["context"] = options["context"]
    leaves = {k: v.detach().clone().requires_grad_() for k, v in leaves.items()}
    ws, bs = ([leaves[f"{k}{i}"] for i in range(len(weights))] for k in "wb")
    by_splines = "parametrization" in options
    function = ops.made_spline_inverse if by_splines else functools.partial(ops.made_inverse, scale_map=scale_map)
    given = options | {"context": leaves.get("context")}
    x, ldj = function(leaves["z"], ws, bs, order, counts, method=method, **given)
    found = {"x": x.detach(), "ldj": ldj.detach()}
    if grads is not None:
        pairs = [(o, g) for o, g in zip((x, ldj), grads, strict=True) if g is not None]
        # of one feature the log-determinant does not depend on z, as torch sees the reference
        alone = {"allow_unused": True, "materialize_grads": True} if len(pairs) == 1 else {}
        got = torch.autograd.grad([o for o, _ in pairs], list(leaves.values()), [g for _, g in pairs], **alone)
        for name, grad in zip(leaves, got, strict=True):
            found[f"grad {name}"] = grad
    return found


def widened(case):
    z, weights, biases, order, counts, options = case
    wide = lambda t: None if t is None else t.double().cpu()  # noqa: E731
    return (
        wide(z),
        [wide(w) for w in weights],
        [wide(b) for b in biases],
        order.cpu(),
        counts.cpu(),
        {**options, "context": wide(options["context"])},
    )


NETWORKS = [
    {"features": 1, "hidden": (3, 2), "context": True},
    {"features": 1, "hidden": (1,)},
    {"features": 2, "hidden": (4, 4, 4), "residual": True},
    {"features": 7, "hidden": (20, 11), "order": "random"},
    {"features": 31, "hidden": (9, 50, 13), "order": "reversed", "context": True},
    {"features": 33, "hidden": (40,) * 5, "residual": True, "order": "random", "context": True, "batch": 70},
    {"features": 67, "hidden": (30,), "batch": 130, "context": True},
]
#: Of the same paths where a call is slow; two blocks of samples, more units at once than a tile or than warps, deep dot
#: products.
SMALL = [
    {"features": 1, "hidden": (3, 2), "context": True, "batch": 2},
    {"features": 3, "hidden": (4, 4, 4), "residual": True, "context": True, "order": "random"},
    {"features": 5, "hidden": (40,) * 5, "residual": True, "order": "random", "batch": 3},
    {"features": 5, "hidden": (7, 12), "order": "random", "batch": 9},
    {"features": 6, "hidden": (30,), "context": True, "order": "random", "batch": 1},
    {"features": 9, "hidden": (37, 70), "context": True, "order": "random", "batch": 1},
]


#: What this library's own layers use.
SCALE_MAPS = ("exp", "sigmoid", "tanh")

#: The gradients that are given: of both outputs, of x alone, of the log-determinant alone.
GIVEN = [(True, True), (True, False), (False, True)]
MET = pairwise(range(len(SMALL)), SCALE_MAPS, [F64, F32, BF16], GIVEN)


@pytest.mark.implementations(when=slow_few(MET, "size", "scale_map", "dtype"))
@inverse
@compiled
@pytest.mark.every_build
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("scale_map", SCALE_MAPS)
@pytest.mark.parametrize("size", range(len(NETWORKS)))
def test_inverse_and_gradients(implementation, device, poisoned_memory, size, scale_map, dtype):
    """With the gradients of both outputs, and with that of either alone."""
    nets = SMALL if implementation.is_slow else NETWORKS
    net = nets[size]
    if net["features"] > 30 and dtype != F32 and scale_map != "sigmoid":
        return  # the reference takes seconds
    case = network(**net, dtype=dtype, device=device, scale=0.7)
    z = case[0]
    grads = torch.randn_like(z), torch.randn(len(z), dtype=torch.promote_types(dtype, F32), device=device)
    given = behind(MET, size, scale_map, dtype) if implementation.is_slow else GIVEN
    for some in given if net["features"] < 10 else GIVEN[:1]:
        given_grads = [grad if wanted else None for grad, wanted in zip(grads, some, strict=True)]
        ours = run_inverse(*case, scale_map, grads=given_grads)
        with gk.use_backend("reference"):
            same = run_inverse(*case, scale_map, grads=given_grads)
            exact_grads = [g if g is None else g.double().cpu() for g in given_grads]
            exact = run_inverse(*widened(case), scale_map, grads=exact_grads)
        for name, value in ours.items():
            # in fp64 both round; a half's floor is that of the fp32 arithmetic inside
            units = 16 if implementation.is_slow else 32 if dtype == F64 else 8
            assert_as_accurate(name, value, same[name], exact[name], units)


@inverse
@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_gradient_is_a_zero(implementation, device, missing):
    sizes = (3, (4, 4, 4)) if implementation.is_slow else (9, (14, 14, 14))
    case = network(*sizes, residual=True, context=True, device=device)
    grads = [torch.randn_like(case[0]), torch.randn(5, dtype=F64, device=device)]
    zero, none = list(grads), list(grads)
    zero[missing], none[missing] = torch.zeros_like(grads[missing]), None
    expected = run_inverse(*case, grads=zero)
    for name, value in run_inverse(*case, grads=none).items():
        torch.testing.assert_close(value, expected[name], msg=name)


def with_constant(case, value, dtype=F32):
    """The case in `dtype`, the log-scale of the last step's feature being `value` whatever is seen."""
    z, weights, biases, order, counts, options = case
    weights, biases = [w.to(dtype) for w in weights], [b.to(dtype) for b in biases]
    weights[-1][order[-1]], biases[-1][order[-1]] = 0, value
    context = options["context"] if options["context"] is None else options["context"].to(dtype)
    return z.to(dtype), weights, biases, order, counts, {**options, "context": context}


@inverse
@pytest.mark.parametrize("options", [{}, {"residual": True, "context": True, "order": "random"}], ids=str)
def test_a_feature_that_nothing_uses_multiplies_nothing(implementation, device, options):
    """Of the log-determinant alone the last step's x is no part, however large it is: its gradients are those of
    another constant log-scale."""
    case = network(3, (4, 4, 4), batch=2, device=device, **options)
    grads = None, torch.ones(2, device=device)
    found, usual = (run_inverse(*with_constant(case, value), grads=grads) for value in (-120.0, 0.5))
    assert found["x"].isinf().any()
    for name, value in found.items():
        if name.startswith("grad "):
            torch.testing.assert_close(value, usual[name], msg=lambda m, name=name: f"{name}: {m}")


@inverse
def test_gradients_where_the_scale_overflows(implementation, device):
    """x is nearly lost there, its gradients are nearly zero: a scale that is infinite does not make NaN of them."""
    case = network(3, (4, 4), batch=2, order="random", device=device)
    for value in (95.0, 120.0):
        narrow, wide = with_constant(case, value), with_constant(case, value, F64)
        grads = [torch.ones_like(narrow[0]), torch.ones(2, device=device)]
        found = run_inverse(*narrow, grads=grads)
        with gk.use_backend("reference"):
            exact = run_inverse(*wide, grads=[g.double() for g in grads])
        for name, value in found.items():
            torch.testing.assert_close(
                value.double(), exact[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
            )


@inverse
@pytest.mark.parametrize("scale_map", ALL_MAPS)
def test_it_is_the_inverse(implementation, device, scale_map):
    sizes, code = (9, (14, 15)) if implementation.is_slow else (40, (60, 70)), ScaleMap[scale_map.upper()]
    z, weights, biases, order, counts, options = network(*sizes, context=True, order="random", device=device)
    for method in METHODS:
        x, ldj = ops.made_inverse(z, weights, biases, order, counts, scale_map=scale_map, method=method, **options)
        back, forward_ldj, _ = made_forward(
            x, [options["context"]], weights, biases, [], [order], [counts], False, code, SCALE_CONSTANTS.get(code, 1.0)
        )
        torch.testing.assert_close(back, z)
        torch.testing.assert_close(forward_ldj, -ldj)


@inverse
@compiled
@quick
def test_gradcheck(implementation, device):
    z, weights, biases, order, counts, options = network(
        3, (4, 4, 4), batch=2, residual=True, context=True, order="random", device=device
    )
    leaves = [t.requires_grad_() for t in (z, options["context"], *weights, *biases)]
    ways = [*zip(SCALE_MAPS, METHODS, strict=True), *((scale_map, "blocked") for scale_map in ALL_MAPS[3:])]
    for scale_map, method in ways:

        def function(z, context, *both, scale_map=scale_map, method=method):
            return ops.made_inverse(
                z, both[:4], both[4:], order, counts, context=context, residual=True, scale_map=scale_map, method=method
            )

        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@inverse
@compiled
@quick
def test_opcheck(implementation, device):
    z, weights, biases, order, counts, options = network(4, (5, 6), batch=2, context=True, device=device)
    arguments = (options["context"], weights, biases, order, counts, False, 1, 1.0)
    torch.library.opcheck(torch.ops.genkernels.made_inverse.default, (z, *arguments))
    opcheck_backward(torch.ops.genkernels.made_inverse_backward.default, (z, None, z, *arguments))
    opcheck_backward(torch.ops.genkernels.made_inverse_backward.default, (None, z[:, 0].contiguous(), z, *arguments))


@inverse
@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(implementation, device, batch):
    case = network(6, (8, 9), batch=batch, context=True, device=device)
    grads = torch.ones_like(case[0]), torch.ones(batch, dtype=F64, device=device)
    found = run_inverse(*case, grads=grads)
    assert found["x"].shape == (batch, 6) and found["ldj"].shape == (batch,)
    with gk.use_backend("reference"):
        expected = run_inverse(*case, grads=grads)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.threads
@inverse
@compiled
@pytest.mark.every_build
def test_repeats_and_batches_give_the_same_bits(implementation, device):
    features, hidden, batch, one = (5, (9, 8), 6, 4) if implementation.is_slow else (40, (50, 60), 150, 77)
    case = network(features, hidden, batch=batch, dtype=F32, device=device)
    grads = torch.randn_like(case[0]), torch.randn(batch, device=device)
    first, again = (run_inverse(*case, grads=grads) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
    if implementation.name == "cpu":
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1 if threads > 1 else 2)
            again = run_inverse(*case, grads=grads)
        finally:
            torch.set_num_threads(threads)
        for name, value in first.items():
            assert torch.equal(value, again[name]), f"{name} by the number of threads"
    alone = (case[0][one : one + 1], *case[1:])
    for name, value in run_inverse(*alone).items():
        assert torch.equal(value, first[name][one : one + 1]), name


@inverse
def test_inputs_stay_as_they_were_and_strides_do_not_matter(implementation, device):
    z, weights, biases, order, counts, options = network(6, (8, 9), device=device)
    copies = [t.clone() for t in (z, *weights, *biases)]
    expected = ops.made_inverse(z, weights, biases, order, counts)
    room = torch.randn(9, 11, dtype=F64, device=device).t()
    room[1:11:2, :6] = z
    turned = [w.t().contiguous().t() for w in weights]
    for ours, theirs in zip(ops.made_inverse(room[1:11:2, :6], turned, biases, order, counts), expected, strict=True):
        assert torch.equal(ours, theirs) and ours.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(copies, (z, *weights, *biases), strict=True))


@inverse
def test_dead_weights_and_later_features_never_act(implementation, device):
    z, weights, biases, order, counts, options = network(9, (14, 15), order="random", device=device)
    expected = ops.made_inverse(z, weights, biases, order, counts)
    degrees = degrees_of(order, counts, (14, 15))
    outs = [*degrees[1:], degrees[0].repeat(2)]
    dirty = [
        w.masked_fill(~degree_mask(i, o, k == 2), float("nan"))
        for k, (w, i, o) in enumerate(zip(weights, degrees, outs, strict=True))
    ]
    for ours, theirs in zip(ops.made_inverse(z, dirty, biases, order, counts), expected, strict=True):
        assert torch.equal(ours, theirs)
    late = z.clone()
    late[2, order[5]] = float("nan")
    x, ldj = ops.made_inverse(late, weights, biases, order, counts)
    assert torch.equal(x[:, order[:5]], expected[0][:, order[:5]]) and x[2, order[5:]].isnan().all()
    others = torch.tensor([0, 1, 3, 4], device=device)
    assert torch.equal(x[others], expected[0][others]) and ldj.isnan().tolist() == [False, False, True, False, False]


@inverse
@compiled
@quick
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    features=st.integers(1, 36),
    hidden=st.lists(st.integers(1, 50), min_size=1, max_size=3),
    batch=st.integers(0, 70),
    context=st.booleans(),
    order=st.sampled_from(["natural", "reversed", "random"]),
    scale_map=st.sampled_from(SCALE_MAPS),
)
def test_any_network(implementation, device, poisoned_memory, features, hidden, batch, context, order, scale_map):
    torch.manual_seed(features + 100 * batch)
    case = network(features, tuple(hidden), batch=batch, context=context, order=order, device=device, scale=0.5)
    grads = torch.randn_like(case[0]), torch.randn(batch, dtype=F64, device=device)
    ours = run_inverse(*case, scale_map, grads=grads)
    with gk.use_backend("reference"):
        expected = run_inverse(*case, scale_map, grads=grads)
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


@inverse
@compiled
@pytest.mark.implementations(only=("cuda", "cuda emulated"))
def test_more_layers_than_the_kernels_take_are_refused(functions, device):
    z, *rest, _ = network(2, (2,) * 17, batch=1, dtype=F32, device=device)
    with pytest.raises(RuntimeError, match="the CUDA kernels take at most 16 hidden layers"):
        functions.made_inverse(z, None, *rest, False, 0, 1.0)


@inverse
@pytest.mark.implementations(only=("cuda emulated",))
def test_a_wrong_plan_reads_nothing_outside(functions):
    """Counts and order beyond what there is are cut; an access outside ends the process."""
    z, weights, biases, order, counts, _ = network(4, (5, 6), order="random", batch=3, dtype=F32)
    beside = [[beside_forbidden_memory(t, True) for t in group] for group in (weights, biases)]
    for wrong_order, wrong_counts in ((order, counts + 3), (order, counts - 3), (order + 2, counts)):
        functions.made_inverse(z, None, *beside, wrong_order, wrong_counts, False, 0, 1.0)


def test_the_plan_can_be_undone():
    degrees = [torch.randperm(7) + 1, torch.randint(0, 7, (9,)).sort().values, torch.randint(0, 7, (4,)).sort().values]
    for given_degrees, found in zip(degrees, degrees_of(*plan(degrees), (9, 4)), strict=True):
        assert torch.equal(given_degrees, found)


# ----------------------------------------------------------------------------------------------- the inverse, splines

#: (parametrization, K, place in NETWORKS, in SMALL): of one bin, of two, of many, over several blocks and chunks.
SPLINES = [
    ("nflows", 1, 4, 3),
    ("nflows", 8, 3, 1),
    ("nflows", 64, 0, 0),
    ("zuko", 1, 1, 4),
    ("zuko", 2, 5, 2),
    ("zuko", 5, 6, 3),
    ("circular", 1, 2, 1),
    ("circular", 4, 4, 5),
    ("circular", 64, 3, 0),
]
each_splines = pytest.mark.parametrize(("kind", "bins", "large", "small"), SPLINES)
few_splines = pytest.mark.implementations(when=interpreted_few([SPLINES[i] for i in (1, 2, 4, 6)], "kind", "bins"))


def spline_network(implementation, large, small):
    return SMALL[small] if implementation.is_slow else NETWORKS[large]


def spline_case(kind, bins, net, **options):
    """As `network`, z within the bound, on it and beyond; and the options of the splines."""
    z, *network_case, given = network(**net, params=3 * bins - (kind != "circular"), **options)
    z = 2 * z
    z[-1:, 0], z[:1, -1] = 3.0, -3.0
    return z, *network_case, given | {"parametrization": kind, "bound": 3.0, "floor": 2e-3, "logit_scale": 0.8}


def forward_of(options):
    codes = Spline[options["parametrization"].upper()], options["bound"], options["logit_scale"], options["floor"]
    return functools.partial(definition.forward, Splines(*codes))


@splines
@compiled
@few_splines
@pytest.mark.every_build
@each_splines
def test_spline_inverse_and_gradients(implementation, device, poisoned_memory, kind, bins, large, small):
    """In fp64 as autograd has them through D passes, in fp32 no further from that than the definition in fp32."""
    net = spline_network(implementation, large, small)
    case = spline_case(kind, bins, net, device=device)
    grads = torch.randn_like(case[0]), torch.randn(len(case[0]), dtype=F64, device=device)
    few = GIVEN[large % 3 :][:1] if implementation.is_slow else GIVEN[:1]
    for some in GIVEN if net["features"] < 10 and not implementation.is_slow else few:
        given = [grad if wanted else None for grad, wanted in zip(grads, some, strict=True)]
        ours = run_inverse(*case, grads=given)
        with gk.use_backend("reference"):
            exact = run_inverse(*case, grads=given)
        for name, value in ours.items():
            scale = max(1.0, exact[name].abs().max().item())
            assert (value - exact[name]).abs().max() <= 1e-10 * scale, f"{name} {some}"
    narrow = [t.float() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in case]
    narrow[1:3] = [[t.float() for t in layers] for layers in case[1:3]]
    narrow[5] = case[5] | {"context": None if case[5]["context"] is None else case[5]["context"].float()}
    with gk.use_backend("reference"):
        same, exact = run_inverse(*narrow), run_inverse(*widened(narrow))
    for name, value in run_inverse(*narrow).items():
        assert_as_accurate(name, value, same[name], exact[name], 32)


@pytest.mark.implementations(when=lambda i, **_: not i.is_interpreted)
@splines
@each_splines
def test_it_is_the_inverse_of_the_splines(implementation, device, kind, bins, large, small):
    net = spline_network(implementation, large, small)
    z, weights, biases, order, counts, options = spline_case(kind, bins, net, device=device)
    methods = METHODS if net["features"] < 10 else METHODS[:1]
    for method in methods:
        x, ldj = ops.made_spline_inverse(z, weights, biases, order, counts, method=method, **options)
        back, forward_ldj = forward_of(options)(
            x, options["context"], weights, biases, order, counts, options["residual"]
        )
        torch.testing.assert_close(back, z, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(forward_ldj, -ldj, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_spline_gradients_by_any_method(method):
    case = spline_case("zuko", 3, {"features": 5, "hidden": (6, 6, 6), "residual": True, "order": "random"})
    grads = torch.randn_like(case[0]), torch.randn(5, dtype=F64)
    found = run_inverse(*case, method=method, grads=grads)
    with gk.use_backend("reference"):
        expected = run_inverse(*case, grads=grads)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10, msg=name)


@splines
@compiled
@quick
def test_spline_gradcheck(implementation, device):
    torch.manual_seed(3)
    for kind in Spline.words():
        z, weights, biases, order, counts, options = spline_case(
            kind, 2, {"features": 3, "hidden": (4,), "batch": 2, "context": True, "order": "random"}, device=device
        )
        given = options.pop("context")
        z = torch.linspace(-2.6, 2.3, 6, dtype=F64, device=device).view(2, 3)  # ±B has no second derivative
        leaves = [t.requires_grad_() for t in (z, given, *weights, *biases)]

        def function(z, context, *both, rest=(order, counts), options=options):
            return ops.made_spline_inverse(z, both[:2], both[2:], *rest, context=context, **options)

        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@splines
@compiled
@quick
def test_spline_opcheck(implementation, device):
    z, weights, biases, order, counts, options = spline_case("nflows", 2, NETWORKS[0], device=device)
    arguments = (options["context"], weights, biases, order, counts, False, 0, 3.0, 1.0, 1e-3)
    torch.library.opcheck(torch.ops.genkernels.made_spline_inverse.default, (z, *arguments))
    backward = torch.ops.genkernels.made_spline_inverse_backward.default
    opcheck_backward(backward, (z, None, z, *arguments))
    opcheck_backward(backward, (None, z[:, 0].contiguous(), z, *arguments))


@pytest.mark.threads
@splines
@pytest.mark.every_build
def test_a_row_of_splines_is_alone(implementation, device):
    """Its bits are those it has by itself, with any number of threads and a NaN in another; no row gives none."""
    net, row, at = {"features": 40, "hidden": (50, 60), "batch": 70, "order": "random"}, 37, 25
    if implementation.is_slow:
        net, row, at = {"features": 3, "hidden": (5, 4), "batch": 6, "order": "random"}, 4, 1
    z, weights, biases, order, counts, options = spline_case("nflows", 6, net, dtype=F32, device=device)

    def run(z):
        return ops.made_spline_inverse(z, weights, biases, order, counts, **options)

    x, ldj = run(z)
    z[row, order[at]] = float("nan")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        spoilt, spoilt_ldj = run(z)
    finally:
        torch.set_num_threads(threads)
    others = torch.arange(len(z), device=device) != row
    assert torch.equal(spoilt[others], x[others]) and torch.equal(spoilt_ldj[others], ldj[others])
    assert torch.equal(spoilt[row, order[:at]], x[row, order[:at]]) and spoilt_ldj[row].isnan()
    assert spoilt[row, order[at:]].isnan().sum() > 1 and spoilt[row, order[at]].isnan()
    if implementation.name != "reference":
        alone = run(z[row + 1 :][:1])
        assert torch.equal(alone[0], x[row + 1 :][:1]) and torch.equal(alone[1], ldj[row + 1 :][:1])
    assert [t.shape for t in run(z[:0])] == [(0, z.shape[1]), (0,)]
    empty = run_inverse(z[:0], weights, biases, order, counts, options, grads=(z[:0], ldj[:0]))
    assert all(not value.any() for value in empty.values())


# ------------------------------------------------------------------------------------------------------------ refusals


def changed(**changes):
    z, weights, biases, order, counts, options = network(3, (4, 5))
    call = {"z": z, "weights": weights, "biases": biases, "order": order, "counts": counts, **options, **changes}
    return lambda: ops.made_inverse(**call)


def changed_splines(outputs, **options):
    z, weights, biases, order, counts, _ = network(3, (4, 5), params=outputs)
    return lambda: ops.made_spline_inverse(z, weights, biases, order, counts, **options)


ZEROS = torch.zeros
REFUSED = [
    (
        changed_splines(6),
        ValueError,
        r"made: weights\[2\] must be \[P\*D, H\] with P = 3K - 1 and D = 3, got \[18, 5\]",
    ),
    (
        changed_splines(5, parametrization="circular"),
        ValueError,
        r"made: weights\[2\] must be \[P\*D, H\] with P = 3K and D = 3, got \[15, 5\]",
    ),
    (changed_splines(8, floor=0.4), ValueError, "made: floor must be below 1/K = 1/3, the share of a bin, got 0.4"),
    (changed_splines(8, bound=0), ValueError, "made: bound must be"),
    (
        changed_splines(8, parametrization="cubic"),
        ValueError,
        "made: parametrization must be one of nflows, zuko, circular, got 'cubic'",
    ),
    (changed_splines(8, method="guess"), ValueError, "made: method must be one of blocked, jacobi, sequential"),
    (changed(z=[1.0]), TypeError, "made: z must be a torch.Tensor, got list"),
    (
        changed(z=ZEROS(5, 3)),
        TypeError,
        r"made: weights\[0\] must have the dtype of z, torch.float32, got torch.float64",
    ),
    (
        changed(z=ZEROS(5, 3, dtype=torch.int64)),
        TypeError,
        "made: z must be float64, float32, bfloat16 or float16, got torch.int64",
    ),
    (changed(z=ZEROS(3, dtype=F64)), ValueError, r"made: z must be \[N, D\] with D at least 1, got \[3\]"),
    (changed(z=ZEROS(2, 4, dtype=F64)), ValueError, r"made: weights\[0\] must be \[out, in\] = \[4, 4\], got \[4, 3\]"),
    (
        changed(biases=[]),
        ValueError,
        "made: weights and biases must be two lists of one length, at least 2, got 3 and 0",
    ),
    (
        changed(residual=True),
        ValueError,
        "made: a residual network must have an odd number of hidden layers, at least 3, got 2",
    ),
    (changed(order=torch.arange(3.0)), TypeError, "made: order must be int64, got torch.float32"),
    (changed(order=torch.arange(4)), ValueError, r"made: order must be \[D\] = \[3\], got \[4\]"),
    (
        changed(counts=torch.zeros(2, 3, dtype=torch.int64)),
        ValueError,
        r"made: counts must be \[layers - 1, D \+ 1\] = \[2, 4\], got \[2, 3\]",
    ),
    (changed(context=ZEROS(5, 3, dtype=F64)), ValueError, r"made: context must be \[N, H\] = \[5, 4\], got \[5, 3\]"),
    (
        changed(scale_map="cube"),
        ValueError,
        "made: scale_map must be one of exp, sigmoid, tanh, sigmoid_floor, softplus_floor, "
        "sigmoid_inverse, atan, soft_clip, got 'cube'",
    ),
    (changed(method="guess"), ValueError, "made: method must be one of blocked, jacobi, sequential, got 'guess'"),
    (
        lambda: ops.masked_linear(ZEROS(2, 3), ZEROS(4, 2), None, torch.arange(2), torch.arange(4)),
        ValueError,
        r"made: x must be \[..., in\] with in = 2, got \[2, 3\]",
    ),
    (
        lambda: ops.masked_linear(ZEROS(2, 3), ZEROS(4, 3), ZEROS(3), torch.arange(3), torch.arange(4)),
        ValueError,
        r"made: bias must be \[out\] = \[4\], got \[3\]",
    ),
    (
        lambda: ops.masked_linear(ZEROS(2, 3), ZEROS(4, 3), None, torch.arange(3), torch.arange(3)),
        ValueError,
        r"made: out_degrees must be \[out\] = \[4\], got \[3\]",
    ),
    (
        lambda: ops.masked_linear(ZEROS(2, 3), ZEROS(4, 3), None, torch.arange(3.0), torch.arange(4)),
        TypeError,
        "made: in_degrees must be int64, got torch.float32",
    ),
    (
        lambda: ops.masked_linear(ZEROS(2, 3), ZEROS(4, 3, dtype=F64), None, torch.arange(3), torch.arange(4)),
        TypeError,
        "made: weight must have the dtype of x, torch.float32, got torch.float64",
    ),
]


@pytest.mark.parametrize("action,error,sentence", REFUSED, ids=range(len(REFUSED)))
def test_refusals(action, error, sentence):
    with pytest.raises(error, match=sentence):
        action()


@pytest.mark.skipif(gk.backends.why_missing("cpu") is not None, reason="the CPU library is not built")
def test_the_kernel_addresses_nothing_by_a_wrong_plan():
    z, weights, biases, order, counts, _ = network(3, (4, 4, 4), residual=True)
    call = lambda order, counts, residual=False: ops.made_inverse(z, weights, biases, order, counts, residual=residual)  # noqa: E731
    for wrong in ([0, 1, 1], [0, 1, 3], [-1, 0, 1]):
        with pytest.raises(RuntimeError, match="order must be a permutation of 0 to 2"):
            call(torch.tensor(wrong), counts)
    for wrong in ([0, 3, 2, 4], [-1, 1, 2, 4], [0, 1, 2, 5], [0, 1, 2, 3]):
        with pytest.raises(RuntimeError, match="counts must ascend from 0 or more to the number of units"):
            call(order, torch.tensor([wrong] * 3))
    with pytest.raises(RuntimeError, match="a residual block must not add a unit to one of a lower degree"):
        call(order, torch.tensor([[0, 1, 2, 4], [0, 1, 2, 4], [0, 2, 3, 4]]), True)


@pytest.mark.parametrize("backend,method", [("reference", "blocked"), ("auto", "jacobi"), ("auto", "sequential")])
def test_the_plain_passes_refuse_a_wrong_plan_too(backend, method):
    z, weights, biases, order, counts, _ = network(3, (4, 4, 4), residual=True)

    def call(order, counts, residual=False):
        with gk.use_backend(backend):
            ops.made_inverse(z, weights, biases, order, counts, residual=residual, method=method)

    call(order, counts, True)
    for wrong in ([0, 1, 1], [0, 1, 3], [-1, 0, 1]):
        with pytest.raises(ValueError, match=r"order must be a permutation of 0 to 2, got \["):
            call(torch.tensor(wrong), counts)
    for wrong in ([0, 3, 2, 4], [-1, 1, 2, 4], [0, 1, 2, 5], [0, 1, 2, 3]):
        with pytest.raises(ValueError, match="counts must ascend from 0 or more to the number of units"):
            call(order, torch.tensor([wrong] * 3))
    with pytest.raises(ValueError, match="a residual block must not add a unit to one of a lower degree"):
        call(order, torch.tensor([[0, 1, 2, 4], [0, 1, 2, 4], [0, 2, 3, 4]]), True)


def test_a_bias_that_is_missing_is_named():
    z, weights, biases, order, counts, _ = network(3, (4, 4))
    with pytest.raises(TypeError, match=r"made: biases\[1\] must be a torch.Tensor, got None"):
        ops.made_inverse(z, weights, [biases[0], None, biases[2]], order, counts)
