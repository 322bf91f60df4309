"""log_det_series on every implementation that runs here, against its definition in fp64 and against autograd."""

import functools
import itertools
import math

import pytest
import torch

import genkernels as gk
from genkernels import ops
from genkernels._options import Nonlinearity
from genkernels.reference import _block
from tests.checks import assert_as_accurate, bits, pairwise
from tests.ops.blocks import ACTIVATIONS, OF_EACH, SHAPES, block, jacobians, network

F64, F32 = torch.float64, torch.float32
quick = pytest.mark.implementations(slow=False)
FIRST = [name for name, (_, widths, sizes) in SHAPES.items() if len(widths) == 2 and (sizes is None or sizes[1] == 1)]
SMALL = ["mlp", "two maps", "deep", "3-1-3 of 2x2"]
#: What Triton's interpreter and the emulated CUDA kernels take of the shapes.
THIN = ["mlp", "deep", "3-1-3"]
#: What the former takes in a few seconds each.
INTERPRETED = [("mlp", "clipswish"), ("3-1-3", "lipswish")]


def thin(implementation, name, activation, samples):
    if not implementation.is_slow or samples > 1 and (name, activation) in OF_EACH:
        return True
    return samples == 1 and (name, activation) in INTERPRETED if implementation.is_interpreted else name in THIN


def sample(device="cpu", dtype=F64):
    """`(function of tensors, tensors)`; the function returns a tuple of tensors."""
    x, weights, biases, parameters = block("first of each", "clipswish", device=device, dtype=dtype)
    count = len(weights)
    signs = torch.randint(0, 2, (2, *x.shape), generator=torch.Generator().manual_seed(1)) * 2 - 1

    def function(x, *rest):
        weights, biases, parameters = rest[:count], rest[count:-1], rest[-1]
        dtype = torch.promote_types(x.dtype, weights[0].dtype)
        probes = signs.to(x.device, dtype)
        out = ops.log_det_series(
            x, weights, biases, "clipswish", parameters, probes=probes, terms=[1, 1, 2.0], first_term="exact"
        )
        return out.value, out.log_det

    return function, (x, *weights, *biases, parameters)


SAMPLES = {"log_det_series": sample}


def draws(x, probes=2, seed=1):
    drawn = torch.randint(0, 2, (probes, *x.shape), generator=torch.Generator().manual_seed(seed))
    return (2 * drawn - 1).to(x)


