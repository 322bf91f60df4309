r"""The network of a residual block on the GPU: products with its maps and what follows them, for both operators of it.

.. math:: g(x) = W_L\,\varphi(\dots \varphi(W_1 x + b_1) \dots) + b_L

Layout. Inside everything is rows of channels in fp32 (fp64 for fp64): a sample is one row, or a row for each pixel of
an image, so fully connected maps and convolutions differ in nothing but the taps. A buffer holds a *plane*
``[rows, channels]`` for each map, one behind the other: `inputs` those that the maps read (the first is x), `outputs`
those of what they give or of its cotangents (the last is that of g). Maps lie packed twice, as ``[taps · in, out]``
and, mirrored, as ``[taps · out, in]``: W t and Wᵀ w are one code, which reads either along its rows.

A *tile* is BR rows by BC channels of one map: the product over taps and channels, then in registers bias, activation
and slope, or a product with slopes, or the gradient of the activation. [z, −z] takes a tile twice, once for each half.

Fully connected blocks: a program takes BR samples through all maps of all steps, tile after tile, with barriers of its
threads between maps; what it wrote it finds in the caches. Convolutions: a launch for each map.

The gradient of a map is a product over rows, cut into parts by shape alone and added up in order: no atomics, the same
bits each run. fp32 products are exact to fp32. Offsets are 64-bit.
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from genkernels._options import CLIPSWISH_DIVISOR, LIPSWISH_DIVISOR, Nonlinearity
from genkernels.triton import _math

RELU = tl.constexpr(Nonlinearity.RELU.value)
LEAKY_RELU = tl.constexpr(Nonlinearity.LEAKY_RELU.value)
ELU = tl.constexpr(Nonlinearity.ELU.value)
SILU = tl.constexpr(Nonlinearity.SILU.value)
TANH = tl.constexpr(Nonlinearity.TANH.value)
LIPSWISH = tl.constexpr(Nonlinearity.LIPSWISH.value)
CLIPSWISH = tl.constexpr(Nonlinearity.CLIPSWISH.value)
ONE = tl.constexpr(1.0)
OVER_LIPSWISH, OVER_CLIPSWISH = tl.constexpr(1 / LIPSWISH_DIVISOR), tl.constexpr(1 / CLIPSWISH_DIVISOR)

# a map's row in the table of sizes: channels in and out, where its packed matrices, its bias and its planes begin
IN, OUT, PUSH_AT, PULL_AT, BIAS_AT, IN_AT, OUT_AT = (tl.constexpr(i) for i in range(7))
FIELDS = tl.constexpr(7)

SIZES = (
    *("rows", "pitch", "samples", "layers", "inputs", "columns", "height", "width", "probes", "terms", "term", "place"),
    *("first_part", "parts", "steps", "count", "taps", "step", "depth", "most", "features", "block", "classes"),
)


# --------------------------------------------------------------------------------------------------------- activations


@triton.jit
def _expm1(b_z):
    """e^z − 1 for z ≤ 0."""
    b_n, b_small = _math._reduce(tl.maximum(b_z, -80.0, propagate_nan=tl.PropagateNan.ALL))
    b_power = _math._times_power(tl.full(b_z.shape, 1.0, b_z.dtype), b_n)
    return b_power * b_small + (b_power - 1.0)


@triton.jit
def _steepness(parameter, ACTIVATION: tl.constexpr):
    """What z is multiplied by, and what divides the result, of those that have a sigmoid."""
    if ACTIVATION == LIPSWISH:
        return parameter, OVER_LIPSWISH
    elif ACTIVATION == CLIPSWISH:
        return parameter, OVER_CLIPSWISH
    else:
        return tl.full((), 1.0, parameter.dtype), ONE


@triton.jit
def curve(b_z, parameter, ACTIVATION: tl.constexpr):
    """Value and slope."""
    if ACTIVATION == RELU:
        b_value = tl.where(b_z <= 0, 0.0, b_z)
        b_slope = tl.where(b_z > 0, 1.0, 0.0).to(b_z.dtype)
    elif ACTIVATION == LEAKY_RELU:
        b_value = tl.where(b_z > 0, b_z, parameter * b_z)
        b_slope = tl.where(b_z > 0, 1.0, tl.zeros_like(b_z) + parameter)
    elif ACTIVATION == ELU:
        b_low = tl.minimum(b_z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        b_value = tl.where(b_z > 0, b_z, parameter * _expm1(b_low))
        b_slope = tl.where(b_z > 0, 1.0, parameter * _math.exp(b_low))
    elif ACTIVATION == TANH:
        b_value, b_slope = _math.tanh(b_z)
    else:
        beta, over = _steepness(parameter, ACTIVATION)
        b_up, b_down, _ = _math.sigmoid(beta * b_z)
        b_value = b_z * b_up * over
        b_slope = b_up * (1.0 + beta * b_z * b_down) * over
    return b_value, b_slope


@triton.jit
def curve_changes(b_z, parameter, ACTIVATION: tl.constexpr):
    """The curvature, and the derivatives of value and slope by the parameter."""
    b_zero = tl.zeros_like(b_z)
    if ACTIVATION == LEAKY_RELU:
        b_by = tl.minimum(b_z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return b_zero, b_by, tl.where(b_z <= 0, 1.0, b_zero)
    elif ACTIVATION == ELU:
        b_low = tl.minimum(b_z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        b_exp = tl.where(b_z > 0, 0.0, _math.exp(b_low))
        return parameter * b_exp, tl.where(b_z > 0, 0.0, _expm1(b_low)), b_exp
    elif ACTIVATION == TANH:
        b_tanh, b_slope = _math.tanh(b_z)
        return -2.0 * b_tanh * b_slope, b_zero, b_zero
    elif ACTIVATION == RELU:
        return b_zero, b_zero, b_zero
    else:
        beta, over = _steepness(parameter, ACTIVATION)
        b_up, b_down, _ = _math.sigmoid(beta * b_z)
        b_both = b_up * b_down * over
        b_bend = b_both * (2.0 + beta * b_z * (b_down - b_up))
        if ACTIVATION == SILU:
            return b_bend, b_zero, b_zero
        else:
            return beta * b_bend, b_z * b_z * b_both, b_z * b_bend


# --------------------------------------------------------------------------------------------------------------- tiles


@triton.jit
def _gather(p_in, o_r, m_r, o_k, m_k, inputs, b_y, b_x, height, width, TAPS: tl.constexpr):
    """``[BR, BK]``: number k = tap · in + channel of what the maps read at each row; 0 beyond the image."""
    if TAPS == 1:
        return tl.load(p_in + (o_r[:, None] * inputs + o_k[None, :]), m_r[:, None] & m_k[None, :], other=0.0)
    else:
        b_tap = o_k // inputs
        b_down = b_tap // 3 - 1
        b_right = b_tap % 3 - 1
        b_row = b_y[:, None] + b_down[None, :]
        b_column = b_x[:, None] + b_right[None, :]
        m = (b_row >= 0) & (b_row < height) & (b_column >= 0) & (b_column < width) & m_r[:, None] & m_k[None, :]
        o_place = o_r[:, None] + (b_down * width + b_right)[None, :]
        return tl.load(p_in + (o_place * inputs + (o_k - b_tap * inputs)[None, :]), m, other=0.0)


@triton.jit
def _place(o_r, height, width, TAPS: tl.constexpr):
    """Row and column in the image."""
    if TAPS == 1:
        return o_r, o_r
    else:
        b_line = o_r // width
        return b_line % height, o_r - b_line * width


@triton.jit
def product(
    p_in, p_w, o_r, m_r, o_c, m_c, inputs, columns, height, width, wanted, TAPS: tl.constexpr, BK: tl.constexpr
):
    """``[BR, BC]`` of gathered rows times a packed map; zeros unless `wanted`."""
    ACC: tl.constexpr = p_w.dtype.element_ty
    b_sum = tl.zeros((o_r.shape[0], o_c.shape[0]), ACC)
    b_y, b_x = _place(o_r, height, width, TAPS)
    depth = inputs * TAPS
    for k in range(0, tl.where(wanted, depth, 0), BK):
        o_k = tl.arange(0, BK).to(tl.int64) + k
        m_k = o_k < depth
        b_in = _gather(p_in, o_r, m_r, o_k, m_k, inputs, b_y, b_x, height, width, TAPS)
        o_w = o_k[:, None] * columns + o_c[None, :]
        b_w = tl.load(p_w + o_w, m_k[:, None] & m_c[None, :], other=0.0)
        b_sum = tl.dot(b_in, b_w, b_sum, input_precision="ieee", out_dtype=ACC)
    return b_sum


@triton.jit
def _store_activation(p_a, p_d, b_value, b_slope, o, m):
    tl.store(p_a + o, b_value, m)
    if p_d is not None:
        tl.store(p_d + o, b_slope, m)


@triton.jit
def forward_tile(
    p_in,
    p_w,
    p_bias,
    p_parameter,
    p_z,
    p_a,
    p_d,
    o_r,
    m_r,
    c,
    inputs,
    columns,
    height,
    width,
    wanted,
    ACTIVATION: tl.constexpr,
    TAPS: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """z = W a + b of a map before an activation, the activation and its slopes; z and slopes where they are wanted."""
    o_c = tl.arange(0, BC).to(tl.int64) + c
    m_c = o_c < columns
    b_z = product(p_in, p_w, o_r, m_r, o_c, m_c, inputs, columns, height, width, wanted, TAPS, BK)
    b_z += tl.load(p_bias + o_c, m_c, other=0.0)[None, :]
    m = m_r[:, None] & m_c[None, :]
    o = o_r[:, None] * columns + o_c[None, :]
    if p_z is not None:
        tl.store(p_z + o, b_z, m)
    parameter = tl.load(p_parameter)
    b_value, b_slope = curve(b_z, parameter, ACTIVATION)
    if ACTIVATION == CLIPSWISH:
        o = o_r[:, None] * (2 * columns) + o_c[None, :]
        _store_activation(p_a, p_d, b_value, b_slope, o, m)
        b_value, b_slope = curve(-b_z, parameter, ACTIVATION)
        _store_activation(p_a, p_d, b_value, -b_slope, o + columns, m)
    else:
        _store_activation(p_a, p_d, b_value, b_slope, o, m)


@triton.jit
def push_tile(
    p_in,
    p_w,
    p_d,
    p_t,
    p_out,
    o_r,
    o_n,
    m_r,
    c,
    inputs,
    columns,
    height,
    width,
    ACTIVATION: tl.constexpr,
    TAPS: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """The tangent of z and, with the slopes, that of the activation. o_n: the slopes' rows."""
    o_c = tl.arange(0, BC).to(tl.int64) + c
    m_c = o_c < columns
    b_t = product(p_in, p_w, o_r, m_r, o_c, m_c, inputs, columns, height, width, True, TAPS, BK)
    m = m_r[:, None] & m_c[None, :]
    tl.store(p_t + (o_r[:, None] * columns + o_c[None, :]), b_t, m)
    both = columns * 2 if ACTIVATION == CLIPSWISH else columns
    o_d = o_n[:, None] * both + o_c[None, :]
    o = o_r[:, None] * both + o_c[None, :]
    tl.store(p_out + o, tl.load(p_d + o_d, m, other=0.0) * b_t, m)
    if ACTIVATION == CLIPSWISH:
        tl.store(p_out + (o + columns), tl.load(p_d + (o_d + columns), m, other=0.0) * b_t, m)


