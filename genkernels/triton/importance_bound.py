r"""The importance-weighted bound and the Gaussian terms under it on the GPU: one pass each.

.. math:: F_n = \log\frac1K\sum_k e^{\ell_{nk}},\quad \tilde w_{nk} = \frac{\partial F_n}{\partial\ell_{nk}},\qquad
    z = \mu + e^s \varepsilon,\quad r_{nk} = \sum_d \tfrac12\varepsilon^2 + s - \tfrac12 z^2

`genkernels.reference.importance_bound` has the gradients.

The bound: a program takes rows, many where they are short; one that is longer than COLS it goes through three times,
COLS at a time, of which the first alone comes from memory: for the peak, the sum, the weights.

The Gaussian: a program takes ROWS samples of one example and goes through their numbers COLS at a time. Backward: a
program takes COLS numbers of one example and runs down its samples, ROWS at a time, always in the same order: no
atomics, the same bits each run.

Bytes: log-weights once, weights once; backward weights once, the gradient once. The Gaussian reads ε and writes z; its
backward reads ε and the gradient of z. Arithmetic in fp32 (fp64 for fp64), rounded once at the store.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from genkernels.triton import _math
from genkernels.triton._recording import SampleCalls, meta

HALF_LOG_2PI = tl.constexpr(0.5 * math.log(2 * math.pi))
#: Numbers of a program's tile.
TILE = 2048


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _row_tile(p, o_row, m_row, first, columns, COLS: tl.constexpr, other: tl.constexpr):
    """COLS numbers from `first` on of each of the rows, in the type that is computed in, and offsets and mask."""
    o_col = first + tl.arange(0, COLS).to(tl.int64)
    o = (o_row * columns)[:, None] + o_col[None, :]
    m = m_row[:, None] & (o_col < columns)[None, :]
    return _math.widened(tl.load(p + o, m, other=other)), o, m


@triton.jit(do_not_specialize=("rows", "columns", "log_count"))
def _bound_kernel(p_log_w, p_bound, p_weights, rows, columns, log_count, ROWS: tl.constexpr, COLS: tl.constexpr):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    minus_inf: tl.constexpr = float("-inf")
    b_peak = tl.full((ROWS,), minus_inf, p_bound.dtype.element_ty)
    b_bad = tl.zeros((ROWS,), tl.int32)  # whether there is a NaN, which a maximum passes over
    for first in range(0, columns, COLS):
        b_log_w, o, m = _row_tile(p_log_w, o_row, m_row, first, columns, COLS, minus_inf)
        b_is_nan = b_log_w != b_log_w
        b_bad = tl.maximum(b_bad, tl.max(b_is_nan.to(tl.int32), axis=1))
        b_peak = tl.maximum(b_peak, tl.max(tl.where(b_is_nan, minus_inf, b_log_w), axis=1))
    b_finite = (tl.abs(b_peak) != float("inf")) & (b_bad == 0)
    b_base = tl.where(b_finite, b_peak, 0.0)
    b_total = tl.zeros((ROWS,), p_bound.dtype.element_ty)
    for first in range(0, columns, COLS):
        b_log_w, o, m = _row_tile(p_log_w, o_row, m_row, first, columns, COLS, minus_inf)
        b_share = _math.exp(b_log_w - b_base[:, None])
        b_total += tl.sum(tl.where(m & b_finite[:, None], b_share, 0.0), axis=1)
    b_total = tl.where(b_finite, b_total, 1.0)
    for first in range(0, columns, COLS):
        b_log_w, o, m = _row_tile(p_log_w, o_row, m_row, first, columns, COLS, minus_inf)
        b_share = _math.exp(b_log_w - b_base[:, None]) / b_total[:, None]
        b_without = tl.where((b_peak == minus_inf) & (b_bad == 0), 0.0, float("nan"))
        b_share = tl.where(b_finite[:, None], b_share, b_without[:, None])
        tl.store(p_weights + o, b_share.to(p_weights.dtype.element_ty), m)
    b_bound = b_peak.to(tl.float64) + (_math.log(b_total).to(tl.float64) - log_count)
    b_bound = tl.where(b_finite, b_bound.to(b_peak.dtype), tl.where(b_bad != 0, float("nan"), b_peak))
    tl.store(p_bound + o_row, b_bound, m_row)


@triton.jit(do_not_specialize=("rows", "columns"))
def _bound_backward_kernel(
    p_by_bound, p_by_weights, p_weights, p_by_log_w, rows, columns, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """p_by_bound or p_by_weights may be None: zero."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    b_slope = tl.zeros((ROWS,), p_weights.dtype.element_ty)
    if p_by_bound is not None:
        b_slope += tl.load(p_by_bound + o_row, m_row, other=0.0)
    if p_by_weights is not None:
        for first in range(0, columns, COLS):
            b_weight, o, m = _row_tile(p_weights, o_row, m_row, first, columns, COLS, 0.0)
            b_slope -= tl.sum(tl.load(p_by_weights + o, m, other=0.0) * b_weight, axis=1)
    for first in range(0, columns, COLS):
        b_weight, o, m = _row_tile(p_weights, o_row, m_row, first, columns, COLS, 0.0)
        b_by = b_slope[:, None]
        if p_by_weights is not None:
            b_by = b_by + tl.load(p_by_weights + o, m, other=0.0)
        tl.store(p_by_log_w + o, (b_by * b_weight).to(p_by_log_w.dtype.element_ty), m)


