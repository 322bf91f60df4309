"""importance_bound and gaussian_reparameterize on every implementation that runs here, against their definition in fp64
and torch's own formulas."""

import math

import pytest
import torch
from torch.distributions import Normal

from genkernels import ops
from genkernels.reference import importance_bound as reference
from tests.checks import assert_as_accurate, bits, draw, off_address, opcheck_backward, strided

F64, F32, BF16, F16 = DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INF, NAN = math.inf, math.nan
WORK = {F64: F64}
# one sample, rows shorter and longer than a run of lanes and than a program's columns, none
SHAPES = [(1, 1), (5, 3), (40, 16), (9, 50), (3, 523), (2, 4500), (0, 4)]
# [N, K, D]: one number, more columns than a tile, more samples than are added up at once, none of each
GAUSSIANS = [(1, 1, 1), (3, 5, 2), (4, 37, 50), (2, 3, 600), (2, 270, 5), (0, 4, 3), (3, 0, 4), (3, 4, 0)]
LARGE = [(3, 523), (2, 4500), (2, 3, 600), (2, 270, 5)]
OPTIONS = [(prior, stopped) for prior in (True, False) for stopped in (True, False)]

kernels = pytest.mark.implementations(reference=False)
large_once = pytest.mark.implementations(
    when=lambda i, shape, dtype: not i.is_interpreted or shape not in LARGE or dtype == F32
)


def bound_sample(device="cpu", dtype=F64):
    """`(function of tensors, tensors)`; the function returns a tuple of tensors."""
    (log_w,) = draw((3, 5), device=device, dtype=dtype, seed=1)
    return ops.importance_bound, (log_w,)


def gaussian_sample(device="cpu", dtype=F64):
    noise, *parameters = draw((3, 4, 5), (3, 5), (3, 5), device=device, seed=1)

    def function(mean, log_scale):
        return ops.gaussian_reparameterize(noise.to(mean.dtype), mean, log_scale)

    return function, tuple(p.to(dtype) for p in parameters)


SAMPLES = {"importance_bound": bound_sample, "gaussian_reparameterize": gaussian_sample}


def log_weights(shape, dtype=F64, device="cpu", spread=5.0):
    """About −300 nats, as of pictures."""
    (log_w,) = draw(shape, device=device)
    return (spread * log_w - 300).to(dtype)


def plain(noise, mean, log_scale, prior, stopped):
    """The Gaussian's terms by torch's own distributions."""
    z = mean[:, None] + log_scale[:, None].exp() * noise
    at, scale = (t.detach() if stopped else t for t in (mean, log_scale.exp()))
    ratio = -Normal(at[:, None], scale[:, None], validate_args=False).log_prob(z).sum(2)
    return z, ratio + Normal(0, 1, validate_args=False).log_prob(z).sum(2) if prior else ratio


def assert_accurate(name, functions, arguments, sizes=(None, None), **tolerance):
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]
    found = [getattr(functions, name)(*arguments), *(getattr(reference, name)(*given) for given in (arguments, wide))]
    found = [t if isinstance(t, tuple) else (t,) for t in found]
    for *results, size in zip(*found, sizes, strict=False):
        assert_as_accurate(name, *results, size=size, **tolerance)


def summed(by_z, by_ratio, noise, mean, log_scale, prior, stopped):
    """The magnitude of what the gradients add up: theirs where every term has one sign, score and path apart."""
    signs = [None if t is None else sign * t.double().abs() for t, sign in ((by_z, 1), (by_ratio, -1))]
    tensors = *signs, noise.double().abs(), mean.double().abs(), log_scale.double()
    ways = [reference.gaussian_reparameterize_backward(*tensors, prior, way) for way in {False, stopped}]
    return [sum(t.abs().max() if t.numel() else 0.0 for t in some) for some in zip(*ways, strict=True)]


# --------------------------------------------------------------------------------------------------------------- values


