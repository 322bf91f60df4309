"""A tile of one map: the product over taps and channels, and what follows it in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from genkernels.triton._block.curves import CLIPSWISH, curve, curve_changes


@triton.jit
def gather(p_in, o_r, m_r, o_k, m_k, inputs, b_y, b_x, height, width, TAPS: tl.constexpr):
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
def place(o_r, height, width, TAPS: tl.constexpr):
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
    b_y, b_x = place(o_r, height, width, TAPS)
    depth = inputs * TAPS
    for k in range(0, tl.where(wanted, depth, 0), BK):
        o_k = tl.arange(0, BK).to(tl.int64) + k
        m_k = o_k < depth
        b_in = gather(p_in, o_r, m_r, o_k, m_k, inputs, b_y, b_x, height, width, TAPS)
        o_w = o_k[:, None] * columns + o_c[None, :]
        b_w = tl.load(p_w + o_w, m_k[:, None] & m_c[None, :], other=0.0)
        b_sum = tl.dot(b_in, b_w, b_sum, input_precision="ieee", out_dtype=ACC)
    return b_sum


@triton.jit
def bias_tile(p_bias, bias_pitch, o_n, m_r, o_c, m_c):
    """``[1, BC]``; with a pitch, from one sample's biases to the next one's, ``[BR, BC]``. o_n: the rows' samples."""
    if bias_pitch is None:
        return tl.load(p_bias + o_c, m_c, other=0.0)[None, :]
    else:
        return tl.load(p_bias + (o_n[:, None] * bias_pitch + o_c[None, :]), m_r[:, None] & m_c[None, :], other=0.0)


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
    bias_pitch,
    p_parameter,
    p_z,
    p_a,
    p_d,
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
    """z = W a + b of a map before an activation, the activation and its slopes; z and slopes where they are wanted.
    o_n: the rows' samples."""
    o_c = tl.arange(0, BC).to(tl.int64) + c
    m_c = o_c < columns
    b_z = product(p_in, p_w, o_r, m_r, o_c, m_c, inputs, columns, height, width, wanted, TAPS, BK)
    b_z += bias_tile(p_bias, bias_pitch, o_n, m_r, o_c, m_c)
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
