"""upfirdn2d on every implementation that runs here, against its definition in fp64 and torch's convolutions."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from genkernels import ops
from genkernels.reference import upfirdn2d as reference
from tests.checks import assert_as_accurate, bits, draw, off_address, pairwise, strided

F64, F32, BF16, F16 = DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FACTORS, LENGTHS = [1, 2, 3, 4], [(1, 1), (4, 4), (2, 5), (12, 3)]
PADDINGS = [(0, 0, 0, 0), (2, 1, 2, 1), (11, 11, 3, 7), (-1, 2, 3, -2)]
CASES = [
    case
    for case in pairwise(FACTORS, FACTORS, LENGTHS, PADDINGS, [False, True])
    if all(
        reference.length_of(n, k, case[0], case[1], *pad) > 0
        for n, k, pad in zip((9, 11), case[2][::-1], (case[3][2:], case[3][:2]), strict=True)
    )
]

kernels = pytest.mark.implementations(reference=False)


def sample(device="cpu", dtype=F64):
    """`(function of tensors, tensors)`; the function returns a tuple of tensors."""
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=F64).to(device, dtype)
    taps = torch.tensor([1, 3, 3, 1], dtype=F64, device=device) / 8
    return lambda x: (ops.upfirdn2d(x, taps, up=2, padding=(2, 1, 2, 1), gain=4.0),), (x,)


SAMPLES = {"upfirdn2d": sample}


def plain(x, filter_x, filter_y, up, down, padding, gain, flip):
    """With zeros and a filter in two dimensions, as it is mostly written down."""
    spread = x.new_zeros(*x.shape[:2], x.shape[2] * up, x.shape[3] * up)
    spread[:, :, ::up, ::up] = x
    kernel = torch.outer(filter_y, filter_x)
    planes = F.pad(spread, padding).flatten(0, 1).unsqueeze(1)
    y = F.conv2d(planes, (kernel if flip else kernel.flip(0, 1))[None, None], stride=down)
    return gain * y.unflatten(0, x.shape[:2]).squeeze(2)


@pytest.mark.parametrize(("up", "down", "lengths", "padding", "flip"), CASES, ids=str)
def test_is_the_convolution_of_an_image_with_zeros_between(implementation, device, up, down, lengths, padding, flip):
    x, *filters = draw((2, 2, 9, 11), *lengths, device=device)
    x.requires_grad_()
    y = ops.upfirdn2d(x, *filters, up=up, down=down, padding=padding, gain=1.5, flip=flip)
    expected = plain(x.detach(), *filters, up, down, padding, 1.5, flip)
    torch.testing.assert_close(y.detach(), expected, rtol=1e-12, atol=1e-12)
    (weights,) = draw(y.shape, device=device, seed=1)
    (by_x,) = torch.autograd.grad((y * weights).sum(), x)
    others = x.detach().clone().requires_grad_()
    spread = reference.upfirdn2d(others, *filters, up, down, padding, 1.5, flip)  # torch's own gradient
    torch.testing.assert_close(by_x, torch.autograd.grad((spread * weights).sum(), others)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("up", [1, 2, 3])
def test_up_sampling_is_a_transposed_convolution(implementation, device, up):
    x, taps = draw((2, 3, 5, 6), (4,), device=device)
    padding = (3, 4 - up, 3, 4 - up)
    kernel = torch.outer(taps, taps).expand(3, 1, 4, 4)
    expected = F.conv_transpose2d(x, kernel, stride=up, groups=3)
    torch.testing.assert_close(ops.upfirdn2d(x, taps, up=up, padding=padding), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.every_build
@pytest.mark.implementations(
    when=lambda i, shape, dtype: not i.is_interpreted or shape != (1, 2, 33, 40) or dtype == F32
)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 33, 40), (3, 2, 17, 5), (0, 2, 4, 4), (2, 0, 4, 4)], ids=str)
def test_error_is_that_of_the_reference(functions, device, poisoned_memory, shape, dtype):
    (x,) = draw(shape, dtype=dtype, device=device)
    taps = (torch.tensor([1.0, 3.0, 3.0, 1.0], device=device) / 8).to(torch.promote_types(dtype, F32))
    for up, down, padding in ((2, 1, [2, 1, 2, 1]), (1, 2, [1, 2, 1, 2]), (1, 1, [2, 1, 2, 1])):
        arguments = (taps, taps, up, down, padding, float(up * up), False)
        ours, same = functions.upfirdn2d(x, *arguments), reference.upfirdn2d(x, *arguments)
        exact = reference.upfirdn2d(x.double(), *(t.double() for t in arguments[:2]), *arguments[2:])
        assert_as_accurate("upfirdn2d", ours, same, exact, beside=2)


def test_a_flat_image_stays_flat_within_its_border(implementation, device):
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device=device) / 8
    x = torch.full((1, 1, 6, 8), 3.0, device=device)
    up = ops.upfirdn2d(x, taps, up=2, padding=(2, 1, 2, 1), gain=4.0)
    assert up.shape == (1, 1, 12, 16) and torch.equal(up[..., 2:-2, 2:-2], torch.full_like(up[..., 2:-2, 2:-2], 3.0))
    down = ops.upfirdn2d(x, taps, down=2, padding=(1, 1, 1, 1))
    assert down.shape == (1, 1, 3, 4) and torch.equal(
        down[..., 1:-1, 1:-1], torch.full_like(down[..., 1:-1, 1:-1], 3.0)
    )


@pytest.mark.implementations(slow=False)
@pytest.mark.parametrize(("up", "down"), itertools.product([1, 2], [1, 2]))
def test_gradients_to_second_order_and_by_filters(implementation, device, up, down):
    x, *filters = (t.requires_grad_() for t in draw((1, 2, 3, 4), (4,), (3,), device=device))

    def function(x, *filters):
        return ops.upfirdn2d(x, *filters, up=up, down=down, padding=(2, 1, 1, 2), gain=1.5).square()

    held = [t.detach() for t in filters]
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x: function(x, *held), x)
        assert check(function, (x, *filters))


def test_the_torch_operator_refuses_a_gradient_by_a_filter():
    x, taps = draw((1, 1, 4, 4), (3,))
    y = torch.ops.genkernels.upfirdn2d(x, taps.requires_grad_(), taps.detach(), 1, 1, [1, 1, 1, 1], 1.0, False)
    with pytest.raises(
        RuntimeError, match="upfirdn2d: the torch operator has no gradient by the filters; genkernels.ops"
    ):
        y.sum().backward()


@kernels
def test_torch_finds_nothing_amiss(functions, device):
    x, taps = draw((2, 2, 5, 6), (4,), device=device)
    torch.library.opcheck(functions.upfirdn2d, (x.requires_grad_(), taps, taps, 2, 1, [2, 1, 2, 1], 4.0, False))


def test_a_nan_reaches_its_neighbours_alone(implementation, device):
    (x,) = draw((2, 2, 8, 9), dtype=F32, device=device)
    x[1, 0, 4, 5] = float("nan")
    y = ops.upfirdn2d(x, torch.ones(3, device=device), padding=(1, 1, 1, 1))
    found = y.isnan().nonzero()
    assert len(found) == 9 and found.amin(0).tolist() == [1, 0, 3, 4] and found.amax(0).tolist() == [1, 0, 5, 6]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_any_stride_gives_the_same_and_inputs_are_left_alone(implementation, device, dtype):
    x, taps = draw((2, 3, 8, 8), (4,), dtype=dtype, device=device)
    expected = ops.upfirdn2d(x, taps, up=2, padding=(2, 1, 2, 1))
    for change in (
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: off_address(t, 1),
        lambda t: strided(t, 3, 2),
    ):
        given = change(x)
        before = given.clone()
        assert torch.equal(ops.upfirdn2d(given, strided(taps, 1, 2), up=2, padding=(2, 1, 2, 1)), expected)
        assert torch.equal(given, before)


@pytest.mark.threads
@pytest.mark.implementations(reference=False, slow=False)
def test_bitwise_the_same_from_run_to_run_and_for_any_number_of_threads(functions, device):
    x, taps = draw((3, 2, 130, 131), (4,), dtype=F32, device=device)

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return functions.upfirdn2d(x, taps, taps, 1, 2, [1, 1, 1, 1], 1.0, False)
        finally:
            torch.set_num_threads(before)

    first = bits(run(1))
    assert all(torch.equal(first, bits(run(threads))) for threads in (1, 2, 3))


def test_under_autocast_it_computes_in_fp32(implementation, device):
    x, taps = draw((1, 2, 6, 6), (4,), dtype=F32, device=device)
    expected = ops.upfirdn2d(x, taps, padding=(2, 1, 2, 1))
    with torch.autocast(device, dtype=BF16):
        assert torch.equal(ops.upfirdn2d(x, taps, padding=(2, 1, 2, 1)), expected)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda x, f: ops.upfirdn2d(x[0], f), ValueError, r"x must be \[N, C, H, W\], got \[2, 5, 6\]"),
        (
            lambda x, f: ops.upfirdn2d(x, f[:0]),
            ValueError,
            r"filter_x must be \[k\] with at least one number, got \[0\]",
        ),
        (lambda x, f: ops.upfirdn2d(x, f, f[None]), ValueError, r"filter_y must be \[k\] .*, got \[1, 3\]"),
        (lambda x, f: ops.upfirdn2d(x, f, up=0), ValueError, "up must be an integer of at least 1, got 0"),
        (lambda x, f: ops.upfirdn2d(x, f, down=1.5), ValueError, "down must be an integer of at least 1, got 1.5"),
        (
            lambda x, f: ops.upfirdn2d(x, f, padding=(1, 1)),
            ValueError,
            r"padding must be four integers, .* got \(1, 1\)",
        ),
        (lambda x, f: ops.upfirdn2d(x, f, padding=1), ValueError, "padding must be four integers, .* got 1"),
        (lambda x, f: ops.upfirdn2d(x, f, gain=float("nan")), ValueError, "gain must be a finite number, got nan"),
        (
            lambda x, f: ops.upfirdn2d(x, f, padding=(-4, 0, 0, 0)),
            ValueError,
            "padded image must be as large as the filters, 3x3, got 5x2",
        ),
        (lambda x, f: ops.upfirdn2d(x, [1, 2]), TypeError, "filter_x must be a torch.Tensor, got list"),
        (lambda x, f: ops.upfirdn2d(x, f.to("meta")), ValueError, "x and filter_x must be on one device"),
    ],
)
def test_bad_input_gets_one_sentence(call, error, sentence):
    with pytest.raises(error, match=f"^upfirdn2d: .*{sentence}"):
        call(*draw((1, 2, 5, 6), (3,)))
