"""gradient_penalty on every implementation that runs here, against its definition in fp64 and torch's own formulas."""

import pytest
import torch

from genkernels import ops
from genkernels.reference import gradient_penalty as reference
from tests.checks import assert_as_accurate, bits, draw, off_address, strided

F64, F32, BF16, F16 = DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
WORK = {F64: F64}
# one number, points, odd sizes, several dimensions, rows of more than one part or program, none, no numbers
SHAPES = [(1, 1), (300, 2), (7,), (3, 5), (2, 3, 7, 9), (2, 1, 3, 2, 5), (2, 3, 80, 84), (1, 16640), (0, 4), (4, 0)]
TARGETS = [(1.0, False), (1.0, True), (0.1, False), (0.0, False)]

LARGE = [(2, 3, 80, 84), (1, 16640)]

kernels = pytest.mark.implementations(reference=False)


def penalty_sample(device="cpu", dtype=F64):
    """`(function of tensors, tensors)`; the function returns a tuple of tensors."""
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(3, 2, 5, generator=generator, dtype=F64).to(device, dtype)
    return lambda g: (ops.gradient_penalty(g),), (gradient,)


def pairs_sample(device="cpu", dtype=F64):
    generator = torch.Generator().manual_seed(1)
    pairs = tuple(torch.randn(3, 5, generator=generator, dtype=F64).to(device, dtype) for _ in range(2))
    u = torch.rand(3, generator=generator, dtype=F64).to(device)
    return lambda real, fake: (ops.interpolate_pairs(real, fake, u),), pairs


SAMPLES = {"gradient_penalty": penalty_sample, "interpolate_pairs": pairs_sample}


def plain(gradient, target=1.0, one_sided=False):
    """The penalty as it is written down."""
    more = gradient.flatten(1).norm(dim=1) - target
    return (more.clamp(min=0) if one_sided else more).square()


# --------------------------------------------------------------------------------------------------------------- values


@pytest.mark.every_build
@pytest.mark.implementations(when=lambda i, shape, dtype: not i.is_interpreted or shape not in LARGE or dtype == F32)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_that_of_the_reference(functions, device, poisoned_memory, shape, dtype):
    real, fake, grad = draw(shape, shape, shape, dtype=dtype, device=device)
    u, by_value, by_norm = draw(shape[:1], shape[:1], shape[:1], dtype=WORK.get(dtype, F32), device=device, seed=1)
    calls = [("interpolate_pairs", (real, fake, u.sigmoid())), ("interpolate_pairs_backward", (grad, u.sigmoid()))]
    norm = reference.gradient_penalty(grad, 1.0, False)[1]
    for target in TARGETS:
        calls.append(("gradient_penalty", (grad, *target)))
        calls.append(("gradient_penalty_backward", (by_value, None, grad, norm, *target)))
    calls.append(("gradient_penalty_backward", (by_value, by_norm.double(), grad, norm, 1.0, False)))
    calls.append(("gradient_penalty_backward", (None, by_norm.double(), grad, norm, 1.0, False)))
    for name, arguments in calls:
        wide = [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]
        ours = getattr(functions, name)(*arguments)
        same, exact = (getattr(reference, name)(*given) for given in (arguments, wide))
        for results in zip(*((t if isinstance(t, tuple) else (t,)) for t in (ours, same, exact)), strict=True):
            # in fp64 the measure itself adds up, and rounds
            assert_as_accurate(name, *results, beside=2, floor=8 if dtype == F64 else 0)


@pytest.mark.parametrize("n", [1, 2, 64])
@pytest.mark.parametrize("shape", [(6,), (2, 3), (3, 2, 4), (2, 2, 3, 2)], ids=str)
def test_a_linear_critic_costs_its_slope(implementation, device, shape, n):
    slope, real, fake = draw(shape, (n, *shape), (n, *shape), device=device)
    u = torch.rand(n, dtype=F64).to(device)
    x = ops.interpolate_pairs(real, fake, u).requires_grad_()
    along = u.view(-1, *[1] * len(shape))
    torch.testing.assert_close(x.detach(), along * real + (1 - along) * fake)
    gradient = torch.autograd.grad((x * slope).sum(), x)[0]
    expected = (slope.norm() - 1).square().expand(n)
    torch.testing.assert_close(ops.gradient_penalty(gradient), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("target", "one_sided"), TARGETS)
