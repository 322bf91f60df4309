r"""Batch normalisation and leaky ReLU on the GPU: a channel in registers, or two passes over it.

.. math:: y = \phi\Bigl(\gamma_c\,\frac{x - \mu_c}{\sqrt{v_c + \varepsilon}} + \beta_c\Bigr)

Ioffe & Szegedy 2015; `genkernels.reference.batch_norm_leaky_relu` has the gradients.

Layout: x [N, C, S], contiguous, in tiles of samples by channels by places: several channels where S is so short that
one of them would take but a part of what memory gives at once. As in `_rows`, the axis whose numbers lie side by side,
of places or, where S is 1, of channels, comes as a number of units of the longest access that divides it.

Channels of up to WHOLE bytes: a program has all of a channel in registers. Larger ones: a program takes a part of one,
some tiles in turn, and leaves its moments or sums; of these the programs of a second kernel, each for itself, make the
channel's, always in the same order (Chan et al., "Updating formulae and a pairwise algorithm for computing sample
variances", 1979), and go over the part again, from the end of x to its beginning: what was read last is in the cache.

Sums: a part's number by number, in fp32 around a number near the mean, then over the tile and over parts in fp64. No
atomics: the same bits each run.

Bytes: forward reads x and writes y; backward reads the gradient and x and writes the gradient of x. Beyond WHOLE what
is read is read twice. Arithmetic in fp32 (fp64 for fp64), rounded once at the store.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from genkernels.triton import _math
from genkernels.triton._recording import SampleCalls, meta

#: Bytes, of the type that is computed in: of a channel, or several, that one program holds, and of a tile.
WHOLE, TILE = 32 * 1024, 16 * 1024
#: Bytes of x that a program should find side by side, and must.
WIDE, NARROW = 128, 64
#: How many programs there should be, and at least and most how many of a channel, if it has so many tiles.
PROGRAMS, FEWEST_PARTS, MOST_PARTS = 2048, 16, 256
#: Bytes that a part must have of a channel for every part there is. So what the second kernel's programs read of all
#: parts, 24 bytes each, is no more than an eighth of what they read and write of their own.
MERGED = 96

SHAPE = ("samples", "channel_units", "place_units")  # not worth a compilation for each value
CUT = ("across", "tiles", "share", "parts")


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _channels(block, channels, CHANNELS: tl.constexpr):
    """A program's channels [CHANNELS], and which of them there are."""
    o_c = block.to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    return o_c, o_c < channels


