"""batch_norm_leaky_relu on every implementation that runs here, against its definition in fp64 and torch's layers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from genkernels import ops
from genkernels.reference import batch_norm_leaky_relu as reference
from tests.checks import assert_as_accurate, bits, draw, off_address, strided

F64, F32, BF16, F16 = DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# vectors, small planes, odd ones, one sample, one channel, channels beyond what is taken at once, none
SHAPES = [
    (70, 3),
    (3, 5, 7),
    (4, 16, 4, 4),
    (2, 3, 9, 13),
    (1, 4, 5),
    (5, 1, 64),
    (3, 2, 150, 151),
    (0, 3, 2),
    (2, 0, 4),
]
SLOPES = [0.0, 0.2, 1.0]

kernels = pytest.mark.implementations(reference=False)


def sample(device="cpu", dtype=F64):
    """`(function of tensors, tensors)`; the function returns a tuple of tensors."""
    generator = torch.Generator().manual_seed(1)
    tensors = (torch.randn(shape, generator=generator, dtype=F64) for shape in ((3, 4, 2, 3), (4,), (4,)))
    return lambda x, w, b: (ops.batch_norm_leaky_relu(x, w, b).y,), tuple(t.to(device, dtype) for t in tensors)


SAMPLES = {"batch_norm_leaky_relu": sample}


def plain(x, weight=None, bias=None, negative_slope=0.0, eps=1e-5):
    return F.leaky_relu(F.batch_norm(x, None, None, weight, bias, True, 0.0, eps), negative_slope)


def inputs(shape, dtype, device):
    """x with a mean that is not small beside its deviation, a gradient, weight and bias."""
    x, grad = draw(shape, shape, dtype=F64, device=device)
    (center,) = draw(shape[1:2], dtype=F64, device=device, seed=2)
    x = (x * 0.7 + 3 * center.view(-1, *[1] * (len(shape) - 2))).to(dtype)
    work = torch.promote_types(dtype, F32)
    return x, grad.to(dtype), *draw(shape[1:2], shape[1:2], dtype=work, device=device, seed=1)


RESULTS = ("y", "mean", "variance", "grad_x", "grad_weight", "grad_bias")


def exact(grad, x, weight, bias, eps, slope):
    """`RESULTS` by numpy in its longest numbers, as fp64 is to be told from fp64 too."""
    axes, ones = (0, *range(2, x.dim())), (-1, *[1] * (x.dim() - 2))
    g, x, gamma, beta = (
        None if t is None else t.detach().cpu().double().numpy().astype(np.longdouble) for t in (grad, x, weight, bias)
    )
    if not x.size:
        nothing = np.zeros(x.shape[1])
        return [torch.from_numpy(t) for t in (np.zeros(x.shape), nothing, nothing, np.zeros(x.shape), nothing, nothing)]
    mean = x.mean(axes)
    variance = np.square(x - mean.reshape(ones)).mean(axes)
    inverse = 1 / np.sqrt(variance + eps).reshape(ones)
    normal = (x - mean.reshape(ones)) * inverse
    gamma = np.ones_like(mean) if gamma is None else gamma
    before = normal * gamma.reshape(ones) + (0 if beta is None else beta.reshape(ones))
    y, g = (np.where(before > 0, t, slope * t) for t in (before, g))
    by_bias, by_weight, n = g.sum(axes), (g * normal).sum(axes), x.size // x.shape[1]
    by_x = gamma.reshape(ones) * inverse * (g - by_bias.reshape(ones) / n - normal * by_weight.reshape(ones) / n)
    return [torch.from_numpy(t.astype(np.float64)) for t in (y, mean, variance, by_x, by_weight, by_bias)]


def _interpreted(shape, dtype):
    """What Triton's interpreter takes, which needs half a minute for what others do at once."""
    return dtype in {(70, 3): (F64,), (3, 2, 150, 151): (F32,), (4, 16, 4, 4): ()}.get(shape, (F32, BF16))


