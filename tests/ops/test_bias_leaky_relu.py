"""bias_leaky_relu on every implementation that runs here, against its definition in fp64 and torch's own formula."""

import math

import pytest
import torch
import torch.nn.functional as F

from genkernels import ops
from genkernels.reference import bias_leaky_relu as reference
from tests.checks import assert_as_accurate, bits, draw, off_address, strided

F64, F32, BF16, F16 = DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# vectors, small planes and large ones, of odd sizes and of whole vectors, one number, one channel, none
SHAPES = [(1, 1), (70, 3), (3, 5, 7), (4, 16, 4, 4), (2, 3, 9, 13), (2, 2, 130, 131), (5, 1, 64), (0, 3, 2), (2, 0, 4)]
OPTIONS = [(0.2, math.sqrt(2), math.inf), (0.0, 1.0, 0.5), (0.1, 3.0, 2.0)]

kernels = pytest.mark.implementations(reference=False)


def sample(device="cpu", dtype=F64):
    """`(function of tensors, tensors)`; the function returns a tuple of tensors."""
    generator = torch.Generator().manual_seed(1)
    tensors = (torch.randn(shape, generator=generator, dtype=F64) for shape in ((3, 4, 2, 3), (4,)))
    return lambda x, bias: (ops.bias_leaky_relu(x, bias),), tuple(t.to(device, dtype) for t in tensors)


SAMPLES = {"bias_leaky_relu": sample}


def plain(x, bias=None, negative_slope=0.2, gain=2**0.5, clamp=None):
    a = x if bias is None else x + bias.view(-1, *[1] * (x.dim() - 2))
    y = gain * F.leaky_relu(a, negative_slope)
    return y if clamp is None else y.clamp(-clamp, clamp)


@pytest.mark.every_build
@pytest.mark.implementations(
    when=lambda i, shape, dtype: not i.is_interpreted or shape != (2, 2, 130, 131) or dtype == F32
)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_that_of_the_reference(functions, device, poisoned_memory, shape, dtype):
    x, grad = draw(shape, shape, dtype=dtype, device=device)
    (bias,) = draw(shape[1:2], dtype=torch.promote_types(dtype, F32), device=device, seed=1)
    for options in OPTIONS:
        calls = [("bias_leaky_relu", (x, b, *options)) for b in (bias, None)]
        y = reference.bias_leaky_relu(x, bias, *options)
        calls += [("bias_leaky_relu_backward", (grad, y, with_bias, *options)) for with_bias in (True, False)]
        for name, arguments in calls:
            wide = [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]
            ours = getattr(functions, name)(*arguments)
            same, exact = (getattr(reference, name)(*given) for given in (arguments, wide))
            for results in zip(*((t if isinstance(t, tuple) else (t,)) for t in (ours, same, exact)), strict=True):
                summed = results[0].shape == bias.shape != shape and name.endswith("backward")
                size = grad.double().abs().sum().item() if summed else None
                assert_as_accurate(name, *results, beside=2, size=size)


@pytest.mark.parametrize("clamp", [None, 1.5])
@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 5), (2, 3, 9, 10)], ids=str)
def test_is_torchs_formula_with_its_gradients(implementation, device, shape, clamp):
    for with_bias in (True, False):
        leaves = [t.requires_grad_() for t in draw(shape, shape[1:2], device=device)][: 1 + with_bias]
        ours, theirs = (function(*leaves, clamp=clamp) for function in (ops.bias_leaky_relu, plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)
        (weights,) = draw(shape, device=device, seed=2)
        pair = [torch.autograd.grad((y * weights).sum(), leaves) for y in (ours, theirs)]
        torch.testing.assert_close(*pair, rtol=1e-13, atol=1e-13)


@pytest.mark.implementations(slow=False)
@pytest.mark.parametrize("clamp", [None, 1.5])
def test_gradients_to_second_order(implementation, device, clamp):
    tensors = [t.requires_grad_() for t in draw((3, 2, 4), (2,), device=device)]
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x, bias: ops.bias_leaky_relu(x, bias, clamp=clamp), tensors)
        assert check(lambda x: ops.bias_leaky_relu(x, clamp=clamp), tensors[:1])


def test_a_penalty_on_the_gradient_trains_as_by_torch(implementation, device):
    """What a critic's R1 asks of it: the mixed second derivatives by x, by weights before it, and by the bias."""
    x, weight, bias = (t.requires_grad_() for t in draw((5, 3, 4), (6, 3, 1), (6,), device=device))

    def by(function):
        score = function(F.conv1d(x, weight), bias).square().sum()  # curved, or the bias would get nothing
        gradient = torch.autograd.grad(score, x, create_graph=True)[0]
        return torch.autograd.grad(gradient.square().sum(), [x, weight, bias])

    torch.testing.assert_close(by(ops.bias_leaky_relu), by(plain), rtol=1e-11, atol=1e-12)


def test_what_is_clamped_has_no_gradient_and_infinity_has_its_own(implementation, device):
    x = torch.tensor([[-float("inf"), -9.0, -1.0, 0.0, 1.0, 2.0, float("inf")]], device=device).requires_grad_()
    for clamp, expected in ((None, [0.5, 0.5, 0.5, 0.5, 1, 1, 1]), (2.0, [0, 0, 0.5, 0.5, 1, 0, 0])):
        y = ops.bias_leaky_relu(x, negative_slope=0.5, gain=1.0, clamp=clamp)
        assert torch.equal(y.detach(), plain(x.detach(), None, 0.5, 1.0, clamp))
        assert torch.autograd.grad(y.sum(), x)[0].tolist() == [expected]


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
def test_a_clamp_that_its_dtype_does_not_hold_is_rounded_to_it(implementation, device, dtype):
    x = torch.tensor([[-3.0, 0.25, 3.0]], device=device, dtype=dtype).requires_grad_()
    y = ops.bias_leaky_relu(x, negative_slope=1.0, gain=1.0, clamp=0.7)
    assert torch.equal(y.detach(), torch.tensor([[-0.7, 0.25, 0.7]], device=device).to(dtype))
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [[0, 1, 0]]


