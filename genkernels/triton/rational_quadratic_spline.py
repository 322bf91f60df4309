r"""Rational-quadratic splines on the GPU, in one kernel each way: `genkernels.reference.rational_quadratic_spline` has
the maths.

.. math:: y = y_0 + h\,\frac{s\xi^2 + d_0\xi\eta}{s(\xi^2 + \eta^2) + (d_0 + d_1)\xi\eta}

Durkan et al. 2019. A program takes ROWS rows by COLS numbers; their logits stand in blocks [ROWS * COLS, BINS], BINS
the power of two from K on, where a softmax and its running sum are sums along the second axis. What a number's bin
needs is taken out of a block by a sum, its two raw slopes are loaded. Log-determinants of rows that are cut leave a
partial sum each, which torch adds up: no atomics, the same bits each run.

Saved for backward: x (of the inverse its output) and params. Bytes, a number of K = 8 in fp32: 100 forward, 196
backward. Arithmetic in fp32 (fp64 for fp64), rounded once at the store. K and the options are compiled in: they are a
model's, and few.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from genkernels._options import Spline
from genkernels.triton import _math
from genkernels.triton._recording import SampleCalls, meta

SIZES = ("rows", "length", "blocks")
ZUKO, CIRCULAR = tl.constexpr(int(Spline.ZUKO)), tl.constexpr(int(Spline.CIRCULAR))
LANES = 1024  # logits that a program holds in a block; a quarter of 8 bytes


@triton.jit
def _numbers(rows, length, blocks, ROWS: tl.constexpr, COLS: tl.constexpr):
    """This program's first row and block, its numbers [ROWS * COLS], their rows, and which of them there are."""
    row, block = tl.program_id(0).to(tl.int64) // blocks * ROWS, tl.program_id(0) % blocks
    o = tl.arange(0, ROWS * COLS)
    o_row, o_col = row + o // COLS, block.to(tl.int64) * COLS + o % COLS
    return row, block, o_row * length + o_col, o_row, (o_row < rows) & (o_col < length)


@triton.jit
def _softmax(p, o, m, SCALE: tl.constexpr, CLIP: tl.constexpr, KIND: tl.constexpr):
    """The softmax along the second axis, and the slope of each logit by its raw number."""
    b_u = SCALE * _math.widened(tl.load(p + o, m, other=0.0))
    b_slope = tl.full(b_u.shape, SCALE, b_u.dtype)
    if KIND == ZUKO:
        b_shrink = 1.0 / (1.0 + tl.abs(2 * CLIP * b_u))
        b_u, b_slope = b_u * b_shrink, b_slope * b_shrink * b_shrink
    b_u = tl.where(m, b_u, float("-inf"))
    b_peak = tl.max(b_u, axis=1, keep_dims=True)
    b_e = tl.where(m, _math.exp(b_u - tl.where(b_peak == float("-inf"), 0.0, b_peak)), 0.0)
    b_sum = tl.sum(b_e, axis=1, keep_dims=True)
    return b_e / tl.where(b_sum == 0, 1.0, b_sum), b_slope


@triton.jit
def _knot_slope(p, o, m, FLOOR: tl.constexpr, CLIP: tl.constexpr, KIND: tl.constexpr):
    """The slope and its own by the raw number at p + o; 1 and 0 where there is none."""
    b_raw = _math.widened(tl.load(p + o, m, other=0.0))
    if KIND == ZUKO:
        b_shrink = 1.0 / (1.0 + tl.abs(CLIP * b_raw))
        b_value = _math.exp(b_raw * b_shrink)
        b_by_raw = b_value * b_shrink * b_shrink
    else:
        b_e = _math.exp(-tl.abs(b_raw))
        b_near = _math.reciprocal_of_sum(1.0, b_e)
        b_tail = _math.log1p(b_e)
        b_value = FLOOR + tl.where(b_raw < 0, b_tail, b_raw + b_tail)
        b_by_raw = tl.where(b_raw < 0, b_e * b_near, b_near)
    return tl.where(m, b_value, 1.0), tl.where(m, b_by_raw, 0.0)


@triton.jit
def _taken(b, m_at):
    """Of each row the one number where `m_at`."""
    return tl.sum(tl.where(m_at, b, 0.0), axis=1)


@triton.jit
def _held(b, low, high):
    """Keeps a NaN."""
    return tl.where(b > high, high, tl.where(b < low, low, b))