@pytest.mark.every_build
@pytest.mark.implementations(when=lambda i, shape, dtype: not i.is_interpreted or _interpreted(shape, dtype))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_that_of_the_reference(implementation, functions, device, poisoned_memory, shape, dtype):
    x, grad, weight, bias = inputs(shape, dtype, device)
    pairs = ((weight, bias), (None, None), (None, bias))
    few = implementation.is_interpreted
    for slope in SLOPES[1:2] if few else SLOPES:
        for pair in pairs[:1] if few else pairs:
            truth = exact(grad, x, *pair, 1e-5, slope)
            statistics = reference.moments(x)
            forward = (x, *pair, 1e-5, slope)
            backward = (grad, x, *pair, *statistics, 1e-5, slope)
            ours, same = (
                [*f.batch_norm_leaky_relu(*forward), *f.batch_norm_leaky_relu_backward(*backward)]
                for f in (functions, reference)
            )
            summed = grad.double().abs().sum().item()
            for i, (name, values) in enumerate(zip(RESULTS, zip(ours, same, truth, strict=True), strict=True)):
                assert_as_accurate(name, *values, beside=2, size=summed if i > 3 else None)


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 5), (2, 3, 9, 10), (2, 2, 3, 4, 5)], ids=str)
def test_is_torchs_formula_with_its_gradients(implementation, device, shape, slope):
    for count in (1, 3):
        leaves = [t.requires_grad_() for t in draw(shape, shape[1:2], shape[1:2], device=device)][:count]
        ours, theirs = ops.batch_norm_leaky_relu(*leaves, negative_slope=slope), plain(*leaves, negative_slope=slope)
        torch.testing.assert_close(ours.y, theirs, rtol=1e-12, atol=1e-12)
        (weights,) = draw(shape, device=device, seed=2)
        pair = [torch.autograd.grad((y * weights).sum(), leaves) for y in (ours.y, theirs)]
        torch.testing.assert_close(*pair, rtol=1e-11, atol=1e-11)
        variance, mean = torch.var_mean(leaves[0].detach(), [0, *range(2, len(shape))], correction=0)
        torch.testing.assert_close((ours.mean, ours.variance), (mean, variance), rtol=1e-12, atol=1e-12)
        assert not ours.mean.requires_grad and not ours.variance.requires_grad


@pytest.mark.implementations(slow=False)
@pytest.mark.parametrize("slope", SLOPES)
def test_gradients_to_second_order(implementation, device, slope):
    tensors = [t.requires_grad_() for t in draw((3, 2, 4), (2,), (2,), device=device)]
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda *t: ops.batch_norm_leaky_relu(*t, negative_slope=slope).y, tensors)
        assert check(lambda x: ops.batch_norm_leaky_relu(x, negative_slope=slope).y, tensors[:1])


@kernels
def test_torch_finds_nothing_amiss(functions, device):
    x, grad, weight, bias = (t.requires_grad_() for t in draw((3, 4, 5), (3, 4, 5), (4,), (4,), device=device))
    for pair in ((weight, bias), (None, None)):
        torch.library.opcheck(functions.batch_norm_leaky_relu, (x, *pair, 1e-5, 0.2))
        _, *statistics = functions.batch_norm_leaky_relu(x.detach(), None, None, 1e-5, 0.2)
        torch.library.opcheck(functions.batch_norm_leaky_relu_backward, (grad, x, *pair, *statistics, 1e-5, 0.2))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_any_stride_gives_the_same_and_inputs_are_left_alone(implementation, device, dtype):
    x, _, weight, bias = inputs((3, 4, 8), dtype, device)
    expected = ops.batch_norm_leaky_relu(x, weight, bias)
    for change in (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: off_address(t, 1),
        lambda t: strided(t, 3, 2),
    ):
        given = change(x)
        before = given.clone()
        found = ops.batch_norm_leaky_relu(given, strided(weight, 1, 2), strided(bias, 1, 2))
        if implementation.backend == "reference":  # torch's own sums go as the strides do
            torch.testing.assert_close(found.y, expected.y)
        else:
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert torch.equal(given, before)


@pytest.mark.threads
@pytest.mark.implementations(reference=False, slow=False)
@pytest.mark.parametrize("shape", [(300, 7, 6), (3, 5, 40000)], ids=str)
def test_bitwise_the_same_from_run_to_run_and_for_any_number_of_threads(functions, device, shape):
    x, grad, weight, bias = inputs(shape, F32, device)

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            y, *statistics = functions.batch_norm_leaky_relu(x, weight, bias, 1e-5, 0.2)
            given = (grad, x, weight, bias, *statistics, 1e-5, 0.2)
            return y, *statistics, *functions.batch_norm_leaky_relu_backward(*given)
        finally:
            torch.set_num_threads(before)

    first = [bits(t) for t in run(1)]
    for threads in (1, 2, 3):
        assert all(torch.equal(a, bits(b)) for a, b in zip(first, run(threads), strict=True))