def run(x, weights, biases, activation, parameters, weigh=None, **options):
    """Results and gradients by name, every sample of a weight of its own."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, *weights, *biases, parameters)]
    count = len(weights)
    out = ops.log_det_series(
        leaves[0], leaves[1 : 1 + count], leaves[1 + count : -1], activation, leaves[-1], **options
    )
    generator = torch.Generator().manual_seed(2)
    by_value = torch.randn(x.shape, generator=generator, dtype=F64).to(x)
    by_log_det = torch.randn(len(x), generator=generator, dtype=F64).to(out.log_det)
    weigh = weigh or ("value", "log_det")
    loss = sum(
        (getattr(out, name) * g).sum() for name, g in (("value", by_value), ("log_det", by_log_det)) if name in weigh
    )
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    named = {
        f"gradient {i}": torch.zeros_like(t) if g is None else g
        for i, (t, g) in enumerate(zip(leaves, grads, strict=True))
    }
    return {"value": out.value.detach(), "log_det": out.log_det.detach(), "shrink": out.shrink, **named}


# --- the definition -----------------------------------------------------------------------------------------------


@quick
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", SMALL)
def test_each_term_is_the_power_of_the_jacobian(implementation, device, name, activation):
    x, *rest = block(name, activation, device=device)
    weights, biases, parameters = rest
    g = network(weights, biases, activation, parameters)
    j, v = jacobians(g, x), draws(x)
    flat, w = v.flatten(2), v.flatten(2)
    for k in range(1, 5):
        w = torch.einsum("nij,pni->pnj", j, w)
        alone = [0.0] * (k - 1) + [1.0]
        out = ops.log_det_series(x, weights, biases, activation, parameters, probes=v, terms=alone)
        torch.testing.assert_close(out.value, g(x))
        torch.testing.assert_close(out.log_det, (-1) ** (k + 1) / k * (w * flat).sum(2).mean(0))
        torch.testing.assert_close(out.shrink, (w.norm(dim=2) / flat.norm(dim=2)) ** (1 / k))


@quick
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", SMALL)
def test_the_whole_jacobian_gives_the_determinant_and_its_gradient(implementation, device, name, activation):
    x, weights, biases, parameters = block(name, activation, device=device)
    found = run(x, weights, biases, activation, parameters, ("log_det",), probes=None)
    leaves = [t.requires_grad_() for t in (x, *weights, *biases, parameters)]
    j = jacobians(network(weights, biases, activation, parameters), x)
    expected = torch.linalg.slogdet(j + torch.eye(j.shape[1]).to(j))[1]
    torch.testing.assert_close(found["log_det"], expected)
    by = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=F64)  # as `run` draws before
    generator = torch.Generator().manual_seed(2)
    torch.randn(by.shape, generator=generator, dtype=F64)
    each = torch.randn(len(x), generator=generator, dtype=F64).to(x)
    grads = torch.autograd.grad((expected * each).sum(), leaves, allow_unused=True)
    for i, (leaf, grad) in enumerate(zip(leaves, grads, strict=True)):
        torch.testing.assert_close(found[f"gradient {i}"], torch.zeros_like(leaf) if grad is None else grad)


@quick
@pytest.mark.parametrize("first_term", ["probe", "exact"])
@pytest.mark.parametrize("name", ["mlp", "3-1-3 of 2x2"])
def test_over_all_signs_values_and_gradients_are_those_of_the_traces(implementation, device, name, first_term):
    """The mean over all 2^D vectors of signs is the expectation, with nothing left to chance. (Of the image 2^16 would
    be too many: the rows of a Hadamard matrix, which are orthogonal, have the same covariance.)"""
    x, weights, biases, parameters = block(name, "lipswish", samples=3, device=device)
    size = x[0].numel()
    if size == 16:
        signs = torch.ones(1, 1, dtype=F64)
        for _ in range(4):
            signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    else:
        signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=size)), dtype=F64)
    probes = signs.to(device)[:, None].expand(-1, len(x), -1).reshape(-1, *x.shape)
    terms = [1.0, 1.0, 2.0, 4.0]
    found = run(
        x, weights, biases, "lipswish", parameters, ("log_det",), probes=probes, terms=terms, first_term=first_term
    )
    leaves = [t.requires_grad_() for t in (x, *weights, *biases, parameters)]
    j = jacobians(network(weights, biases, "lipswish", parameters), x)
    power, expected = j, 0
    for k, weight in enumerate(terms, start=1):
        expected = expected + (-1) ** (k + 1) / k * weight * power.diagonal(dim1=1, dim2=2).sum(1)
        power = power @ j
    torch.testing.assert_close(found["log_det"], expected)
    generator = torch.Generator().manual_seed(2)
    torch.randn(x.shape, generator=generator, dtype=F64)
    each = torch.randn(len(x), generator=generator, dtype=F64).to(x)
    grads = torch.autograd.grad((expected * each).sum(), leaves, allow_unused=True)
    for i, (leaf, grad) in enumerate(zip(leaves, grads, strict=True)):
        torch.testing.assert_close(found[f"gradient {i}"], torch.zeros_like(leaf) if grad is None else grad)


# --- kernels ------------------------------------------------------------------------------------------------------


@quick
@pytest.mark.every_build
@pytest.mark.parametrize("first_term", ["probe", "exact"])
@pytest.mark.parametrize("terms", [1, 2, 3, 4, 12])
@pytest.mark.parametrize(("features", "probes"), [(1, 1), (1, 3), (2, 1), (2, 3), (3, 1), (3, 2), (16, 2), (17, 2)])
def test_of_few_features_is_right_for_any_number_of_terms(implementation, device, features, probes, terms, first_term):
    """On both sides of where the whole Jacobian costs less than the chain of every term; a sample of NaN keeps to
    itself."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(features), dtype=F64)
    x, weights = draw(5, features), [0.5 * draw(8, features), 0.2 * draw(6, 16), 0.3 * draw(features, 12)]
    biases, parameters, each = [draw(8), draw(6), draw(features)], torch.tensor([0.7, 1.1], dtype=F64), draw(5)
    x, parameters, each, *both = (t.to(device) for t in (x, parameters, each, *weights, *biases))
    coefficients, v = [1 / (k + 1) for k in range(terms)], draws(x, probes)
    leaves = [t.requires_grad_() for t in (x, *both)]
    options = {"probes": v, "terms": coefficients, "first_term": first_term}
    out = ops.log_det_series(x, both[:3], both[3:], "clipswish", parameters, **options)
    grads = torch.autograd.grad((each * out.log_det).sum(), leaves[:4])

    j = jacobians(network(both[:3], both[3:], "clipswish", parameters), x)
    before, power = torch.eye(features).to(j).expand_as(j), j
    expected, known, s = 0, [], torch.zeros_like(v)
    for k, c in enumerate(coefficients, start=1):
        known.append(torch.einsum("pni,nij,pnj->n", v, power, v) / probes)
        if first_term == "exact" and k == 1:
            known[0] = j.diagonal(dim1=1, dim2=2).sum(1)
        else:
            s = s - (-1) ** k * c / probes * torch.einsum("pni,nij->pnj", v, before)
        expected = expected - (-1) ** k * c / k * known[-1]
        before, power = power, power @ j
    torch.testing.assert_close(out.log_det, expected)
    through = torch.einsum("pni,nij,pnj->n", s.detach(), j, v)
    through = through + coefficients[0] * known[0] if first_term == "exact" else through
    torch.testing.assert_close(grads, torch.autograd.grad((each * through).sum(), leaves[:4]))

    broken = x.detach().clone()
    broken[2] = math.nan
    again = ops.log_det_series(broken, both[:3], both[3:], "clipswish", parameters, **options).log_det
    assert again.isnan().tolist() == [False, False, True, False, False]
    torch.testing.assert_close(again[[0, 1, 3, 4]], out.log_det[[0, 1, 3, 4]])


