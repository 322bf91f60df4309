r"""Points between pairs and the penalty of a gradient's norm on the GPU: one pass each.

.. math:: \hat x_n = f_n + u_n (r_n - f_n),\qquad p_n = (\lVert g_n\rVert - t)^2

Gulrajani et al. 2017; `genkernels.reference.gradient_penalty` has the gradients.

Layout: [N, L], contiguous, in tiles: several rows a program where they are short, a part of one where they are long
(`_rows`).

Sums: a program adds up its tile's squares in fp64, in a fixed order; where it takes whole rows they are done, else a
second kernel sums the programs' [N, blocks]. No atomics: the same bits each run.

Bytes: interpolation 2 reads and 1 write, its backward 1 and 2, the penalty 1 read, its backward 1 and 1. Points in fp32
(fp64 for fp64), the penalty and its gradient's product in fp64, rounded once at the store.
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

SMALLEST = tl.constexpr(2.0**-126)  # a norm below has no direction


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit(do_not_specialize=_rows.SIZES)
def _interpolate_kernel(
    p_real, p_fake, p_u, p_x, rows, units, blocks, V: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    o_row, m_row, o, m = _rows.tile(rows, units, blocks, V, ROWS, COLS)
    b_real, b_fake = _math.widened(tl.load(p_real + o, m)), _math.widened(tl.load(p_fake + o, m))
    b_x = b_fake + tl.load(p_u + o_row, m_row)[:, None] * (b_real - b_fake)
    tl.store(p_x + o, b_x.to(p_x.dtype.element_ty), m)


@triton.jit(do_not_specialize=_rows.SIZES)
def _interpolate_backward_kernel(
    p_grad, p_u, p_by_real, p_by_fake, rows, units, blocks, V: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    o_row, m_row, o, m = _rows.tile(rows, units, blocks, V, ROWS, COLS)
    b_grad = _math.widened(tl.load(p_grad + o, m))
    b_by_real = tl.load(p_u + o_row, m_row)[:, None] * b_grad
    tl.store(p_by_real + o, b_by_real.to(p_by_real.dtype.element_ty), m)
    tl.store(p_by_fake + o, (b_grad - b_by_real).to(p_by_fake.dtype.element_ty), m)


@triton.jit
def _excess(b_norm, TARGET: tl.constexpr, ONE_SIDED: tl.constexpr):
    b_more = b_norm - TARGET
    return tl.where(b_more < 0, 0.0, b_more) if ONE_SIDED else b_more  # NaN stays


@triton.jit
def _store_penalty(p_value, p_norm, o, m, b_square, TARGET: tl.constexpr, ONE_SIDED: tl.constexpr):
    """Penalty and norm from the sum of squares."""
    b_norm = tl.where(b_square < SMALLEST * SMALLEST, 0.0, tl.sqrt(b_square))
    if TARGET == 0:
        b_value = b_square
    else:
        b_more = _excess(b_norm, TARGET, ONE_SIDED)
        b_value = b_more * b_more
    tl.store(p_value + o, b_value.to(p_value.dtype.element_ty), m)
    tl.store(p_norm + o, b_norm, m)


@triton.jit(do_not_specialize=_rows.SIZES)
def _squares_kernel(
    p_gradient,
    p_squares,
    p_value,
    p_norm,
    rows,
    units,
    blocks,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TARGET: tl.constexpr,
    ONE_SIDED: tl.constexpr,
):
    """Squares [N, blocks] or, where p_squares is None, since a program takes whole rows, penalty and norm [N]."""
    o_row, m_row, o, m = _rows.tile(rows, units, blocks, V, ROWS, COLS)
    b_gradient = tl.load(p_gradient + o, m, other=0.0).to(tl.float64)
    b_square = tl.sum(b_gradient * b_gradient, axis=1)
    if p_squares is None:
        _store_penalty(p_value, p_norm, o_row, m_row, b_square, TARGET, ONE_SIDED)
    else:
        tl.store(p_squares + (o_row * blocks + tl.program_id(0) % blocks), b_square, m_row)


@triton.jit(do_not_specialize=("blocks",))
def _penalty_kernel(
    p_squares, p_value, p_norm, blocks, COLS: tl.constexpr, TARGET: tl.constexpr, ONE_SIDED: tl.constexpr
):
    """Penalty and norm of a program's row from the squares [N, blocks], COLS at a time, always in the same order."""
    row = tl.program_id(0).to(tl.int64)
    b_sum = tl.zeros((COLS,), tl.float64)
    for first in range(0, blocks, COLS):
        o = first + tl.arange(0, COLS).to(tl.int64)
        b_sum += tl.load(p_squares + (row * blocks + o), o < blocks, other=0.0)
    _store_penalty(p_value, p_norm, row, True, tl.sum(b_sum, axis=0), TARGET, ONE_SIDED)


