r"""Affine coupling on the GPU: one pass forward, one inverse, one backward.

.. math::
    z_2 = x_2\,\sigma(s) + t,\qquad z_1 = x_1,\qquad \mathrm{ldj} = \sum\ell(s),\quad \ell = \log\sigma

Dinh et al. 2015, 2017; Kingma & Dhariwal 2018. Gradients, with g for the incoming one:

- forward: :math:`g_{x_2} = g\sigma,\ g_t = g,\ g_s = (g x_2\sigma + g_\mathrm{ldj})\,\ell'`;
- inverse, with :math:`x_2 = (z_2 - t)/\sigma`:
  :math:`g_{z_2} = g/\sigma,\ g_t = -g_{z_2},\ g_s = -(g x_2 + g_\mathrm{ldj})\,\ell'`;
- reverse, from the forward's output: :math:`x_2` as the inverse has it, the gradients of the forward,
  :math:`x_2\sigma = z_2 - t`.

Layout. Everything is contiguous, so one sample of the channel split is two blocks of L = C/2 * S numbers, one copied
and one transformed; of the checkerboard, one block of L = C * H * W, where the parity of h + w decides. A sample is cut
into *units* of V numbers (16 bytes where L allows): a unit lies within one channel and one image row, so whatever needs
a division (channel of the interleaved layout, parity of a row) is worked out once a unit. A program takes a tile of
ROWS
samples by COLS units: several small samples, or a part of a large one. Offsets are 64-bit; the units within a sample
are divided in 32 bits when a sample has fewer than 2^31 of them.

Log-determinant. A program sums its tile in a fixed order. Where one tile covers a sample that is the result; else the
sums go to a temporary [N, blocks], added up in a fixed order by a second kernel: no atomics, the same bits each run.

Saved for backward: the input and the parameters, nothing else; x_2 and s are read again and σ is computed again, which
costs no bandwidth. Bytes, in half-tensors of the channel split: forward 6 (read x, s, t, write z), backward of the
forward 8 (t is not needed: read g, x_2, s, write g_x, g_s, g_t), of the inverse 9, reverse 11.

Arithmetic in fp32 (fp64 for fp64), rounded once at the store. `_math` says why exp, log1p and tanh are its own.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from genkernels._options import SCALE_CONSTANTS, Layout, ScaleMap, Split
from genkernels.triton import _math, _scale_map
from genkernels.triton._recording import SampleCalls, meta

CHANNEL = tl.constexpr(Split.CHANNEL.value)
CHECKERBOARD = tl.constexpr(Split.CHECKERBOARD.value)
NONE = tl.constexpr(Split.NONE.value)
ALTERNATE = tl.constexpr(Split.ALTERNATE.value)
HALVES = tl.constexpr(Layout.HALVES.value)
INTERLEAVED = tl.constexpr(Layout.INTERLEAVED.value)
SHIFT_HALVES = tl.constexpr(Layout.SHIFT_HALVES.value)
SHIFT_INTERLEAVED = tl.constexpr(Layout.SHIFT_INTERLEAVED.value)

# What the backward kernel differentiates: the forward from its input, the inverse from its input, the forward from its
# output.
FORWARD = tl.constexpr(0)
INVERSE = tl.constexpr(1)
REVERSE = tl.constexpr(2)

SIZES = ("n_rows", "units", "width", "height", "blocks")  # not worth a compilation for each value


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _tile(
    n_rows,
    units,
    width,
    height,
    blocks,
    MAP: tl.constexpr,
    SPLIT: tl.constexpr,
    LAYOUT: tl.constexpr,
    FLIP: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Where this program works: samples [T], mask [T, 1], offsets [T, V] (transformed, copied, s, t), parity [T, V].

    T = ROWS * COLS units. The copied offsets mean something for the channel split alone, the parity, true where a pixel
    is transformed, for the checkerboard alone.
    """
    pid = tl.program_id(0)  # 32 bits wide in hardware, and cheaper to divide so
    b_unit = tl.arange(0, ROWS * COLS)
    o_row = (pid // blocks).to(tl.int64) * ROWS + b_unit // COLS
    o_unit = (pid % blocks).to(tl.int64) * COLS + b_unit % COLS
    m_unit = (o_row < n_rows) & (o_unit < units)

    # units is a 32-bit argument unless a sample is so large that it is a 64-bit one: divide in its width
    b_unit = o_unit.to(units.dtype)
    b_line = b_unit // width  # channel (channel split) or image row counted through all channels (checkerboard)
    b_column = b_unit - b_line * width
    size = units.to(tl.int64) * V
    o_lane = tl.arange(0, V)[None, :]
    o_inner = (o_unit * V)[:, None] + o_lane

    if SPLIT == CHECKERBOARD:
        b_channel = b_line // height
        plane = width.to(tl.int64) * height * V
        m_moved = (((b_line - b_channel * height) + b_column * V)[:, None] + o_lane) % 2 == (0 if FLIP else 1)
        o_moved = (o_row * size)[:, None] + o_inner
        o_copied = o_moved
    elif SPLIT == NONE:
        b_channel = b_line
        plane = width.to(tl.int64) * V
        m_moved = m_unit[:, None]
        o_moved = (o_row * size)[:, None] + o_inner
        o_copied = o_moved
    elif SPLIT == ALTERNATE:
        b_channel = b_line
        plane = width.to(tl.int64) * V
        m_moved = m_unit[:, None]
        # channel c of a half has c channels of the other half before it
        o_copied = (o_row * (2 * size) + b_channel.to(tl.int64) * plane)[:, None] + o_inner
        o_moved = o_copied + plane
        if FLIP:
            o_moved, o_copied = o_copied, o_moved
    else:
        b_channel = b_line
        plane = width.to(tl.int64) * V
        m_moved = m_unit[:, None]
        o_moved = (o_row * (2 * size) + (0 if FLIP else size))[:, None] + o_inner
        o_copied = (o_row * (2 * size) + (size if FLIP else 0))[:, None] + o_inner

    if MAP == _scale_map.ADDITIVE:
        o_shift = (o_row * size)[:, None] + o_inner
        o_scale = o_shift
    elif LAYOUT == INTERLEAVED or LAYOUT == SHIFT_INTERLEAVED:
        # channel c of the transformed part has its log-scale in channel 2c, which is c channels further on
        o_scale = (o_row * (2 * size) + b_channel.to(tl.int64) * plane)[:, None] + o_inner
        o_shift = o_scale + plane
    else:
        o_scale = (o_row * (2 * size))[:, None] + o_inner
        o_shift = o_scale + size
    if MAP != _scale_map.ADDITIVE and (LAYOUT == SHIFT_HALVES or LAYOUT == SHIFT_INTERLEAVED):
        o_scale, o_shift = o_shift, o_scale
    return o_row, m_unit[:, None], o_moved, o_copied, o_scale, o_shift, m_moved


@triton.jit(do_not_specialize=SIZES)
def _couple_kernel(
    p_x,
    p_params,
    p_y,
    p_ldj,
    n_rows,
    units,
    width,
    height,
    blocks,
    MAP: tl.constexpr,
    CONSTANT: tl.constexpr,
    SPLIT: tl.constexpr,
    LAYOUT: tl.constexpr,
    FLIP: tl.constexpr,
    IS_INVERSE: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """y [N, C, S] and ldj [N, blocks] from x [N, C, S] and params; forward or inverse."""
    o_row, m, o_moved, o_copied, o_scale, o_shift, m_moved = _tile(
        n_rows, units, width, height, blocks, MAP, SPLIT, LAYOUT, FLIP, V, ROWS, COLS
    )
    ROUGH: tl.constexpr = p_x.dtype.element_ty.primitive_bitwidth == 16
    # every load before the first store, which the compiler would not move a load across
    b_x_raw = tl.load(p_x + o_moved, m)
    b_t = _math.widened(tl.load(p_params + o_shift, m))
    b_s = b_t if MAP == _scale_map.ADDITIVE else _math.widened(tl.load(p_params + o_scale, m))
    if SPLIT == CHANNEL or SPLIT == ALTERNATE:
        tl.store(p_y + o_copied, tl.load(p_x + o_copied, m), m)

    b_x = _math.widened(b_x_raw)
    if MAP == _scale_map.ADDITIVE:
        b_y = b_x - b_t if IS_INVERSE else b_x + b_t
    else:
        b_log, b_sigma, b_shrink, _ = _scale_map.scale(b_s, MAP, CONSTANT, ROUGH)
        b_y = (b_x - b_t) * b_shrink if IS_INVERSE else b_x * b_sigma + b_t
        b_log = tl.where(m & m_moved, -b_log if IS_INVERSE else b_log, 0.0)
        b_sum = tl.sum(tl.reshape(b_log, (ROWS, COLS * V)), axis=1)

    b_y = b_y.to(p_y.dtype.element_ty)
    if SPLIT == CHECKERBOARD:
        b_y = tl.where(m_moved, b_y, b_x_raw)  # the pixels as they were loaded: a copy to the bit
    tl.store(p_y + o_moved, b_y, m)

    pid = tl.program_id(0)
    o_sample = (pid // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if MAP == _scale_map.ADDITIVE:  # nothing to add up: ldj itself, [N], by the first program of a sample
        tl.store(p_ldj + o_sample, tl.zeros_like(o_sample), o_sample < tl.where(pid % blocks == 0, n_rows, 0))
    else:
        o_sum = o_sample * blocks + pid % blocks
        tl.store(p_ldj + o_sum, b_sum, o_sample < n_rows)


@triton.jit(do_not_specialize=("n_rows", "blocks"))
def _sum_kernel(p_partial, p_ldj, n_rows, blocks, STEPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """ldj [N] from the tiles' sums [N, blocks], COLS at a time, always in the same order; blocks <= STEPS * COLS."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_col = tl.arange(0, COLS).to(tl.int64)
    m_row = o_row < n_rows
    b_sum = tl.zeros((ROWS, COLS), p_ldj.dtype.element_ty)
    for _ in range(STEPS):
        m = m_row[:, None] & (o_col < blocks)[None, :]
        b_sum += tl.load(p_partial + ((o_row * blocks)[:, None] + o_col[None, :]), m, other=0.0)
        o_col += COLS
    tl.store(p_ldj + o_row, tl.sum(b_sum, axis=1), m_row)


@triton.jit(do_not_specialize=SIZES)
def _backward_kernel(
    p_g,
    p_g_ldj,
    p_x,
    p_params,
    p_x_out,
    p_g_x,
    p_g_params,
    n_rows,
    units,
    width,
    height,
    blocks,
    MAP: tl.constexpr,
    CONSTANT: tl.constexpr,
    SPLIT: tl.constexpr,
    LAYOUT: tl.constexpr,
    FLIP: tl.constexpr,
    OF: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """g_x [N, C, S], g_params and, for OF == REVERSE, x_out [N, C, S] from g [N, C, S], g_ldj [N] and what was saved.

    p_x is the forward's input x, the inverse's input z, or (REVERSE) the forward's output z. p_g, p_g_ldj may be None.
    """
    o_row, m, o_moved, o_copied, o_scale, o_shift, m_moved = _tile(
        n_rows, units, width, height, blocks, MAP, SPLIT, LAYOUT, FLIP, V, ROWS, COLS
    )
    ROUGH: tl.constexpr = p_x.dtype.element_ty.primitive_bitwidth == 16
    # every load before the first store, which the compiler would not move a load across
    b_x_raw = tl.load(p_x + o_moved, m)
    b_x = _math.widened(b_x_raw)
    b_g_raw = tl.load(p_g + o_moved, m) if p_g is not None else tl.zeros_like(b_x_raw)
    b_g = _math.widened(b_g_raw)
    if MAP != _scale_map.ADDITIVE:
        b_s = _math.widened(tl.load(p_params + o_scale, m))
    if OF != FORWARD:
        b_x -= _math.widened(tl.load(p_params + o_shift, m))  # z - t, which is x times σ
    if SPLIT == CHANNEL or SPLIT == ALTERNATE:
        b_g_copied = tl.load(p_g + o_copied, m) if p_g is not None else b_g_raw
        if OF == REVERSE:
            tl.store(p_x_out + o_copied, tl.load(p_x + o_copied, m), m)
        tl.store(p_g_x + o_copied, b_g_copied, m)

    if MAP == _scale_map.ADDITIVE:
        b_g_x = b_g
        b_g_t = -b_g if OF == INVERSE else b_g
    else:
        _, b_sigma, b_shrink, b_slope = _scale_map.scale(b_s, MAP, CONSTANT, ROUGH)
        # a gradient that is not there is left out, not multiplied in as 0, which would turn inf to NaN
        b_g_x = b_g
        b_g_s = tl.zeros_like(b_x)
        if p_g is not None:
            b_g_x = b_g * (b_shrink if OF == INVERSE else b_sigma)
            b_g_s = b_g * b_x if OF == REVERSE else b_g_x * b_x
        if p_g_ldj is not None:
            b_g_s += tl.load(p_g_ldj + o_row, o_row < n_rows)[:, None]
        b_g_t = -b_g_x if OF == INVERSE else b_g
        b_g_s *= b_slope
        b_g_s = -b_g_s if OF == INVERSE else b_g_s
        if OF == REVERSE:
            b_x *= b_shrink

    if SPLIT == CHECKERBOARD:
        b_g_x = tl.where(m_moved, b_g_x.to(p_g_x.dtype.element_ty), b_g_raw)
        b_g_t = tl.where(m_moved, b_g_t, 0.0)
    tl.store(p_g_x + o_moved, b_g_x.to(p_g_x.dtype.element_ty), m)
    tl.store(p_g_params + o_shift, b_g_t.to(p_g_params.dtype.element_ty), m)
    if MAP != _scale_map.ADDITIVE:
        if SPLIT == CHECKERBOARD:
            b_g_s = tl.where(m_moved, b_g_s, 0.0)
        tl.store(p_g_params + o_scale, b_g_s.to(p_g_params.dtype.element_ty), m)
    if OF == REVERSE:
        b_x = b_x.to(p_x_out.dtype.element_ty)
        if SPLIT == CHECKERBOARD:
            b_x = tl.where(m_moved, b_x, b_x_raw)
        tl.store(p_x_out + o_moved, b_x, m)


# ---------------------------------------------------------------------------------------------------------- launchers


class _Plan(NamedTuple):
    """A launch, by shape alone: no autotuning, so the first call does what every later call does."""

    grid: tuple[int]
    sizes: tuple[int, int, int, int, int]  #: the kernels' n_rows, units, width, height, blocks
    constants: dict[str, int]  #: V, ROWS, COLS and the operator's codes
    warps: int


@lru_cache(maxsize=512)
def _plan(
    shape: tuple[int, ...],
    itemsize: int,
    params_itemsize: int,
    scale_map: int,
    constant: float,
    split: int,
    layout: int,
    flip: bool,
) -> _Plan:
    rows, channels, *spatial = shape
    if scale_map == ScaleMap.ADDITIVE:
        layout = HALVES.value  # the shift alone: one block either way
    if split == CHECKERBOARD.value:
        size = channels * math.prod(spatial)
        height, run = spatial
    else:
        size = (channels if split == NONE.value else channels // 2) * math.prod(spatial)
        interleaved = layout in (INTERLEAVED.value, SHIFT_INTERLEAVED.value) or split == ALTERNATE.value
        height, run = 1, math.prod(spatial) if interleaved else size
    # the longest piece of at most 16 bytes that divides the run of neighbours which share a channel and an image row
    unit = math.gcd(run, 16 // min(itemsize, params_itemsize))
    units = size // unit

    tile = 4096 // itemsize  # numbers: two 16-byte accesses a tensor for each of 128 threads
    whole = triton.next_power_of_2(units) * unit
    if whole <= (2048 if itemsize == 8 else 4096):  # a whole sample, or several
        cols, blocks = whole // unit, 1
        tile = max(tile, whole)
    else:
        cols = tile // unit
        blocks = triton.cdiv(units, cols)
    tile_rows = tile // (cols * unit)
    constants = {
        "MAP": int(scale_map),
        "CONSTANT": float(constant),
        "SPLIT": int(split),
        "LAYOUT": int(layout),
        "FLIP": bool(flip),
        "V": unit,
        "ROWS": tile_rows,
        "COLS": cols,
    }
    single = split == ALTERNATE.value and unit == 1  # every number of a thread has an address of its own
    warps = 4 if tile * itemsize <= 4096 and not single else 8
    grid = triton.cdiv(rows, tile_rows) * blocks
    return _Plan((grid,), (rows, units, run // unit, height, blocks), constants, warps)


def _sum_tile(blocks: int) -> dict[str, int]:
    cols = min(triton.next_power_of_2(blocks), 512)
    return {"STEPS": triton.cdiv(blocks, cols), "ROWS": 512 // cols, "COLS": cols}


def _plan_of(
    input: Tensor, params: Tensor, scale_map: int, constant: float, split: int, layout: int, flip: bool
) -> _Plan:
    return _plan(input.shape, input.element_size(), params.element_size(), scale_map, constant, split, layout, flip)


def _empty_like(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def affine_coupling(
    input: Tensor, params: Tensor, scale_map: int, constant: float, split: int, layout: int, flip: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """`(output, ldj)` of contiguous tensors on one GPU; the caller has checked them. Codes as in the operator's
    schema."""
    rows = input.shape[0]
    output = _empty_like(input)
    ldj = input.new_empty(rows, dtype=torch.float64 if input.dtype == torch.float64 else torch.float32)
    if input.numel() == 0:
        return output, ldj.zero_()
    plan = _plan_of(input, params, scale_map, constant, split, layout, flip)
    blocks = plan.sizes[-1]
    two_stages = blocks > 1 and scale_map != ScaleMap.ADDITIVE
    with torch.cuda.device_of(input):
        sums = ldj.new_empty(rows, blocks) if two_stages else ldj
        _couple_kernel[plan.grid](
            input,
            params,
            output,
            sums,
            *plan.sizes,
            **plan.constants,
            IS_INVERSE=bool(inverse),
            num_warps=plan.warps,
            enable_fp_fusion=True,
        )
        if two_stages:
            _sum(sums, ldj)
    return output, ldj


def _sum(sums: Tensor, ldj: Tensor) -> None:
    """ldj [N] from the tiles' sums [N, blocks]."""
    rows, blocks = sums.shape
    tile = _sum_tile(blocks)
    _sum_kernel[(triton.cdiv(rows, tile["ROWS"]),)](sums, ldj, rows, blocks, **tile, num_warps=4, enable_fp_fusion=True)


def affine_coupling_backward(
    grad_output: Tensor | None,
    grad_ldj: Tensor | None,
    input: Tensor,
    params: Tensor,
    scale_map: int,
    constant: float,
    split: int,
    layout: int,
    flip: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """`(grad_input, grad_params)`; what a missing gradient would have been multiplied by plays no part.
    Conditions as for `affine_coupling`."""
    codes = (scale_map, constant, split, layout, flip)
    of = INVERSE.value if inverse else FORWARD.value
    return _backward(grad_output, grad_ldj, input, params, None, codes, of)


def affine_coupling_reverse(
    grad_output: Tensor | None,
    grad_ldj: Tensor | None,
    output: Tensor,
    params: Tensor,
    scale_map: int,
    constant: float,
    split: int,
    layout: int,
    flip: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(input, grad_input, grad_params)` of the forward from its output. Conditions as for `affine_coupling`."""
    input = _empty_like(output)
    codes = (scale_map, constant, split, layout, flip)
    return input, *_backward(grad_output, grad_ldj, output, params, input, codes, REVERSE.value)


def _backward(grad_output, grad_ldj, saved, params, rebuilt, codes, of):
    grad_input, grad_params = _empty_like(saved), _empty_like(params)
    if saved.numel() == 0:
        return grad_input, grad_params
    if grad_output is None and grad_ldj is None:
        if rebuilt is not None:
            rebuilt.copy_(affine_coupling(saved, params, *codes, True)[0])
        return grad_input.zero_(), grad_params.zero_()
    plan = _plan_of(saved, params, *codes)
    with torch.cuda.device_of(saved):
        _backward_kernel[plan.grid](
            grad_output,
            grad_ldj,
            saved,
            params,
            rebuilt,
            grad_input,
            grad_params,
            *plan.sizes,
            **plan.constants,
            OF=of,
            num_warps=plan.warps,
            enable_fp_fusion=True,
        )
    return grad_input, grad_params


# ------------------------------------------------------------------------------------------ ahead-of-time compilation


def sample_calls() -> SampleCalls:
    """One of each kind as to registers and accesses: `flip` only moves constants."""
    f64, f32, b16 = torch.float64, torch.float32, torch.bfloat16
    large, whole, small, odd = (8, 12, 64, 64), (512, 12, 16, 16), (4096, 2), (64, 6, 7, 7)
    maps, splits, layouts = ScaleMap.words(), Split.words(), Layout.words()
    cases = [(large, f32, f32, code, split, 0) for code in range(4) for split in (0, 1)]
    cases += [(large, f32, f32, code, 2, 2) for code in range(4, len(maps))]
    cases += [(large, f32, f32, 4, 3, 2), (odd, b16, b16, 0, 3, 0)]
    cases += [(odd, f64, f64, code, 2, 3) for code in (4, 5, 7)]
    cases += [(large, b16, b16, code, split, 0) for code in (1, 2) for split in (0, 1)]
    cases += [(large, f32, f32, 2, split, 1) for split in (0, 1)]
    cases += [(large, f64, f64, 2, split, 0) for split in (0, 1)]
    cases += [(large, f32, b16, 2, 0, 0), (whole, f32, f32, 1, 0, 0), (whole, f32, f32, 2, 0, 0)]
    cases += [(whole, b16, b16, 2, 1, 0), (odd, f32, f32, 2, 1, 1), (small, f32, f32, 0, 0, 0)]
    sums = [(dtype, blocks) for dtype in (f32, f64) for blocks in (3, 2048)]
    calls = [
        (f"blocks {n} {t}".replace("torch.float", "fp"), partial(_sum, meta(8, n, dtype=t), meta(8, dtype=t)))
        for t, n in sums
    ]
    for shape, dtype, params_dtype, scale_map, split, layout in cases:
        rows = shape[1] // 2 if split in (CHANNEL.value, ALTERNATE.value) else shape[1]
        rows *= 1 if scale_map == ScaleMap.ADDITIVE else 2
        x, params = meta(*shape, dtype=dtype), meta(shape[0], rows, *shape[2:], dtype=params_dtype)
        g_ldj = meta(shape[0], dtype=torch.promote_types(dtype, f32))
        codes = (scale_map, SCALE_CONSTANTS.get(scale_map, 1.0), split, layout, False)
        kinds = [{f64: "fp64", f32: "fp32", b16: "bf16"}[t] for t in (dtype, params_dtype)]
        label = " ".join(("x".join(map(str, shape)), *kinds, maps[scale_map], splits[split], layouts[layout]))
        for inverse, name in ((False, "forward"), (True, "inverse")):
            calls.append((f"{label} {name}", partial(affine_coupling, x, params, *codes, inverse)))
            backward = partial(affine_coupling_backward, x, g_ldj, x, params, *codes, inverse)
            calls.append((f"{label} of {name}", backward))
        calls.append((f"{label} of reverse", partial(affine_coupling_reverse, x, g_ldj, x, params, *codes)))
    return calls