@triton.jit
def pull_tile(
    p_in,
    p_w,
    p_d,
    p_beta,
    p_out,
    o_r,
    o_n,
    m_r,
    c,
    inputs,
    columns,
    height,
    width,
    wanted,
    ACTIVATION: tl.constexpr,
    TAPS: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """The cotangent of an activation, kept where it is wanted, and with the slopes that of z."""
    o_c = tl.arange(0, BC).to(tl.int64) + c
    m_c = o_c < columns
    both = columns * 2 if ACTIVATION == CLIPSWISH else columns
    m = m_r[:, None] & m_c[None, :]
    o_d = o_n[:, None] * both + o_c[None, :]
    o = o_r[:, None] * both + o_c[None, :]
    b_w = product(p_in, p_w, o_r, m_r, o_c, m_c, inputs, both, height, width, wanted, TAPS, BK)
    if p_beta is not None:
        tl.store(p_beta + o, b_w, m)
    b_out = tl.load(p_d + o_d, m, other=0.0) * b_w
    if ACTIVATION == CLIPSWISH:
        b_w = product(p_in, p_w + columns, o_r, m_r, o_c, m_c, inputs, both, height, width, wanted, TAPS, BK)
        if p_beta is not None:
            tl.store(p_beta + (o + columns), b_w, m)
        b_out += tl.load(p_d + (o_d + columns), m, other=0.0) * b_w
    tl.store(p_out + (o_r[:, None] * columns + o_c[None, :]), b_out, m)


@triton.jit
def _delta_half(
    b_alpha,
    b_z,
    sign,
    parameter,
    p_d,
    p_beta,
    p_t,
    p_by,
    o,
    o_t,
    m,
    rows,
    probes,
    both,
    columns,
    ACTIVATION: tl.constexpr,
):
    """The gradients by z and by the parameter, of one sign of z."""
    b_curvature, b_value_by, b_slope_by = curve_changes(b_z, parameter, ACTIVATION)
    b_to_z = tl.load(p_d + o, m, other=0.0) * b_alpha
    b_to_p = b_value_by * b_alpha
    if p_beta is not None:
        b_by = tl.zeros_like(b_alpha)
        if p_by is not None:
            b_by += tl.load(p_by + o, m, other=0.0)
        for probe in range(0, probes):
            first = rows.to(tl.int64) * probe
            b_beta = tl.load(p_beta + (first * both + o), m, other=0.0)
            b_by += b_beta * tl.load(p_t + (first * columns + o_t), m, other=0.0)
        b_to_z += b_curvature * b_by
        b_to_p += sign * b_slope_by * b_by
    return b_to_z, tl.sum(tl.sum(tl.where(m, b_to_p, 0.0), axis=1), axis=0)


@triton.jit
def delta_tile(
    p_in,
    p_w,
    p_parameter,
    p_z,
    p_d,
    p_beta,
    p_t,
    p_by,
    p_out,
    o_r,
    m_r,
    c,
    inputs,
    columns,
    height,
    width,
    rows,
    probes,
    ACTIVATION: tl.constexpr,
    TAPS: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """The gradient by z from that by what the next map gives, and this tile's part of that by the parameter."""
    o_c = tl.arange(0, BC).to(tl.int64) + c
    m_c = o_c < columns
    both = columns * 2 if ACTIVATION == CLIPSWISH else columns
    m = m_r[:, None] & m_c[None, :]
    o_t = o_r[:, None] * columns + o_c[None, :]
    o = o_r[:, None] * both + o_c[None, :]
    parameter = tl.load(p_parameter)
    b_z = tl.load(p_z + o_t, m, other=0.0)
    b_alpha = product(p_in, p_w, o_r, m_r, o_c, m_c, inputs, both, height, width, True, TAPS, BK)
    b_out, part = _delta_half(
        b_alpha, b_z, 1.0, parameter, p_d, p_beta, p_t, p_by, o, o_t, m, rows, probes, both, columns, ACTIVATION
    )
    if ACTIVATION == CLIPSWISH:
        b_alpha = product(p_in, p_w + columns, o_r, m_r, o_c, m_c, inputs, both, height, width, True, TAPS, BK)
        o += columns
        b_more, part_more = _delta_half(
            b_alpha, -b_z, -1.0, parameter, p_d, p_beta, p_t, p_by, o, o_t, m, rows, probes, both, columns, ACTIVATION
        )
        b_out += b_more
        part += part_more
    tl.store(p_out + o_t, b_out, m)
    return part


# ------------------------------------------------------------------- chains of a fully connected block, by one program


@triton.jit
def field(p_table, i, FIELD: tl.constexpr):
    return tl.load(p_table + (i * FIELDS + FIELD))


@triton.jit
def forward_chain(
    p_table,
    p_push,
    p_biases,
    p_parameters,
    p_inputs,
    p_z,
    p_d,
    o_r,
    m_r,
    pitch,
    layers,
    ACTIVATION: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """All maps but the last."""
    features = field(p_table, 0, IN)
    for i in range(0, layers - 1):
        columns = field(p_table, i, OUT)
        p_out = p_inputs + pitch * field(p_table, i + 1, IN_AT)
        p_slopes = p_d
        if p_d is not None:
            p_slopes = p_d + pitch * (field(p_table, i + 1, IN_AT) - features)
        p_points = p_z
        if p_z is not None:
            p_points = p_z + pitch * field(p_table, i, OUT_AT)
        for c in range(0, columns, BC):
            forward_tile(
                p_inputs + pitch * field(p_table, i, IN_AT),
                p_push + field(p_table, i, PUSH_AT),
                p_biases + field(p_table, i, BIAS_AT),
                p_parameters + i,
                p_points,
                p_out,
                p_slopes,
                o_r,
                m_r,
                c,
                field(p_table, i, IN),
                columns,
                1,
                1,
                True,
                ACTIVATION,
                1,
                BC,
                BK,
            )
        tl.debug_barrier()


@triton.jit
def pull_chain(
    p_table,
    p_pull,
    p_outputs,
    p_beta,
    p_d,
    o_r,
    o_n,
    m_r,
    pitch,
    pitch_n,
    layers,
    ACTIVATION: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """From the cotangents of g, the last plane, to those of the first map's outputs. pitch: rows of a plane, of the
    slopes pitch_n."""
    features = field(p_table, 0, IN)
    for back in range(0, layers - 1):
        i = layers - 1 - back
        columns = field(p_table, i - 1, OUT)
        at = field(p_table, i, IN_AT) - features
        p_kept = p_beta
        if p_beta is not None:
            p_kept = p_beta + pitch * at
        for c in range(0, columns, BC):
            pull_tile(
                p_outputs + pitch * field(p_table, i, OUT_AT),
                p_pull + field(p_table, i, PULL_AT),
                p_d + pitch_n * at,
                p_kept,
                p_outputs + pitch * field(p_table, i - 1, OUT_AT),
                o_r,
                o_n,
                m_r,
                c,
                field(p_table, i, OUT),
                columns,
                1,
                1,
                True,
                ACTIVATION,
                1,
                BC,
                BK,
            )
        tl.debug_barrier()


@triton.jit(do_not_specialize=SIZES)
def _gradient_chain_kernel(
    p_table,
    p_push,
    p_pull,
    p_biases,
    p_parameters,
    p_inputs,
    p_z,
    p_d,
    p_tangents,
    p_t,
    p_cotangents,
    p_beta,
    p_by,
    p_deltas,
    p_grad,
    p_parts,
    rows,
    pitch,
    probes,
    layers,
    ACTIVATION: tl.constexpr,
    FORWARD: tl.constexpr,
    PROBES: tl.constexpr,
    DELTA: tl.constexpr,
    SLOPES: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """The gradient of a fully connected block but for its maps': the pass, then of each probe tangents and cotangents,
    then from the gradient of g (the last plane of `deltas`) that by x. SLOPES: of the slopes, too."""
    tile = tl.program_id(0).to(tl.int64)
    probe = tl.program_id(1).to(tl.int64)
    o_n = tile * BR + tl.arange(0, BR)
    m_n = o_n < rows
    plane = pitch.to(tl.int64)
    features = field(p_table, 0, IN)
    if FORWARD:
        forward_chain(
            p_table, p_push, p_biases, p_parameters, p_inputs, p_z, p_d, o_n, m_n, plane, layers, ACTIVATION, BC, BK
        )
    if PROBES:
        o_r = probe * rows + o_n
        wide = plane * probes
        for i in range(0, layers - 1):
            columns = field(p_table, i, OUT)
            for c in range(0, columns, BC):
                push_tile(
                    p_tangents + wide * field(p_table, i, IN_AT),
                    p_push + field(p_table, i, PUSH_AT),
                    p_d + plane * (field(p_table, i + 1, IN_AT) - features),
                    p_t + wide * field(p_table, i, OUT_AT),
                    p_tangents + wide * field(p_table, i + 1, IN_AT),
                    o_r,
                    o_n,
                    m_n,
                    c,
                    field(p_table, i, IN),
                    columns,
                    1,
                    1,
                    ACTIVATION,
                    1,
                    BC,
                    BK,
                )
            tl.debug_barrier()
        pull_chain(p_table, p_pull, p_cotangents, p_beta, p_d, o_r, o_n, m_n, wide, plane, layers, ACTIVATION, BC, BK)
    if DELTA:
        for back in range(0, layers - 1):
            i = layers - 1 - back
            columns = field(p_table, i - 1, OUT)
            at = field(p_table, i, IN_AT) - features
            p_betas = p_beta
            p_ts = p_t
            p_bys = p_by
            if SLOPES:
                p_betas = p_beta + plane * probes * at
                p_ts = p_t + plane * probes * field(p_table, i - 1, OUT_AT)
            if p_by is not None:
                p_bys = p_by + plane * at
            part = tl.zeros((), p_parts.dtype.element_ty)
            for c in range(0, columns, BC):
                part += delta_tile(
                    p_deltas + plane * field(p_table, i, OUT_AT),
                    p_pull + field(p_table, i, PULL_AT),
                    p_parameters + (i - 1),
                    p_z + plane * field(p_table, i - 1, OUT_AT),
                    p_d + plane * at,
                    p_betas,
                    p_ts,
                    p_bys,
                    p_deltas + plane * field(p_table, i - 1, OUT_AT),
                    o_n,
                    m_n,
                    c,
                    field(p_table, i, OUT),
                    columns,
                    1,
                    1,
                    rows,
                    probes,
                    ACTIVATION,
                    1,
                    BC,
                    BK,
                )
            tl.store(p_parts + ((i - 1) * tl.num_programs(0).to(tl.int64) + tile), part)
            tl.debug_barrier()
        for c in range(0, features, BC):
            o_c = tl.arange(0, BC).to(tl.int64) + c
            m_c = o_c < features
            b_x = product(p_deltas, p_pull, o_n, m_n, o_c, m_c, field(p_table, 0, OUT), features, 1, 1, True, 1, BK)
            tl.store(p_grad + (o_n[:, None] * features + o_c[None, :]), b_x, m_n[:, None] & m_c[None, :])


# ------------------------------------------------------------------------------------ a map of a convolution, by launch


@triton.jit
def rows_left(p_done, o_r, m_r, samples, rows):
    """Whether any sample of these rows is still to be done, and the mask of theirs."""
    if p_done is not None:
        b_done = tl.load(p_done + o_r // (rows // samples), m_r, other=1)
        m_r = m_r & (b_done == 0)
    return m_r, tl.max(m_r.to(tl.int32), axis=0) > 0


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    p_in,
    p_w,
    p_bias,
    p_parameter,
    p_z,
    p_a,
    p_d,
    p_done,
    rows,
    samples,
    place,
    inputs,
    columns,
    height,
    width,
    ACTIVATION: tl.constexpr,
    TAPS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_r, wanted = rows_left(p_done, o_r, o_r < rows, samples, rows)
    c = tl.program_id(1) * BC
    forward_tile(
        p_in,
        p_w,
        p_bias,
        p_parameter + place,
        p_z,
        p_a,
        p_d,
        o_r,
        m_r,
        c,
        inputs,
        columns,
        height,
        width,
        wanted,
        ACTIVATION,
        TAPS,
        BC,
        BK,
    )


@triton.jit(do_not_specialize=SIZES)
def _push_kernel(
    p_in,
    p_w,
    p_d,
    p_t,
    p_out,
    rows,
    probes,
    inputs,
    columns,
    height,
    width,
    ACTIVATION: tl.constexpr,
    TAPS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_r = o_r < rows.to(tl.int64) * probes
    c = tl.program_id(1) * BC
    push_tile(
        p_in, p_w, p_d, p_t, p_out, o_r, o_r % rows, m_r, c, inputs, columns, height, width, ACTIVATION, TAPS, BC, BK
    )


@triton.jit(do_not_specialize=SIZES)
def _pull_kernel(
    p_in,
    p_w,
    p_d,
    p_beta,
    p_out,
    p_done,
    rows,
    samples,
    probes,
    inputs,
    columns,
    height,
    width,
    ACTIVATION: tl.constexpr,
    TAPS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_r, wanted = rows_left(p_done, o_r, o_r < rows.to(tl.int64) * probes, samples, rows)
    c = tl.program_id(1) * BC
    pull_tile(
        p_in,
        p_w,
        p_d,
        p_beta,
        p_out,
        o_r,
        o_r % rows,
        m_r,
        c,
        inputs,
        columns,
        height,
        width,
        wanted,
        ACTIVATION,
        TAPS,
        BC,
        BK,
    )


@triton.jit(do_not_specialize=SIZES)
def _delta_kernel(
    p_in,
    p_w,
    p_parameter,
    p_z,
    p_d,
    p_beta,
    p_t,
    p_by,
    p_out,
    p_parts,
    rows,
    probes,
    place,
    inputs,
    columns,
    height,
    width,
    ACTIVATION: tl.constexpr,
    TAPS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    c = tl.program_id(1) * BC
    part = delta_tile(
        p_in,
        p_w,
        p_parameter + place,
        p_z,
        p_d,
        p_beta,
        p_t,
        p_by,
        p_out,
        o_r,
        o_r < rows,
        c,
        inputs,
        columns,
        height,
        width,
        rows,
        probes,
        ACTIVATION,
        TAPS,
        BC,
        BK,
    )
    tl.store(p_parts + tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1), part)


@triton.jit(do_not_specialize=SIZES)
def _plain_kernel(
    p_in,
    p_w,
    p_bias,
    p_target,
    p_x,
    p_out,
    p_done,
    rows,
    samples,
    inputs,
    columns,
    height,
    width,
    TAPS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """The product, with a bias where there is one; or target − x − that."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_r, wanted = rows_left(p_done, o_r, o_r < rows, samples, rows)
    o_c = tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC)
    m_c = o_c < columns
    b_y = product(p_in, p_w, o_r, m_r, o_c, m_c, inputs, columns, height, width, wanted, TAPS, BK)
    if p_bias is not None:
        b_y += tl.load(p_bias + o_c, m_c, other=0.0)[None, :]
    m = m_r[:, None] & m_c[None, :]
    o = o_r[:, None] * columns + o_c[None, :]
    if p_target is not None:
        b_y = tl.load(p_target + o, m, other=0.0) - tl.load(p_x + o, m, other=0.0) - b_y
    tl.store(p_out + o, b_y, m)


# ------------------------------------------------------------------------------------------------- sums over all rows


@triton.jit
def class_rows(tile, samples, height, width, classes, BR: tl.constexpr):
    """Of the rows sorted by their pixel's class (`genkernels.reference._block.classes`): which class a tile is of, its
    rows and their mask."""
    o = tl.arange(0, BR).to(tl.int64)
    found = tl.zeros((), tl.int32)
    top = tl.zeros((), tl.int64)
    left = tl.zeros((), tl.int64)
    high = tl.zeros((), tl.int64) + height
    wide = tl.zeros((), tl.int64) + width
    first = tl.zeros((), tl.int64)
    before = tl.zeros((), tl.int64)
    if classes > 1:
        for c in range(0, 9):
            line = c // 3
            column = c - 3 * line
            lines = tl.where(line == 1, height - 2, 1)
            columns = tl.where(column == 1, width - 2, 1)
            tiles = tl.cdiv(samples.to(tl.int64) * lines * columns, BR)
            here = (tile >= before) & (tile < before + tiles)
            found = tl.where(here, c, found)
            top = tl.where(here, tl.where(line == 0, 0, tl.where(line == 1, 1, height - 1)), top)
            left = tl.where(here, tl.where(column == 0, 0, tl.where(column == 1, 1, width - 1)), left)
            high = tl.where(here, lines, high)
            wide = tl.where(here, columns, wide)
            first = tl.where(here, before, first)
            before += tiles
    o_i = (tile - first) * BR + o
    size = tl.maximum(high * wide, 1)
    b_n = o_i // size
    b_p = o_i - b_n * size
    b_line = b_p // tl.maximum(wide, 1)
    o_r = (b_n * height + top + b_line) * width + left + (b_p - b_line * wide)
    return found, o_r, b_n, b_n < tl.where(high * wide > 0, samples, 0)


@triton.jit(do_not_specialize=SIZES)
def _trace_kernel(
    p_in,
    p_map,
    p_other,
    p_each,
    p_coefficient,
    p_out,
    samples,
    rows,
    inputs,
    columns,
    height,
    width,
    classes,
    SUMS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """M d at each pixel with the M of its class, M ``[classes, in, out]``; SUMS: the sum of its products with `other`,
    ``[column tiles, rows]``, times a coefficient; else times that and each sample's gradient."""
    found, o_r, o_n, m_r = class_rows(tl.program_id(0).to(tl.int64), samples, height, width, classes, BR)
    o_c = tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC)
    m_c = o_c < columns
    p_w = p_map + found.to(tl.int64) * inputs * columns
    b_y = product(p_in, p_w, o_r, m_r, o_c, m_c, inputs, columns, height, width, True, 1, BK)
    m = m_r[:, None] & m_c[None, :]
    o = o_r[:, None] * columns + o_c[None, :]
    coefficient = tl.load(p_coefficient).to(b_y.dtype)
    if SUMS:
        b_sum = coefficient * tl.sum(b_y * tl.load(p_other + o, m, other=0.0), axis=1)
        tl.store(p_out + (tl.program_id(1).to(tl.int64) * rows + o_r), b_sum, m_r)
    else:
        b_each = coefficient * tl.load(p_each + o_n, m_r, other=0.0)
        tl.store(p_out + o, b_each[:, None] * b_y, m)


@triton.jit(do_not_specialize=SIZES)
def _outer_kernel(
    p_in,
    p_g,
    p_each,
    p_coefficient,
    p_parts,
    p_bias_parts,
    rows,
    samples,
    inputs,
    columns,
    height,
    width,
    classes,
    first_part,
    steps,
    TAPS: tl.constexpr,
    CLASSES: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """parts ``[parts, taps · in, out]``: sums over this part's rows of gathered inputs times g, and of g itself.

    CLASSES: of the rows of each class, ``[classes, parts, in, out]``, each row times its sample's number.
    """
    ACC: tl.constexpr = p_in.dtype.element_ty
    o_k = tl.program_id(0).to(tl.int64) * BK + tl.arange(0, BK)
    o_c = tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC)
    part = tl.program_id(2).to(tl.int64)
    depth = inputs * TAPS
    m_k = o_k < depth
    m_c = o_c < columns
    b_sum = tl.zeros((BK, BC), ACC)
    b_bias = tl.zeros((BC,), ACC)
    begin = part * steps
    if CLASSES:
        tiles_of_part = steps
        parts = tl.num_programs(2) // classes
        which = part // parts
        begin, tiles_of_part = _class_tiles(which, part - which * parts, steps, samples, height, width, classes, BR)
    else:
        tiles_of_part = tl.zeros((), tl.int64) + steps
    for step in range(0, tiles_of_part):
        if CLASSES:
            found, o_r, o_n, m_r = class_rows(begin + step, samples, height, width, classes, BR)
        else:
            o_r = (begin + step) * BR + tl.arange(0, BR)
            m_r = o_r < rows
        b_y, b_x = _place(o_r, height, width, TAPS)
        b_in = _gather(p_in, o_r, m_r, o_k, m_k, inputs, b_y, b_x, height, width, TAPS)
        b_g = tl.load(p_g + (o_r[:, None] * columns + o_c[None, :]), m_r[:, None] & m_c[None, :], other=0.0)
        if CLASSES:
            b_each = tl.load(p_coefficient).to(ACC) * tl.load(p_each + o_n, m_r, other=0.0)
            b_g = b_g * b_each[:, None]
        b_sum = tl.dot(tl.trans(b_in), b_g, b_sum, input_precision="ieee", out_dtype=ACC)
        if p_bias_parts is not None:
            b_bias += tl.sum(b_g, axis=0)
    o = ((first_part + part) * depth + o_k)[:, None] * columns + o_c[None, :]
    tl.store(p_parts + o, b_sum, m_k[:, None] & m_c[None, :])
    if p_bias_parts is not None:
        m_bias = o_c < tl.where(tl.program_id(0) == 0, columns, 0)
        tl.store(p_bias_parts + ((first_part + part) * columns + o_c), b_bias, m_bias)


@triton.jit
def _class_tiles(which, part, steps, samples, height, width, classes, BR: tl.constexpr):
    """The first tile of a part of a class, and how many it has."""
    begin = tl.zeros((), tl.int64)
    of_class = tl.zeros((), tl.int64)
    for c in range(0, classes):
        line = c // 3
        column = c - 3 * line
        lines = tl.where(classes == 1, height, tl.where(line == 1, height - 2, 1))
        columns = tl.where(classes == 1, width, tl.where(column == 1, width - 2, 1))
        tiles = tl.cdiv(samples.to(tl.int64) * lines * columns, BR)
        begin += tl.where(c < which, tiles, 0)
        of_class = tl.where(c == which, tiles, of_class)
    first = tl.minimum(part * steps, of_class)
    return begin + first, tl.minimum(of_class - first, steps)


@triton.jit(do_not_specialize=SIZES)
def _add_parts_kernel(p_parts, p_out, inputs, columns, taps, parts, count, BLOCK: tl.constexpr):
    """out ``[groups, out, in, taps]`` of parts ``[groups, parts, taps, in, out]``, added up in order."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < count
    b_tap = o % taps
    b_i = (o // taps) % inputs
    b_c = o // taps // inputs
    b_group = b_c // columns
    size = tl.zeros((), tl.int64) + columns
    size = size * inputs * taps
    o_from = b_group * parts * size + (b_tap * inputs + b_i) * columns + (b_c - b_group * columns)
    b_sum = tl.zeros((BLOCK,), p_parts.dtype.element_ty)
    for part in range(0, parts):
        b_sum += tl.load(p_parts + (o_from + part * size), m, other=0.0)
    tl.store(p_out + o, b_sum.to(p_out.dtype.element_ty), m)


@triton.jit(do_not_specialize=("n0", "n1", "n2", "n3"))
def _write_kernel(p_to, n0, n1, n2, n3):
    """Four numbers' bits."""
    tl.store(p_to, n0.to(tl.int64))
    tl.store(p_to + 1, n1.to(tl.int64))
    tl.store(p_to + 2, n2.to(tl.int64))
    tl.store(p_to + 3, n3.to(tl.int64))


# ---------------------------------------------------------------------------------------------------------- launchers

BLOCK = 512


class Tiles(NamedTuple):
    BR: int
    BC: int
    BK: int
    num_warps: int
    num_stages: int
    #: ptxas alone settles for fewer registers, and spills
    maxnreg: int = 255


def _power(n: int, low: int, high: int) -> int:
    return max(low, min(high, triton.next_power_of_2(n)))


def map_tiles(itemsize: int, columns: int, rows: int = 64) -> Tiles:
    """Of a launch for one map."""
    if itemsize == 8:
        return Tiles(32, _power(columns, 16, 32), 16, 4, 1)
    return Tiles(rows, _power(columns, 16, 64), 16, 4 if columns <= 32 else 8, 2)


#: Rows of a tile that holds more at once: of the gradient by z, and of [z, −z] transposed.
DELTA_ROWS = 32


def chain_tiles(itemsize: int) -> Tiles:
    """Of a program that goes through all maps."""
    return Tiles(16, 32, 16, 8, 1) if itemsize == 8 else Tiles(16, 64, 16, 8, 1)


class Map(NamedTuple):
    """One linear map; its matrices packed for W t and Wᵀ w."""

    inputs: int
    outputs: int
    taps: int
    push: Tensor
    pull: Tensor
    bias: Tensor


class Network:
    """A block's tensors, packed in the type that is computed in, and the sizes of its planes for `samples` samples.

    Buffers of planes come flat; a plane begins at `pitch` (rows, rounded up for the sake of alignment) times the widths
    before it.
    """

    def __init__(self, x: Tensor, weights, biases, parameters: Tensor, activation: int):
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        self.x, self.activation = x, int(activation)
        self.parameters = parameters.to(self.dtype)
        self.image = x.dim() == 4
        self.samples, self.features = x.shape[0], x.shape[1]
        self.height, self.width = x.shape[2:] if self.image else (1, 1)
        self.rows = self.samples * self.height * self.width
        self.pitch = (self.rows + 3) // 4 * 4
        both = 2 if activation == CLIPSWISH.value else 1
        self.in_widths = [w.shape[1] for w in weights]
        self.out_widths = [w.shape[0] for w in weights]
        self.slope_widths = [both * h for h in self.out_widths[:-1]]
        self.maps, rows = self._pack(weights, biases)
        self.layers = len(self.maps)
        self.table = None if self.image else _table(str(x.device), tuple(rows))

    def _pack(self, weights, biases) -> tuple[list[Map], list[tuple[int, ...]]]:
        at, places, bias_at = 0, [], 0
        for w in weights:
            places.append(at)
            at += (w.numel() + 3) // 4 * 4
        new = self.x.new_empty
        self.push, self.pull = new((at,), dtype=self.dtype), new((at,), dtype=self.dtype)
        self.biases = new((sum((len(b) + 3) // 4 * 4 for b in biases),), dtype=self.dtype)
        maps, rows, in_at, out_at = [], [], 0, 0
        for w, b, place in zip(weights, biases, places, strict=True):
            outputs, inputs = w.shape[:2]
            kernel = w.reshape(outputs, inputs, -1)
            taps = kernel.shape[2]
            push, pull = (t[place : place + w.numel()] for t in (self.push, self.pull))
            push.view(taps, inputs, outputs).copy_(kernel.permute(2, 1, 0))
            pull.view(taps, outputs, inputs).copy_((kernel.flip(2) if taps > 1 else kernel).permute(2, 0, 1))
            bias = self.biases[bias_at : bias_at + outputs]
            bias.copy_(b)
            maps.append(Map(inputs, outputs, taps, push, pull, bias))
            rows.append((inputs, outputs, place, place, bias_at, in_at, out_at))
            bias_at += (outputs + 3) // 4 * 4
            in_at, out_at = in_at + inputs, out_at + outputs
        return maps, rows

    # planes

    def planes(self, widths: list[int], probes: int = 1) -> tuple[Tensor, list[Tensor]]:
        """A buffer, and its planes ``[probes · rows, width]``."""
        pitch, count, at = self.pitch * probes, self.rows * probes, 0
        flat, found = self.x.new_empty((pitch * sum(widths),), dtype=self.dtype), []
        for width in widths:
            found.append(flat[pitch * at : pitch * at + count * width].view(count, width))
            at += width
        return flat, found

    def enter(self, plane: Tensor, t: Tensor) -> Tensor:
        """Fills a plane with ``[..., N, C]`` or ``[..., N, C, H, W]``."""
        if self.image:
            t = t.reshape(-1, *t.shape[-3:]).permute(0, 2, 3, 1)
            plane.view(t.shape).copy_(t)
        else:
            plane.copy_(t.reshape(-1, t.shape[-1]))
        return plane

    def leave(self, plane: Tensor, like: Tensor) -> Tensor:
        """A plane as a tensor of another's shape and type."""
        if not self.image:
            return plane.view(like.shape).to(like.dtype)
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        whole = out.view(-1, *like.shape[-3:])
        whole.copy_(plane.view(len(whole), self.height, self.width, -1).permute(0, 3, 1, 2))
        return out

    # launches of a map

    def launch(self, kernel, map_: Map, columns: int, rows: int, arguments: tuple, tile: int = 64, **options) -> None:
        """`columns`: that a program's tiles go over."""
        tiles = map_tiles(self.parameters.element_size(), columns, tile)
        grid = (triton.cdiv(rows, tiles.BR), triton.cdiv(columns, tiles.BC))
        kernel[grid](*arguments, TAPS=map_.taps, **tiles._asdict(), **options, enable_fp_fusion=True)

    def column_tiles(self, columns: int) -> int:
        return triton.cdiv(columns, map_tiles(self.parameters.element_size(), columns).BC)

    def delta_tiles(self, columns: int) -> int:
        tiles = map_tiles(self.parameters.element_size(), columns, DELTA_ROWS)
        return triton.cdiv(self.rows, tiles.BR) * triton.cdiv(columns, tiles.BC)

    def forward(self, i: int, into: Tensor, z: Tensor | None, a: Tensor, d: Tensor | None, done=None) -> None:
        m = self.maps[i]
        sizes = (self.rows, self.samples, i, m.inputs, m.outputs, self.height, self.width)
        arguments = (into, m.push, m.bias, self.parameters, z, a, d, done, *sizes)
        self.launch(_forward_kernel, m, m.outputs, self.rows, arguments, ACTIVATION=self.activation)

    def pull_back(self, i: int, w: Tensor, d: Tensor, beta: Tensor | None, out: Tensor, probes: int, done=None) -> None:
        """Through map i and the activation before it."""
        m, h = self.maps[i], self.out_widths[i - 1]
        sizes = (self.rows, self.samples, probes, m.outputs, h, self.height, self.width)
        arguments = (w, m.pull, d, beta, out, done, *sizes)
        tile = DELTA_ROWS if self.activation == CLIPSWISH.value else 64
        self.launch(_pull_kernel, m, h, self.rows * probes, arguments, tile, ACTIVATION=self.activation)

    def value(self, into: Tensor, out: Tensor, target=None, x=None, done=None) -> None:
        """The last map; target − x − it."""
        m = self.maps[-1]
        sizes = (self.rows, self.samples, m.inputs, m.outputs, self.height, self.width)
        self.launch(_plain_kernel, m, m.outputs, self.rows, (into, m.push, m.bias, target, x, out, done, *sizes))

    def pull_out(self, w: Tensor, out: Tensor, target=None, x=None, done=None) -> None:
        """The transposed first map; target − x − it."""
        m = self.maps[0]
        sizes = (self.rows, self.samples, m.outputs, m.inputs, self.height, self.width)
        self.launch(_plain_kernel, m, m.inputs, self.rows, (w, m.pull, None, target, x, out, done, *sizes))


_KEPT: dict[tuple, Tensor] = {}


def _table(device: str, rows: tuple[tuple[int, ...], ...]) -> Tensor:
    """Made once for a list of shapes, and kept: graphs captured with it may be replayed at any time."""
    if (device, rows) not in _KEPT:
        _KEPT[device, rows] = torch.tensor(rows, dtype=torch.int64).to(device)
    return _KEPT[device, rows]


def numbers(values: list[float], device: torch.device) -> Tensor:
    """fp64 on a device, without waiting for it; while a graph is captured as kernels' arguments, for a copy from the
    host would be made anew at each replay."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.float64, device=device)
    if not torch.cuda.is_current_stream_capturing():
        return torch.tensor(values, dtype=torch.float64, pin_memory=True).to(device, non_blocking=True)
    return written(values, torch.empty((len(values) + 3) // 4 * 4, dtype=torch.int64, device=device))


def written(values: list[float], table: Tensor) -> Tensor:
    bits = [struct.unpack("q", struct.pack("d", value))[0] for value in values]
    bits += [0] * (len(table) - len(bits))
    for begin in range(0, len(bits), 4):
        _write_kernel[(1,)](table[begin:], *bits[begin : begin + 4])
    return table.view(torch.float64)[: len(values)]


# --------------------------------------------------------------------------------------------------------- gradients


class Passed(NamedTuple):
    """What a pass leaves for gradients: planes of the maps' inputs (x first), of z and of the slopes, flat and each."""

    inputs: tuple[Tensor, list[Tensor]]
    z: tuple[Tensor, list[Tensor]]
    d: tuple[Tensor, list[Tensor]]


class Probed(NamedTuple):
    """Of probes: planes of the tangents that maps read (the probes first), of z's tangents, of the cotangents of what
    maps give (last those of g) and of the activations' outputs; and what to add to the slopes' gradients."""

    tangents: tuple[Tensor, list[Tensor]]
    t: tuple[Tensor, list[Tensor]]
    cotangents: tuple[Tensor, list[Tensor]]
    beta: tuple[Tensor, list[Tensor]]
    count: int
    by: tuple[Tensor, list[Tensor]] | None


def room_for_pass(net: Network) -> Passed:
    found = Passed(net.planes(net.in_widths), net.planes(net.out_widths[:-1]), net.planes(net.slope_widths))
    net.enter(found.inputs[1][0], net.x)
    return found


def room_for_probes(net: Network, count: int, traced: bool) -> Probed:
    return Probed(
        net.planes(net.in_widths, count),
        net.planes(net.out_widths[:-1], count),
        net.planes(net.out_widths, count),
        net.planes(net.slope_widths, count),
        count,
        net.planes(net.slope_widths) if traced else None,
    )


def run_pass(net: Network, at: Passed) -> None:
    """z, activations and slopes from x."""
    if not net.image:
        _chain(net, at, None, None, None, None, FORWARD=True)
        return
    for i in range(net.layers - 1):
        net.forward(i, at.inputs[1][i], at.z[1][i], at.inputs[1][i + 1], at.d[1][i])


def run_probes(net: Network, at: Passed, probed: Probed) -> None:
    if not net.image:
        _chain(net, at, probed, None, None, None, PROBES=True)
        return
    rows, size = net.rows * probed.count, (net.height, net.width)
    for i in range(net.layers - 1):
        m = net.maps[i]
        arguments = (probed.tangents[1][i], m.push, at.d[1][i], probed.t[1][i], probed.tangents[1][i + 1])
        arguments += (net.rows, probed.count, m.inputs, m.outputs, *size)
        net.launch(_push_kernel, m, m.outputs, rows, arguments, ACTIVATION=net.activation)
    outs = probed.cotangents[1]
    for i in range(net.layers - 1, 0, -1):
        net.pull_back(i, outs[i], at.d[1][i - 1], probed.beta[1][i - 1], outs[i - 1], probed.count)


def run_deltas(net: Network, at: Passed, probed: Probed | None, deltas: tuple[Tensor, list[Tensor]]) -> tuple:
    """``(gradient by x, by the parameters)``; fills the planes of `deltas` but the last, the gradient by g."""
    grad = net.x.new_empty((net.rows, net.features), dtype=net.dtype)
    if not net.image:
        tiles = chain_tiles(grad.element_size())
        parts = grad.new_empty((net.layers - 1, triton.cdiv(net.rows, tiles.BR)))
        _chain(net, at, probed, deltas, grad, parts, DELTA=True)
        return grad, parts.sum(1)
    by = []
    for i in range(net.layers - 1, 0, -1):
        m, h = net.maps[i], net.out_widths[i - 1]
        parts = grad.new_empty((net.delta_tiles(h),))
        beta, t = (None, None) if probed is None else (probed.beta[1][i - 1], probed.t[1][i - 1])
        traced = None if probed is None or probed.by is None else probed.by[1][i - 1]
        arguments = (deltas[1][i], m.pull, net.parameters, at.z[1][i - 1], at.d[1][i - 1], beta, t, traced)
        arguments += (deltas[1][i - 1], parts, net.rows, 1 if probed is None else probed.count)
        arguments += (i - 1, m.outputs, h, net.height, net.width)
        net.launch(_delta_kernel, m, h, net.rows, arguments, DELTA_ROWS, ACTIVATION=net.activation)
        by.insert(0, parts.sum())
    net.pull_out(deltas[1][0], grad)
    return grad, torch.stack(by)


def run_all(net: Network, at: Passed, probed: Probed | None, deltas) -> tuple[Tensor, Tensor]:
    """All of it, where possible by one launch: ``(gradient by x, by the parameters)``."""
    fits = not net.image and (probed is None or probed.count == 1) and (probed is None or probed.by is None)
    if not fits:
        run_pass(net, at)
        if probed is not None:
            run_probes(net, at, probed)
        return run_deltas(net, at, probed, deltas)
    grad = net.x.new_empty((net.rows, net.features), dtype=net.dtype)
    parts = grad.new_empty((net.layers - 1, triton.cdiv(net.rows, chain_tiles(grad.element_size()).BR)))
    _chain(net, at, probed, deltas, grad, parts, FORWARD=True, PROBES=probed is not None, DELTA=True)
    return grad, parts.sum(1)


def _chain(net, at, probed, deltas, grad, parts, FORWARD=False, PROBES=False, DELTA=False) -> None:
    tiles = chain_tiles(net.parameters.element_size())
    both = (None,) * 5
    if probed is not None:
        flat = [p[0] for p in (probed.tangents, probed.t, probed.cotangents, probed.beta)]
        both = (*flat, None if probed.by is None else probed.by[0])
    grid = (triton.cdiv(net.rows, tiles.BR), probed.count if PROBES else 1)
    _gradient_chain_kernel[grid](
        net.table,
        net.push,
        net.pull,
        net.biases,
        net.parameters,
        at.inputs[0],
        at.z[0],
        at.d[0],
        *both,
        None if deltas is None else deltas[0],
        grad,
        parts,
        net.rows,
        net.pitch,
        1 if probed is None else probed.count,
        net.layers,
        ACTIVATION=net.activation,
        FORWARD=FORWARD,
        PROBES=PROBES,
        DELTA=DELTA,
        SLOPES=DELTA and probed is not None,
        **tiles._asdict(),
        enable_fp_fusion=True,
    )


def _splits(rows: int, programs: int, tile: int) -> tuple[int, int]:
    """(parts, steps a part): about 512 programs in all, each with at least 8 steps; by shape alone."""
    steps = max(1, triton.cdiv(rows, tile))
    parts = max(1, min(triton.cdiv(512, programs), steps // 8))
    each = triton.cdiv(steps, parts)
    return triton.cdiv(steps, each), each


def _outer_tiles(itemsize: int, depth: int, columns: int) -> Tiles:
    if itemsize == 8:
        return Tiles(16, 16, 16, 4, 1)
    return Tiles(16, _power(columns, 16, 64), _power(depth, 16, 32), 8 if columns > 32 else 4, 2)


def map_gradients(net: Network, at: Passed, probed: Probed | None, deltas, weights, biases) -> list[Tensor]:
    """Those of each weight, then those of each bias, like these."""
    by_weights, by_biases = [], []
    for i, m in enumerate(net.maps):
        pairs = [(at.inputs[1][i], deltas[1][i], 1)]
        if probed is not None:
            pairs.append((probed.tangents[1][i], probed.cotangents[1][i], probed.count))
        depth = m.inputs * m.taps
        tiles = _outer_tiles(net.parameters.element_size(), depth, m.outputs)
        grid = (triton.cdiv(depth, tiles.BK), triton.cdiv(m.outputs, tiles.BC))
        cuts = [_splits(net.rows * probes, math.prod(grid), tiles.BR) for *_, probes in pairs]
        total = sum(parts for parts, _ in cuts)
        sums = net.x.new_empty((total, depth, m.outputs), dtype=net.dtype)
        bias_sums = net.x.new_empty((cuts[0][0], m.outputs), dtype=net.dtype)
        first = 0
        for (inputs, g, probes), (parts, steps) in zip(pairs, cuts, strict=True):
            sizes = (net.rows * probes, net.samples * probes, m.inputs, m.outputs, net.height, net.width, 1)
            bias = bias_sums if first == 0 else None
            arguments = (inputs, g, None, None, sums, bias, *sizes, first, steps)
            _outer_kernel[(*grid, parts)](
                *arguments, TAPS=m.taps, CLASSES=False, **tiles._asdict(), enable_fp_fusion=True
            )
            first += parts
        by_weights.append(_added(sums, torch.empty_like(weights[i]), m.inputs, m.outputs, m.taps, total))
        by_biases.append(_added(bias_sums, torch.empty_like(biases[i]), 1, m.outputs, 1, cuts[0][0]))
    return [*by_weights, *by_biases]


def _added(sums: Tensor, out: Tensor, inputs: int, columns: int, taps: int, parts: int) -> Tensor:
    grid = (triton.cdiv(out.numel(), BLOCK),)
    _add_parts_kernel[grid](sums, out, inputs, columns, taps, parts, out.numel(), BLOCK=BLOCK)
    return out


# ------------------------------------------------------------------------------------------ the trace of a block


def _class_tile_count(net: Network, classes: int, tile: int) -> list[int]:
    """Tiles of each class of pixels."""
    if classes == 1:
        return [triton.cdiv(net.rows, tile)]
    lines, columns = (1, net.height - 2, 1), (1, net.width - 2, 1)
    return [triton.cdiv(net.samples * a * b, tile) for a in lines for b in columns]


def trace_sums(net: Network, d: list[Tensor], trace_map: Tensor, coefficient: Tensor) -> Tensor:
    """``[column tiles, rows]``: of each pixel d₂ᵀ M d₁ times a coefficient."""
    outputs, inputs = trace_map.shape[1:]
    tiles = map_tiles(net.parameters.element_size(), outputs)
    sums = d[0].new_empty((triton.cdiv(outputs, tiles.BC), net.rows))
    _trace(net, d[0], trace_map.transpose(1, 2), d[1], None, coefficient, sums, inputs, outputs, len(trace_map))
    return sums


def trace_gradients(net: Network, d, trace_map: Tensor, each: Tensor, coefficient: Tensor, by) -> Tensor:
    """Fills what the trace adds to the slopes' gradients; the gradient by the map."""
    classes, outputs, inputs = trace_map.shape
    _trace(net, d[0], trace_map.transpose(1, 2), None, each, coefficient, by[1], inputs, outputs, classes)
    _trace(net, d[1], trace_map, None, each, coefficient, by[0], outputs, inputs, classes)
    tiles = _outer_tiles(net.parameters.element_size(), inputs, outputs)
    grid = (triton.cdiv(inputs, tiles.BK), triton.cdiv(outputs, tiles.BC))
    most = max(_class_tile_count(net, classes, tiles.BR))
    parts, steps = _splits(most * tiles.BR, math.prod(grid) * classes, tiles.BR)
    sums = d[0].new_empty((classes, parts, inputs, outputs))
    sizes = (net.rows, net.samples, inputs, outputs, net.height, net.width, classes, 0, steps)
    _outer_kernel[(*grid, classes * parts)](
        d[0],
        d[1],
        each,
        coefficient,
        sums,
        None,
        *sizes,
        TAPS=1,
        CLASSES=True,
        **tiles._asdict(),
        enable_fp_fusion=True,
    )
    return _added(sums, torch.empty_like(trace_map), inputs, outputs, 1, parts)


def _trace(net, d, matrix, other, each, coefficient, out, inputs, outputs, classes) -> None:
    """`matrix` is ``[classes, in, out]``."""
    tiles = map_tiles(net.parameters.element_size(), outputs)
    grid = (sum(_class_tile_count(net, classes, tiles.BR)), triton.cdiv(outputs, tiles.BC))
    packed = matrix.to(net.dtype).contiguous()
    sizes = (net.samples, net.rows, inputs, outputs, net.height, net.width, classes)
    _trace_kernel[grid](
        *(d, packed, other, each, coefficient, out, *sizes),
        SUMS=other is not None,
        **tiles._asdict(),
        enable_fp_fusion=True,
    )