@triton.jit
def _bins(
    p_params,
    o,
    m,
    b_value,
    BY_HEIGHT: tl.constexpr,
    KIND: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    BINS: tl.constexpr,
    BOUND: tl.constexpr,
    SCALE: tl.constexpr,
    FLOOR: tl.constexpr,
    CLIP: tl.constexpr,
):
    """The softmaxes and their logits' slopes; the bin of each number: its place, the softmaxes below it and in it, and
    left, width, bottom, height, the slopes at its ends and theirs by the raw numbers."""
    LEAST: tl.constexpr = 0.0 if KIND == ZUKO else FLOOR
    REST: tl.constexpr = 1.0 - K * LEAST
    o_k = tl.arange(0, BINS)[None, :]
    o_p = o[:, None] * P + o_k
    m_k = m[:, None] & (o_k < K)
    b_w, b_w_slope = _softmax(p_params, o_p, m_k, SCALE, CLIP, KIND)
    b_h, b_h_slope = _softmax(p_params, o_p + K, m_k, SCALE, CLIP, KIND)
    b_w_below, b_h_below = tl.cumsum(b_w, axis=1) - b_w, tl.cumsum(b_h, axis=1) - b_h
    b_knots = 2 * BOUND * (o_k.to(b_w.dtype) * LEAST + REST * (b_h_below if BY_HEIGHT else b_w_below)) - BOUND
    m_below = (o_k > 0) & (o_k < K) & (b_knots <= b_value[:, None])
    b_place = tl.sum(m_below.to(tl.int32), axis=1)
    m_at = o_k == b_place[:, None]
    b_w_before, b_w_in = _taken(b_w_below, m_at), _taken(b_w, m_at)
    b_h_before, b_h_in = _taken(b_h_below, m_at), _taken(b_h, m_at)
    b_left = 2 * BOUND * (b_place.to(b_w.dtype) * LEAST + REST * b_w_before) - BOUND
    b_bottom = 2 * BOUND * (b_place.to(b_w.dtype) * LEAST + REST * b_h_before) - BOUND
    b_width, b_height = 2 * BOUND * (LEAST + REST * b_w_in), 2 * BOUND * (LEAST + REST * b_h_in)
    o_raw = o * P + 2 * K
    if KIND == CIRCULAR:
        b_first, b_by_first = _knot_slope(p_params, o_raw + b_place, m, FLOOR, CLIP, KIND)
        b_last, b_by_last = _knot_slope(p_params, o_raw + (b_place + 1) % K, m, FLOOR, CLIP, KIND)
    else:
        b_first, b_by_first = _knot_slope(p_params, o_raw + (b_place - 1), m & (b_place > 0), FLOOR, CLIP, KIND)
        b_last, b_by_last = _knot_slope(p_params, o_raw + b_place, m & (b_place < K - 1), FLOOR, CLIP, KIND)
    softmaxes = b_w, b_h, b_w_slope, b_h_slope
    parts = b_place, b_w_before, b_w_in, b_h_before, b_h_in
    return softmaxes, parts, b_left, b_width, b_bottom, b_height, b_first, b_last, b_by_first, b_by_last


@triton.jit
def mapped(
    p_params,
    o,
    m,
    b_x,
    INVERSE: tl.constexpr,
    KIND: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    BINS: tl.constexpr,
    BOUND: tl.constexpr,
    SCALE: tl.constexpr,
    FLOOR: tl.constexpr,
    CLIP: tl.constexpr,
):
    """y of x, or x of y (INVERSE), and the log-slope of the way taken, 0 where there is no number; its parameters begin
    at p_params + o * P."""
    _, _, b_left, b_width, b_bottom, b_height, b_d0, b_d1, _, _ = _bins(
        p_params, o, m, b_x, INVERSE, KIND, K, P, BINS, BOUND, SCALE, FLOOR, CLIP
    )
    b_s = b_height / b_width
    if INVERSE:
        b_r = _held((b_x - b_bottom) / b_height, 0.0, 1.0)
        b_q = 1.0 - b_r
        b_b = b_d0 * b_q - b_d1 * b_r
        b_root = tl.sqrt(b_b * b_b + 4.0 * b_s * b_s * (b_r * b_q))
        b_above = tl.where(b_b < 0, b_root - b_b, 2.0 * b_s * b_r)
        b_below = tl.where(b_b < 0, 2.0 * b_s * b_q, b_b + b_root)
        b_per_sum = 1.0 / (b_above + b_below)
        b_xi, b_eta = b_above * b_per_sum, b_below * b_per_sum
    else:
        b_xi = _held((b_x - b_left) / b_width, 0.0, 1.0)
        b_eta = 1.0 - b_xi
    b_both, b_squares = b_xi * b_eta, b_xi * b_xi + b_eta * b_eta
    b_d = b_s * b_squares + (b_d0 + b_d1) * b_both
    b_n = b_d1 * (b_xi * b_xi) + 2.0 * b_s * b_both + b_d0 * (b_eta * b_eta)
    b_ldj = _math.log(b_n) + 2.0 * _math.log(b_s / b_d)
    if INVERSE:
        b_out, b_ldj = b_left + b_width * b_xi, -b_ldj
    else:
        b_out = b_bottom + b_height * ((b_s * b_xi + b_d0 * b_eta) * b_xi / b_d)
    b_out = _held(b_out, -BOUND, BOUND)
    b_ldj = tl.where(b_out == b_out, b_ldj, b_out)
    m_out = tl.abs(b_x) > BOUND
    return tl.where(m_out, b_x, b_out), tl.where(m & (m_out == 0), b_ldj, 0.0)


