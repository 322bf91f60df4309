"""Both products of a power iteration with a matrix, in one read of it."""

from __future__ import annotations

import triton
import triton.language as tl

from genkernels.triton._spectral_norm.layers import (
    A_AT,
    B_AT,
    BLOCKS,
    COLUMNS,
    DISTANCE,
    LEFT,
    LEFT_AT,
    NARROW,
    PARTIAL_AT,
    PARTS,
    RIGHT,
    RIGHT_AT,
    ROWS,
    K,
    M,
)
from genkernels.triton._spectral_norm.norms import piece_of, vector_of


@triton.jit
def _column_offsets(p_layer, o_k):
    """Offsets of columns in row 0, and the distance of rows."""
    rows = tl.load(p_layer + M)
    distance = tl.load(p_layer + DISTANCE).to(tl.int32)
    b_run = o_k // distance
    return b_run.to(tl.int64) * (rows * distance) + (o_k - b_run * distance), distance.to(tl.int64)


@triton.jit
def sweep(p_weight, p_layer, p_room, block, p_v, p_found_v, given, first, second, p_u, p_found_u, given_u, alone):
    """a of a program's rows, its piece and, unless `alone`, what they give to b."""
    A: tl.constexpr = p_room.dtype.element_ty
    rows = tl.load(p_layer + M).to(tl.int32)
    columns = tl.load(p_layer + K).to(tl.int32)
    blocks = tl.load(p_layer + BLOCKS + LEFT).to(tl.int32)
    o_r = block * ROWS + tl.arange(0, ROWS)
    m_r = o_r < rows
    b_sum = tl.zeros((ROWS, COLUMNS), A)
    for k in range(0, columns, COLUMNS):
        o_k = k + tl.arange(0, COLUMNS)
        m_k = o_k < columns
        o_w, distance = _column_offsets(p_layer, o_k)
        o_w = o_w[None, :] + (o_r * distance)[:, None]
        b_w = tl.load(p_weight + o_w, m_r[:, None] & m_k[None, :], other=0.0).to(A)
        b_sum += b_w * vector_of(p_v, p_found_v, given, first, second, o_k, m_k)[None, :]
    b_a = tl.sum(b_sum, axis=1)
    tl.store(p_room + tl.load(p_layer + A_AT) + o_r, b_a, m_r)
    b_a = tl.where(m_r, b_a, 0.0)
    largest, squares = piece_of(b_a)
    p_piece = p_room + tl.load(p_layer + LEFT_AT) + block
    tl.store(p_piece, largest)
    tl.store(p_piece + blocks, squares)
    tl.store(p_piece + 2 * blocks, tl.sum(b_a * vector_of(p_u, p_found_u, given_u, 1.0, 1.0, o_r, m_r), axis=0))
    b_scaled = b_a / tl.where(largest > 0, largest, 1.0)
    p_partial = p_room + tl.load(p_layer + PARTIAL_AT) + tl.load(p_layer + K) * block
    for k in range(0, tl.where(alone, 0, columns), COLUMNS):
        o_k = k + tl.arange(0, COLUMNS)
        m_k = o_k < columns
        o_w, distance = _column_offsets(p_layer, o_k)
        o_w = o_w[None, :] + (o_r * distance)[:, None]
        b_w = tl.load(p_weight + o_w, m_r[:, None] & m_k[None, :], other=0.0).to(A)
        tl.store(p_partial + o_k, tl.sum(b_w * b_scaled[:, None], axis=0), m_k)


@triton.jit
def gather(p_weight, p_layer, p_room, block, usable, first, second, p_u, p_found_u, given):
    """b of a program's columns, and its piece: from the partial sums or, where a has no norm, from W and u."""
    A: tl.constexpr = p_room.dtype.element_ty
    rows = tl.load(p_layer + M).to(tl.int32)
    columns = tl.load(p_layer + K).to(tl.int32)
    blocks = tl.load(p_layer + BLOCKS + RIGHT).to(tl.int32)
    partials = tl.load(p_layer + BLOCKS + LEFT).to(tl.int32)
    o_k = block * NARROW + tl.arange(0, NARROW)
    m_k = o_k < columns
    b_sum = tl.zeros((PARTS, NARROW), A)
    pitch = tl.load(p_layer + K)
    p_left = p_room + tl.load(p_layer + LEFT_AT)
    p_partial = p_room + tl.load(p_layer + PARTIAL_AT)
    for i in range(0, tl.where(usable, partials, 0), PARTS):
        o_i = i + tl.arange(0, PARTS)
        m_i = o_i < partials
        b_unit = tl.load(p_left + o_i, m_i, other=0.0) * first * second
        o = (o_i * pitch)[:, None] + o_k[None, :]
        b_sum += b_unit[:, None] * tl.load(p_partial + o, m_i[:, None] & m_k[None, :], other=0.0)
    o_w, distance = _column_offsets(p_layer, o_k)
    for r in range(0, tl.where(usable, 0, rows), PARTS):
        o_r = r + tl.arange(0, PARTS)
        m_r = o_r < rows
        o = o_w[None, :] + (o_r * distance)[:, None]
        b_w = tl.load(p_weight + o, m_r[:, None] & m_k[None, :], other=0.0).to(A)
        b_sum += b_w * vector_of(p_u, p_found_u, given, first, second, o_r, m_r)[:, None]
    b_b = tl.sum(b_sum, axis=0)
    tl.store(p_room + tl.load(p_layer + B_AT) + o_k, b_b, m_k)
    largest, squares = piece_of(tl.where(m_k, b_b, 0.0))
    p_piece = p_room + tl.load(p_layer + RIGHT_AT) + block
    tl.store(p_piece, largest)
    tl.store(p_piece + blocks, squares)
    tl.store(p_piece + 2 * blocks, 0.0)
