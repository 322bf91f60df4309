r"""Planar and radial flows on the GPU, K layers in one kernel: `genkernels.reference.elementary_flows` has the maths.

.. math:: z' = z + \hat u\tanh(w^\top z + b),\qquad z' = z + \frac{\beta}{\alpha + \lVert z - c\rVert}(z - c)

Rezende & Mohamed 2015. Layout: z [G, R, D], parameters [G, K, ...]; shared ones are one group of all rows, amortised
ones N groups of S rows. A program takes ROWS rows of one group through all layers, [ROWS, DIM] in registers, DIM the
power of two from D on; each layer's parameters are loaded, and constrained, by every program anew, which is less than
one row's work.

Saved for backward: the inputs. A program goes forward again, leaves each layer's z in scratch memory [K, G·R, D], which
nobody else reads, and comes back. It adds up its own rows' share of the sums that go into the gradients by parameters;
a second kernel, a program a layer and group, adds these up in order and goes through the constraints. No atomics: the
same bits each run.

Bytes: forward reads and writes z, backward reads z and a gradient and writes one, and goes through the scratch, which
for D = 2 and K = 16 is 128 B a row each way and stays in the second-level cache. Arithmetic in fp32 (fp64 for fp64),
rounded once at the store.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from genkernels.triton import _math
from genkernels.triton._recording import SampleCalls, meta

SIZES = ("rows", "blocks", "layers", "features")
NUMBERS = 512  # of z that a program holds
LEAST_32, LEAST_64 = tl.constexpr(2.0**-63), tl.constexpr(2.0**-511)  # that a softplus counts as


# ------------------------------------------------------------------------------------------------------------- pieces


@triton.jit
def _softplus(b_x):
    """log(1 + e^x), its slope, log(1 + e^-x) and the slope of that by -x."""
    b_e = _math.exp(-tl.abs(b_x))
    b_tail = _math.log1p(b_e)
    b_near = _math.reciprocal_of_sum(1.0, b_e)
    b_far = b_e * b_near
    b_value = tl.where(b_x < 0, b_tail, b_x + b_tail)
    b_minus = tl.where(b_x < 0, b_tail - b_x, b_tail)
    b_slope, b_minus_slope = tl.where(b_x < 0, b_far, b_near), tl.where(b_x < 0, b_near, b_far)
    if b_x.dtype == tl.float64:
        b_low = b_value < LEAST_64
        return tl.where(b_low, LEAST_64, b_value), tl.where(b_low, 0.0, b_slope), b_minus, b_minus_slope
    else:
        b_low = b_value < LEAST_32
        return tl.where(b_low, LEAST_32, b_value), tl.where(b_low, 0.0, b_slope), b_minus, b_minus_slope


@triton.jit
def _one_plus(b_x, b_sum):
    """1 + x: where that would cancel, `b_sum`, which has it from positive parts."""
    return tl.where(b_x > -0.5, 1.0 + b_x, b_sum)


@triton.jit
def _log_one_plus(b_x, b_plus):
    """log(1 + x), what the rounding of 1 + x lost made good."""
    return _math.log(b_plus) + tl.where(b_x > -0.5, b_x - (b_plus - 1.0), 0.0) / b_plus


@triton.jit
def _rows_of(rows, blocks, features, ROWS: tl.constexpr, DIM: tl.constexpr):
    """A program's group, its rows [ROWS, 1] counted through all groups, their mask, features [1, DIM] and z's mask."""
    group = tl.program_id(0).to(tl.int64) // blocks
    o_in = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_d = tl.arange(0, DIM)[None, :]
    m_r = o_in < rows
    return group, group * rows + o_in, m_r, o_d, m_r & (o_d < features)


@triton.jit
def _layer(k, total, features):
    """Where layer k of the scratch memory begins; k from a loop may be a plain int."""
    return tl.full((1, 1), 1, tl.int64) * k * total * features


@triton.jit
def _numbers(p, o):
    """One number at p + o, [1, 1]."""
    return _math.widened(tl.load(p + (o + tl.arange(0, 1)[:, None])))


@triton.jit
def _constraint(p_w, p_u, o, m):
    """w, u, v = w / its largest part, 1/‖v‖², 1/largest, (m(a) − a)/largest, its slope, 1 + wᵀû, its slope."""
    b_w, b_u = _math.widened(tl.load(p_w + o, m, other=0.0)), _math.widened(tl.load(p_u + o, m, other=0.0))
    b_largest = tl.max(tl.abs(b_w), axis=1, keep_dims=True)
    m_free = b_largest == 0
    b_per_largest = 1.0 / tl.where(m_free, 1.0, b_largest)
    b_v = b_w / tl.where(m_free, 1.0, b_largest)
    b_per_v = 1.0 / tl.where(m_free, 1.0, tl.sum(b_v * b_v, axis=1, keep_dims=True))
    b_a = tl.sum(b_w * b_u, axis=1, keep_dims=True)
    b_soft, b_soft_slope, b_minus, b_minus_slope = _softplus(b_a)
    b_shift = tl.where(m_free, 0.0, (b_minus - 1.0) * b_per_largest)
    b_shift_slope = tl.where(m_free, 0.0, -b_minus_slope * b_per_largest)
    b_soft, b_soft_slope = tl.where(m_free, 1.0 + b_a, b_soft), tl.where(m_free, 1.0, b_soft_slope)
    return b_w, b_u, b_v, b_per_v, b_per_largest, b_shift, b_shift_slope, b_soft, b_soft_slope


@triton.jit
def _radial(b_d, b_alpha, b_soft):
    """r, 1/(α + r), x = β/(α + r), α/(α + r) and the stretches around the centre and away from it."""
    b_r = tl.sqrt(tl.sum(b_d * b_d, axis=1, keep_dims=True))
    b_inverse = 1.0 / (b_alpha + b_r)
    b_x, b_share = (b_soft - b_alpha) * b_inverse, b_alpha * b_inverse
    b_around = _one_plus(b_x, (b_r + b_soft) * b_inverse)
    b_along = _one_plus(b_x * b_share, b_r * b_inverse * (1.0 + b_share) + b_share * (b_soft * b_inverse))
    return b_r, b_inverse, b_x, b_share, b_around, b_along


# ------------------------------------------------------------------------------------------------------------- planar


@triton.jit(do_not_specialize=SIZES)
def _planar_kernel(
    p_z, p_w, p_u, p_b, p_out, p_ldj, rows, blocks, layers, features, ROWS: tl.constexpr, DIM: tl.constexpr
):
    group, o_r, m_r, o_d, m_z = _rows_of(rows, blocks, features, ROWS, DIM)
    b_z = _math.widened(tl.load(p_z + (o_r * features + o_d), m_z, other=0.0))
    b_ldj = tl.zeros((ROWS, 1), b_z.dtype)
    for k in range(0, layers):
        o_k = group * layers + k
        b_w, b_u, b_v, b_per_v, _, b_shift, _, b_soft, _ = _constraint(p_w, p_u, o_k * features + o_d, o_d < features)
        b_h, b_s = _math.tanh(tl.sum(b_z * b_w, axis=1, keep_dims=True) + _numbers(p_b, o_k))
        b_x = b_s * (b_soft - 1.0)
        b_ldj += _log_one_plus(b_x, _one_plus(b_x, b_h * b_h + b_s * b_soft))
        b_z += b_h * (b_u + b_shift * (b_per_v * b_v))
    tl.store(p_out + (o_r * features + o_d), b_z.to(p_out.dtype.element_ty), m_z)
    tl.store(p_ldj + o_r, b_ldj, m_r)


@triton.jit(do_not_specialize=(*SIZES, "total"))
def _planar_backward_kernel(
    p_grad_z,
    p_grad_ldj,
    p_z,
    p_w,
    p_u,
    p_b,
    p_scratch,
    p_by_z,
    p_sums,
    rows,
    blocks,
    layers,
    features,
    total,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    """p_scratch [K, total, D]; p_sums [programs, K, 2 D + 2]: by w, û, wᵀû and b. A gradient may be None."""
    group, o_r, m_r, o_d, m_z = _rows_of(rows, blocks, features, ROWS, DIM)
    o_z = o_r * features + o_d
    b_z = _math.widened(tl.load(p_z + o_z, m_z, other=0.0))
    for k in range(0, layers):
        tl.store(p_scratch + (_layer(k, total, features) + o_z), b_z, m_z)
        o_k = group * layers + k
        b_w, b_u, b_v, b_per_v, _, b_shift, _, _, _ = _constraint(p_w, p_u, o_k * features + o_d, o_d < features)
        b_h, _ = _math.tanh(tl.sum(b_z * b_w, axis=1, keep_dims=True) + _numbers(p_b, o_k))
        b_z += b_h * (b_u + b_shift * (b_per_v * b_v))
    tl.debug_barrier()  # a thread may read what another has written
    b_g = tl.zeros((ROWS, DIM), b_z.dtype)
    if p_grad_z is not None:
        b_g += _math.widened(tl.load(p_grad_z + o_z, m_z, other=0.0))
    b_l = tl.zeros((ROWS, 1), b_z.dtype)
    if p_grad_ldj is not None:
        b_l += tl.load(p_grad_ldj + o_r, m_r, other=0.0)
    for i in range(0, layers):
        k = layers - 1 - i
        o_k = group * layers + k
        b_z = tl.load(p_scratch + (_layer(k, total, features) + o_z), m_z, other=0.0)
        b_w, b_u, b_v, b_per_v, _, b_shift, _, b_soft, _ = _constraint(p_w, p_u, o_k * features + o_d, o_d < features)
        b_h, b_s = _math.tanh(tl.sum(b_z * b_w, axis=1, keep_dims=True) + _numbers(p_b, o_k))
        b_along = tl.sum(b_g * (b_u + b_shift * (b_per_v * b_v)), axis=1, keep_dims=True)
        b_by_m = b_l * b_s / (b_h * b_h + b_s * b_soft)
        b_by_t = b_s * b_along - 2.0 * b_h * (b_soft - 1.0) * b_by_m
        p_here = p_sums + (tl.program_id(0).to(tl.int64) * layers + k) * (2 * features + 2)
        tl.store(p_here + o_d, tl.sum(b_z * b_by_t, axis=0, keep_dims=True), o_d < features)
        tl.store(p_here + (features + o_d), tl.sum(b_g * b_h, axis=0, keep_dims=True), o_d < features)
        o_1 = 2 * features + tl.arange(0, 1)[:, None]
        tl.store(p_here + o_1, tl.sum(b_by_m, axis=0, keep_dims=True))
        tl.store(p_here + (o_1 + 1), tl.sum(b_by_t, axis=0, keep_dims=True))
        b_g += b_w * b_by_t
    tl.store(p_by_z + o_z, b_g.to(p_by_z.dtype.element_ty), m_z)


@triton.jit(do_not_specialize=SIZES[1:])
def _planar_finish_kernel(p_sums, p_w, p_u, p_by_w, p_by_u, p_by_b, blocks, layers, features, DIM: tl.constexpr):
    """The gradients by one layer's parameters, from the sums [G, blocks, K, 2 D + 2]."""
    group, k = tl.program_id(0).to(tl.int64) // layers, tl.program_id(0) % layers
    o_k, o_d, o_1 = group * layers + k, tl.arange(0, DIM)[None, :], tl.arange(0, 1)[:, None]
    m_d = o_d < features
    b_w, b_u, b_v, b_per_v, b_per_largest, b_shift, b_shift_slope, _, b_soft_slope = _constraint(
        p_w, p_u, o_k * features + o_d, m_d
    )
    b_by_w, b_by_u = tl.zeros((1, DIM), b_w.dtype), tl.zeros((1, DIM), b_w.dtype)
    b_by_m, b_by_b = tl.zeros((1, 1), b_w.dtype), tl.zeros((1, 1), b_w.dtype)
    for block in range(0, blocks):
        p_here = p_sums + ((group * blocks + block) * layers + k) * (2 * features + 2)
        b_by_w += tl.load(p_here + o_d, m_d, other=0.0)
        b_by_u += tl.load(p_here + (features + o_d), m_d, other=0.0)
        b_by_m += tl.load(p_here + (2 * features + o_1))
        b_by_b += tl.load(p_here + (2 * features + 1 + o_1))
    # of w/‖w‖² the derivative is that of w, less twice its part along w, over ‖w‖²
    b_along = b_per_v * tl.sum(b_by_u * b_v, axis=1, keep_dims=True)
    b_by_a = b_by_m * b_soft_slope + b_along * b_shift_slope
    b_by_w += b_by_a * b_u + b_shift * (b_per_largest * b_per_v) * (b_by_u - 2.0 * b_along * b_v)
    b_by_u += b_by_a * b_w
    tl.store(p_by_w + (o_k * features + o_d), b_by_w.to(p_by_w.dtype.element_ty), m_d)
    tl.store(p_by_u + (o_k * features + o_d), b_by_u.to(p_by_u.dtype.element_ty), m_d)
    tl.store(p_by_b + (o_k + o_1), b_by_b.to(p_by_b.dtype.element_ty))