@triton.jit(do_not_specialize=SIZES)
def _spline_kernel(
    p_x,
    p_params,
    p_out,
    p_ldj,
    rows,
    length,
    blocks,
    INVERSE: tl.constexpr,
    KIND: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    BINS: tl.constexpr,
    BOUND: tl.constexpr,
    SCALE: tl.constexpr,
    FLOOR: tl.constexpr,
    CLIP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """p_ldj [rows, blocks]: partial sums."""
    row, block, o, _, m = _numbers(rows, length, blocks, ROWS, COLS)
    b_x = _math.widened(tl.load(p_x + o, m, other=0.0))
    b_out, b_ldj = mapped(p_params, o, m, b_x, INVERSE, KIND, K, P, BINS, BOUND, SCALE, FLOOR, CLIP)
    tl.store(p_out + o, b_out.to(p_out.dtype.element_ty), m)
    o_row = row + tl.arange(0, ROWS)
    tl.store(p_ldj + (o_row * blocks + block), tl.sum(tl.reshape(b_ldj, (ROWS, COLS)), axis=1), o_row < rows)


@triton.jit
def gradients(
    p_params,
    p_by_params,
    o,
    m,
    b_x,
    b_given,
    b_gamma,
    INVERSE: tl.constexpr,
    KIND: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    BINS: tl.constexpr,
    BOUND: tl.constexpr,
    SCALE: tl.constexpr,
    FLOOR: tl.constexpr,
    CLIP: tl.constexpr,
):
    """The gradient by the input from those by the output and by the log-slope, at x; those by the parameters are
    stored."""
    softmaxes, parts, b_left, b_width, _, b_height, b_d0, b_d1, b_by_first, b_by_last = _bins(
        p_params, o, m, b_x, False, KIND, K, P, BINS, BOUND, SCALE, FLOOR, CLIP
    )
    b_w, b_h, b_w_slope, b_h_slope = softmaxes
    b_place, b_w_before, b_w_in, b_h_before, b_h_in = parts
    b_s = b_height / b_width
    b_xi = _held((b_x - b_left) / b_width, 0.0, 1.0)
    b_eta = 1.0 - b_xi
    b_both, b_xi2, b_eta2 = b_xi * b_eta, b_xi * b_xi, b_eta * b_eta
    b_d = b_s * (b_xi2 + b_eta2) + (b_d0 + b_d1) * b_both
    b_n = b_d1 * b_xi2 + 2.0 * b_s * b_both + b_d0 * b_eta2
    b_per_n, b_per_d, b_per_w = 1.0 / b_n, 1.0 / b_d, 1.0 / b_width
    b_per_d2 = b_per_d * b_per_d
    b_ell_xi = 2.0 * (
        (b_xi * (b_d1 - b_s) + b_eta * (b_s - b_d0)) * b_per_n - (b_d0 + b_d1 - 2.0 * b_s) * (b_eta - b_xi) * b_per_d
    )
    b_ell_s = 2.0 * (b_both * b_per_n + 1.0 / b_s - (b_xi2 + b_eta2) * b_per_d)
    b_from_below, b_from_above = b_s * b_xi + b_d0 * b_eta, b_s * b_eta + b_d1 * b_xi
    b_by_bottom = b_given
    if INVERSE:
        b_gamma = -b_gamma
        b_by_x = (b_given + b_gamma * b_ell_xi * b_per_w) / (b_s * b_s * b_n * b_per_d2)
        b_by_bottom = -b_by_x
    b_rise = b_by_bottom * b_height
    b_by_xi = b_rise * (b_s * b_n * b_per_d2) + b_gamma * b_ell_xi
    b_by_s = b_rise * (b_both * (b_d1 * b_xi2 - b_d0 * b_eta2) * b_per_d2) + b_gamma * b_ell_s
    b_by_left = -b_by_xi * b_per_w
    b_by_width = -(b_by_xi * b_xi + b_by_s * b_s) * b_per_w
    b_by_height = b_by_bottom * (b_from_below * b_xi * b_per_d) + b_by_s * b_per_w
    b_by_d0 = b_rise * (b_both * b_eta * b_from_above * b_per_d2)
    b_by_d0 += b_gamma * (b_eta2 * b_per_n - 2.0 * b_both * b_per_d)
    b_by_d1 = b_gamma * (b_xi2 * b_per_n - 2.0 * b_both * b_per_d)
    b_by_d1 -= b_rise * (b_both * b_xi * b_from_below * b_per_d2)
    if not INVERSE:
        b_by_x = -b_by_left
    m_out = tl.abs(b_x) > BOUND
    FACTOR: tl.constexpr = 2 * BOUND * (1.0 if KIND == ZUKO else 1.0 - K * FLOOR)
    o_k = tl.arange(0, BINS)[None, :]
    o_p = o[:, None] * P + o_k
    m_k = m[:, None] & (o_k < K)
    b_at = b_place[:, None]
    b_mean = b_by_left * b_w_before + b_by_width * b_w_in
    b_by_w = tl.where(o_k < b_at, b_by_left[:, None], tl.where(o_k == b_at, b_by_width[:, None], 0.0))
    b_by_w = FACTOR * b_w_slope * b_w * (b_by_w - b_mean[:, None])
    b_by_w = tl.where(m_out[:, None], 0.0, b_by_w)
    tl.store(p_by_params + o_p, b_by_w.to(p_by_params.dtype.element_ty), m_k)
    b_mean = b_by_bottom * b_h_before + b_by_height * b_h_in
    b_by_h = tl.where(o_k < b_at, b_by_bottom[:, None], tl.where(o_k == b_at, b_by_height[:, None], 0.0))
    b_by_h = FACTOR * b_h_slope * b_h * (b_by_h - b_mean[:, None])
    b_by_h = tl.where(m_out[:, None], 0.0, b_by_h)
    tl.store(p_by_params + (o_p + K), b_by_h.to(p_by_params.dtype.element_ty), m_k)
    # raw number i is the slope at knot i + 1, circular at knot i, and at knot K where i = 0
    b_by_d0 = tl.where(m_out, 0.0, b_by_d0 * b_by_first)[:, None]
    b_by_d1 = tl.where(m_out, 0.0, b_by_d1 * b_by_last)[:, None]
    if KIND == CIRCULAR:
        m_first, m_last = o_k == b_at, o_k == (b_at + 1) % K
    else:
        m_first, m_last = o_k + 1 == b_at, o_k == b_at
    b_by_v = tl.where(m_first, b_by_d0, 0.0) + tl.where(m_last, b_by_d1, 0.0)
    tl.store(p_by_params + (o_p + 2 * K), b_by_v.to(p_by_params.dtype.element_ty), m[:, None] & (o_k < P - 2 * K))
    return tl.where(m_out, b_given, b_by_x)


@triton.jit(do_not_specialize=SIZES)
def _spline_backward_kernel(
    p_grad,
    p_grad_ldj,
    p_x,
    p_params,
    p_by_x,
    p_by_params,
    rows,
    length,
    blocks,
    INVERSE: tl.constexpr,
    KIND: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    BINS: tl.constexpr,
    BOUND: tl.constexpr,
    SCALE: tl.constexpr,
    FLOOR: tl.constexpr,
    CLIP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """A gradient may be None."""
    _, _, o, o_row, m = _numbers(rows, length, blocks, ROWS, COLS)
    b_x = _math.widened(tl.load(p_x + o, m, other=0.0))
    b_given = tl.zeros(b_x.shape, b_x.dtype)
    if p_grad is not None:
        b_given += _math.widened(tl.load(p_grad + o, m, other=0.0))
    b_gamma = tl.zeros(b_x.shape, b_x.dtype)
    if p_grad_ldj is not None:
        b_gamma += tl.load(p_grad_ldj + o_row, m, other=0.0)
    b_by_x = gradients(
        p_params, p_by_params, o, m, b_x, b_given, b_gamma, INVERSE, KIND, K, P, BINS, BOUND, SCALE, FLOOR, CLIP
    )
    tl.store(p_by_x + o, b_by_x.to(p_by_x.dtype.element_ty), m)


# ----------------------------------------------------------------------------------------------------------- launchers


def compiled_in(count: int, kind: int, bound: float, logit_scale: float, floor: float) -> dict:
    """What kernels know of splines of `count` parameters when they are compiled."""
    bins = (count + (kind != Spline.CIRCULAR)) // 3
    constants = {"KIND": int(kind), "K": bins, "P": count, "BINS": triton.next_power_of_2(bins), "BOUND": float(bound)}
    return constants | {"SCALE": float(logit_scale), "FLOOR": float(floor), "CLIP": -1 / math.log(floor)}


def _plan(x: Tensor, params: Tensor, kind: int, bound: float, logit_scale: float, floor: float, inverse: bool):
    """The grid, the sizes and what is compiled in."""
    constants = {"INVERSE": inverse} | compiled_in(params.shape[-1], kind, bound, logit_scale, floor)
    numbers = max(1, (LANES // 4 if x.dtype == torch.float64 else LANES) // constants["BINS"])
    rows, length = x.shape[0], math.prod(x.shape[1:])
    cols = min(numbers, triton.next_power_of_2(length))
    constants |= {"ROWS": numbers // cols, "COLS": cols, "num_warps": 4}
    blocks = triton.cdiv(length, cols)
    return (triton.cdiv(rows, numbers // cols) * blocks,), (rows, length, blocks), constants


def rational_quadratic_spline(
    input: Tensor, params: Tensor, parametrization: int, bound: float, logit_scale: float, floor: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Contiguous tensors on one GPU; the caller has checked them."""
    work = torch.promote_types(input.dtype, torch.float32)
    output = torch.empty_like(input)
    if not input.numel():
        return output, input.new_zeros(input.shape[:1], dtype=work)
    grid, sizes, constants = _plan(input, params, parametrization, bound, logit_scale, floor, inverse)
    parts = input.new_empty((sizes[0], sizes[2]), dtype=work)
    with torch.cuda.device_of(input):
        _spline_kernel[grid](input, params, output, parts, *sizes, **constants)
    return output, parts.view(-1) if sizes[2] == 1 else parts.sum(1)


def rational_quadratic_spline_backward(
    grad_output: Tensor | None,
    grad_ldj: Tensor | None,
    x: Tensor,
    params: Tensor,
    parametrization: int,
    bound: float,
    logit_scale: float,
    floor: float,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients by the input and by params. Conditions as for `rational_quadratic_spline`."""
    by_x, by_params = torch.empty_like(x), torch.empty_like(params)
    if x.numel():
        grid, sizes, constants = _plan(x, params, parametrization, bound, logit_scale, floor, inverse)
        with torch.cuda.device_of(x):
            _spline_backward_kernel[grid](grad_output, grad_ldj, x, params, by_x, by_params, *sizes, **constants)
    return by_x, by_params


# ------------------------------------------------------------------------------------------ ahead-of-time compilation


def sample_calls() -> SampleCalls:
    """Points of each parametrization; of nflows' images, more bins and other dtypes too, of zuko's fp64, which takes
    the most registers."""
    nflows, zuko, circular = Spline
    fp32, fp64, bf16 = torch.float32, torch.float64, torch.bfloat16
    cases = [((4096, 16), 8, kind, fp32) for kind in (nflows, zuko, circular)]
    cases += [((256, 3072), 8, nflows, fp32), ((4096, 16), 32, nflows, fp32), ((4096, 16), 8, nflows, bf16)]
    cases += [((4096, 16), 8, kind, fp64) for kind in (nflows, zuko)]
    calls = []
    for shape, bins, kind, dtype in cases:
        x, ldj = meta(*shape, dtype=dtype), meta(shape[0], dtype=torch.promote_types(dtype, fp32))
        params = meta(*shape, 3 * bins - (kind != circular), dtype=dtype)
        label = f"{'x'.join(map(str, (*shape, bins)))} {str(dtype).removeprefix('torch.')} {kind.name.lower()}"
        for inverse in (False, True):
            given, way = (int(kind), 5.0, 1.0, 1e-3, inverse), " inverse" if inverse else ""
            calls.append((label + way, partial(rational_quadratic_spline, x, params, *given)))
            back = partial(rational_quadratic_spline_backward, x, ldj, x, params, *given)
            calls.append((f"{label}{way} backward", back))
    return calls