def test_is_the_formula_with_its_gradient(implementation, device, target, one_sided):
    (gradient,) = draw((9, 4, 3), device=device)
    gradient *= torch.linspace(0.05, 0.5, 9, dtype=F64, device=device).view(-1, 1, 1)  # norms on both sides of 1
    ours, theirs = (gradient.clone().requires_grad_() for _ in range(2))
    value, expected = ops.gradient_penalty(ours, target, one_sided), plain(theirs, target, one_sided)
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
    weights = torch.arange(1.0, 10.0, dtype=F64, device=device)
    pair = [torch.autograd.grad((p * weights).sum(), g)[0] for p, g in ((value, ours), (expected, theirs))]
    torch.testing.assert_close(*pair, rtol=1e-13, atol=1e-14)
    assert one_sided == bool((value == 0).any())


def test_without_a_target_the_gradient_is_twice_what_came(implementation, device):
    (gradient,) = draw((3, 50), dtype=F32, device=device)
    gradient[1] = 0
    value = ops.gradient_penalty(gradient.requires_grad_(), 0)
    torch.testing.assert_close(value, gradient.square().sum(1))
    assert torch.equal(torch.autograd.grad(value.sum(), gradient)[0], 2 * gradient)


def test_a_critic_learns_from_it_as_from_the_formula(implementation, device):
    torch.manual_seed(0)
    critic = (
        torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Softplus(), torch.nn.Linear(16, 1)).double().to(device)
    )
    real, fake = draw((8, 6), (8, 6), device=device)
    u = torch.rand(8, dtype=F64).to(device)

    def by(points, penalty):
        x = points.detach().requires_grad_()
        gradient = torch.autograd.grad(critic(x).sum(), x, create_graph=True)[0]
        return torch.autograd.grad(penalty(gradient).mean(), [p for p in critic.parameters() if p.dim() == 2])

    ours = by(ops.interpolate_pairs(real, fake, u), ops.gradient_penalty)
    torch.testing.assert_close(ours, by(fake + u.view(-1, 1) * (real - fake), plain), rtol=1e-11, atol=1e-14)


# ------------------------------------------------------------------------------------------------------------- the ends


@pytest.mark.parametrize(("target", "one_sided"), TARGETS)
def test_at_a_gradient_of_zero_every_derivative_is_finite(implementation, device, target, one_sided):
    gradient = torch.zeros(2, 4, dtype=F64, device=device)
    gradient[1] = 0.7
    gradient.requires_grad_()
    value = ops.gradient_penalty(gradient, target, one_sided)
    assert value[0] == (0 if one_sided else target**2)
    (first,) = torch.autograd.grad(value.sum(), gradient, create_graph=True)
    assert not first[0].any() and first[1].all()
    (second,) = torch.autograd.grad((first * torch.arange(4.0, device=device)).sum(), gradient)
    assert second.isfinite().all()
    expected = 2 * torch.arange(4.0, dtype=F64, device=device) if target == 0 else torch.zeros_like(second[0])
    torch.testing.assert_close(second[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "size"), [(F32, 1e30), (F32, 1e-30), (F16, 6e4), (F16, 6e-8), (F64, 1e150)])
def test_norms_reach_as_far_as_their_dtype(implementation, functions, device, dtype, size):
    (gradient,) = draw((4, 100), dtype=F64)
    gradient = (gradient.sign() * size).to(device, dtype)
    value, norm = functions.gradient_penalty(gradient, 1.0, False)
    exact = gradient.double().abs()[:, 0] * 10
    torch.testing.assert_close(norm, exact, rtol=1e-14, atol=0)
    torch.testing.assert_close(value, (exact - 1).square().to(value.dtype))  # inf where it has no room
    grad = torch.full((4,), 0.25, dtype=value.dtype, device=device)
    by_gradient = functions.gradient_penalty_backward(grad, None, gradient, norm, 1.0, False)
    expected = 0.5 * ((exact - 1) / exact)[:, None] * gradient.double()
    torch.testing.assert_close(by_gradient, expected.to(dtype))
    assert by_gradient.isfinite().all()


