"""elementary_flows on every implementation that runs here, against its definition in fp64 and the papers' formulas."""

import functools

import pytest
import torch
import torch.nn.functional as F

from genkernels import ops
from genkernels.reference import elementary_flows as reference
from tests.checks import assert_as_accurate, bits, draw, off_address, strided
from tests.implementations import interpreted_few, slow_few

F64, F32, BF16, F16 = DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
WORK = {F64: F64}
KINDS = ["planar", "radial"]
FLOWS = {"planar": ops.planar_flow, "radial": ops.radial_flow}

# z's shape, K, whether each example has parameters of its own: points, odd sizes, samples of examples, more rows than
# a block or a tile, many features, one of everything
SIZES = [
    ((1, 2), 1, False),
    ((7, 1), 3, False),
    ((700, 2), 16, False),
    ((5, 3, 5), 2, False),
    ((40, 64), 3, False),
    ((35, 3), 4, True),
    ((3, 70, 5), 2, True),
    ((18, 5, 33), 2, True),
    ((2, 600, 2), 1, True),
    ((3, 2, 3), 2, True),
]
FEW = [(size, F32) for size in (SIZES[2], SIZES[4], SIZES[6])] + [(SIZES[5], F64), (SIZES[5], BF16)]
FEWEST = [(SIZES[1], F32), (SIZES[9], F64), (SIZES[9], BF16)]
uninterpreted = pytest.mark.implementations(when=lambda i, **given: not i.is_interpreted)


def inputs(kind, shape, layers, own, dtype=F64, device="cpu", seed=1):
    """z and the parameters: w of length 1 or so, so that a layer turns no rounding error into a large one."""
    lead, features = (shape[:1] if own else ()), shape[-1]
    vector, number = (*lead, layers, features), (*lead, layers)
    shapes = [shape, vector, *([vector, number] if kind == "planar" else [number, number])]
    z, first, *others = draw(*shapes, seed=seed)
    if kind == "planar":
        first, others[0] = first * features**-0.5, others[0] * features**-0.5
    return [t.to(device, dtype) for t in (z, first, *others)]


def sample(kind, device="cpu", dtype=F64):
    """`(function of tensors, tensors)`; the function returns a tuple of tensors."""
    return FLOWS[kind], tuple(inputs(kind, (3, 2), 2, kind == "radial", dtype, device))


SAMPLES = {"elementary_flows": functools.partial(sample, "planar"), "radial_flow": functools.partial(sample, "radial")}


def u_hat(w, u):
    """The paper's û."""
    a = (w * u).sum(-1, keepdim=True)
    return u + (F.softplus(a, threshold=1000) - 1 - a) * w / (w * w).sum(-1, keepdim=True)


def plain(kind, z, *parameters):
    """One set of parameters, as the papers have it."""
    ldj = 0
    for first, second, third in zip(*parameters, strict=True):
        if kind == "planar":
            along = u_hat(first, second)
            h = torch.tanh(z @ first + third)
            ldj = ldj + torch.log(1 + (1 - h**2) * (first @ along))
            z = z + h[..., None] * along
        else:
            alpha = F.softplus(second, threshold=1000)
            beta = F.softplus(third, threshold=1000) - alpha
            h = 1 / (alpha + torch.linalg.vector_norm(z - first, dim=-1))
            ldj = ldj + (z.shape[-1] - 1) * torch.log1p(beta * h) + torch.log1p(beta * alpha * h**2)
            z = z + (beta * h)[..., None] * (z - first)
    return z, ldj


def gradients(function, tensors, **options):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    z, ldj = function(*leaves)
    return torch.autograd.grad(
        (z.double() ** 2).sum() + (ldj.double() * torch.arange(ldj.numel(), device=ldj.device).view(ldj.shape)).sum(),
        leaves,
        **options,
    )


# --------------------------------------------------------------------------------------------------------------- values