@pytest.mark.implementations(reference=False, when=thin)
@pytest.mark.every_build
@pytest.mark.parametrize(("name", "activation"), pairwise(list(SHAPES), ACTIVATIONS))
@pytest.mark.parametrize("samples", [1, 5])
def test_agrees_with_the_definition(implementation, device, name, activation, samples):
    given = block(name, activation, samples=samples, device=device)
    v = draws(given[0])
    for options in ({"terms": []}, {"terms": [1, 2.0, 3.0]}, {"terms": [1, 1, 1, 2.0, 1], "first_term": "exact"}):
        if options.get("first_term") and name not in FIRST:
            continue
        ours = run(*given[:3], activation, given[3], probes=v, **options)
        with gk.use_backend("reference"):
            expected = run(*given[:3], activation, given[3], probes=v, **options)
        for label, value in expected.items():
            torch.testing.assert_close(ours[label], value, msg=lambda m, label=label: f"{label}: {m}")


@quick
@pytest.mark.implementations(reference=False)
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp", "wide", "3-1-3", "large"])
def test_is_as_accurate_as_the_definition(implementation, device, name, dtype):
    exact = block(name, "lipswish", samples=7, device=device)
    given = [[t.to(dtype) for t in some] if isinstance(some, list) else some.to(dtype) for some in exact]
    again = [[t.to(F64) for t in some] if isinstance(some, list) else some.to(F64) for some in given]
    v = draws(given[0], 1)
    options = {"terms": [1, 1, 1, 1.0], "first_term": "exact" if name in FIRST else "probe"}
    ours = run(*given[:3], "lipswish", given[3], probes=v, **options)
    with gk.use_backend("reference"):
        theirs = run(*given[:3], "lipswish", given[3], probes=v, **options)
        truth = run(*again[:3], "lipswish", again[3], probes=v.to(F64), **options)
    for label, value in truth.items():
        # a parameter's gradient is a sum over all units and samples, of terms of either sign
        beside = 16.0 if value.dim() == 1 and len(value) == len(given[1]) - 1 else 4.0
        assert_as_accurate(label, ours[label], theirs[label], value, beside=beside)


@quick
@pytest.mark.parametrize("name", ["mlp", "3-1-3 of 2x2", "3-1-3"])
def test_samples_are_their_own(implementation, device, name):
    """A sample has the same bits alone as among others, and one that is NaN keeps it to itself."""
    x, weights, biases, parameters = block(name, "lipswish", samples=67, device=device, dtype=F32)
    v = draws(x, 1)
    options = {"terms": [1, 1, 1.0], "first_term": "exact"}
    x[3] = float("nan")
    together = ops.log_det_series(x, weights, biases, "lipswish", parameters, probes=v, **options)
    assert together.log_det[3].isnan() and not together.log_det[:3].isnan().any()
    assert not together.log_det[4:].isnan().any() and not together.value[4:].isnan().any()
    if implementation.name != "cpu":
        return
    for i in (0, 2, 4, 66):
        at = slice(i, i + 1)
        alone = ops.log_det_series(x[at], weights, biases, "lipswish", parameters, probes=v[:, at], **options)
        assert torch.equal(bits(alone.value[0]), bits(together.value[i]))
        assert torch.equal(bits(alone.log_det[0]), bits(together.log_det[i]))


