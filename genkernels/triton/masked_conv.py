r"""Masked convolution on the GPU: an implicit matrix product over the live taps alone.

.. math::
    y = \mathrm{act}\big(x * (w \odot m) + b + c\big) + r

van den Oord et al. 2016a, 2016b. The live taps of every region are one run of the kernel's taps in row order, from
FIRST on, TAPS of them; with several data channels the last, the centre, is live only between certain blocks of
channels.

- forward: ``y[o, p] = sum over k = (tap, i) of w[o, k] x[i, p + tap]``. The weight is packed once a call as [Cout, TAPS
  * Cin], dead taps left out. A program holds BO channels (for the gate twice, one for each half) by BP pixels; pixels
    run on through all images, so
  small images fill tiles as well as large ones. Bias, condition, activation and residual follow in registers.
- gradient of x: the same kernel, channels swapped, taps mirrored.
- gradient of the weight: ``sum over p of g[o, p] x[i, p + tap]``, the pixels cut into `splits` parts by shape; partial
  sums [splits, Cout, TAPS * Cin] are added in order and scattered, dead taps getting exactly 0. No atomics: the same
  bits each run.
- gradient of the pre-activation: elementwise, one program a plane, which also sums it for the bias and the [N, Cout]
  condition.

Layout: channels first, as torch hands it over: a tile's pixels are neighbours in memory, whatever the tap. FLAT, for
few channels: k runs over taps and channels together, so that 7×7 taps of one channel fill a tile.

Saved for backward: x, weight; relu: the output, beside a residual the pre-activation; gate: the pre-activation. Flops:
2 N H W (live weights) forward, twice that backward. Bytes: x and y once, x again for each tap out of the cache.

Accumulation in fp32 (fp64 for fp64), rounded once at the store. fp32 products follow torch's setting for convolutions:
TF32 where ``torch.backends.cudnn.conv.fp32_precision`` allows it, else exact.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from genkernels._options import Activation, MaskType, Region
from genkernels.triton import _math
from genkernels.triton._recording import SampleCalls, meta

RASTER, VERTICAL, HORIZONTAL = Region
NONE = tl.constexpr(Activation.NONE.value)
RELU = tl.constexpr(Activation.RELU.value)
GATE = tl.constexpr(Activation.GATE.value)

# Triton's interpreter multiplies the bit patterns of bf16: there operands are widened, and products are the same.
WIDENED = tl.constexpr(bool(triton.knobs.runtime.interpret))

SIZES = (
    "pixels",
    "inputs",
    "outputs",
    "height",
    "width",
    "steps",
    "blocks",
    "splits",
    "count",
)  # one compilation for all values


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _dot(b_a, b_b, b_acc, PRECISION: tl.constexpr):
    if WIDENED:
        return b_acc + tl.dot(_math.widened(b_a), _math.widened(b_b), input_precision="ieee", out_dtype=b_acc.dtype)
    else:
        return tl.dot(b_a, b_b, b_acc, input_precision=PRECISION, out_dtype=b_acc.dtype)


@triton.jit
def _gate_parts(b_a, b_b):
    """tanh(a), 1 - tanh(a)^2, sigmoid(b), 1 - sigmoid(b)."""
    b_tanh, b_slope = _math.tanh(b_a)
    b_sigmoid, b_rest, _ = _math.sigmoid(b_b)
    return b_tanh, b_slope, b_sigmoid, b_rest


@triton.jit
def _pixels(o_p, pixels, height, width):
    """Image (64-bit), place in it (64-bit), row and column of pixel numbers, which may run over the end."""
    o_p = tl.minimum(o_p, pixels.to(tl.int64) - 1)
    b_p = o_p.to(pixels.dtype)  # divided in 32 bits wherever they are enough
    size = height.to(pixels.dtype) * width
    b_n = b_p // size
    b_hw = b_p - b_n * size
    b_h = b_hw // width
    o_n = b_n.to(tl.int64)
    return o_n, o_p - o_n * (height.to(tl.int64) * width), b_h, b_hw - b_h * width


@triton.jit(do_not_specialize=SIZES)
def _pack_kernel(
    p_weight,
    p_packed,
    inputs,
    outputs,
    count,
    FIRST: tl.constexpr,
    TAPS: tl.constexpr,
    AREA: tl.constexpr,
    GROUPS: tl.constexpr,
    LEAVING: tl.constexpr,
    STRICT: tl.constexpr,
    SWAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """packed [Cout, TAPS, Cin], or SWAPPED [Cin, TAPS, Cout], of weight [Cout, Cin, AREA]; see `_live` for the rest."""
    o_e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o_e < count
    columns = outputs if SWAPPED else inputs
    b_column = o_e % columns
    b_tap = (o_e // columns) % TAPS
    b_row = o_e // columns // TAPS
    b_o = b_column if SWAPPED else b_row
    b_i = b_row if SWAPPED else b_column
    m_live = _live(b_o, b_i, b_tap, inputs, outputs, TAPS, GROUPS, LEAVING, STRICT)
    b_w = tl.load(p_weight + (b_o * inputs + b_i) * AREA + FIRST + b_tap, m & m_live, other=0.0)
    tl.store(p_packed + o_e, b_w, m)


@triton.jit
def _live(
    b_o,
    b_i,
    b_tap,
    inputs,
    outputs,
    TAPS: tl.constexpr,
    GROUPS: tl.constexpr,
    LEAVING: tl.constexpr,
    STRICT: tl.constexpr,
):
    """Whether tap `b_tap` of the run is live between the two channels. GROUPS: blocks at the last tap, 1 where all of
    it is live;
    LEAVING: 2 for the gate, whose blocks lie within each half; STRICT: mask A."""
    left = outputs // LEAVING
    b_of_output = (b_o % left) // (left // GROUPS)
    b_of_input = b_i // (inputs // GROUPS)
    m_seen = b_of_input < b_of_output if STRICT else b_of_input <= b_of_output
    return m_seen | (b_tap < TAPS - 1) | (GROUPS == 1)


@triton.jit(do_not_specialize=SIZES)
def _conv_kernel(
    p_x,
    p_w,
    p_bias,
    p_condition,
    p_residual,
    p_y,
    p_pre,
    pixels,
    inputs,
    outputs,
    height,
    width,
    FIRST: tl.constexpr,
    TAPS: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    MIRRORED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FLAT_CONDITION: tl.constexpr,
    FLAT: tl.constexpr,
    PRECISION: tl.constexpr,
    BO: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
):
    """y [N, Cout', H, W] of x [N, Cin, H, W] and packed w [Cout, TAPS, Cin]; pre [N, Cout, H, W] where it is wanted."""
    SIGN: tl.constexpr = -1 if MIRRORED else 1
    o_p = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    o_o = tl.program_id(1).to(tl.int64) * BO + tl.arange(0, BO)
    left = outputs // 2 if ACTIVATION == GATE else outputs
    b_n, b_hw, b_h, b_w = _pixels(o_p, pixels, height, width)
    m_p = o_p < pixels
    m_o = o_o < left
    line = width.to(tl.int64)
    size = height.to(tl.int64) * line
    channels = inputs.to(tl.int64)
    o_x = b_n * (channels * size) + b_hw
    o_row = o_o * (channels * TAPS)
    other_half = left.to(tl.int64) * (channels * TAPS)

    ACC: tl.constexpr = tl.float64 if p_x.dtype.element_ty == tl.float64 else tl.float32
    b_acc = tl.zeros([BO, BP], ACC)
    b_acc2 = tl.zeros([BO, BP], ACC)
    if FLAT:
        for k in range(0, TAPS * inputs, BK):
            o_k = tl.arange(0, BK).to(tl.int64) + k
            b_tap = o_k // channels
            m_k = o_k < channels * TAPS
            b_dr = SIGN * ((b_tap + FIRST) // KW - KH // 2)
            b_dc = SIGN * ((b_tap + FIRST) % KW - KW // 2)
            o_in = (o_k - b_tap * channels) * size + b_dr * line + b_dc
            b_row = b_h[None, :] + b_dr.to(tl.int32)[:, None]
            b_column = b_w[None, :] + b_dc.to(tl.int32)[:, None]
            m = (b_row >= 0) & (b_row < height) & (b_column >= 0) & (b_column < width) & m_p[None, :] & m_k[:, None]
            b_x = tl.load(p_x + (o_x[None, :] + o_in[:, None]), m, other=0.0)
            m = m_o[:, None] & m_k[None, :]
            b_a = tl.load(p_w + (o_row[:, None] + o_k[None, :]), m, other=0.0)
            b_acc = _dot(b_a, b_x, b_acc, PRECISION)
            if ACTIVATION == GATE:
                b_b = tl.load(p_w + (o_row[:, None] + o_k[None, :] + other_half), m, other=0.0)
                b_acc2 = _dot(b_b, b_x, b_acc2, PRECISION)
    else:
        for tap in range(TAPS):
            o_t = tl.full([], tap, tl.int64) + FIRST
            dr = SIGN * (o_t // KW - KH // 2)
            dc = SIGN * (o_t % KW - KW // 2)
            b_row = b_h + dr.to(tl.int32)
            b_column = b_w + dc.to(tl.int32)
            m_x = (b_row >= 0) & (b_row < height) & (b_column >= 0) & (b_column < width) & m_p
            o_tap = o_x + line * dr + dc
            for k in range(0, inputs, BK):
                o_k = tl.arange(0, BK).to(tl.int64) + k
                m_k = o_k < inputs
                b_x = tl.load(p_x + (o_tap[None, :] + (o_k * size)[:, None]), m_x[None, :] & m_k[:, None], other=0.0)
                o_w = o_row[:, None] + (o_k + channels * tap)[None, :]
                m = m_o[:, None] & m_k[None, :]
                b_a = tl.load(p_w + o_w, m, other=0.0)
                b_acc = _dot(b_a, b_x, b_acc, PRECISION)
                if ACTIVATION == GATE:
                    b_b = tl.load(p_w + (o_w + other_half), m, other=0.0)
                    b_acc2 = _dot(b_b, b_x, b_acc2, PRECISION)

    m = m_o[:, None] & m_p[None, :]
    out64 = outputs.to(tl.int64)
    o_full = (b_n * (out64 * size) + b_hw)[None, :] + (o_o * size)[:, None]
    b_y = _shifted(b_acc, p_bias, p_condition, p_pre, o_o, o_full, b_n * out64, m_o, m, FLAT_CONDITION)
    if ACTIVATION == RELU:
        b_y = tl.where(b_y < 0, 0.0, b_y)  # NaN stays
    elif ACTIVATION == GATE:
        left64 = left.to(tl.int64)
        b_b = _shifted(
            b_acc2,
            p_bias,
            p_condition,
            p_pre,
            o_o + left64,
            o_full + left64 * size,
            b_n * out64,
            m_o,
            m,
            FLAT_CONDITION,
        )
        b_tanh, b_unused, b_sigmoid, b_unused2 = _gate_parts(b_y, b_b)
        b_y = b_tanh * b_sigmoid
    o_y = (b_n * (left.to(tl.int64) * size) + b_hw)[None, :] + (o_o * size)[:, None]
    if p_residual is not None:
        b_y += _math.widened(tl.load(p_residual + o_y, m))
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), m)


@triton.jit
def _shifted(b_acc, p_bias, p_condition, p_pre, o_o, o_full, o_n, m_o, m, FLAT_CONDITION: tl.constexpr):
    """Bias and condition added; kept where the backward wants it."""
    if p_bias is not None:
        b_acc += _math.widened(tl.load(p_bias + o_o, m_o, other=0.0))[:, None]
    if p_condition is not None:
        o_c = o_n[None, :] + o_o[:, None] if FLAT_CONDITION else o_full
        b_acc += _math.widened(tl.load(p_condition + o_c, m, other=0.0))
    if p_pre is not None:
        tl.store(p_pre + o_full, b_acc.to(p_pre.dtype.element_ty), m)
    return b_acc


@triton.jit(do_not_specialize=SIZES)
def _weight_kernel(
    p_g,
    p_x,
    p_partial,
    pixels,
    inputs,
    outputs,
    height,
    width,
    steps,
    blocks,
    FIRST: tl.constexpr,
    TAPS: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    FLAT: tl.constexpr,
    PRECISION: tl.constexpr,
    BO: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
):
    """partial [splits, Cout, TAPS, Cin]: this program's pixels of g [N, Cout, H, W] times those of x [N, Cin, H, W]."""
    o_o = tl.program_id(0).to(tl.int64) * BO + tl.arange(0, BO)
    pid = tl.program_id(1)
    split = tl.program_id(2).to(tl.int64)
    line = width.to(tl.int64)
    size = height.to(tl.int64) * line
    channels = inputs.to(tl.int64)
    if FLAT:
        o_k = pid.to(tl.int64) * BK + tl.arange(0, BK)
        b_tap = o_k // channels
        m_k = o_k < channels * TAPS
        b_dr = ((b_tap + FIRST) // KW - KH // 2)[:, None]
        b_dc = ((b_tap + FIRST) % KW - KW // 2)[:, None]
        o_in = ((o_k - b_tap * channels) * size)[:, None] + b_dr * line + b_dc
    else:
        tap = (pid // blocks).to(tl.int64)
        o_i = (pid % blocks).to(tl.int64) * BK + tl.arange(0, BK)
        m_k = o_i < channels
        b_dr = (tap + FIRST) // KW - KH // 2
        b_dc = (tap + FIRST) % KW - KW // 2
        o_in = (o_i * size)[:, None] + line * b_dr + b_dc
        o_k = o_i + channels * tap
    m_o = o_o < outputs
    ACC: tl.constexpr = tl.float64 if p_x.dtype.element_ty == tl.float64 else tl.float32
    b_acc = tl.zeros([BO, BK], ACC)
    for step in range(0, steps):
        o_p = (split * steps + step) * BP + tl.arange(0, BP)
        m_p = o_p < pixels
        b_n, b_hw, b_h, b_w = _pixels(o_p, pixels, height, width)
        o_g = (b_n * (outputs.to(tl.int64) * size) + b_hw)[None, :] + (o_o * size)[:, None]
        b_g = tl.load(p_g + o_g, m_o[:, None] & m_p[None, :], other=0.0)
        b_row = b_h[None, :] + b_dr.to(tl.int32)
        b_column = b_w[None, :] + b_dc.to(tl.int32)
        m = (b_row >= 0) & (b_row < height) & (b_column >= 0) & (b_column < width) & m_p[None, :]
        b_x = tl.load(p_x + ((b_n * (channels * size) + b_hw)[None, :] + o_in), m & m_k[:, None], other=0.0)
        b_acc = _dot(b_g, tl.trans(b_x), b_acc, PRECISION)
    row = channels * TAPS
    o_to = (split * outputs + o_o)[:, None] * row + o_k[None, :]
    tl.store(p_partial + o_to, b_acc, m_o[:, None] & m_k[None, :])


@triton.jit(do_not_specialize=SIZES)
def _unpack_kernel(
    p_partial,
    p_weight,
    inputs,
    outputs,
    splits,
    count,
    FIRST: tl.constexpr,
    TAPS: tl.constexpr,
    AREA: tl.constexpr,
    GROUPS: tl.constexpr,
    LEAVING: tl.constexpr,
    STRICT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """weight [Cout, Cin, AREA]: partial [splits, Cout, TAPS, Cin] added in order, dead taps 0."""
    o_e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o_e < count
    b_tap = o_e % AREA - FIRST
    b_i = (o_e // AREA) % inputs
    b_o = o_e // AREA // inputs
    m_live = m & (b_tap >= 0) & (b_tap < TAPS)
    m_live = m_live & _live(b_o, b_i, b_tap, inputs, outputs, TAPS, GROUPS, LEAVING, STRICT)
    channels = inputs.to(tl.int64)
    o_from = (b_o * TAPS + b_tap) * channels + b_i
    part = outputs.to(tl.int64) * (channels * TAPS)
    b_sum = tl.zeros([BLOCK], p_partial.dtype.element_ty)
    for split in range(0, splits):
        b_sum += tl.load(p_partial + (o_from + part * split), m_live, other=0.0)
    tl.store(p_weight + o_e, b_sum.to(p_weight.dtype.element_ty), m)


@triton.jit(do_not_specialize=SIZES)
def _slope_kernel(
    p_grad, p_grad_pre, p_state, p_g, p_sums, outputs, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    """g [N, Cout, HW], the gradient of the pre-activation, and its sums [N, Cout]; one program a plane (gate: two).
    count = HW."""
    plane = tl.program_id(0).to(tl.int64)
    left = outputs // 2 if ACTIVATION == GATE else outputs
    size = count.to(tl.int64)
    first = plane // left * outputs + plane % left
    second = first + left
    ACC: tl.constexpr = tl.float64 if p_sums.dtype.element_ty == tl.float64 else tl.float32
    b_sum = tl.zeros([BLOCK], ACC)
    b_sum2 = tl.zeros([BLOCK], ACC)
    for start in range(0, count, BLOCK):
        o = tl.arange(0, BLOCK).to(tl.int64) + start
        m = o < size
        b_g = tl.zeros([BLOCK], ACC)
        b_g2 = tl.zeros([BLOCK], ACC)
        if p_grad is not None:
            b_g = _math.widened(tl.load(p_grad + plane * size + o, m, other=0.0))
            if ACTIVATION == RELU:
                b_g = tl.where(_math.widened(tl.load(p_state + first * size + o, m, other=0.0)) <= 0, 0.0, b_g)
            elif ACTIVATION == GATE:
                b_a = _math.widened(tl.load(p_state + first * size + o, m, other=0.0))
                b_b = _math.widened(tl.load(p_state + second * size + o, m, other=0.0))
                b_tanh, b_slope, b_sigmoid, b_rest = _gate_parts(b_a, b_b)
                b_g2 = b_g * b_tanh * (b_sigmoid * b_rest)
                b_g = b_g * b_sigmoid * b_slope
        if p_grad_pre is not None:
            b_g += _math.widened(tl.load(p_grad_pre + first * size + o, m, other=0.0))
            if ACTIVATION == GATE:
                b_g2 += _math.widened(tl.load(p_grad_pre + second * size + o, m, other=0.0))
        if p_g is not None:
            tl.store(p_g + first * size + o, b_g.to(p_g.dtype.element_ty), m)
            if ACTIVATION == GATE:
                tl.store(p_g + second * size + o, b_g2.to(p_g.dtype.element_ty), m)
        b_sum += tl.where(m, b_g, 0.0)
        b_sum2 += tl.where(m, b_g2, 0.0)
    tl.store(p_sums + first, tl.sum(b_sum, 0))
    if ACTIVATION == GATE:
        tl.store(p_sums + second, tl.sum(b_sum2, 0))


# ---------------------------------------------------------------------------------------------------------- launchers


class _Taps(NamedTuple):
    """The run of live taps, and the blocks of channels at its last tap."""

    first: int
    taps: int
    groups: int
    kernel: tuple[int, int]
    leaving: int
    strict: bool

    def constants(self) -> dict:
        return {
            "FIRST": self.first,
            "TAPS": self.taps,
            "AREA": self.kernel[0] * self.kernel[1],
            "GROUPS": self.groups,
            "LEAVING": self.leaving,
            "STRICT": self.strict,
        }


@lru_cache(maxsize=512)
def _taps_of(height: int, width: int, mask_type: int, data_channels: int, region: int, activation: int) -> _Taps:
    above, middle, strict = height // 2 * width, width // 2, mask_type == MaskType.A
    first = above if region == HORIZONTAL else 0
    groups = 1
    if region == VERTICAL:
        end = above if strict else above + width
    else:
        end = above + middle + (data_channels > 1 or not strict)
        groups = data_channels
    leaving = 2 if activation == GATE.value else 1
    return _Taps(first, end - first, groups, (height, width), leaving, strict)


class _Tiles(NamedTuple):
    BO: int
    BP: int
    BK: int
    warps: int
    stages: int

    def constants(self) -> dict:
        return {"BO": self.BO, "BP": self.BP, "BK": self.BK}


def _power(n: int, low: int, high: int) -> int:
    return max(low, min(high, triton.next_power_of_2(n)))


@lru_cache(maxsize=512)
def _conv_tiles(itemsize: int, inputs: int, left: int, gate: bool) -> _Tiles:
    channels = inputs if inputs >= 16 else 16 * 4
    if itemsize == 8:
        return _Tiles(16, 32, 16, 2, 1)
    # the gate holds two sums; the tiles are the largest that spill no register
    if itemsize == 4:
        rows = _power(left, 16, 16 if gate else 64)
        return _Tiles(rows, 32, 16, 4, 1 if rows == 16 else 2)
    return _Tiles(_power(left, 16, 32 if gate else 64), 128, _power(channels, 16, 32), 8, 3)


@lru_cache(maxsize=512)
def _weight_tiles(itemsize: int, inputs: int, outputs: int) -> _Tiles:
    channels = inputs if inputs >= 16 else 16 * 4
    if itemsize == 8:
        return _Tiles(16, 16, 16, 4, 1)
    if itemsize == 4:
        return _Tiles(_power(outputs, 16, 64), 32, _power(channels, 16, 32 if _flat(inputs) else 64), 8, 2)
    return _Tiles(_power(outputs, 16, 64), 64, _power(channels, 16, 64), 8, 3)


def _flat(inputs: int) -> bool:
    return inputs < 16


def _splits(pixels: int, programs: int, tile: int) -> tuple[int, int]:
    """(splits, steps a split): about 1,024 programs in all, each with at least 8 steps; by shape alone."""
    steps = triton.cdiv(pixels, tile)
    splits = max(1, min(triton.cdiv(1024, programs), steps // 8))
    each = triton.cdiv(steps, splits)
    return triton.cdiv(steps, each), each


def _precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


_BLOCK = 512
_OPTIONS = {"enable_fp_fusion": True}


def _pack(weight: Tensor, taps: _Taps, swapped: bool) -> Tensor:
    outputs, inputs = weight.shape[:2]
    count = outputs * inputs * taps.taps
    packed = weight.new_empty(count)
    _pack_kernel[(triton.cdiv(count, _BLOCK),)](
        weight, packed, inputs, outputs, count, **taps.constants(), SWAPPED=swapped, BLOCK=_BLOCK, **_OPTIONS
    )
    return packed


def _convolve(x, packed, bias, condition, residual, y, pre, outputs, taps: _Taps, mirrored, activation):
    batch, inputs, height, width = x.shape
    left = outputs // 2 if activation == GATE.value else outputs
    tiles = _conv_tiles(x.element_size(), inputs, left, activation == GATE.value)
    pixels = batch * height * width
    _conv_kernel[(triton.cdiv(pixels, tiles.BP), triton.cdiv(left, tiles.BO))](
        x,
        packed,
        bias,
        condition,
        residual,
        y,
        pre,
        pixels,
        inputs,
        outputs,
        height,
        width,
        FIRST=taps.first,
        TAPS=taps.taps,
        KH=taps.kernel[0],
        KW=taps.kernel[1],
        MIRRORED=mirrored,
        ACTIVATION=int(activation),
        FLAT_CONDITION=condition is not None and condition.dim() == 2,
        FLAT=_flat(inputs),
        PRECISION=_precision(x.dtype),
        **tiles.constants(),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **_OPTIONS,
    )


def masked_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    condition: Tensor | None,
    residual: Tensor | None,
    mask_type: int,
    data_channels: int,
    region: int,
    activation: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """`(output, pre)` of contiguous tensors on one GPU; the caller has checked them. Codes as in the operator's
    schema."""
    taps = _taps_of(*weight.shape[2:], mask_type, data_channels, region, activation)
    outputs = weight.shape[0]
    y = x.new_empty(x.shape[0], outputs // taps.leaving, *x.shape[2:])
    kept = keep and (activation == GATE.value or (activation == RELU.value and residual is not None))
    pre = x.new_empty((x.shape[0], outputs, *x.shape[2:]) if kept else 0)
    if y.numel() == 0:
        return y, pre
    with torch.cuda.device_of(x):
        packed = _pack(weight, taps, False)
        _convolve(x, packed, bias, condition, residual, y, pre if kept else None, outputs, taps, False, activation)
    return y, pre


def masked_conv_backward(
    grad_output: Tensor | None,
    grad_pre: Tensor | None,
    state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mask_type: int,
    data_channels: int,
    region: int,
    activation: int,
    condition_rank: int,
    want_x: bool,
    want_weight: bool,
    want_bias: bool,
    want_condition: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(grad_x, grad_weight, grad_bias, grad_condition)`, each empty where it is not wanted. Conditions as for
    `masked_conv`."""
    taps = _taps_of(*weight.shape[2:], mask_type, data_channels, region, activation)
    (outputs, inputs), (batch, _, height, width) = weight.shape[:2], x.shape
    whole = (batch, outputs, height, width)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if want_x else x.new_empty(0)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if want_weight else x.new_empty(0)
    if batch == 0:
        bias = x.new_zeros(outputs if want_bias else 0)
        condition = x.new_empty(0 if not want_condition else whole if condition_rank == 4 else whole[:2])
        return grad_x, grad_weight.zero_(), bias, condition
    full = want_condition and condition_rank == 4
    # with no activation g is the output's gradient, unless it must be handed out
    made = full or activation != NONE.value or grad_output is None or grad_pre is not None
    flat = want_condition and condition_rank == 2
    sums = None
    with torch.cuda.device_of(x):
        g = grad_output
        if made or want_bias or flat:
            g = x.new_empty(whole) if made else grad_output
            sums = x.new_empty(whole[:2], dtype=torch.promote_types(x.dtype, torch.float32))
            block = _power(height * width, 32, 1024)
            _slope_kernel[(batch * outputs // taps.leaving,)](
                grad_output,
                grad_pre,
                state,
                g if made else None,
                sums,
                outputs,
                height * width,
                ACTIVATION=int(activation),
                BLOCK=block,
                num_warps=4,
                **_OPTIONS,
            )
        if want_x:
            packed = _pack(weight, taps, True)
            _convolve(g, packed, None, None, None, grad_x, None, inputs, taps, True, NONE.value)
        if want_weight:
            _weight_gradient(g, x, grad_weight, taps)
    grad_bias = sums.sum(0).to(x.dtype) if want_bias else x.new_empty(0)
    grad_condition = g if full else sums.to(x.dtype) if flat else x.new_empty(0)
    return grad_x, grad_weight, grad_bias, grad_condition


def _weight_gradient(g: Tensor, x: Tensor, grad_weight: Tensor, taps: _Taps) -> None:
    batch, inputs, height, width = x.shape
    outputs = g.shape[1]
    tiles = _weight_tiles(x.element_size(), inputs, outputs)
    blocks = triton.cdiv(inputs, tiles.BK)
    columns = triton.cdiv(inputs * taps.taps, tiles.BK) if _flat(inputs) else taps.taps * blocks
    rows, pixels = triton.cdiv(outputs, tiles.BO), batch * height * width
    splits, steps = _splits(pixels, rows * columns, tiles.BP)
    partial = x.new_empty((splits, outputs, taps.taps, inputs), dtype=torch.promote_types(x.dtype, torch.float32))
    _weight_kernel[(rows, columns, splits)](
        g,
        x,
        partial,
        pixels,
        inputs,
        outputs,
        height,
        width,
        steps,
        blocks,
        FIRST=taps.first,
        TAPS=taps.taps,
        KH=taps.kernel[0],
        KW=taps.kernel[1],
        FLAT=_flat(inputs),
        PRECISION=_precision(x.dtype),
        **tiles.constants(),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **_OPTIONS,
    )
    count = grad_weight.numel()
    _unpack_kernel[(triton.cdiv(count, _BLOCK),)](
        partial, grad_weight, inputs, outputs, splits, count, **taps.constants(), BLOCK=_BLOCK, **_OPTIONS
    )


# ------------------------------------------------------------------------------------------ ahead-of-time compilation


def sample_calls() -> SampleCalls:
    """One of each kind as to registers and accesses."""
    f64, f32, b16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
    raster = (1, 1, RASTER)
    cases = [("3x3", (64, 64, 3, 3), raster, activation, dtype) for dtype in (f32, b16) for activation in (0, 1)]
    cases += [("gated", (128, 64, 3, 3), raster, 2, dtype) for dtype in (f32, b16, f16)]
    cases += [("7x7A", (64, 1, 7, 7), (0, 1, RASTER), 0, dtype) for dtype in (f32, b16)]
    cases += [("rgb", (66, 66, 3, 3), (1, 3, RASTER), 1, dtype) for dtype in (f32, b16)]
    cases += [("3x3", (64, 64, 3, 3), raster, 0, f64), ("gated", (128, 64, 3, 3), raster, 2, f64)]
    kinds = {f64: "fp64", f32: "fp32", b16: "bf16", f16: "fp16"}
    calls = []
    for name, shape, codes, activation, dtype in cases:
        tensor, (outputs, inputs, *_) = partial(meta, dtype=dtype), shape
        gate = activation == GATE.value
        x, weight, pre = tensor(8, inputs, 32, 32), tensor(*shape), tensor(8, outputs, 32, 32)
        y = tensor(8, outputs // 2, 32, 32) if gate else pre
        forward = (x, weight, tensor(outputs), tensor(8, outputs), y, *codes, activation, gate)
        state = pre if activation else None
        backward = (y, None, state, x, weight, *codes, activation, 4, True, True, True, True)
        for precision in ("ieee", "tf32") if dtype == f32 else ("ieee",):
            label = f"{name} {kinds[dtype]} {('none', 'relu', 'gate')[activation]} {precision}"
            calls.append((f"{label} forward", partial(_at_precision, precision, masked_conv, *forward)))
            calls.append((f"{label} backward", partial(_at_precision, precision, masked_conv_backward, *backward)))
    return calls


def _at_precision(precision: str, call, *arguments):
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = precision
    try:
        return call(*arguments)
    finally:
        conv.fp32_precision = before