@pytest.mark.every_build
@large_once
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bounds_error_is_that_of_the_reference(functions, device, poisoned_memory, shape, dtype):
    log_w = log_weights(shape, dtype, device)
    floor = 8 if dtype == F64 else 0  # where the measure itself adds up, and rounds
    assert_accurate("importance_bound", functions, (log_w,), beside=2, floor=floor)
    weights = log_w.to(WORK.get(dtype, F32)).softmax(1)
    by_bound, by_weights = draw(shape[:1], shape, dtype=weights.dtype, device=device, seed=1)
    for grads in ((by_bound, None), (None, by_weights), (by_bound, by_weights)):
        assert_accurate("importance_bound_backward", functions, (*grads, weights, log_w), beside=2, floor=floor)


@pytest.mark.every_build
@large_once
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", GAUSSIANS, ids=str)
def test_the_gaussians_error_is_that_of_the_reference(implementation, functions, device, poisoned_memory, shape, dtype):
    n, k, d = shape
    noise, mean, log_scale, by_z = draw(shape, (n, d), (n, d), shape, dtype=dtype, device=device)
    (by_ratio,) = draw((n, k), dtype=WORK.get(dtype, F32), device=device, seed=1)
    tensors = noise, mean, log_scale
    z = mean.double()[:, None] + log_scale.double().exp()[:, None] * noise.double()
    terms = (noise.double().square() + z.square()) / 2 + log_scale.double()[:, None].abs()
    largest = terms.sum(2).max() if by_ratio.numel() else 0.0  # of both signs: what is summed, not the sum
    for prior, stopped in OPTIONS[1:3] if implementation.is_interpreted else OPTIONS:
        arguments = (*tensors, prior, stopped)
        assert_accurate("gaussian_reparameterize", functions, arguments, beside=2, sizes=(None, largest))
        for grads in ((by_z, None), (None, by_ratio), (by_z, by_ratio)):
            arguments = (*grads, *tensors, prior, stopped)
            sizes = summed(*arguments)
            assert_accurate("gaussian_reparameterize_backward", functions, arguments, beside=2, sizes=sizes)


