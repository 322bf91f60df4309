r"""Up-sampling by zeros, a separable filter and down-sampling on the GPU: one pass.

.. math:: y_{ab} = \gamma \sum_{ij} h^y_i h^x_j\, \tilde x_{a d + i - p_0,\ b d + j - q_0}

Karras et al. 2021; `genkernels.reference.upfirdn2d` has the indices, and says why this is its own gradient.

A program takes a tile of PLANES planes by PIXELS results: several small planes, or a part of a large one. A result
begins at the first tap that meets a number, not a zero between, and goes on in steps of `up` taps, TAPS_Y by TAPS_X of
them. Both filters are applied at once: what neighbours share of the numbers they read again from the first cache, which
a pass between the two would pay for with a write and a read of memory.

Offsets are 64-bit; within a plane results are divided in 32 bits where it has fewer than 2^31 of them. Bytes: reads x
and writes y. Arithmetic in fp32 (fp64 for fp64), rounded once at the store.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from genkernels.triton import _math
from genkernels.triton._recording import SampleCalls, meta

TILE = 512  # four results a thread: beyond, a filter of 12 taps takes more registers than there are

SIZES = ("planes", "height", "width", "pixels", "results_x", "blocks", "from_y", "from_x", "lift_y", "lift_x")


@triton.jit
def _first(b_result, start, lift, UP: tl.constexpr, DOWN: tl.constexpr):
    """The first tap of a result that meets a number, and which: `start` is -padding plus UP * lift, 0 or more."""
    b_place = b_result * DOWN + start
    b_tap = (UP - b_place % UP) % UP
    return b_tap, (b_place + b_tap) // UP - lift


@triton.jit
def _weight(p_filter, b_tap, m, LENGTH: tl.constexpr, FLIP: tl.constexpr):
    return tl.load(p_filter + (b_tap if FLIP else LENGTH - 1 - b_tap).to(tl.int64), m, other=0.0)


@triton.jit(do_not_specialize=SIZES)
def _filter_kernel(
    p_x,
    p_filter_x,
    p_filter_y,
    p_y,
    planes,
    height,
    width,
    pixels,
    results_x,
    blocks,
    from_y,
    from_x,
    lift_y,
    lift_x,
    UP: tl.constexpr,
    DOWN: tl.constexpr,
    LENGTH_Y: tl.constexpr,
    LENGTH_X: tl.constexpr,
    TAPS_Y: tl.constexpr,
    TAPS_X: tl.constexpr,
    GAIN: tl.constexpr,
    FLIP: tl.constexpr,
    PLANES: tl.constexpr,
    PIXELS: tl.constexpr,
):
    pid = tl.program_id(0)  # 32 bits wide in hardware, and cheaper to divide so
    o_plane = (pid // blocks).to(tl.int64) * PLANES + tl.arange(0, PLANES)
    o_pixel = (pid % blocks).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    m_pixel, m_plane = o_pixel < pixels, o_plane < planes
    b_pixel = o_pixel.to(pixels.dtype)
    b_row = b_pixel // results_x
    b_tap_y, b_y = _first(b_row, from_y, lift_y, UP, DOWN)
    b_tap_x, b_x = _first(b_pixel - b_row * results_x, from_x, lift_x, UP, DOWN)
    o_first = o_plane * (height.to(tl.int64) * width)
    b_sum = tl.zeros((PLANES, PIXELS), p_filter_x.dtype.element_ty)
    for _ in range(TAPS_Y):
        m_y = m_pixel & (b_tap_y < LENGTH_Y) & (b_y >= 0) & (b_y < height)
        o_row = b_y.to(tl.int64) * width
        b_along = tl.zeros((PLANES, PIXELS), p_filter_x.dtype.element_ty)
        for j in tl.static_range(TAPS_X):
            m = m_y & (b_tap_x + j * UP < LENGTH_X) & (b_x + j >= 0) & (b_x + j < width)
            o = o_first[:, None] + (o_row + (b_x + j).to(tl.int64))[None, :]
            b_value = _math.widened(tl.load(p_x + o, m_plane[:, None] & m[None, :], other=0.0))
            b_along += _weight(p_filter_x, b_tap_x + j * UP, m, LENGTH_X, FLIP)[None, :] * b_value
        b_sum += _weight(p_filter_y, b_tap_y, m_y, LENGTH_Y, FLIP)[None, :] * b_along
        b_tap_y += UP
        b_y += 1
    o = (o_plane * pixels)[:, None] + o_pixel[None, :]
    tl.store(p_y + o, (GAIN * b_sum).to(p_y.dtype.element_ty), m_plane[:, None] & m_pixel[None, :])


def _start(padding: int, up: int) -> tuple[int, int]:
    """`_first`'s start and lift."""
    lift = max(0, triton.cdiv(padding, up))
    return lift * up - padding, lift


def upfirdn2d(
    x: Tensor, filter_x: Tensor, filter_y: Tensor, up: int, down: int, padding: list[int], gain: float, flip: bool
) -> Tensor:
    """Contiguous tensors on one GPU; the caller has checked them."""
    samples, channels, height, width = x.shape
    left, right, top, bottom = padding
    length_x, length_y = filter_x.shape[0], filter_y.shape[0]
    results_y = (height * up + top + bottom - length_y) // down + 1
    results_x = (width * up + left + right - length_x) // down + 1
    y = x.new_empty(samples, channels, results_y, results_x)
    if y.numel() == 0:
        return y
    planes, pixels = samples * channels, results_y * results_x
    cols = min(triton.next_power_of_2(pixels), TILE)
    blocks = triton.cdiv(pixels, cols)
    (from_y, lift_y), (from_x, lift_x) = _start(top, up), _start(left, up)
    with torch.cuda.device_of(x):
        _filter_kernel[(triton.cdiv(planes, TILE // cols) * blocks,)](
            x,
            filter_x,
            filter_y,
            y,
            planes,
            height,
            width,
            pixels,
            results_x,
            blocks,
            from_y,
            from_x,
            lift_y,
            lift_x,
            UP=up,
            DOWN=down,
            LENGTH_Y=length_y,
            LENGTH_X=length_x,
            TAPS_Y=triton.cdiv(length_y, up),
            TAPS_X=triton.cdiv(length_x, up),
            GAIN=float(gain),
            FLIP=bool(flip),
            PLANES=TILE // cols,
            PIXELS=cols,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return y


def sample_calls() -> SampleCalls:
    """Up, down and neither, by filters of 4 and of 12 taps, of small planes and of large ones."""
    calls = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        taps = {k: meta(k, dtype=torch.promote_types(dtype, torch.float32)) for k in (4, 12)}
        for shape in ((16, 64, 8, 8), (16, 64, 128, 128)):
            x = meta(*shape, dtype=dtype)
            label = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
            for k, up, down, padding, flip in (
                (4, 2, 1, (2, 1, 2, 1), False),
                (4, 1, 2, (1, 1, 1, 1), True),
                (4, 1, 1, (2, 1, 2, 1), False),
                (12, 2, 1, (6, 5, 6, 5), False),
            ):
                call = partial(upfirdn2d, x, taps[k], taps[k], up, down, list(padding), float(up * up), flip)
                calls.append((f"{label} {k} taps up {up} down {down}", call))
    return calls
