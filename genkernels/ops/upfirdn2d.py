"""Up-sampling by zeros, a separable filter, down-sampling: schema, checks, fake, gradient. The maths is in
`genkernels.reference.upfirdn2d`."""

from __future__ import annotations

import math

from torch import Tensor

from genkernels.ops import _autocast as autocast
from genkernels.ops import _checks as checks
from genkernels.ops._gradients import Formula
from genkernels.ops._operator import DIFFERENTIABLE, KERNEL, Operator
from genkernels.reference import upfirdn2d as reference

NAME = "upfirdn2d"


def upfirdn2d(
    x: Tensor,
    filter_x: Tensor,
    filter_y: Tensor | None = None,
    *,
    up: int = 1,
    down: int = 1,
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    gain: float = 1.0,
    flip: bool = False,
) -> Tensor:
    r"""Spreads an image with zeros, filters it along both axes, and takes every `down`-th number, in one pass.

    Equivalent to::

        spread = torch.zeros(*x.shape[:2], x.shape[2] * up, x.shape[3] * up)
        spread[:, :, ::up, ::up] = x
        kernel = torch.outer(filter_y, filter_x)
        kernel = kernel if flip else kernel.flip(0, 1)
        planes = F.pad(spread, padding).flatten(0, 1).unsqueeze(1)
        y = gain * F.conv2d(planes, kernel[None, None], stride=down).unflatten(0, x.shape[:2]).squeeze(2)

    Its gradient is the same operator with other factors, so that derivatives of every order run by kernels. Nothing is
    compiled at run time on a CPU.

    Args:
        x: ``[N, C, H, W]``, fp64, fp32, bf16 or fp16.
        filter_x: ``[k]``, along W, any of these dtypes; computed in fp32 (fp64 for fp64). Where a filter requires a
            gradient the call runs in plain PyTorch.
        filter_y: ``[k']``, along H; None for `filter_x`.
        up: zeros come between, ``up - 1`` after each number; down: the step between results. 1 or more.
        padding: zeros to the left, right, top and bottom, after up-sampling; negative numbers crop.
        gain: multiplies the result; up² keeps the mean of an image that is up-sampled by a filter that adds up to 1.
        flip: takes the filters as they are, as neural networks' convolutions do, in place of reversing them.

    Returns:
        ``[N, C, H', W']`` of x's dtype, contiguous, ``W' = (W * up + left + right - k) // down + 1``, H' likewise.

    Raises:
        ValueError: a shape, a device or an option is wrong. TypeError: a dtype is. BackendUnavailable: a forced
            backend cannot run.

    Source: Karras et al., "Alias-free generative adversarial networks", 2021.
    """
    filter_y = filter_x if filter_y is None else filter_y
    checks.tensors(NAME, {"x": x, "filter_x": filter_x, "filter_y": filter_y})
    if x.dim() != 4:
        raise ValueError(f"{NAME}: x must be [N, C, H, W], got {list(x.shape)}")
    for label, taps in (("filter_x", filter_x), ("filter_y", filter_y)):
        if taps.dim() != 1 or not len(taps):
            raise ValueError(f"{NAME}: {label} must be [k] with at least one number, got {list(taps.shape)}")
    up, down = checks.integer(NAME, "up", up, 1), checks.integer(NAME, "down", down, 1)
    if not isinstance(padding, tuple | list) or len(padding) != 4 or not all(isinstance(pad, int) for pad in padding):
        raise ValueError(f"{NAME}: padding must be four integers, left, right, top and bottom, got {padding!r}")
    if not isinstance(gain, int | float) or not math.isfinite(gain):
        raise ValueError(f"{NAME}: gain must be a finite number, got {gain!r}")
    sizes = _sizes(x, filter_x, filter_y, up, down, padding)
    if min(sizes) < 1:
        left, right, top, bottom = padding
        taps = f"{len(filter_y)}x{len(filter_x)}"
        got = f"{up * x.shape[2] + top + bottom}x{up * x.shape[3] + left + right}"
        raise ValueError(f"{NAME}: the padded image must be as large as the filters, {taps}, got {got}")
    work = autocast.work_dtype(x)
    filters = filter_x.to(work), filter_y.to(work)
    options = (up, down, list(padding), float(gain), bool(flip))
    if filter_x.requires_grad or filter_y.requires_grad:
        return reference.upfirdn2d(x, *filters, *options)
    return UPFIRDN(x, *filters, *options)


def _sizes(x, filter_x, filter_y, up, down, padding) -> tuple[int, int]:
    """H' and W'."""
    left, right, top, bottom = padding
    height = reference.length_of(x.shape[2], filter_y.shape[0], up, down, top, bottom)
    return height, reference.length_of(x.shape[3], filter_x.shape[0], up, down, left, right)


def _fake(x, filter_x, filter_y, up, down, padding, gain, flip):
    return x.new_empty((*x.shape[:2], *_sizes(x, filter_x, filter_y, up, down, padding)))


def _setup(ctx, inputs, output):
    x, *filters, ctx.up, ctx.down, ctx.padding, ctx.gain, ctx.flip = inputs
    ctx.size = x.shape[2:]
    ctx.save_for_backward(*filters)


def _backward(ctx, grad):
    if any(ctx.needs_input_grad[1:3]):
        raise RuntimeError(f"{NAME}: the torch operator has no gradient by the filters; genkernels.ops.{NAME} has")
    filter_x, filter_y = ctx.saved_tensors
    (height, width), (left, right, top, bottom) = ctx.size, ctx.padding
    along_x = reference.transposed(width, filter_x.shape[0], ctx.up, ctx.down, left, right)
    along_y = reference.transposed(height, filter_y.shape[0], ctx.up, ctx.down, top, bottom)
    options = (ctx.down, ctx.up, [*along_x, *along_y], ctx.gain, not ctx.flip)
    return UPFIRDN.dense(grad, filter_x, filter_y, *options), *[None] * 7


OPERATOR = Operator(
    NAME,
    functions=(upfirdn2d,),
    kernels={"cpu": "", "triton": "", "cuda": "would win nothing: one pass in Triton already moves the fewest bytes"},
    composability=DIFFERENTIABLE | {"double backward": KERNEL},
)
UPFIRDN = OPERATOR.define(
    "upfirdn2d(Tensor x, Tensor filter_x, Tensor filter_y, int up, int down, int[] padding, float gain, bool flip) "
    "-> Tensor",
    reference.upfirdn2d,
    _fake,
    gradient=Formula(_setup, _backward),
)