# ------------------------------------------------------------------------------------------------------------- radial


@triton.jit(do_not_specialize=SIZES)
def _radial_kernel(
    p_z, p_c, p_alpha, p_beta, p_out, p_ldj, rows, blocks, layers, features, ROWS: tl.constexpr, DIM: tl.constexpr
):
    group, o_r, m_r, o_d, m_z = _rows_of(rows, blocks, features, ROWS, DIM)
    b_z = _math.widened(tl.load(p_z + (o_r * features + o_d), m_z, other=0.0))
    b_ldj = tl.zeros((ROWS, 1), b_z.dtype)
    for k in range(0, layers):
        o_k = group * layers + k
        b_alpha, _, _, _ = _softplus(_numbers(p_alpha, o_k))
        b_soft, _, _, _ = _softplus(_numbers(p_beta, o_k))
        b_d = b_z - _math.widened(tl.load(p_c + (o_k * features + o_d), o_d < features, other=0.0))
        _, _, b_x, b_share, b_around, b_along = _radial(b_d, b_alpha, b_soft)
        b_ldj += (features - 1) * _log_one_plus(b_x, b_around) + _log_one_plus(b_x * b_share, b_along)
        b_z += b_x * b_d
    tl.store(p_out + (o_r * features + o_d), b_z.to(p_out.dtype.element_ty), m_z)
    tl.store(p_ldj + o_r, b_ldj, m_r)