@pytest.mark.implementations(torch_op="log_det_series_keeping")
@pytest.mark.every_build
@pytest.mark.parametrize("samples", [0, 1, 16, 37, 100])
@pytest.mark.parametrize("activation", ["lipswish", "clipswish"])
def test_keeps_arguments_and_their_tangents(functions, activation, samples):
    x, weights, biases, parameters = block("deep", activation, samples=samples)
    v, code = draws(x, 2), Nonlinearity[activation.upper()]
    given = x, weights, biases, parameters, None, v, [1.0, 1.0]
    kept = functions.log_det_series_keeping(*given, code)[4]

    def arguments(x):
        zs = [network(weights[:n], biases[:n], activation, parameters)(x) for n in range(1, len(weights))]
        return torch.cat(zs, 1)

    expected = [arguments(x), *(torch.func.jvp(arguments, (x,), (p,))[1] for p in v)]
    blocks = -(-samples // 16)
    assert kept.shape == (blocks, 3, sum(len(w) for w in weights[:-1]), 16)
    found = kept.permute(1, 0, 3, 2).flatten(1, 2)
    torch.testing.assert_close(found[:, :samples], torch.stack(expected))
    assert not found[:, samples:].any()


@pytest.mark.implementations(torch_op="log_det_series_trace_map")
@pytest.mark.every_build
@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["lipswish", "clipswish"])
@pytest.mark.parametrize("name", ["mlp", "3-1-3", "1-1-1", "large"])
def test_the_map_of_the_trace_is_what_comes_back_to_a_pixel(functions, name, activation, dtype):
    """An impulse of one channel through W3 and W1, at each pixel of an image of 3x3, which has one of each class."""
    _, weights, *_ = block(name, activation, dtype=dtype)
    found = functions.log_det_series_trace_map(weights, Nonlinearity[activation.upper()])
    assert found.dtype == dtype
    twice = 2 if activation == "clipswish" else 1
    first, middle, last = (w.double().reshape(*w.shape[:2], *(w.shape[2:] or (1, 1))) for w in weights)
    first, middle, padding = (
        first.repeat(twice, 1, 1, 1),
        middle.repeat(twice, 1, 1, 1)[..., 0, 0],
        first.shape[-1] // 2,
    )
    for k in range(len(found)):
        impulse = torch.zeros(len(middle), len(middle), 9, dtype=F64)
        impulse[:, :, k] = torch.eye(len(middle))
        passed = torch.nn.functional.conv2d(impulse.unflatten(2, (3, 3)), last, padding=padding)
        back = torch.nn.functional.conv2d(passed, first, padding=padding).flatten(2)[:, :, k]
        torch.testing.assert_close(found[k], (middle * back).to(dtype))


@pytest.mark.implementations(torch_op="log_det_series_trace_map_backward")
@pytest.mark.every_build
@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["lipswish", "clipswish"])
@pytest.mark.parametrize("name", ["mlp", "3-1-3", "1-1-1", "large", "broad"])
def test_the_map_of_the_trace_has_the_gradients_of_its_definition(functions, name, activation, dtype):
    _, weights, *_ = block(name, activation, dtype=dtype)
    number = Nonlinearity[activation.upper()]
    leaves = [w.double().requires_grad_() for w in weights]
    map_of = _block.trace_map(_block.Block(leaves, [], leaves[0], number))
    grad = torch.randn(map_of.shape, generator=torch.Generator().manual_seed(3), dtype=F64).to(dtype)
    expected = torch.autograd.grad(map_of, leaves, grad.double())
    found = functions.log_det_series_trace_map_backward(grad, weights, number)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.to(dtype))