@triton.jit(do_not_specialize=("count", "width", "blocks"))
def _reparameterize_kernel(
    p_noise,
    p_mean,
    p_log_scale,
    p_z,
    p_ratio,
    count,
    width,
    blocks,
    PRIOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    o_k = (pid % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_k = o_k < count
    o_sample = row * count + o_k
    b_ratio = tl.zeros((ROWS,), p_ratio.dtype.element_ty)
    for first in range(0, width, COLS):
        o_d = first + tl.arange(0, COLS).to(tl.int64)
        m_d = o_d < width
        m = m_k[:, None] & m_d[None, :]
        o = (o_sample * width)[:, None] + o_d[None, :]
        b_mean = _math.widened(tl.load(p_mean + row * width + o_d, m_d, other=0.0))
        b_log_scale = _math.widened(tl.load(p_log_scale + row * width + o_d, m_d, other=0.0))
        b_noise = _math.widened(tl.load(p_noise + o, m, other=0.0))
        b_z = b_mean[None, :] + _math.exp(b_log_scale)[None, :] * b_noise
        tl.store(p_z + o, b_z.to(p_z.dtype.element_ty), m)
        b_term = 0.5 * b_noise * b_noise + b_log_scale[None, :]
        b_term = b_term - 0.5 * b_z * b_z if PRIOR else b_term + HALF_LOG_2PI
        b_ratio += tl.sum(tl.where(m, b_term, 0.0), axis=1)
    tl.store(p_ratio + o_sample, b_ratio, m_k)


@triton.jit(do_not_specialize=("count", "width", "blocks"))
def _reparameterize_backward_kernel(
    p_by_z,
    p_by_ratio,
    p_noise,
    p_mean,
    p_log_scale,
    p_by_mean,
    p_by_log_scale,
    count,
    width,
    blocks,
    PRIOR: tl.constexpr,
    STOPPED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """p_by_z or p_by_ratio may be None: zero, and what it would have been multiplied by plays no part."""
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    o_d = (pid % blocks).to(tl.int64) * COLS + tl.arange(0, COLS)
    m_d = o_d < width
    b_mean = _math.widened(tl.load(p_mean + row * width + o_d, m_d, other=0.0))
    b_scale = _math.exp(_math.widened(tl.load(p_log_scale + row * width + o_d, m_d, other=0.0)))
    b_g = tl.zeros((COLS,), b_mean.dtype)
    b_g_noise = tl.zeros((COLS,), b_mean.dtype)
    b_r_noise = tl.zeros((COLS,), b_mean.dtype)
    b_direct = tl.zeros((COLS,), b_mean.dtype)  # what reaches s past z, or as if it did
    for first in range(0, count, ROWS):
        o_k = first + tl.arange(0, ROWS).to(tl.int64)
        m_k = o_k < count
        m = m_k[:, None] & m_d[None, :]
        o = ((row * count + o_k) * width)[:, None] + o_d[None, :]
        b_noise = _math.widened(tl.load(p_noise + o, m, other=0.0))
        b_by_z = tl.zeros((ROWS, COLS), b_mean.dtype)
        if p_by_z is not None:
            b_by_z += _math.widened(tl.load(p_by_z + o, m, other=0.0))
        if p_by_ratio is not None:
            b_ratio = tl.load(p_by_ratio + row * count + o_k, m_k, other=0.0)[:, None]
            if PRIOR:
                b_by_z -= tl.where(m, b_ratio * (b_mean[None, :] + b_scale[None, :] * b_noise), 0.0)
            if STOPPED:
                b_r_noise += tl.sum(b_ratio * b_noise, axis=0)
                b_direct += tl.sum(b_ratio * b_noise * b_noise, axis=0)
            else:
                b_direct += tl.sum(b_ratio, axis=0)
        b_g += tl.sum(b_by_z, axis=0)
        b_g_noise += tl.sum(b_by_z * b_noise, axis=0)
    b_by_log_scale = b_scale * b_g_noise + b_direct
    b_by_mean = b_g
    if (p_by_ratio is not None) and STOPPED:
        b_by_mean += b_r_noise / b_scale
    o = row * width + o_d
    tl.store(p_by_mean + o, b_by_mean.to(p_by_mean.dtype.element_ty), m_d)
    tl.store(p_by_log_scale + o, b_by_log_scale.to(p_by_log_scale.dtype.element_ty), m_d)


# ---------------------------------------------------------------------------------------------------------- launchers


def _work(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _tile(length: int, like: Tensor, most: int = TILE) -> tuple[int, int]:
    """Rows and columns of a tile, powers of two; of fp64, which fills registers twice as fast, half as many."""
    numbers = TILE // 2 if like.dtype == torch.float64 else TILE
    cols = min(triton.next_power_of_2(length), most, numbers)
    return numbers // cols, cols


def importance_bound(log_w: Tensor) -> tuple[Tensor, Tensor]:
    """``(bound, weights)`` of a contiguous tensor on a GPU; the caller has checked it."""
    rows, columns = log_w.shape
    bound, weights = log_w.new_empty(rows, dtype=_work(log_w)), log_w.new_empty(log_w.shape, dtype=_work(log_w))
    if log_w.numel():
        at_once, cols = _tile(columns, log_w)
        with torch.cuda.device_of(log_w):
            _bound_kernel[(triton.cdiv(rows, at_once),)](
                log_w, bound, weights, rows, columns, math.log(columns), ROWS=at_once, COLS=cols, enable_fp_fusion=True
            )
    return bound, weights


def importance_bound_backward(
    grad_bound: Tensor | None, grad_weights: Tensor | None, weights: Tensor, like: Tensor
) -> Tensor:
    """The gradient by ``log_w``. Conditions as for `importance_bound`."""
    by_log_w = weights.new_empty(weights.shape, dtype=like.dtype)
    if weights.numel():
        rows, columns = weights.shape
        at_once, cols = _tile(columns, weights)
        with torch.cuda.device_of(weights):
            _bound_backward_kernel[(triton.cdiv(rows, at_once),)](
                grad_bound,
                grad_weights,
                weights,
                by_log_w,
                rows,
                columns,
                ROWS=at_once,
                COLS=cols,
                enable_fp_fusion=True,
            )
    return by_log_w


def gaussian_reparameterize(
    noise: Tensor, mean: Tensor, log_scale: Tensor, prior: bool, stopped: bool
) -> tuple[Tensor, Tensor]:
    """``(z, log_ratio)``. Conditions as for `importance_bound`."""
    rows, count, width = noise.shape
    z, ratio = noise.new_empty(noise.shape), noise.new_empty((rows, count), dtype=_work(noise))
    if ratio.numel():
        at_once, cols = _tile(max(width, 1), noise, 512)
        at_once = min(at_once, triton.next_power_of_2(count))
        blocks = triton.cdiv(count, at_once)
        with torch.cuda.device_of(noise):
            _reparameterize_kernel[(rows * blocks,)](
                noise,
                mean,
                log_scale,
                z,
                ratio,
                count,
                width,
                blocks,
                PRIOR=bool(prior),
                ROWS=at_once,
                COLS=cols,
                enable_fp_fusion=True,
            )
    return z, ratio


def gaussian_reparameterize_backward(
    grad_z: Tensor | None,
    grad_ratio: Tensor | None,
    noise: Tensor,
    mean: Tensor,
    log_scale: Tensor,
    prior: bool,
    stopped: bool,
) -> tuple[Tensor, Tensor]:
    """``(grad_mean, grad_log_scale)``. Conditions as for `importance_bound`."""
    by_mean, by_log_scale = mean.new_empty(mean.shape), log_scale.new_empty(log_scale.shape)
    if mean.numel():
        rows, count, width = noise.shape
        cols = min(triton.next_power_of_2(width), 32)  # more programs, each with more samples at once
        at_once = min(TILE // cols, max(triton.next_power_of_2(count), 1))
        blocks = triton.cdiv(width, cols)
        with torch.cuda.device_of(noise):
            _reparameterize_backward_kernel[(rows * blocks,)](
                grad_z,
                grad_ratio,
                noise,
                mean,
                log_scale,
                by_mean,
                by_log_scale,
                count,
                width,
                blocks,
                PRIOR=bool(prior),
                STOPPED=bool(stopped),
                ROWS=at_once,
                COLS=cols,
                enable_fp_fusion=True,
            )
    return by_mean, by_log_scale


# ------------------------------------------------------------------------------------------ ahead-of-time compilation


def sample_calls() -> SampleCalls:
    """Short rows and long ones; each choice of prior and of what is stopped, and gradients that are not there."""
    calls = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        work = torch.promote_types(dtype, torch.float32)
        for shape in ((4096, 50), (100, 5000)):
            log_w, weights, row = meta(*shape, dtype=dtype), meta(*shape, dtype=work), meta(shape[0], dtype=work)
            calls.append((f"{name} {shape[1]}", partial(importance_bound, log_w)))
            for kind, grads in (("bound", (row, None)), ("weights", (None, weights)), ("both", (row, weights))):
                backward = partial(importance_bound_backward, *grads, weights, log_w)
                calls.append((f"{name} {shape[1]} backward by {kind}", backward))
        for n, k, d in ((100, 50, 50), (16, 8, 3072)):
            noise, row, ratio = meta(n, k, d, dtype=dtype), meta(n, d, dtype=dtype), meta(n, k, dtype=work)
            for prior in (True, False):
                kind = f"{name} {d}{' prior' if prior else ''}"
                calls.append((f"{kind} drawn", partial(gaussian_reparameterize, noise, row, row, prior, False)))
                for stopped in (True, False):
                    for grads in ((noise, ratio), (noise, None), (None, ratio)):
                        arguments = (*grads, noise, row, row, prior, stopped)
                        label = f"{kind}{' stopped' if stopped else ''} drawn backward {[g is not None for g in grads]}"
                        calls.append((label, partial(gaussian_reparameterize_backward, *arguments)))
    return calls