def test_is_torchs_own_formula_with_its_gradient(implementation, device):
    log_w = log_weights((7, 50), device=device).requires_grad_()
    bound, weights = ops.importance_bound(log_w)
    torch.testing.assert_close(bound, log_w.logsumexp(1) - math.log(50), rtol=1e-14, atol=0)
    torch.testing.assert_close(weights, log_w.softmax(1), rtol=1e-12, atol=1e-16)
    g, h = draw((7,), (7, 50), device=device, seed=1)
    ours = torch.autograd.grad([bound, weights], log_w, [g, h])
    expected = torch.autograd.grad([log_w.logsumexp(1), log_w.softmax(1)], log_w, [g, h])
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("prior", "stopped"), OPTIONS)
def test_the_gaussian_is_torchs_own_to_second_order(implementation, device, prior, stopped):
    noise, mean, log_scale = draw((3, 4, 6), (3, 6), (3, 6), device=device)
    log_scale /= 4
    found = []
    for function in (ops.gaussian_reparameterize, plain):
        leaves = [t.clone().requires_grad_() for t in (mean, log_scale)]
        z, ratio = function(noise, *leaves, prior=prior, stopped=stopped)
        loss = z.sin().sum() + (ratio.square() * torch.arange(4.0, device=device)).sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(first[0].sin().sum() + first[1].cos().sum(), leaves)
        found.append((z, ratio, *first, *second))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [F64, F32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("k", [1, 5, 50])
def test_one_sample_and_equal_samples_give_the_elbo(implementation, device, k, dtype):
    elbo = log_weights((6, 1), dtype, device)
    bound, weights = ops.importance_bound(elbo.expand(6, k))
    torch.testing.assert_close(bound, elbo[:, 0], rtol=2 * torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / k), rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert k > 1 or torch.equal(bound, elbo[:, 0])


def test_the_mean_bound_is_monotone_in_k(implementation, device):
    log_w = log_weights((60, 64), device=device, spread=2.0)
    means = [ops.importance_bound(log_w.reshape(-1, k))[0].mean().item() for k in (1, 2, 4, 8, 16, 32, 64)]
    assert means == sorted(means) and means[-1] > means[0] + 1  # of nested groups exactly, by Jensen's inequality


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
def test_halves_are_computed_in_fp32(implementation, device, dtype):
    log_w = log_weights((3, 5000), dtype, device, spread=1.0)
    bound, weights = ops.importance_bound(log_w)
    assert bound.dtype == weights.dtype == F32
    torch.testing.assert_close(bound.double(), log_w.double().logsumexp(1) - math.log(5000), rtol=0, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------- the ends


@pytest.mark.parametrize("dtype", [F64, F32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("k", [1, 3, 16, 50, 600])
def test_what_is_not_finite_stays_in_its_row(implementation, device, k, dtype):
    log_w = log_weights((7, k), dtype, device)
    log_w[1], log_w[3, k // 2], log_w[5, k - 1], log_w[6] = -INF, INF, NAN, NAN
    log_w[4, : k - 1] = -INF
    log_w.requires_grad_()
    bound, weights = ops.importance_bound(log_w)
    expected = log_w.detach().logsumexp(1) - math.log(k)
    torch.testing.assert_close(bound.detach(), expected, equal_nan=True)
    assert bound[1] == -INF and bound[3] == INF and bound[5:].isnan().all()
    assert not weights[1].any() and weights[3].isnan().all() and weights[5:].isnan().all()
    torch.testing.assert_close(weights[[0, 2]].sum(1), torch.ones(2, dtype=dtype, device=device))
    assert weights[4, -1] == 1 and not weights[4, :-1].any()
    for output in (bound, weights.square()):
        (grad,) = torch.autograd.grad(output.sum(), log_w, retain_graph=True)
        assert not grad[1].any() and grad[[0, 2, 4]].isfinite().all() and grad[5:].isnan().all()


def test_one_sample_far_below_changes_no_other_row(implementation, device):
    log_w = log_weights((3, 50), F32, device)
    bound, weights = ops.importance_bound(log_w)
    moved = log_w.clone()
    moved[1, 7] -= 1e4
    others = ops.importance_bound(moved)
    assert torch.equal(others[0][::2], bound[::2]) and torch.equal(others[1][::2], weights[::2])
    left = torch.cat([log_w[1, :7], log_w[1, 8:]])[None]
    torch.testing.assert_close(others[0][1], ops.importance_bound(left)[0][0] + math.log(49 / 50), rtol=1e-6, atol=0)
    assert others[1][1, 7] == 0


def test_a_scale_of_nothing_and_one_beyond_all(implementation, device):
    noise, mean = draw((2, 3, 4), (2, 4), dtype=F32, device=device)
    log_scale = torch.tensor([[-200.0], [200.0]], device=device).expand(2, 4)
    z, ratio = ops.gaussian_reparameterize(noise, mean, log_scale)
    torch.testing.assert_close(z[0], mean[0].expand(3, 4))
    assert z[1].isinf().all() and (ratio[1] == -INF).all() and ratio[0].isfinite().all()


# ---------------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.implementations(slow=False)
def test_gradients_to_second_order(implementation, device):
    log_w = log_weights((3, 5), device=device, spread=1.0).requires_grad_()
    noise, *parameters = (t.requires_grad_() for t in draw((2, 3, 4), (2, 4), (2, 4), device=device))
    held = noise.detach()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(ops.importance_bound, log_w)
        for prior in (True, False):
            assert check(lambda *t, p=prior: ops.gaussian_reparameterize(held, *t, prior=p), parameters)
    assert torch.autograd.gradcheck(ops.gaussian_reparameterize, (noise, *parameters))  # by the noise too


def test_only_one_output_is_used(implementation, device):
    noise, *parameters = (t.requires_grad_() for t in draw((2, 3, 4), (2, 4), (2, 4), device=device))
    outputs = ops.gaussian_reparameterize(noise.detach(), *parameters)
    for output, expected in zip(outputs, plain(noise.detach(), *parameters, True, False), strict=True):
        ours, theirs = (
            torch.autograd.grad(o.square().sum(), parameters, retain_graph=True) for o in (output, expected)
        )
        torch.testing.assert_close(ours, theirs)


@kernels
def test_torch_finds_nothing_amiss(functions, device):
    noise, mean, log_scale, log_w, ratio = (
        t.requires_grad_() for t in draw((2, 3, 4), (2, 4), (2, 4), (2, 3), (2, 3), device=device)
    )
    weights, bound = log_w.detach().softmax(1).requires_grad_(), torch.ones(2, dtype=F64, device=device)
    torch.library.opcheck(functions.importance_bound, (log_w,))
    opcheck_backward(functions.importance_bound_backward, (bound, ratio, weights, weights.detach()))
    opcheck_backward(functions.importance_bound_backward, (None, ratio.float(), weights.float(), mean.bfloat16()))
    held = noise.detach()
    torch.library.opcheck(functions.gaussian_reparameterize, (held, mean, log_scale, True, False))
    torch.library.opcheck(functions.gaussian_reparameterize_backward, (noise, ratio, held, mean, log_scale, True, True))


def test_the_torch_operator_refuses_a_gradient_by_the_noise():
    noise, mean, log_scale = draw((2, 3, 4), (2, 4), (2, 4))
    z, _ = torch.ops.genkernels.gaussian_reparameterize(noise.requires_grad_(), mean, log_scale, True, False)
    sentence = "gaussian_reparameterize: the torch operator has no gradient by noise; genkernels.ops"
    with pytest.raises(RuntimeError, match=sentence):
        z.sum().backward()


@pytest.mark.parametrize("stopped", [False, True])
def test_neither_output_hangs_on_the_other(implementation, device, stopped):
    """What weighs the gradient of both (dreg) must weigh it once."""
    noise, *parameters = (t.requires_grad_() for t in draw((2, 3, 4), (2, 4), (2, 4), device=device))
    z, ratio = ops.gaussian_reparameterize(noise.detach(), *parameters, stopped=stopped)
    assert torch.autograd.grad(ratio.sum(), z, allow_unused=True, retain_graph=True) == (None,)
    plainly = torch.autograd.grad(ratio.sum(), parameters, retain_graph=True)
    z.register_hook(lambda g: None if g is None else 0 * g)
    torch.testing.assert_close(torch.autograd.grad(ratio.sum(), parameters), plainly)


# --------------------------------------------------------------------------------------------------------------- memory


@kernels
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_any_stride_gives_the_same_and_inputs_are_left_alone(implementation, device, dtype):
    log_w = log_weights((3, 20), dtype, device)
    tensors = draw((3, 4, 8), (3, 8), (3, 8), dtype=dtype, device=device)
    expected = (*ops.importance_bound(log_w), *ops.gaussian_reparameterize(*tensors))
    for change in (
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: off_address(t, 1),
        lambda t: strided(t, 3, 2),
    ):
        given = [change(t) for t in (log_w, *tensors)]
        before = [t.clone() for t in given]
        found = (*ops.importance_bound(given[0]), *ops.gaussian_reparameterize(*given[1:]))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@kernels
def test_a_gradient_without_memory_of_its_own_is_taken(implementation, device):
    log_w = log_weights((3, 5), F32, device).requires_grad_()
    bound, weights = ops.importance_bound(log_w)
    (bound.sum() + weights.sum()).backward()  # strides of 0 arrive
    torch.testing.assert_close(log_w.grad, weights.detach(), rtol=1e-5, atol=1e-7)
    noise, *parameters = (t.requires_grad_() for t in draw((2, 3, 4), (2, 4), (2, 4), dtype=F32, device=device))
    z, ratio = ops.gaussian_reparameterize(noise.detach(), *parameters)
    ours = torch.autograd.grad(z.sum() + ratio.sum(), parameters)
    z, ratio = plain(noise.detach(), *parameters, True, False)
    torch.testing.assert_close(ours, torch.autograd.grad(z.sum() + ratio.sum(), parameters))


@pytest.mark.threads
@pytest.mark.implementations(reference=False, slow=False)
def test_bitwise_the_same_from_run_to_run_and_for_any_number_of_threads(functions, device):
    log_w = log_weights((70, 1000), F32, device)
    tensors = draw((3, 300, 70), (3, 70), (3, 70), dtype=F32, device=device)

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            bound, weights = functions.importance_bound(log_w)
            z, ratio = functions.gaussian_reparameterize(*tensors, True, True)
            back = functions.gaussian_reparameterize_backward(z, ratio, *tensors, True, True)
            return bound, weights, functions.importance_bound_backward(bound, log_w, weights, weights), z, ratio, *back
        finally:
            torch.set_num_threads(before)

    first = [bits(t) for t in run(1)]
    for threads in (1, 2, 3):
        assert all(torch.equal(a, bits(b)) for a, b in zip(first, run(threads), strict=True))
    alone = functions.importance_bound(log_w[1:2].contiguous())
    assert torch.equal(bits(alone[1]), first[1][1:2])  # nor does a row hang on the others


def test_under_autocast_the_widest_dtype_is_taken(implementation, device):
    noise, mean, log_scale = draw((2, 3, 4), (2, 4), (2, 4), dtype=F32, device=device)
    with torch.autocast(device, dtype=BF16):
        z, ratio = ops.gaussian_reparameterize(noise, mean.bfloat16(), log_scale.bfloat16())
        assert ops.importance_bound(mean.bfloat16())[0].dtype == F32
    assert z.dtype == ratio.dtype == F32


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda e, m: ops.importance_bound(m[:, :0]),
            ValueError,
            r"log_w must be \[N, K\], K of at least 1, got \[2, 0",
        ),
        (lambda e, m: ops.importance_bound(e), ValueError, r"log_w must be \[N, K\], K of at least 1, got \[2, 3, 4\]"),
        (lambda e, m: ops.importance_bound([1.0]), TypeError, "log_w must be a torch.Tensor, got list"),
        (lambda e, m: ops.importance_bound(m.long()), TypeError, "log_w must be float64, .* got torch.int64"),
        (lambda e, m: ops.gaussian_reparameterize(m, m, m), ValueError, r"noise must be \[N, K, D\], got \[2, 4\]"),
        (
            lambda e, m: ops.gaussian_reparameterize(e, m[:1], m),
            ValueError,
            r"mean must be \[N, D\] = \[2, 4\], got \[1, 4\]",
        ),
        (
            lambda e, m: ops.gaussian_reparameterize(e, m, e),
            ValueError,
            r"log_scale must be \[N, D\] = \[2, 4\], got \[2, 3, 4\]",
        ),
        (
            lambda e, m: ops.gaussian_reparameterize(e, m.float(), m),
            TypeError,
            "mean must have the dtype of noise, torch.float64, got torch.float32",
        ),
        (
            lambda e, m: ops.gaussian_reparameterize(e, m, m.to("meta")),
            ValueError,
            "noise and log_scale must be on one device",
        ),
    ],
)
def test_bad_input_gets_one_sentence(call, error, sentence):
    noise, mean = draw((2, 3, 4), (2, 4))
    with pytest.raises(error, match=f"^(importance_bound|gaussian_reparameterize): {sentence}"):
        call(noise, mean)