def test_a_nan_stays_where_it_is(implementation, device):
    (x,) = draw((2, 3, 70), dtype=F32, device=device)
    x[1, 2, 69] = float("nan")
    for clamp in (None, 0.5):
        y = ops.bias_leaky_relu(x, torch.zeros(3, device=device), clamp=clamp)
        assert y[1, 2, 69].isnan() and y.isnan().sum() == 1


@kernels
def test_torch_finds_nothing_amiss(functions, device):
    x, grad, bias = (t.requires_grad_() for t in draw((3, 4, 5), (3, 4, 5), (4,), device=device))
    torch.library.opcheck(functions.bias_leaky_relu, (x, bias, *OPTIONS[0]))
    torch.library.opcheck(functions.bias_leaky_relu, (x, None, *OPTIONS[2]))
    y = functions.bias_leaky_relu(x, bias, *OPTIONS[0]).detach()
    torch.library.opcheck(functions.bias_leaky_relu_backward, (grad, y, True, *OPTIONS[0]))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_any_stride_gives_the_same_and_inputs_are_left_alone(implementation, device, dtype):
    (x,) = draw((3, 4, 8), dtype=dtype, device=device)
    (bias,) = draw((4,), dtype=F32, device=device, seed=1)
    expected = ops.bias_leaky_relu(x, bias)
    for change in (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: off_address(t, 1),
        lambda t: strided(t, 3, 2),
    ):
        given = change(x)
        before = given.clone()
        assert torch.equal(ops.bias_leaky_relu(given, strided(bias, 1, 2)), expected)
        assert torch.equal(given, before)


@pytest.mark.threads
@pytest.mark.implementations(reference=False, slow=False)
@pytest.mark.parametrize("shape", [(3, 5, 20000), (300, 700)], ids=str)
def test_bitwise_the_same_from_run_to_run_and_for_any_number_of_threads(functions, device, shape):
    x, grad = draw(shape, shape, dtype=F32, device=device)

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            y = functions.bias_leaky_relu(x, None, *OPTIONS[0])
            return y, *functions.bias_leaky_relu_backward(grad, y, True, *OPTIONS[0])
        finally:
            torch.set_num_threads(before)

    first = [bits(t) for t in run(1)]
    for threads in (1, 2, 3):
        assert all(torch.equal(a, bits(b)) for a, b in zip(first, run(threads), strict=True))


def test_under_autocast_the_output_is_of_xs_dtype(implementation, device):
    x, bias = draw((2, 3, 4), (3,), dtype=BF16, device=device)
    with torch.autocast(device, dtype=BF16):
        for given in (x, x.float()):
            assert ops.bias_leaky_relu(given, bias.float()).dtype == given.dtype
            assert ops.bias_leaky_relu(given, bias).dtype == given.dtype


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda x, b: ops.bias_leaky_relu(x[0, 0], b), ValueError, r"x must be \[N, C, \.\.\.\], got \[5\]"),
        (lambda x, b: ops.bias_leaky_relu(x, b[:2]), ValueError, r"bias must be \[C\] = \[4\], got \[2\]"),
        (
            lambda x, b: ops.bias_leaky_relu(x, b.float()),
            TypeError,
            "bias must have the dtype of x, torch.float64, got",
        ),
        (
            lambda x, b: ops.bias_leaky_relu(x.float(), b.half()),
            TypeError,
            "bias must have the dtype of x, torch.float32",
        ),
        (lambda x, b: ops.bias_leaky_relu(x, 1.0), TypeError, "bias must be a torch.Tensor, got float"),
        (lambda x, b: ops.bias_leaky_relu(x, b.to("meta")), ValueError, "x and bias must be on one device"),
        (lambda x, b: ops.bias_leaky_relu(x, b, gain=0), ValueError, "gain must be a finite number above 0, got 0"),
        (
            lambda x, b: ops.bias_leaky_relu(x, b, clamp=-1),
            ValueError,
            "clamp must be a finite number above 0, or None",
        ),
        (
            lambda x, b: ops.bias_leaky_relu(x, b, negative_slope=-1),
            ValueError,
            "negative_slope must be a finite .* -1",
        ),
    ],
)
def test_bad_input_gets_one_sentence(call, error, sentence):
    with pytest.raises(error, match=f"^bias_leaky_relu: {sentence}"):
        call(*draw((3, 4, 5), (4,)))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_what_underflows_has_the_slope_of_0_by_every_implementation(implementation, device, dtype):
    """As y alone is kept, and says 0; the definition's gradient is the same."""
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the least number above 0
    x = torch.tensor([[tiny, -tiny, 0.0, 1.0]], dtype=dtype, device=device).requires_grad_()
    for function in (
        ops.bias_leaky_relu,
        lambda *a, negative_slope, gain: reference.bias_leaky_relu(*a, negative_slope, gain, math.inf),
    ):
        y = function(x, None, negative_slope=0.5, gain=0.25)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert y[0, :3].tolist() == [0.0] * 3
        assert gradient.tolist() == [[0.125, 0.125, 0.125, 0.25]]