@quick
@pytest.mark.every_build
@pytest.mark.parametrize("samples", [17, 20, 33, 47])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_an_exact_first_term_of_any_number_of_samples(implementation, device, dtype, samples):
    """Of columns that are an odd number of vectors, too."""
    x, weights, biases, parameters = block("mlp", samples=samples, device=device)
    given = [t.to(dtype) for t in (x, *weights, *biases, parameters)]
    options = {"probes": draws(given[0], 1), "terms": [1.0], "first_term": "exact"}
    found = run(given[0], given[1:4], given[4:7], "lipswish", given[7], ("log_det",), **options)
    leaves = [t.requires_grad_() for t in (x, *weights)]
    expected = jacobians(network(weights, biases, "lipswish", parameters), x).diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(found["log_det"], expected.to(dtype))
    generator = torch.Generator().manual_seed(2)  # as `run` draws
    torch.randn(x.shape, generator=generator, dtype=F64)
    each = torch.randn(len(x), generator=generator, dtype=F64).to(x)
    for i, grad in enumerate(torch.autograd.grad((expected * each).sum(), leaves)):
        torch.testing.assert_close(found[f"gradient {i}"], grad.to(dtype))


@quick
def test_no_samples_and_one_pixel(implementation, device):
    for name, size in (("mlp", None), ("3-1-3", None), ("3-3", (1, 1))):
        x, weights, biases, parameters = block(name, "elu", samples=0 if size is None else 2, device=device)
        x = x if size is None else x[:, :, :1, :1].contiguous()
        found = run(x, weights, biases, "elu", parameters, probes=draws(x, 1), terms=[1.0, 1.0])
        with gk.use_backend("reference"):
            expected = run(x, weights, biases, "elu", parameters, probes=draws(x, 1), terms=[1.0, 1.0])
        for label, value in expected.items():
            torch.testing.assert_close(found[label], value)


@quick
def test_a_kept_graph_may_be_gone_through_again(implementation, device):
    function, tensors = sample(device)
    leaves = [t.requires_grad_() for t in tensors]
    value, log_det = function(*leaves)
    loss = value.sum() + log_det.sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@quick
def test_far_out_nothing_overflows(implementation, device):
    """Activations and their derivatives where exponentials overflow and underflow."""
    for activation in ACTIVATIONS:
        x, weights, biases, parameters = block("mlp", activation, device=device, dtype=F32)
        biases = [b * 1e4 for b in biases]
        found = run(x, weights, biases, activation, parameters, probes=draws(x), terms=[1, 1.0])
        with gk.use_backend("reference"):
            expected = run(x, weights, biases, activation, parameters, probes=draws(x), terms=[1, 1.0])
        for label, value in expected.items():
            assert value.isfinite().all(), (activation, label)
            torch.testing.assert_close(found[label], value, rtol=1e-5, atol=2e-6 * float(value.abs().max()))


# --- what it refuses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"activation": "gelu"}, "activation must be one of relu, leaky_relu"),
        ({"terms": [1.0], "probes": None}, "terms and first_term need probes, got None"),
        ({"probes": torch.zeros(1, 4, 4, dtype=F64)}, r"probes must be \[P, 4, 5\]"),
        ({"weights": [torch.zeros(5, 5, dtype=F64)]}, "those of two maps or more, got 1"),
        ({"first_term": "all"}, "first_term must be one of probe, exact"),
        ({"parameters": torch.ones(3, dtype=F64)}, r"parameters must be \[maps - 1\] = \[2\]"),
        ({"x": torch.zeros(4, 6, dtype=F64), "probes": torch.zeros(1, 4, 6, dtype=F64)}, r"weights\[0\] must take 6"),
        ({"x": torch.zeros(4, 5, dtype=F32)}, "must have the dtype of x"),
    ],
)
def test_says_what_is_wrong(change, sentence):
    x, weights, biases, parameters = block("mlp")
    given = {"x": x, "weights": weights, "biases": biases, "activation": "lipswish", "parameters": parameters}
    given |= {"probes": draws(x), "terms": [1.0]} | change
    with pytest.raises((ValueError, TypeError), match=f"log_det_series: .*{sentence}"):
        ops.log_det_series(**given)


def test_says_which_blocks_have_an_exact_first_term_and_how_large_a_jacobian_may_be():
    x, weights, biases, parameters = block("deep")
    with pytest.raises(ValueError, match="first_term 'exact' needs three maps"):
        ops.log_det_series(x, weights, biases, parameters=parameters, probes=draws(x), terms=[1], first_term="exact")
    x, weights, biases, parameters = block("large")
    with pytest.raises(ValueError, match=f"up to 256 features a sample, got {math.prod(x.shape[1:])}"):
        ops.log_det_series(x, weights, biases, parameters=parameters, probes=None)