def test_what_is_too_small_to_be_divided_by_counts_as_zero(implementation, device):
    gradient = torch.tensor([[2.0**-127, 0.0], [2.0**-126, 0.0]], device=device).requires_grad_()
    value = ops.gradient_penalty(gradient)
    assert torch.equal(value.detach(), torch.ones(2, device=device))
    (by_gradient,) = torch.autograd.grad(value.sum(), gradient)
    assert torch.equal(by_gradient, torch.tensor([[0.0, 0.0], [-2.0, 0.0]], device=device))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("target", "one_sided"), TARGETS)
def test_what_is_not_finite_stays_in_its_sample(implementation, device, target, one_sided, bad):
    (gradient,) = draw((3, 20000), dtype=F32, device=device)
    gradient[1, 17001] = bad
    gradient.requires_grad_()
    value = ops.gradient_penalty(gradient, target, one_sided)
    assert torch.equal(value.isfinite(), torch.tensor([True, False, True], device=device))
    assert bool(value[1].isnan()) == (bad != bad)
    (by_gradient,) = torch.autograd.grad(value.sum(), gradient)
    assert by_gradient[::2].isfinite().all()
    assert bool(by_gradient[1].isnan().any()) == (target != 0 or bad != bad)
    real, fake = (t.clone() for t in gradient.detach().split([1, 2]))
    x = ops.interpolate_pairs(real.expand(2, -1).clone(), fake, torch.tensor([0.0, 1.0], device=device))
    assert torch.equal(x.isfinite().all(1), torch.tensor([False, True], device=device))


# ---------------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.implementations(slow=False)
@pytest.mark.parametrize(("target", "one_sided"), TARGETS)
def test_gradients_to_second_order(implementation, functions, device, target, one_sided):
    (gradient,) = draw((4, 2, 3), device=device)
    gradient.requires_grad_()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda g: functions.gradient_penalty(g, target, one_sided), gradient)  # the norm's gradient too


def test_pairs_gradients_to_second_order(implementation, device):
    tensors = [t.requires_grad_() for t in draw((3, 4), (3, 4), (3,), device=device)]
    assert torch.autograd.gradcheck(ops.interpolate_pairs, tensors)  # by u too
    held = tensors[2].detach()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda real, fake: ops.interpolate_pairs(real, fake, held), tensors[:2])


@kernels
def test_torch_finds_nothing_amiss(functions, device):
    real, fake, u = (t.requires_grad_() for t in draw((3, 5), (3, 5), (3,), device=device))
    norm = real.detach().norm(dim=1)
    grad = torch.ones(3, dtype=F64, device=device)
    torch.library.opcheck(functions.interpolate_pairs, (real, fake, u.detach()))
    torch.library.opcheck(functions.interpolate_pairs_backward, (real, u))
    torch.library.opcheck(functions.gradient_penalty, (real, 1.0, False))
    torch.library.opcheck(functions.gradient_penalty_backward, (grad, None, real, norm, 1.0, True))


def test_the_torch_operator_refuses_a_gradient_by_u():
    real, fake, u = draw((3, 5), (3, 5), (3,))
    x = torch.ops.genkernels.interpolate_pairs(real, fake, u.requires_grad_())
    with pytest.raises(
        RuntimeError, match="interpolate_pairs: the torch operator has no gradient by u; genkernels.ops"
    ):
        x.sum().backward()


# --------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_any_stride_gives_the_same_and_inputs_are_left_alone(implementation, device, dtype):
    real, fake = draw((3, 4, 8), (3, 4, 8), dtype=dtype, device=device)
    u = torch.rand(3).to(device)
    x, value = ops.interpolate_pairs(real, fake, u), ops.gradient_penalty(real)
    for change in (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: off_address(t, 1),
        lambda t: strided(t, 3, 2),
    ):
        given = [change(t) for t in (real, fake)]
        before = [t.clone() for t in given]
        assert torch.equal(ops.interpolate_pairs(*given, u), x)
        assert torch.equal(ops.gradient_penalty(given[0]), value)
        assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    one = real[:1].expand(3, -1, -1)
    assert torch.equal(ops.interpolate_pairs(one, fake, u), ops.interpolate_pairs(one.contiguous(), fake, u))