@triton.jit(do_not_specialize=(*SIZES, "total"))
def _radial_backward_kernel(
    p_grad_z,
    p_grad_ldj,
    p_z,
    p_c,
    p_alpha,
    p_beta,
    p_scratch,
    p_by_z,
    p_sums,
    rows,
    blocks,
    layers,
    features,
    total,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    """p_scratch [K, total, D]: z − c; p_sums [programs, K, D + 2]: by centre, α and softplus(β)."""
    group, o_r, m_r, o_d, m_z = _rows_of(rows, blocks, features, ROWS, DIM)
    o_z = o_r * features + o_d
    b_z = _math.widened(tl.load(p_z + o_z, m_z, other=0.0))
    for k in range(0, layers):
        o_k = group * layers + k
        b_alpha, _, _, _ = _softplus(_numbers(p_alpha, o_k))
        b_soft, _, _, _ = _softplus(_numbers(p_beta, o_k))
        b_d = b_z - _math.widened(tl.load(p_c + (o_k * features + o_d), o_d < features, other=0.0))
        tl.store(p_scratch + (_layer(k, total, features) + o_z), b_d, m_z)
        _, _, b_x, _, _, _ = _radial(b_d, b_alpha, b_soft)
        b_z += b_x * b_d
    tl.debug_barrier()  # a thread may read what another has written
    b_g = tl.zeros((ROWS, DIM), b_z.dtype)
    if p_grad_z is not None:
        b_g += _math.widened(tl.load(p_grad_z + o_z, m_z, other=0.0))
    b_l = tl.zeros((ROWS, 1), b_z.dtype)
    if p_grad_ldj is not None:
        b_l += tl.load(p_grad_ldj + o_r, m_r, other=0.0)
    for i in range(0, layers):
        k = layers - 1 - i
        o_k = group * layers + k
        b_alpha, _, _, _ = _softplus(_numbers(p_alpha, o_k))
        b_soft, _, _, _ = _softplus(_numbers(p_beta, o_k))
        b_d = tl.load(p_scratch + (_layer(k, total, features) + o_z), m_z, other=0.0)
        b_r, b_inverse, b_x, b_share, b_around, b_along = _radial(b_d, b_alpha, b_soft)
        b_of_along = b_l / b_along
        b_by_x = tl.sum(b_g * b_d, axis=1, keep_dims=True) + (features - 1) * (b_l / b_around) + b_share * b_of_along
        b_by_share = b_x * b_of_along
        b_by_sum = -(b_by_x * b_x + b_by_share * b_share) * b_inverse
        b_outer = b_by_x * b_inverse
        b_inner = b_by_share * b_inverse + b_by_sum - b_outer
        b_outwards = tl.where(b_r > 0, b_by_sum / tl.where(b_r > 0, b_r, 1.0), 0.0)
        b_by_d = b_x * b_g + b_outwards * b_d
        # lanes beyond the last row lie off the centre, too, but nothing came for them
        p_here = p_sums + (tl.program_id(0).to(tl.int64) * layers + k) * (features + 2)
        tl.store(p_here + o_d, -tl.sum(b_by_d, axis=0, keep_dims=True), o_d < features)
        o_1 = features + tl.arange(0, 1)[:, None]
        tl.store(p_here + o_1, tl.sum(b_inner, axis=0, keep_dims=True))
        tl.store(p_here + (o_1 + 1), tl.sum(b_outer, axis=0, keep_dims=True))
        b_g += b_by_d
    tl.store(p_by_z + o_z, b_g.to(p_by_z.dtype.element_ty), m_z)


@triton.jit(do_not_specialize=SIZES[1:])
def _radial_finish_kernel(
    p_sums, p_alpha, p_beta, p_by_c, p_by_alpha, p_by_beta, blocks, layers, features, DIM: tl.constexpr
):
    """The gradients by one layer's parameters, from the sums [G, blocks, K, D + 2]."""
    group, k = tl.program_id(0).to(tl.int64) // layers, tl.program_id(0) % layers
    o_k, o_d, o_1 = group * layers + k, tl.arange(0, DIM)[None, :], tl.arange(0, 1)[:, None]
    _, b_inner_slope, _, _ = _softplus(_numbers(p_alpha, o_k))
    _, b_outer_slope, _, _ = _softplus(_numbers(p_beta, o_k))
    b_by_c = tl.zeros((1, DIM), b_inner_slope.dtype)
    b_inner, b_outer = tl.zeros((1, 1), b_by_c.dtype), tl.zeros((1, 1), b_by_c.dtype)
    for block in range(0, blocks):
        p_here = p_sums + ((group * blocks + block) * layers + k) * (features + 2)
        b_by_c += tl.load(p_here + o_d, o_d < features, other=0.0)
        b_inner += tl.load(p_here + (features + o_1))
        b_outer += tl.load(p_here + (features + 1 + o_1))
    tl.store(p_by_c + (o_k * features + o_d), b_by_c.to(p_by_c.dtype.element_ty), o_d < features)
    tl.store(p_by_alpha + (o_k + o_1), (b_inner * b_inner_slope).to(p_by_alpha.dtype.element_ty))
    tl.store(p_by_beta + (o_k + o_1), (b_outer * b_outer_slope).to(p_by_beta.dtype.element_ty))


# ---------------------------------------------------------------------------------------------------------- launchers


def _plan(z: Tensor, lead: Tensor) -> tuple[int, tuple[int, int, int, int], dict]:
    """Groups, the sizes that every kernel takes, and its constants; a warp for 256 numbers. fp64 takes half as many."""
    groups = z.shape[0] if lead.dim() == 3 else 1
    features = z.shape[-1]
    rows = z.numel() // (groups * features)
    dim = triton.next_power_of_2(features)
    share = 2 if z.dtype == torch.float64 else 1
    tile = max(1, min(triton.next_power_of_2(rows), NUMBERS // share // dim, 32))
    warps = max(1, min(8, tile * dim * share // 256))
    options = {"ROWS": tile, "DIM": dim, "num_warps": warps, "enable_fp_fusion": True}
    return groups, (rows, triton.cdiv(rows, tile), lead.shape[-2], features), options


def _forward(kernel, z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
    work = torch.promote_types(z.dtype, torch.float32)
    if not z.numel() or not parameters[0].shape[-2]:
        return z.clone(), z.new_zeros(z.shape[:-1], dtype=work)
    out, ldj = z.new_empty(z.shape), z.new_empty(z.shape[:-1], dtype=work)
    groups, sizes, options = _plan(z, parameters[0])
    with torch.cuda.device_of(z):
        kernel[(groups * sizes[1],)](z, *parameters, out, ldj, *sizes, **options)
    return out, ldj


def _backward(kernel, finish, sums: int, read: slice, grad_z, grad_ldj, z: Tensor, *parameters: Tensor):
    by_parameters = [p.new_zeros(p.shape) for p in parameters]
    if not z.numel() or not parameters[0].shape[-2]:
        return z.new_zeros(z.shape) if grad_z is None else grad_z.clone(), *by_parameters
    work = torch.promote_types(z.dtype, torch.float32)
    by_z = z.new_empty(z.shape)
    groups, (rows, blocks, layers, features), options = _plan(z, parameters[0])
    scratch = z.new_empty((layers, groups * rows, features), dtype=work)
    partial_sums = z.new_empty((groups * blocks, layers, sums), dtype=work)
    sizes = rows, blocks, layers, features, groups * rows
    with torch.cuda.device_of(z):
        kernel[(groups * blocks,)](grad_z, grad_ldj, z, *parameters, scratch, by_z, partial_sums, *sizes, **options)
        finish[(groups * layers,)](
            partial_sums,
            *parameters[read],
            *by_parameters,
            *sizes[1:4],
            DIM=options["DIM"],
            num_warps=max(1, min(8, options["DIM"] // 128)),
            enable_fp_fusion=True,
        )
    return by_z, *by_parameters


def planar_flow(z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous tensors on one GPU; the caller has checked them."""
    return _forward(_planar_kernel, z, w, u, b)


def planar_flow_backward(
    grad_z: Tensor | None, grad_ldj: Tensor | None, z: Tensor, w: Tensor, u: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by z, w, u, b. Conditions as for `planar_flow`."""
    sums = 2 * z.shape[-1] + 2
    return _backward(_planar_backward_kernel, _planar_finish_kernel, sums, slice(0, 2), grad_z, grad_ldj, z, w, u, b)


def radial_flow(z: Tensor, center: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Conditions as for `planar_flow`."""
    return _forward(_radial_kernel, z, center, alpha, beta)


def radial_flow_backward(
    grad_z: Tensor | None, grad_ldj: Tensor | None, z: Tensor, center: Tensor, alpha: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by z, center, alpha, beta. Conditions as for `planar_flow`."""
    sums = z.shape[-1] + 2
    return _backward(
        _radial_backward_kernel, _radial_finish_kernel, sums, slice(1, 3), grad_z, grad_ldj, z, center, alpha, beta
    )


# ------------------------------------------------------------------------------------------ ahead-of-time compilation


def sample_calls() -> SampleCalls:
    """Points with shared parameters, samples with their own, many features."""
    calls = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        work = torch.promote_types(dtype, torch.float32)
        for shape, lead in (((4096, 2), ()), ((100, 50, 40), (100,)), ((100, 1, 40), (100,)), ((256, 784), ())):
            z, ldj = meta(*shape, dtype=dtype), meta(*shape[:-1], dtype=work)
            vector, number = meta(*lead, 8, shape[-1], dtype=dtype), meta(*lead, 8, dtype=dtype)
            label = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
            for name, flow, backward, parameters in (
                ("planar", planar_flow, planar_flow_backward, (vector, vector, number)),
                ("radial", radial_flow, radial_flow_backward, (vector, number, number)),
            ):
                calls.append((f"{label} {name}", partial(flow, z, *parameters)))
                calls.append((f"{label} {name} backward", partial(backward, z, ldj, z, *parameters)))
                calls.append((f"{label} {name} backward of z", partial(backward, z, None, z, *parameters)))
                calls.append((f"{label} {name} backward of ldj", partial(backward, None, ldj, z, *parameters)))
    return calls