@pytest.mark.every_build
@pytest.mark.implementations(when=slow_few([*FEW, *FEWEST], "size", "dtype"))
@pytest.mark.implementations(when=interpreted_few(FEWEST, "size", "dtype"))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_error_is_that_of_the_reference(functions, device, poisoned_memory, kind, size, dtype):
    tensors = inputs(kind, *size, dtype, device)
    by_z, by_ldj = draw(size[0], size[0][:-1], device=device, seed=2)
    grads = by_z.to(dtype), by_ldj.to(WORK.get(dtype, F32))
    calls = [(f"{kind}_flow", tensors)]
    for given in ((grads[0], grads[1]), (None, grads[1]), (grads[0], None)):
        calls.append((f"{kind}_flow_backward", [*given, *tensors]))
    for name, arguments in calls:
        wide = [None if a is None else a.double() for a in arguments]
        ours = getattr(functions, name)(*arguments)
        same, exact = (getattr(reference, name)(*given) for given in (arguments, wide))
        for results in zip(ours, same, exact, strict=True):
            # terms cancel in most results, and some have few numbers; in fp64 the measure rounds as much
            size_of = max(1.0, results[2].abs().max().item())
            assert_as_accurate(name, *results, beside={F64: 256, F32: 16}.get(dtype, 1), size=size_of)


@uninterpreted
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_papers_formula_with_its_gradient(implementation, device, kind):
    tensors = inputs(kind, (9, 3), 3, False, device=device)
    found, expected = FLOWS[kind](*tensors), plain(kind, *tensors)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (gradients(f, tensors) for f in (FLOWS[kind], functools.partial(plain, kind)))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@uninterpreted
@pytest.mark.parametrize("kind", KINDS)
def test_log_determinant_is_that_of_the_jacobian(implementation, device, kind):
    for features, layers in ((1, 4), (2, 16), (5, 3)):
        z, *parameters = inputs(kind, (4, features), layers, False, device=device)
        z = z.requires_grad_()
        out, ldj = FLOWS[kind](z, *parameters)
        rows = [torch.autograd.grad(out[:, i].sum(), z, retain_graph=True)[0] for i in range(features)]
        sign, expected = torch.linalg.slogdet(torch.stack(rows, 1))
        assert (sign > 0).all(), "the constraints make every layer keep its orientation"
        torch.testing.assert_close(ldj, expected, rtol=0, atol=1e-8)