@triton.jit
def _tile(row, col, o_c, samples, channels, places, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Offsets [ROWS, CHANNELS, COLS] from a sample and a place on, and which of them there are."""
    o_n, o_s = row + tl.arange(0, ROWS).to(tl.int64), col + tl.arange(0, COLS).to(tl.int64)
    o = (o_n * (channels * places))[:, None, None] + (o_c * places)[None, :, None] + o_s[None, None, :]
    m = (o_n < samples)[:, None, None] & (o_c < channels)[None, :, None] & (o_s < places)[None, None, :]
    return o, m


@triton.jit
def _place(tile, across, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The first sample and the first place of a tile by its number; `across` of them lie side by side."""
    # where there is one place the compiler should know that it is 0, and so where channels begin
    col = tl.full((), 0, tl.int64) if COLS == 1 else (tile % across).to(tl.int64) * COLS
    return (tile // across).to(tl.int64) * ROWS, col


@triton.jit
def _count(row, col, samples, places, ROWS: tl.constexpr, COLS: tl.constexpr):
    """How many numbers of a channel a tile has."""
    return (tl.minimum(samples - row, ROWS) * tl.minimum(places - col, COLS)).to(tl.float64)


@triton.jit
def _sizes(samples, channel_units, place_units, V: tl.constexpr, W: tl.constexpr, COLS: tl.constexpr):
    """Samples, channels and places, in 64 bits."""
    places = tl.full((), 1, tl.int64) if COLS == 1 else place_units.to(tl.int64) * V
    return samples.to(tl.int64), channel_units.to(tl.int64) * W, places


@triton.jit
def _each(samples, places):
    """A number's share in its channel."""
    return 1 / (samples * places).to(tl.float64)


@triton.jit
def _total(b_x):
    """[ROWS, CHANNELS, COLS] added up to [CHANNELS] in fp64, so that nothing shows of how threads share a tile."""
    return tl.sum(tl.sum(b_x.to(tl.float64), axis=0), axis=1)


@triton.jit
def _beside(b_value):
    """[CHANNELS] to go with a tile."""
    return b_value[None, :, None]


@triton.jit
def _line(p_weight, p_bias, o_c, m_c, b_mean, b_variance, EPS: tl.constexpr):
    """(inverse, scale, shift) [CHANNELS]: what stands before the leaky ReLU is (x − mean) · scale + shift."""
    b_inverse = tl.rsqrt(b_variance.to(tl.float64) + EPS).to(b_mean.dtype)
    b_scale, b_shift = b_inverse, tl.zeros_like(b_mean)
    if p_weight is not None:
        b_scale *= tl.load(p_weight + o_c, m_c, other=0.0)
    if p_bias is not None:
        b_shift += tl.load(p_bias + o_c, m_c, other=0.0)
    return b_inverse, b_scale, b_shift


@triton.jit
def _leaky(b_before, b_value, SLOPE: tl.constexpr):
    return tl.where(b_before > 0, b_value, SLOPE * b_value)


@triton.jit
def _store_activated(p_y, o, m, b_d, b_scale, b_shift, SLOPE: tl.constexpr):
    b_before = b_d * _beside(b_scale) + _beside(b_shift)
    tl.store(p_y + o, _leaky(b_before, b_before, SLOPE).to(p_y.dtype.element_ty), m)


@triton.jit
def _variance(b_exact, dtype: tl.constexpr):
    """Rounded, and never below 0; NaN stays."""
    return tl.where(b_exact < 0, 0.0, b_exact).to(dtype)


@triton.jit(do_not_specialize=SHAPE)
def _norm_kernel(
    p_x,
    p_weight,
    p_bias,
    p_y,
    p_mean,
    p_variance,
    samples,
    channel_units,
    place_units,
    V: tl.constexpr,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLS: tl.constexpr,
    EPS: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """Whole channels. p_weight and p_bias may be None here and below: 1 and 0."""
    samples, channels, places = _sizes(samples, channel_units, place_units, V, W, COLS)
    each = _each(samples, places)  # before there is much in registers: a division takes some
    o_c, m_c = _channels(tl.program_id(0), channels, CHANNELS)
    o, m = _tile(0, 0, o_c, samples, channels, places, ROWS, COLS)
    b_x = _math.widened(tl.load(p_x + o, m, other=0.0))
    b_exact = _total(b_x) * each
    b_mean = b_exact.to(b_x.dtype)
    b_d = tl.where(m, b_x - _beside(b_mean), 0.0)
    b_off = b_exact - b_mean.to(tl.float64)  # what the rounding of the mean adds to every square
    b_variance = _variance(_total(b_d * b_d) * each - b_off * b_off, b_x.dtype)
    _, b_scale, b_shift = _line(p_weight, p_bias, o_c, m_c, b_mean, b_variance, EPS)
    _store_activated(p_y, o, m, b_d, b_scale, b_shift, SLOPE)
    tl.store(p_mean + o_c, b_mean, m_c)
    tl.store(p_variance + o_c, b_variance, m_c)


@triton.jit(do_not_specialize=(*SHAPE, *CUT))
def _moments_kernel(
    p_x,
    p_parts,
    samples,
    channel_units,
    place_units,
    across,
    tiles,
    share,
    parts,
    V: tl.constexpr,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Of each part the count, the mean and the sum of squares around it, [C, 3, parts] in fp64."""
    pid = tl.program_id(0)
    samples, channels, places = _sizes(samples, channel_units, place_units, V, W, COLS)
    o_c, m_c = _channels(pid // parts, channels, CHANNELS)
    part = pid % parts
    first = part * share
    row, col = _place(first, across, ROWS, COLS)
    o, m = _tile(row, col, o_c, samples, channels, places, ROWS, COLS)
    count = _count(row, col, samples, places, ROWS, COLS)
    b_x = _math.widened(tl.load(p_x + o, m, other=0.0))
    b_center = (_total(b_x) / count).to(b_x.dtype)
    b_sum = tl.where(m, b_x - _beside(b_center), 0.0)
    b_squares = b_sum * b_sum
    for tile in range(first + 1, tl.minimum(first + share, tiles)):
        row, col = _place(tile, across, ROWS, COLS)
        o, m = _tile(row, col, o_c, samples, channels, places, ROWS, COLS)
        b_d = _math.widened(tl.load(p_x + o, m, other=0.0)) - _beside(b_center)
        b_d = tl.where(m, b_d, 0.0)
        b_sum += b_d
        b_squares += b_d * b_d
        count += _count(row, col, samples, places, ROWS, COLS)
    b_total = _total(b_sum)
    b_off = b_total / count
    o = (o_c * 3) * parts + part
    tl.store(p_parts + o, tl.zeros_like(b_off) + count, m_c)
    tl.store(p_parts + (o + parts), b_center.to(tl.float64) + b_off, m_c)
    tl.store(p_parts + (o + parts + parts), _total(b_squares) - b_total * b_off, m_c)


@triton.jit
def _part(p_parts, k: tl.constexpr, kinds: tl.constexpr, o_c, m_c, parts, PARTS: tl.constexpr):
    """The k-th number of each part of a program's channels, [CHANNELS, PARTS] of [C, kinds, parts]; 0 where none is."""
    o_part = tl.arange(0, PARTS).to(tl.int64)[None, :]
    o = ((o_c * kinds + k) * parts)[:, None] + o_part
    return tl.load(p_parts + o, m_c[:, None] & (o_part < parts), other=0.0)


@triton.jit
def _merged_moments(p_parts, o_c, m_c, parts, each, PARTS: tl.constexpr):
    """(mean, variance) [CHANNELS] of what `_moments_kernel` left."""
    b_counts = _part(p_parts, 0, 3, o_c, m_c, parts, PARTS)
    b_means = _part(p_parts, 1, 3, o_c, m_c, parts, PARTS)
    b_mean = tl.sum(b_counts * b_means, axis=1) * each
    b_gap = b_means - b_mean[:, None]
    b_squares = _part(p_parts, 2, 3, o_c, m_c, parts, PARTS) + b_counts * b_gap * b_gap
    return b_mean, tl.sum(b_squares, axis=1) * each


@triton.jit(do_not_specialize=(*SHAPE, *CUT))
def _norm_parts_kernel(
    p_x,
    p_parts,
    p_weight,
    p_bias,
    p_y,
    p_mean,
    p_variance,
    samples,
    channel_units,
    place_units,
    across,
    tiles,
    share,
    parts,
    V: tl.constexpr,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLS: tl.constexpr,
    PARTS: tl.constexpr,
    EPS: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """What `_norm_kernel` gives, part by part, from the moments of `_moments_kernel`."""
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    samples, channels, places = _sizes(samples, channel_units, place_units, V, W, COLS)
    o_c, m_c = _channels(pid // parts, channels, CHANNELS)
    b_exact_mean, b_exact_variance = _merged_moments(p_parts, o_c, m_c, parts, _each(samples, places), PARTS)
    b_mean = b_exact_mean.to(p_mean.dtype.element_ty)
    b_variance = _variance(b_exact_variance, b_mean.dtype)
    _, b_scale, b_shift = _line(p_weight, p_bias, o_c, m_c, b_mean, b_variance, EPS)
    part = pid % parts
    if part == 0:
        tl.store(p_mean + o_c, b_mean, m_c)
        tl.store(p_variance + o_c, b_variance, m_c)
    for tile in range(part * share, tl.minimum(part * share + share, tiles)):
        row, col = _place(tile, across, ROWS, COLS)
        o, m = _tile(row, col, o_c, samples, channels, places, ROWS, COLS)
        b_d = _math.widened(tl.load(p_x + o, m)) - _beside(b_mean)
        _store_activated(p_y, o, m, b_d, b_scale, b_shift, SLOPE)


@triton.jit
def _sloped(p_grad, p_x, o, m, b_mean, b_scale, b_shift, SLOPE: tl.constexpr):
    """(g', x − mean) of a tile, g' 0 outside it."""
    b_d = _math.widened(tl.load(p_x + o, m, other=0.0)) - _beside(b_mean)
    b_grad = _math.widened(tl.load(p_grad + o, m, other=0.0))
    return _leaky(b_d * _beside(b_scale) + _beside(b_shift), b_grad, SLOPE), b_d


@triton.jit
def _shares(b_sum, b_times, b_inverse, each):
    """What of the sums of g' and of g' · (x − mean) goes to every number: (constant, slant) of a line in x − mean."""
    b_wide = b_inverse.to(tl.float64)
    return (b_sum * each).to(b_inverse.dtype), (b_times * b_wide * b_wide * each).to(b_inverse.dtype)


@triton.jit
def _store_by_x(p_by_x, o, m, b_g, b_d, b_scale, b_constant, b_slant):
    b_by_x = _beside(b_scale) * (b_g - _beside(b_constant) - _beside(b_slant) * b_d)
    tl.store(p_by_x + o, b_by_x.to(p_by_x.dtype.element_ty), m)


@triton.jit(do_not_specialize=SHAPE)
def _norm_backward_kernel(
    p_grad,
    p_x,
    p_weight,
    p_bias,
    p_mean,
    p_variance,
    p_by_x,
    p_by_weight,
    p_by_bias,
    samples,
    channel_units,
    place_units,
    V: tl.constexpr,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLS: tl.constexpr,
    EPS: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """Whole channels."""
    samples, channels, places = _sizes(samples, channel_units, place_units, V, W, COLS)
    o_c, m_c = _channels(tl.program_id(0), channels, CHANNELS)
    o, m = _tile(0, 0, o_c, samples, channels, places, ROWS, COLS)
    b_mean, b_variance = tl.load(p_mean + o_c, m_c, other=0.0), tl.load(p_variance + o_c, m_c, other=0.0)
    b_inverse, b_scale, b_shift = _line(p_weight, p_bias, o_c, m_c, b_mean, b_variance, EPS)
    b_g, b_d = _sloped(p_grad, p_x, o, m, b_mean, b_scale, b_shift, SLOPE)
    b_sum, b_times = _total(b_g), _total(b_g * b_d)
    b_constant, b_slant = _shares(b_sum, b_times, b_inverse, _each(samples, places))
    _store_by_x(p_by_x, o, m, b_g, b_d, b_scale, b_constant, b_slant)
    tl.store(p_by_weight + o_c, (b_times * b_inverse.to(tl.float64)).to(b_mean.dtype), m_c)
    tl.store(p_by_bias + o_c, b_sum.to(b_mean.dtype), m_c)


@triton.jit(do_not_specialize=(*SHAPE, *CUT))
def _norm_sums_kernel(
    p_grad,
    p_x,
    p_weight,
    p_bias,
    p_mean,
    p_variance,
    p_parts,
    samples,
    channel_units,
    place_units,
    across,
    tiles,
    share,
    parts,
    V: tl.constexpr,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLS: tl.constexpr,
    EPS: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """Of each part the sums of g' and of g' · (x − mean), [C, 2, parts] in fp64."""
    pid = tl.program_id(0)
    samples, channels, places = _sizes(samples, channel_units, place_units, V, W, COLS)
    o_c, m_c = _channels(pid // parts, channels, CHANNELS)
    b_mean, b_variance = tl.load(p_mean + o_c, m_c, other=0.0), tl.load(p_variance + o_c, m_c, other=0.0)
    _, b_scale, b_shift = _line(p_weight, p_bias, o_c, m_c, b_mean, b_variance, EPS)
    part = pid % parts
    b_sum = tl.zeros((ROWS, CHANNELS, COLS), b_mean.dtype)
    b_times = tl.zeros((ROWS, CHANNELS, COLS), b_mean.dtype)
    for tile in range(part * share, tl.minimum(part * share + share, tiles)):
        row, col = _place(tile, across, ROWS, COLS)
        o, m = _tile(row, col, o_c, samples, channels, places, ROWS, COLS)
        b_g, b_d = _sloped(p_grad, p_x, o, m, b_mean, b_scale, b_shift, SLOPE)
        b_sum += b_g
        b_times += b_g * b_d
    o = (o_c * 2) * parts + part
    tl.store(p_parts + o, _total(b_sum), m_c)
    tl.store(p_parts + (o + parts), _total(b_times), m_c)


@triton.jit(do_not_specialize=(*SHAPE, *CUT))
def _norm_parts_backward_kernel(
    p_grad,
    p_x,
    p_parts,
    p_weight,
    p_bias,
    p_mean,
    p_variance,
    p_by_x,
    p_by_weight,
    p_by_bias,
    samples,
    channel_units,
    place_units,
    across,
    tiles,
    share,
    parts,
    V: tl.constexpr,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLS: tl.constexpr,
    PARTS: tl.constexpr,
    EPS: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """What `_norm_backward_kernel` gives, part by part, from the sums of `_norm_sums_kernel`."""
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    samples, channels, places = _sizes(samples, channel_units, place_units, V, W, COLS)
    o_c, m_c = _channels(pid // parts, channels, CHANNELS)
    b_sum = tl.sum(_part(p_parts, 0, 2, o_c, m_c, parts, PARTS), axis=1)
    b_times = tl.sum(_part(p_parts, 1, 2, o_c, m_c, parts, PARTS), axis=1)
    b_mean, b_variance = tl.load(p_mean + o_c, m_c, other=0.0), tl.load(p_variance + o_c, m_c, other=0.0)
    b_inverse, b_scale, b_shift = _line(p_weight, p_bias, o_c, m_c, b_mean, b_variance, EPS)
    b_constant, b_slant = _shares(b_sum, b_times, b_inverse, _each(samples, places))
    part = pid % parts
    if part == 0:
        tl.store(p_by_weight + o_c, (b_times * b_inverse.to(tl.float64)).to(b_mean.dtype), m_c)
        tl.store(p_by_bias + o_c, b_sum.to(b_mean.dtype), m_c)
    for tile in range(part * share, tl.minimum(part * share + share, tiles)):
        row, col = _place(tile, across, ROWS, COLS)
        o, m = _tile(row, col, o_c, samples, channels, places, ROWS, COLS)
        b_g, b_d = _sloped(p_grad, p_x, o, m, b_mean, b_scale, b_shift, SLOPE)
        _store_by_x(p_by_x, o, m, b_g, b_d, b_scale, b_constant, b_slant)


# ---------------------------------------------------------------------------------------------------------- launchers


class _Plan(NamedTuple):
    """A launch, by shape alone."""

    grid: tuple[int]
    shape: tuple[int, int, int]  #: the kernels' SHAPE
    cut: tuple[int, int, int, int]  #: the kernels' CUT
    options: dict[str, int]  #: V, W, ROWS, CHANNELS, COLS and the like

    @property
    def parts(self) -> int:
        """Of a channel; 0 where a program holds it."""
        return self.cut[-1]

    @property
    def merging(self) -> dict[str, int]:
        return {"PARTS": triton.next_power_of_2(self.parts)}


def _plan(x: Tensor) -> _Plan:
    samples, channels, places = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    size, work = x.element_size(), max(4, x.element_size())
    rows, cols = triton.next_power_of_2(samples), triton.next_power_of_2(places)
    held = min(max(1, WIDE // (size * cols)), triton.next_power_of_2(channels))
    while rows * held * cols * work > WHOLE and held > 1 and held * cols * size > NARROW:
        held //= 2
    whole = rows * held * cols * work <= WHOLE
    if not whole:
        cols = min(cols, TILE // work // held)
        rows = min(rows, TILE // work // (held * cols))
    # numbers that lie side by side come in units; a thread that had more than four channels would run out of registers
    units = {"V": math.gcd(places, 16 // size), "W": math.gcd(channels, min(4, 16 // size)) if places == 1 else 1}
    shape = (samples, channels // units["W"], places // units["V"])
    options = units | {"ROWS": rows, "CHANNELS": held, "COLS": cols, "enable_fp_fusion": True}
    # whole channels are kept, and where rows begin anywhere every number has a mask and an address: more threads
    by_thread = 32 if whole or max(units.values()) * size <= 4 else 64
    options["num_warps"] = min(16, max(4, rows * held * cols * work // (32 * by_thread)))
    blocks = triton.cdiv(channels, held)
    if whole:
        return _Plan((blocks,), shape, (1, 1, 1, 0), options)
    across = triton.cdiv(places, cols)
    tiles = triton.cdiv(samples, rows) * across
    most = min(MOST_PARTS, math.isqrt(samples * places * size // MERGED))
    share = triton.cdiv(tiles, min(most, max(FEWEST_PARTS, PROGRAMS // blocks)))
    parts = triton.cdiv(tiles, share)
    return _Plan((blocks * parts,), shape, (across, tiles, share, parts), options)


def batch_norm_leaky_relu(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, negative_slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, mean, variance)``. Contiguous tensors on one GPU; the caller has checked them."""
    y = x.new_empty(x.shape)
    mean, variance = (x.new_empty(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(2))
    if x.numel() == 0:
        return y, mean.zero_(), variance.zero_()
    plan, curve = _plan(x), {"EPS": float(eps), "SLOPE": float(negative_slope)}
    with torch.cuda.device_of(x):
        if not plan.parts:
            _norm_kernel[plan.grid](x, weight, bias, y, mean, variance, *plan.shape, **curve, **plan.options)
            return y, mean, variance
        sizes = (*plan.shape, *plan.cut)
        parts = x.new_empty((x.shape[1], 3, plan.parts), dtype=torch.float64)
        _moments_kernel[plan.grid](x, parts, *sizes, **plan.options)
        _norm_parts_kernel[plan.grid](
            x, parts, weight, bias, y, mean, variance, *sizes, **plan.merging, **curve, **plan.options
        )
    return y, mean, variance


def batch_norm_leaky_relu_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(grad_x, grad_weight, grad_bias)``. Conditions as for `batch_norm_leaky_relu`."""
    by_x, by_weight, by_bias = x.new_empty(x.shape), mean.new_empty(mean.shape), mean.new_empty(mean.shape)
    if x.numel() == 0:
        return by_x, by_weight.zero_(), by_bias.zero_()
    plan, curve = _plan(x), {"EPS": float(eps), "SLOPE": float(negative_slope)}
    given, results = (weight, bias, mean, variance), (by_x, by_weight, by_bias)
    with torch.cuda.device_of(x):
        if not plan.parts:
            _norm_backward_kernel[plan.grid](grad, x, *given, *results, *plan.shape, **curve, **plan.options)
            return results
        sizes = (*plan.shape, *plan.cut)
        parts = x.new_empty((x.shape[1], 2, plan.parts), dtype=torch.float64)
        _norm_sums_kernel[plan.grid](grad, x, *given, parts, *sizes, **curve, **plan.options)
        _norm_parts_backward_kernel[plan.grid](
            grad, x, parts, *given, *results, *sizes, **plan.merging, **curve, **plan.options
        )
    return results


def sample_calls() -> SampleCalls:
    calls = []
    # vectors, planes that a program holds, aligned and not, and the same in parts
    shapes = ((128, 256), (64, 64, 4, 4), (64, 64, 11, 11), (4096, 256), (64, 256, 64, 64), (64, 3, 75, 75))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for shape in shapes:
            x = meta(*shape, dtype=dtype)
            vector = meta(shape[1], dtype=torch.promote_types(dtype, torch.float32))
            label = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
            options = (1e-5, 0.2)
            backward = partial(batch_norm_leaky_relu_backward, x, x)
            calls.append((label, partial(batch_norm_leaky_relu, x, vector, vector, *options)))
            calls.append((f"{label} backward", partial(backward, vector, vector, vector, vector, *options)))
            if dtype == torch.float32:
                calls.append((f"{label} plain", partial(batch_norm_leaky_relu, x, None, None, 1e-5, 0.0)))
                calls.append((f"{label} plain backward", partial(backward, None, None, vector, vector, 1e-5, 0.0)))
    return calls
