r"""Leaky ReLU with bias, gain and clamp on the GPU: one pass forward, one backward.

.. math:: y = \mathrm{clamp}\bigl(\gamma\,\phi(x + b),\ \pm m\bigr)

Karras et al. 2020; `genkernels.reference.bias_leaky_relu` has the gradients.

Layout: [N * C, S], contiguous, in tiles of rows that have one bias each (`_rows`). y alone is saved for backward.

The gradient of the bias: backward's programs add up their rows' parts, [N, C, blocks], in a fixed order; a second
kernel adds up samples and parts of COLUMNS channels, so too. No atomics: the same bits each run.

Bytes: forward reads x and writes y; backward reads the gradient and y and writes the gradient of x. Arithmetic in fp32
(fp64 for fp64), rounded once at the store.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from genkernels.triton import _math, _rows
from genkernels.triton._recording import SampleCalls, meta

COLUMNS, PARTS = 16, 64


@triton.jit(do_not_specialize=(*_rows.SIZES, "channels"))
def _activate_kernel(
    p_x,
    p_bias,
    p_y,
    rows,
    units,
    blocks,
    channels,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SLOPE: tl.constexpr,
    GAIN: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """p_bias may be None; a CLAMP of None is none."""
    o_row, m_row, o, m = _rows.tile(rows, units, blocks, V, ROWS, COLS)
    b_a = _math.widened(tl.load(p_x + o, m))
    if p_bias is not None:
        b_a += tl.load(p_bias + o_row % channels, m_row)[:, None]
    b_y = GAIN * tl.where(b_a > 0, b_a, SLOPE * b_a)
    if CLAMP is not None:
        b_limit = tl.full((1, 1), CLAMP, b_y.dtype).to(p_y.dtype.element_ty).to(b_y.dtype)
        b_y = tl.where(b_y >= b_limit, b_limit, tl.where(b_y <= -b_limit, -b_limit, b_y))
    tl.store(p_y + o, b_y.to(p_y.dtype.element_ty), m)


@triton.jit(do_not_specialize=_rows.SIZES)
def _backward_kernel(
    p_grad,
    p_y,
    p_by_x,
    p_sums,
    rows,
    units,
    blocks,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SLOPE: tl.constexpr,
    GAIN: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """p_sums [rows, blocks] may be None, where nobody asks for the gradient of the bias."""
    o_row, m_row, o, m = _rows.tile(rows, units, blocks, V, ROWS, COLS)
    b_grad = _math.widened(tl.load(p_grad + o, m, other=0.0))
    b_y = _math.widened(tl.load(p_y + o, m, other=0.0))
    if CLAMP is not None:
        b_limit = tl.full((1, 1), CLAMP, b_y.dtype).to(p_y.dtype.element_ty).to(b_y.dtype)
        b_grad = tl.where(tl.abs(b_y) >= b_limit, 0.0, b_grad)
    b_by_x = GAIN * tl.where(b_y > 0, b_grad, SLOPE * b_grad)
    tl.store(p_by_x + o, b_by_x.to(p_by_x.dtype.element_ty), m)
    if p_sums is not None:
        tl.store(p_sums + (o_row * blocks + tl.program_id(0) % blocks), tl.sum(b_by_x, axis=1), m_row)


@triton.jit(do_not_specialize=("samples", "channels", "blocks"))
def _bias_kernel(p_sums, p_by_bias, samples, channels, blocks, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """The gradient of the bias [C] from the parts [N, C, blocks], PARTS at a time."""
    o_c = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < channels
    b_sum = tl.zeros((PARTS, COLUMNS), p_by_bias.dtype.element_ty)
    count = samples.to(tl.int64) * blocks
    for first in range(0, count, PARTS):
        o_part = first + tl.arange(0, PARTS)
        o = (o_part // blocks * channels * blocks + o_part % blocks)[:, None] + (o_c * blocks)[None, :]
        b_sum += tl.load(p_sums + o, (o_part < count)[:, None] & m_c[None, :], other=0.0)
    tl.store(p_by_bias + o_c, tl.sum(b_sum, axis=0), m_c)


def _plan(x: Tensor) -> _rows.Plan:
    return _rows.plan(x.shape[0] * x.shape[1], math.prod(x.shape[2:]), x.element_size())


def _curve(negative_slope: float, gain: float, clamp: float) -> dict[str, float | None]:
    return {"SLOPE": float(negative_slope), "GAIN": float(gain), "CLAMP": float(clamp) if clamp < math.inf else None}


def bias_leaky_relu(x: Tensor, bias: Tensor | None, negative_slope: float, gain: float, clamp: float) -> Tensor:
    """Contiguous tensors on one GPU; the caller has checked them."""
    y = x.new_empty(x.shape)
    if y.numel():
        plan, curve = _plan(x), _curve(negative_slope, gain, clamp)
        with torch.cuda.device_of(x):
            _activate_kernel[plan.grid](
                x,
                bias,
                y,
                *plan.sizes,
                x.shape[1],
                **plan.constants,
                **curve,
                num_warps=plan.warps,
                enable_fp_fusion=True,
            )
    return y


def bias_leaky_relu_backward(
    grad: Tensor, y: Tensor, with_bias: bool, negative_slope: float, gain: float, clamp: float
) -> tuple[Tensor, Tensor]:
    """``(grad_x, grad_bias)``. Conditions as for `bias_leaky_relu`."""
    samples, channels = y.shape[:2]
    by_x = y.new_empty(y.shape)
    by_bias = y.new_empty(channels if with_bias else 0, dtype=torch.promote_types(y.dtype, torch.float32))
    if y.numel() == 0:
        return by_x, by_bias.zero_()
    plan, curve = _plan(y), _curve(negative_slope, gain, clamp)
    blocks = plan.sizes[-1]
    with torch.cuda.device_of(y):
        sums = by_bias.new_empty(samples * channels, blocks) if with_bias else None
        _backward_kernel[plan.grid](
            grad, y, by_x, sums, *plan.sizes, **plan.constants, **curve, num_warps=plan.warps, enable_fp_fusion=True
        )
        if with_bias:
            grid = (triton.cdiv(channels, COLUMNS),)
            _bias_kernel[grid](
                sums, by_bias, samples, channels, blocks, COLUMNS=COLUMNS, PARTS=PARTS, enable_fp_fusion=True
            )
    return by_x, by_bias


def sample_calls() -> SampleCalls:
    calls = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for shape in ((4096, 2), (16, 64, 7, 7), (16, 128, 64, 64)):
            x = meta(*shape, dtype=dtype)
            bias = meta(shape[1], dtype=torch.promote_types(dtype, torch.float32))
            label = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
            for clamp in (math.inf, 256.0):
                options = (0.2, math.sqrt(2), clamp)
                calls.append((f"{label} {clamp}", partial(bias_leaky_relu, x, bias, *options)))
                calls.append((f"{label} {clamp} backward", partial(bias_leaky_relu_backward, x, x, True, *options)))
            options = (0.2, math.sqrt(2), math.inf)
            calls.append((f"{label} plain", partial(bias_leaky_relu, x, None, *options)))
            calls.append((f"{label} plain backward", partial(bias_leaky_relu_backward, x, x, False, *options)))
    return calls