@uninterpreted
@pytest.mark.parametrize("kind", KINDS)
def test_own_parameters_are_those_of_each_example_alone(implementation, device, kind):
    z, *own = inputs(kind, (3, 4, 5), 2, True, device=device)
    found = FLOWS[kind](z, *own)
    for n in range(3):
        alone = FLOWS[kind](z[n], *(p[n] for p in own))
        torch.testing.assert_close((found[0][n], found[1][n]), alone, rtol=1e-13, atol=1e-13)
    first = FLOWS[kind](z[:, 0].contiguous(), *own)
    torch.testing.assert_close(first, (found[0][:, 0], found[1][:, 0]), rtol=1e-13, atol=1e-13)
    shared = [p[0] for p in own]
    samples, flat = FLOWS[kind](z, *shared), FLOWS[kind](z.view(12, 5), *shared)
    torch.testing.assert_close((samples[0].view(12, 5), samples[1].view(12)), flat, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------ the constraints


@pytest.mark.parametrize("length", [1e-3, 1.0, 30.0])
def test_w_times_u_hat_stays_above_minus_one(length):
    w, u = draw((500, 6), (500, 6))
    w = length * F.normalize(w, dim=-1)
    u = (
        torch.linspace(-25, 25, 500, dtype=F64)[:, None] * w / length**2
        + u
        - (u * w).sum(-1, keepdim=True) * w / length**2
    )
    found = reference._planar(w, u)
    product = (w * found.u).sum(-1)
    a = (w * u).sum(-1)
    assert a.min() < -24 and a.max() > 24
    assert (product > -1).all()
    torch.testing.assert_close(product, F.softplus(a, threshold=1000) - 1, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(1 + product, found.soft, rtol=1e-3, atol=1e-13)
    torch.testing.assert_close(found.u, u_hat(w, u), rtol=1e-9, atol=1e-9)


@uninterpreted
@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("length", [1e-30, 1e-3, 1.0, 30.0])
@pytest.mark.parametrize("a", [-1e3, -30.0, 0.0, 30.0])
def test_every_planar_layer_is_increasing_along_w(implementation, device, dtype, length, a):
    """Where softplus vanishes too, and w's square: values and slopes are finite, the determinant is positive."""
    w = torch.tensor([[0.6 * length, 0.8 * length]], dtype=dtype, device=device)
    u = a / length * torch.tensor([[0.6, 0.8]], dtype=dtype, device=device)
    z = torch.linspace(-3, 3, 31, dtype=dtype, device=device)[:, None] * (w / length) / length
    b = torch.zeros(1, dtype=dtype, device=device)
    out, ldj = ops.planar_flow(z, w, u, b)
    assert out.isfinite().all() and ldj.isfinite().all()
    if abs(a) < 100 and length > 1e-9:
        place = (out.double() @ (w / length).double().T).squeeze(1)
        size = place.abs().max().item()
        assert (place.diff() >= -4 * torch.finfo(dtype).eps * max(size, abs(a) / length)).all()
    if length > 1e-9:
        assert all(g.isfinite().all() for g in gradients(ops.planar_flow, (z, w, u, b)))


def test_without_w_there_is_no_constraint(implementation, device):
    z, _, u, b = inputs("planar", (5, 3), 2, False, device=device)
    w = torch.zeros_like(u)
    found = ops.planar_flow(z, w, u, b)
    torch.testing.assert_close(found, (z + (b.tanh()[:, None] * u).sum(0), torch.zeros_like(z[:, 0])))

    def unconstrained(z, w, u, b):
        ldj = 0
        for w_k, u_k, b_k in zip(w, u, b, strict=True):
            h = torch.tanh(z @ w_k + b_k)
            ldj = ldj + torch.log(1 + (1 - h**2) * (w_k @ u_k))
            z = z + h[..., None] * u_k
        return z, ldj

    pair = [gradients(f, (z, w, u, b)) for f in (ops.planar_flow, unconstrained)]
    torch.testing.assert_close(*pair, rtol=1e-11, atol=1e-11)


@uninterpreted
@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("raw", [(-200.0, 0.5), (0.5, -200.0), (0.3, 0.4), (50.0, 50.0)])
def test_radial_at_its_centre_is_finite(implementation, device, dtype, raw):
    center = torch.tensor([[0.5, -1.0, 2.0], [0.5, -1.0, 2.0]], dtype=dtype, device=device)
    z = torch.cat([center[:1], center[:1] + 1e-25, center[:1] + 1.0])
    alpha, beta = (torch.full((2,), value, dtype=dtype, device=device) for value in raw)
    tensors = (z, center, alpha, beta)
    out, ldj = ops.radial_flow(*tensors)
    assert torch.equal(out[0], center[0]) and out.isfinite().all() and ldj.isfinite().all()
    least = torch.finfo(dtype).tiny ** 0.5
    inner, outer = (F.softplus(torch.tensor(value, dtype=F64), threshold=1000).clamp(min=least) for value in raw)
    expected = 2 * 3 * torch.log(outer / inner)  # two layers of stretch outer/inner in all three directions
    torch.testing.assert_close(ldj[0].double().cpu(), expected, rtol=1e-5, atol=1e-5)
    if raw[0] < -100:  # slopes of 1e19 a layer, twice, leave fp32
        return
    found = gradients(ops.radial_flow, tensors)
    assert all(g.isfinite().all() for g in found)
    stretch = torch.autograd.functional.jacobian(
        lambda v: ops.radial_flow(v, *tensors[1:])[0], z[:1].double().to(dtype)
    )
    eye = (outer / inner) ** 2 * torch.eye(3, dtype=F64)
    torch.testing.assert_close(stretch[0, :, 0].double().cpu(), eye, rtol=1e-4, atol=1e-30)


@uninterpreted
def test_far_from_its_centre_a_radial_layer_is_the_identity(implementation, device):
    z = torch.tensor([[1e25, 1.0], [-3e38, 3e38], [1.0, 2.0]], device=device)
    _, center, alpha, beta = inputs("radial", (1, 2), 1, False, F32, device)
    out, ldj = ops.radial_flow(z, center, alpha, beta)
    assert torch.equal(out[:2], z[:2]) and not ldj[:2].any() and ldj[2].item() != 0
    leaves = [t.requires_grad_() for t in (z, center, alpha, beta)]
    out, ldj = ops.radial_flow(*leaves)
    found = torch.autograd.grad(out[:, 1].sum() + ldj.sum(), leaves)
    assert all(g.isfinite().all() for g in found)
    assert torch.equal(found[0][:2], torch.tensor([[0.0, 1.0], [0.0, 1.0]], device=device))


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("kind", KINDS)
def test_near_the_identity_a_small_log_determinant_keeps_its_digits(implementation, device, kind, dtype):
    z, first, *_ = inputs(kind, (50, 4), 1, False, F64, device)
    neutral = torch.log(torch.expm1(torch.ones(1, dtype=F64, device=device)))
    if kind == "planar":  # m is some 1e-3, exactly as it comes from what is rounded here
        first = first / first.norm()
        others = [first * (neutral + 1e-3), torch.zeros_like(neutral)]
    else:
        others = [neutral, neutral + 1e-3]
    tensors = [t.to(dtype) for t in (z, first, *others)]
    ldj = FLOWS[kind](*tensors)[1]
    exact = plain(kind, *(t.double() for t in tensors))[1]
    assert exact.abs().max() < 5e-3
    assert (ldj.double() - exact).abs().max() < 2 * torch.finfo(dtype).eps  # not of 1, a layer's rounded determinant


# ------------------------------------------------------------------------------------------------------------- the ends


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_layers_are_the_identity(implementation, device, kind, own, dtype):
    z, *parameters = inputs(kind, (4, 3, 2), 0, own, dtype, device)
    leaves = [t.requires_grad_() for t in (z, *parameters)]
    out, ldj = FLOWS[kind](*leaves)
    assert torch.equal(out, z) and out.data_ptr() != z.data_ptr()
    assert ldj.shape == (4, 3) and not ldj.any() and ldj.dtype == WORK.get(dtype, F32)
    (by_z,) = torch.autograd.grad(out.sum() + ldj.sum(), leaves[:1])
    assert torch.equal(by_z, torch.ones_like(z))


@uninterpreted
@pytest.mark.parametrize(("shape", "own"), [((0, 2), False), ((0, 2), True), ((3, 0, 2), True), ((3, 0, 2), False)])
@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_give_none_and_gradients_of_zero(implementation, device, kind, shape, own):
    leaves = [t.requires_grad_() for t in inputs(kind, shape, 2, own, F32, device)]
    out, ldj = FLOWS[kind](*leaves)
    assert out.shape == shape and ldj.shape == shape[:-1]
    found = torch.autograd.grad(out.sum() + ldj.sum(), leaves)
    assert all(g.shape == t.shape and not g.any() for g, t in zip(found, leaves, strict=True))


@uninterpreted
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_in_its_row(implementation, device, kind, own, bad):
    z, *parameters = inputs(kind, (20, 5), 3, own, F32, device)
    clean = FLOWS[kind](z, *parameters)
    z[7, 2] = bad
    z.requires_grad_()
    out, ldj = FLOWS[kind](z, *parameters)
    others = torch.arange(20, device=device) != 7
    assert torch.equal(out[others], clean[0][others]) and torch.equal(ldj[others], clean[1][others])
    assert not out[7].isfinite().all() and (bool(ldj[7].isnan()) or bad == float("inf"))
    (by_z,) = torch.autograd.grad(out.sum() + ldj.sum(), z)
    assert by_z[others].isfinite().all() and (by_z[7].isnan().any() or bad == float("inf"))


# ---------------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.implementations(slow=False)
@pytest.mark.parametrize(("shape", "own"), [((3, 2), False), ((2, 2, 3), True), ((2, 2), True)])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_to_second_order(implementation, device, kind, shape, own):
    tensors = [t.requires_grad_() for t in inputs(kind, shape, 2, own, device=device)]
    assert torch.autograd.gradcheck(FLOWS[kind], tensors)
    assert torch.autograd.gradgradcheck(FLOWS[kind], tensors)


@pytest.mark.implementations(reference=False, slow=False)
@pytest.mark.parametrize(("kind", "own"), [("planar", False), ("radial", True)])
def test_torch_finds_nothing_amiss(functions, device, kind, own):
    tensors = [t.requires_grad_() for t in inputs(kind, (3, 2, 2), 2, own, device=device)]
    grads = draw((3, 2, 2), (3, 2), device=device)
    torch.library.opcheck(getattr(functions, f"{kind}_flow"), tensors)
    torch.library.opcheck(getattr(functions, f"{kind}_flow_backward"), (*grads, *tensors))


# --------------------------------------------------------------------------------------------------------------- memory


@uninterpreted
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_stride_gives_the_same_and_inputs_are_left_alone(implementation, device, kind, dtype):
    tensors = inputs(kind, (3, 4, 5), 2, True, dtype, device)
    expected = FLOWS[kind](*tensors)
    for change in (
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: off_address(t, 1),
        lambda t: strided(t, 3, 2),
    ):
        given = [change(t) for t in tensors]
        before = [t.clone() for t in given]
        assert all(torch.equal(a, b) for a, b in zip(FLOWS[kind](*given), expected, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@pytest.mark.threads
@pytest.mark.implementations(reference=False, slow=False)
@pytest.mark.parametrize(("shape", "own"), [((3000, 2), False), ((40, 3, 5), True), ((3, 1300, 2), True)])
@pytest.mark.parametrize("kind", KINDS)
def test_bitwise_the_same_from_run_to_run_and_for_any_number_of_threads(functions, device, kind, shape, own):
    tensors = inputs(kind, shape, 16, own, F32, device)
    grads = draw(shape, shape[:-1], dtype=F32, device=device)

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            backward = getattr(functions, f"{kind}_flow_backward")
            return *getattr(functions, f"{kind}_flow")(*tensors), *backward(*grads, *tensors)
        finally:
            torch.set_num_threads(before)

    first = [bits(t) for t in run(1)]
    for threads in (1, 2, 3):
        assert all(torch.equal(a, bits(b)) for a, b in zip(first, run(threads), strict=True))


@uninterpreted
def test_under_autocast_the_widest_dtype_is_taken(implementation, device):
    z, *parameters = inputs("planar", (3, 2), 2, False, F32, device)
    with torch.autocast(device, dtype=BF16):
        mixed = ops.planar_flow(z.to(BF16), *parameters)
        low = ops.planar_flow(*(t.to(BF16) for t in (z, *parameters)))
    assert mixed[0].dtype == F32 and low[0].dtype == BF16 and low[1].dtype == F32
    assert torch.equal(mixed[0], ops.planar_flow(z.to(BF16).float(), *parameters)[0])


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda z, w, b: ops.planar_flow(z[0], w, w, b), ValueError, r"planar_flow: z must be \[N, D\] or \[N, S, D\]"),
        (lambda z, w, b: ops.radial_flow(z[:, :0], w, b, b), ValueError, r"with D at least 1, got \[4, 0\]"),
        (
            lambda z, w, b: ops.planar_flow(z, w[0], w, b),
            ValueError,
            r"planar_flow: w must be \[K, D\] = \[K, 3\] or \[N, K, D\] = \[4, K, 3\], got \[3\]",
        ),
        (
            lambda z, w, b: ops.radial_flow(z, w[None], b, b),
            ValueError,
            r"radial_flow: center must be .* or \[N, K, D\] = \[4, K, 3\], got \[1, 2, 3\]",
        ),
        (
            lambda z, w, b: ops.planar_flow(z, w, w[:1], b),
            ValueError,
            r"planar_flow: u must be \[K, D\] = \[2, 3\], as w is \[K, D\], got \[1, 3\]",
        ),
        (lambda z, w, b: ops.planar_flow(z, w, w, b[:, None]), ValueError, r"b must be \[K\] = \[2\], as w is"),
        (lambda z, w, b: ops.radial_flow(z, w, b, w), ValueError, r"radial_flow: beta must be \[K\] = \[2\]"),
        (
            lambda z, w, b: ops.radial_flow(z, w.expand(4, 2, 3), b, b),
            ValueError,
            r"radial_flow: alpha must be \[N, K\] = \[4, 2\], as center is \[N, K, D\], got \[2\]",
        ),
        (lambda z, w, b: ops.planar_flow(z, w.float(), w, b), TypeError, "w must have the dtype of z, torch.float64"),
        (lambda z, w, b: ops.planar_flow(z, w, w, 0.5), TypeError, "b must be a torch.Tensor, got float"),
        (lambda z, w, b: ops.planar_flow(z.long(), w, w, b), TypeError, "z must be float64, .* got torch.int64"),
        (lambda z, w, b: ops.planar_flow(z, w.to("meta"), w, b), ValueError, "z and w must be on one device"),
    ],
)
def test_bad_input_gets_one_sentence(call, error, sentence):
    z, w, b = draw((4, 3), (2, 3), (2,))
    with pytest.raises(error, match=sentence) as caught:
        call(z, w, b)
    assert "\n" not in str(caught.value)
