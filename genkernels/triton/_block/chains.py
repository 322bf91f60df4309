"""All maps of a fully connected block, by one program."""

from __future__ import annotations

import triton
import triton.language as tl

from genkernels.triton._block.table import BIAS_AT, IN, IN_AT, OUT, OUT_AT, PULL_AT, PUSH_AT, SIZES, field
from genkernels.triton._block.tiles import delta_tile, forward_tile, product, pull_tile, push_tile


@triton.jit
def forward_chain(
    p_table,
    p_push,
    p_biases,
    bias_pitch,
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
                bias_pitch,
                p_parameters + i,
                p_points,
                p_out,
                p_slopes,
                o_r,
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
def gradient_chain_kernel(
    p_table,
    p_push,
    p_pull,
    p_biases,
    bias_pitch,
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
            p_table,
            p_push,
            p_biases,
            bias_pitch,
            p_parameters,
            p_inputs,
            p_z,
            p_d,
            o_n,
            m_n,
            plane,
            layers,
            ACTIVATION,
            BC,
            BK,
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
