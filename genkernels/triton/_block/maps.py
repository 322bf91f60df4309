"""One map of a convolution, by a launch."""

from __future__ import annotations

import triton
import triton.language as tl

from genkernels.triton._block.table import SIZES
from genkernels.triton._block.tiles import bias_tile, delta_tile, forward_tile, product, pull_tile, push_tile


@triton.jit
def rows_left(p_done, o_n, m_r):
    """Whether any of these rows' samples is still to be done, and the mask of theirs."""
    if p_done is not None:
        b_done = tl.load(p_done + o_n, m_r, other=1)
        m_r = m_r & (b_done == 0)
    return m_r, tl.max(m_r.to(tl.int32), axis=0) > 0


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    p_in,
    p_w,
    p_bias,
    bias_pitch,
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
    o_n = o_r // (rows // samples)
    m_r, wanted = rows_left(p_done, o_n, o_r < rows)
    c = tl.program_id(1) * BC
    forward_tile(
        p_in,
        p_w,
        p_bias,
        bias_pitch,
        p_parameter + place,
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
        ACTIVATION,
        TAPS,
        BC,
        BK,
    )


@triton.jit(do_not_specialize=SIZES)
def push_kernel(
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
def pull_kernel(
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
    m_r, wanted = rows_left(p_done, o_r // (rows // samples), o_r < rows.to(tl.int64) * probes)
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
def delta_kernel(
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
def plain_kernel(
    p_in,
    p_w,
    p_bias,
    bias_pitch,
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
    o_n = o_r // (rows // samples)
    m_r, wanted = rows_left(p_done, o_n, o_r < rows)
    o_c = tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC)
    m_c = o_c < columns
    b_y = product(p_in, p_w, o_r, m_r, o_c, m_c, inputs, columns, height, width, wanted, TAPS, BK)
    if p_bias is not None:
        b_y += bias_tile(p_bias, bias_pitch, o_n, m_r, o_c, m_c)
    m = m_r[:, None] & m_c[None, :]
    o = o_r[:, None] * columns + o_c[None, :]
    if p_target is not None:
        b_y = tl.load(p_target + o, m, other=0.0) - tl.load(p_x + o, m, other=0.0) - b_y
    tl.store(p_out + o, b_y, m)