def test_a_channel_of_one_number_everywhere_gives_the_bias_and_no_gradient(implementation, device):
    x = torch.full((5, 2, 40), 1 / 3, device=device, dtype=F32).requires_grad_()
    bias = torch.tensor([0.5, -0.5], device=device)
    y, mean, variance = ops.batch_norm_leaky_relu(x, None, bias, negative_slope=0.5)
    torch.testing.assert_close(y[:, 0], torch.full_like(y[:, 0], 0.5), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y[:, 1], torch.full_like(y[:, 1], -0.25), rtol=1e-4, atol=1e-4)
    assert (variance >= 0).all() and variance.max() < 1e-12 and torch.allclose(mean, x[0, :, 0])
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.abs().max() < 1e-2  # 1 / √ε = 316 times a rounding


def test_what_is_not_finite_stays_in_its_channel(implementation, device):
    for value in (float("nan"), float("inf")):
        (x,) = draw((3, 4, 70), dtype=F32, device=device)
        x[1, 2, 69] = value
        y, mean, variance = ops.batch_norm_leaky_relu(x, negative_slope=0.2)
        assert y[:, 2].isnan().all() and variance[2].isnan() and not mean[2].isfinite()
        others = [0, 1, 3]
        clean = ops.batch_norm_leaky_relu(x[:, others], negative_slope=0.2)
        torch.testing.assert_close((y[:, others], mean[others], variance[others]), tuple(clean))


def test_a_mean_a_thousand_deviations_away_costs_no_more_than_rounding(implementation, device):
    (x,) = draw((16, 2, 300), dtype=F32, device=device)
    x = x + 1000
    exact = reference.batch_norm_leaky_relu(x.double(), None, None, 1e-5, 1.0)
    found = ops.batch_norm_leaky_relu(x, negative_slope=1.0)
    torch.testing.assert_close(found.variance.double(), exact[2], rtol=1e-4, atol=0)
    torch.testing.assert_close(found.y.double(), exact[0], rtol=0, atol=1e-3)  # 1000 ε of a mean rounded once, ±


def test_under_autocast_the_output_is_of_xs_dtype(implementation, device):
    x, bias = draw((2, 3, 4), (3,), dtype=BF16, device=device)
    with torch.autocast(device, dtype=BF16):
        for given in (x, x.float()):
            for vector in (bias, bias.float()):
                assert ops.batch_norm_leaky_relu(given, vector, vector).y.dtype == given.dtype


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda x, w: ops.batch_norm_leaky_relu(x[0, 0], w), ValueError, r"x must be \[N, C, \.\.\.\], got \[5\]"),
        (lambda x, w: ops.batch_norm_leaky_relu(x, w[:2]), ValueError, r"weight must be \[C\] = \[4\], got \[2\]"),
        (lambda x, w: ops.batch_norm_leaky_relu(x, None, w[:2]), ValueError, r"bias must be \[C\] = \[4\], got \[2\]"),
        (
            lambda x, w: ops.batch_norm_leaky_relu(x[:1, :, :1], w),
            ValueError,
            r"x must have two numbers a channel or more, got \[1, 4, 1\]",
        ),
        (
            lambda x, w: ops.batch_norm_leaky_relu(x, w.float()),
            TypeError,
            "weight must have the dtype of x, torch.float64, got",
        ),
        (lambda x, w: ops.batch_norm_leaky_relu(x, 1.0), TypeError, "weight must be a torch.Tensor, got float"),
        (lambda x, w: ops.batch_norm_leaky_relu(x, w, w.to("meta")), ValueError, "x and bias must be on one device"),
        (lambda x, w: ops.batch_norm_leaky_relu(x, w, eps=0), ValueError, "eps must be a finite number above 0, got 0"),
        (
            lambda x, w: ops.batch_norm_leaky_relu(x, w, negative_slope=-1),
            ValueError,
            "negative_slope must be a finite .* -1",
        ),
    ],
)
def test_bad_input_gets_one_sentence(call, error, sentence):
    with pytest.raises(error, match=f"^batch_norm_leaky_relu: {sentence}"):
        call(*draw((3, 4, 5), (4,)))