@triton.jit(do_not_specialize=_rows.SIZES)
def _penalty_backward_kernel(
    p_grad,
    p_grad_norm,
    p_gradient,
    p_norm,
    p_by_gradient,
    rows,
    units,
    blocks,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TARGET: tl.constexpr,
    ONE_SIDED: tl.constexpr,
):
    """p_grad or p_grad_norm may be None: what it would have been multiplied by plays no part."""
    o_row, m_row, o, m = _rows.tile(rows, units, blocks, V, ROWS, COLS)
    b_gradient = tl.load(p_gradient + o, m).to(tl.float64)
    b_norm = tl.load(p_norm + o_row, m_row, other=0.0)
    b_inverse = tl.where(b_norm == 0, 0.0, 1 / tl.where(b_norm == 0, 1.0, b_norm))
    b_factor = tl.zeros_like(b_norm)
    if p_grad_norm is not None:
        b_factor += tl.load(p_grad_norm + o_row, m_row) * b_inverse
    if p_grad is not None:
        b_slope = 2.0 if TARGET == 0 else 2 * _excess(b_norm, TARGET, ONE_SIDED) * b_inverse
        b_factor += b_slope * tl.load(p_grad + o_row, m_row)
    b_by_gradient = b_factor[:, None] * b_gradient
    if p_by_gradient.dtype.element_ty != tl.float64:
        b_by_gradient = b_by_gradient.to(tl.float32)  # the interpreter knows no other way to half numbers
    tl.store(p_by_gradient + o, b_by_gradient.to(p_by_gradient.dtype.element_ty), m)


# ---------------------------------------------------------------------------------------------------------- launchers


def _plan(samples: Tensor, numbers: int = 0) -> _rows.Plan:
    return _rows.plan(samples.shape[0], math.prod(samples.shape[1:]), samples.element_size(), numbers)


def interpolate_pairs(real: Tensor, fake: Tensor, u: Tensor) -> Tensor:
    """Contiguous tensors on one GPU; the caller has checked them."""
    x = real.new_empty(real.shape)
    if x.numel():
        plan = _plan(x)
        with torch.cuda.device_of(x):
            _interpolate_kernel[plan.grid](
                real, fake, u, x, *plan.sizes, **plan.constants, num_warps=plan.warps, enable_fp_fusion=True
            )
    return x


def interpolate_pairs_backward(grad: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """``(grad_real, grad_fake)``. Conditions as for `interpolate_pairs`."""
    by_real, by_fake = grad.new_empty(grad.shape), grad.new_empty(grad.shape)
    if grad.numel():
        plan = _plan(grad)
        with torch.cuda.device_of(grad):
            _interpolate_backward_kernel[plan.grid](
                grad, u, by_real, by_fake, *plan.sizes, **plan.constants, num_warps=plan.warps, enable_fp_fusion=True
            )
    return by_real, by_fake


def gradient_penalty(gradient: Tensor, target: float, one_sided: bool) -> tuple[Tensor, Tensor]:
    """``(penalty, norm)``. Conditions as for `interpolate_pairs`."""
    rows = gradient.shape[0]
    value = gradient.new_empty(rows, dtype=torch.promote_types(gradient.dtype, torch.float32))
    norm = gradient.new_empty(rows, dtype=torch.float64)
    options = {"TARGET": float(target), "ONE_SIDED": bool(one_sided)}
    if gradient.numel() == 0:
        return value.fill_(0.0 if one_sided else target**2), norm.zero_()
    plan = _plan(gradient, 4096)
    blocks = plan.sizes[-1]
    with torch.cuda.device_of(gradient):
        squares = norm.new_empty(rows, blocks) if blocks > 1 else None
        _squares_kernel[plan.grid](
            gradient, squares, value, norm, *plan.sizes, **plan.constants, **options, num_warps=8, enable_fp_fusion=True
        )
        if squares is not None:
            cols = min(triton.next_power_of_2(blocks), 512)
            _penalty_kernel[(rows,)](
                squares, value, norm, blocks, COLS=cols, **options, num_warps=4, enable_fp_fusion=True
            )
    return value, norm


def gradient_penalty_backward(
    grad: Tensor | None, grad_norm: Tensor | None, gradient: Tensor, norm: Tensor, target: float, one_sided: bool
) -> Tensor:
    """The gradient by `gradient`. Conditions as for `interpolate_pairs`."""
    by_gradient = gradient.new_empty(gradient.shape)
    if gradient.numel():
        plan = _plan(gradient)
        with torch.cuda.device_of(gradient):
            _penalty_backward_kernel[plan.grid](
                grad,
                grad_norm,
                gradient,
                norm,
                by_gradient,
                *plan.sizes,
                **plan.constants,
                TARGET=float(target),
                ONE_SIDED=bool(one_sided),
                num_warps=plan.warps,
                enable_fp_fusion=True,
            )
    return by_gradient


# ------------------------------------------------------------------------------------------ ahead-of-time compilation


def sample_calls() -> SampleCalls:
    """Short rows, whole ones and long ones; a target, one side of it, none."""
    calls = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for shape in ((256, 2), (64, 1, 28, 28), (16, 3, 256, 256)):
            x = meta(*shape, dtype=dtype)
            u, norm = (
                meta(shape[0], dtype=torch.promote_types(dtype, torch.float32)),
                meta(shape[0], dtype=torch.float64),
            )
            label = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
            calls.append((f"{label} between", partial(interpolate_pairs, x, x, u)))
            calls.append((f"{label} between backward", partial(interpolate_pairs_backward, x, u)))
            for target, one_sided in ((1.0, False), (1.0, True), (0.0, False)):
                kind = f"{label} {target}{' one-sided' if one_sided else ''}"
                calls.append((kind, partial(gradient_penalty, x, target, one_sided)))
                backward = partial(gradient_penalty_backward, u, None, x, norm, target, one_sided)
                calls.append((f"{kind} backward", backward))
            calls.append((f"{label} both", partial(gradient_penalty_backward, u, norm, x, norm, 1.0, False)))
    return calls