@kernels
def test_a_gradient_without_memory_of_its_own_is_taken(implementation, device):
    real, fake = (t.requires_grad_() for t in draw((3, 5), (3, 5), dtype=F32, device=device))
    u = torch.rand(3).to(device)
    ops.interpolate_pairs(real, fake, u).sum().backward()  # strides of 0 arrive
    torch.testing.assert_close(real.grad, u[:, None].expand(3, 5))
    torch.testing.assert_close(fake.grad, (1 - u)[:, None].expand(3, 5))


@pytest.mark.threads
@pytest.mark.implementations(reference=False, slow=False)
def test_bitwise_the_same_from_run_to_run_and_for_any_number_of_threads(functions, device):
    (gradient,) = draw((3, 50000), dtype=F32, device=device)

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            value, norm = functions.gradient_penalty(gradient, 1.0, False)
            return value, norm, functions.gradient_penalty_backward(value, None, gradient, norm, 1.0, False)
        finally:
            torch.set_num_threads(before)

    first = [bits(t) for t in run(1)]
    for threads in (1, 2, 3):
        assert all(torch.equal(a, bits(b)) for a, b in zip(first, run(threads), strict=True))
    alone = functions.gradient_penalty(gradient[1:2].contiguous(), 1.0, False)
    assert torch.equal(bits(alone[0]), first[0][1:2])  # nor does a sample hang on the others


def test_under_autocast_the_norm_is_in_fp32(implementation, device):
    (gradient,) = draw((3, 40), dtype=BF16, device=device)
    with torch.autocast(device, dtype=BF16):
        assert ops.gradient_penalty(gradient).dtype == F32
        x = ops.interpolate_pairs(gradient.float(), gradient, torch.zeros(3, device=device))
    assert x.dtype == F32 and torch.equal(x, gradient.float())


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda x, u: ops.interpolate_pairs(x, x[:2], u),
            ValueError,
            r"fake must be \[N, \.\.\.\] = \[3, 5\], got \[2, 5\]",
        ),
        (lambda x, u: ops.interpolate_pairs(x, x, u[:1]), ValueError, r"u must be \[N\] = \[3\], got \[1\]"),
        (lambda x, u: ops.interpolate_pairs(x, x, u[:, None]), ValueError, r"u must be \[N\] = \[3\], got \[3, 1\]"),
        (lambda x, u: ops.interpolate_pairs(x.sum(), x.sum(), u), ValueError, r"real must be \[N, \.\.\.\], got \[\]"),
        (
            lambda x, u: ops.interpolate_pairs(x, x.float(), u),
            TypeError,
            "fake must have the dtype of real, torch.float64",
        ),
        (lambda x, u: ops.interpolate_pairs(x, x, 0.5), TypeError, "u must be a torch.Tensor, got float"),
        (lambda x, u: ops.interpolate_pairs(x.long(), x, u), TypeError, "real must be float64, .* got torch.int64"),
        (lambda x, u: ops.interpolate_pairs(x, x.to("meta"), u), ValueError, "real and fake must be on one device"),
        (lambda x, u: ops.gradient_penalty(x.sum()), ValueError, r"gradient must be \[N, \.\.\.\], got \[\]"),
        (lambda x, u: ops.gradient_penalty(x, -1.0), ValueError, "target must be a finite number, 0 or more, got -1.0"),
        (lambda x, u: ops.gradient_penalty(x, float("nan")), ValueError, "target must be a finite number, .* got nan"),
        (lambda x, u: ops.gradient_penalty(x, True), ValueError, "target must be a finite number, 0 or more, got True"),
        (lambda x, u: ops.gradient_penalty(x, 1.0, "no"), ValueError, "one_sided must be True or False, got 'no'"),
        (lambda x, u: ops.gradient_penalty(x, "1"), ValueError, "target must be a finite number, 0 or more, got '1'"),
    ],
)
def test_bad_input_gets_one_sentence(call, error, sentence):
    x, u = draw((3, 5), (3,))
    with pytest.raises(error, match=f"^(interpolate_pairs|gradient_penalty): {sentence}"):
        call(x, u)
