"""Products with a convolution: matrix products whose right factor is gathered by index."""

from __future__ import annotations

import triton
import triton.language as tl

from genkernels.triton._spectral_norm.layers import (
    AXIS,
    BLOCKS,
    LEFT,
    P_AXES,
    P_CHANNELS,
    P_COLUMN_TILES,
    P_COLUMNS,
    P_DEPTH,
    P_GROUP,
    P_INNER,
    P_PITCH,
    P_PLACES,
    P_ROW_TILES,
    P_ROWS,
    P_SKIP,
    PRODUCT,
    PRODUCTS,
    TILE_COLUMNS,
    TILE_ROWS,
)
from genkernels.triton._spectral_norm.norms import piece_of, vector_of


@triton.jit
def _axis(p_axis):
    """The numbers of `Axis`."""
    return (
        tl.load(p_axis).to(tl.int32),
        tl.load(p_axis + 1).to(tl.int32),
        tl.load(p_axis + 2).to(tl.int32),
        tl.load(p_axis + 3).to(tl.int32),
        tl.load(p_axis + 4).to(tl.int32),
        tl.load(p_axis + 5).to(tl.int32),
        tl.load(p_axis + 6).to(tl.int32),
        tl.load(p_axis + 7).to(tl.int32),
        tl.load(p_axis + 8).to(tl.int32),
    )


@triton.jit
def multiply(p_left, p_product, block, wanted, p_given, p_found, given, first, second):
    """A tile of a product (zeros unless `wanted`), its numbers' offsets and mask.

    The left factor's numbers stand `pitch` apart from row to row, neighbours along the depth but for `skip` after every
    `inner` of them.
    """
    A: tl.constexpr = p_found.dtype.element_ty
    TILE_DEPTH: tl.constexpr = 16 if A == tl.float64 else 32
    rows = tl.load(p_product + P_ROWS).to(tl.int32)
    columns = tl.load(p_product + P_COLUMNS).to(tl.int32)
    depth = tl.load(p_product + P_DEPTH).to(tl.int32)
    row_tiles = tl.load(p_product + P_ROW_TILES).to(tl.int32)
    column_tiles = tl.load(p_product + P_COLUMN_TILES).to(tl.int32)
    inner = tl.load(p_product + P_INNER).to(tl.int32)
    places = tl.load(p_product + P_PLACES).to(tl.int32)
    skip = tl.load(p_product + P_SKIP)
    p_axes = p_product + P_AXES
    columns0, depths0, by_column0, by_depth0, offset0, size0, divisor0, period0, images0 = _axis(p_axes)
    columns1, depths1, by_column1, by_depth1, offset1, size1, divisor1, period1, images1 = _axis(p_axes + AXIS)
    columns2, depths2, by_column2, by_depth2, offset2, size2, divisor2, period2, images2 = _axis(p_axes + 2 * AXIS)

    group = (block // column_tiles) // row_tiles
    o_row = (block // column_tiles) % row_tiles * TILE_ROWS + tl.arange(0, TILE_ROWS)
    o_column = block % column_tiles * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    m_row = o_row < rows
    m_column = o_column < columns
    o_left = o_row * tl.load(p_product + P_PITCH) + group * tl.load(p_product + P_GROUP)
    # the column's digits
    b_c1 = o_column // columns2
    b_place2 = (o_column - b_c1 * columns2) * by_column2 + offset2
    b_c0 = b_c1 // columns1
    b_place1 = (b_c1 - b_c0 * columns1) * by_column1 + offset1
    b_channel = b_c0 // columns0
    b_place0 = (b_c0 - b_channel * columns0) * by_column0 + offset0
    b_channel += group * tl.load(p_product + P_CHANNELS).to(tl.int32)

    b_sum = tl.zeros((TILE_ROWS, TILE_COLUMNS), A)
    for d in range(0, tl.where(wanted, depth, 0), TILE_DEPTH):
        o_d = d + tl.arange(0, TILE_DEPTH)
        m_d = o_d < depth
        o_l = o_left[:, None] + (o_d + (o_d // inner) * skip)[None, :]
        b_left = tl.load(p_left + o_l, m_row[:, None] & m_d[None, :], other=0.0).to(A)
        # the depth's digits
        b_d1 = o_d // depths2
        b_at2 = ((o_d - b_d1 * depths2) * by_depth2)[:, None] + b_place2[None, :]
        b_d0 = b_d1 // depths1
        b_at1 = ((b_d1 - b_d0 * depths1) * by_depth1)[:, None] + b_place1[None, :]
        b_top = b_d0 // depths0
        b_at0 = ((b_d0 - b_top * depths0) * by_depth0)[:, None] + b_place0[None, :]
        o_channel = (b_top[:, None] + b_channel[None, :]) * places
        m_all = m_d[:, None] & m_column[None, :]
        b_right = tl.zeros((TILE_DEPTH, TILE_COLUMNS), A)
        for i in range(-images0, images0 + 1):
            b_i = b_at0 + i * period0
            b_to0 = b_i // divisor0  # towards 0, so that a negative place needs a test of its own
            m0 = m_all & (b_i >= 0) & (b_to0 * divisor0 == b_i) & (b_to0 < size0)
            for j in range(-images1, images1 + 1):
                b_j = b_at1 + j * period1
                b_to1 = b_j // divisor1
                m1 = m0 & (b_j >= 0) & (b_to1 * divisor1 == b_j) & (b_to1 < size1)
                for k in range(-images2, images2 + 1):
                    b_k = b_at2 + k * period2
                    b_to2 = b_k // divisor2
                    m2 = m1 & (b_k >= 0) & (b_to2 * divisor2 == b_k) & (b_to2 < size2)
                    o_v = o_channel + (b_to0 * size1 + b_to1) * size2 + b_to2
                    b_right += vector_of(p_given, p_found, given, first, second, o_v, m2)
        b_sum += tl.dot(b_left, b_right, input_precision="ieee", out_dtype=A)
    o_out = (group * rows + o_row).to(tl.int64)[:, None] * columns + o_column[None, :]
    return b_sum, o_out, m_row[:, None] & m_column[None, :]


@triton.jit
def apply(
    p_weight,
    p_layer,
    p_room,
    block,
    p_given,
    p_found,
    given,
    first,
    second,
    p_u,
    p_found_u,
    given_u,
    LAUNCH: tl.constexpr,
    TO: tl.constexpr,
    PIECE: tl.constexpr,
):
    """A product of a convolution with a vector, and its piece; from `p_u` the sum of products with that, if LEFT."""
    p_product = p_layer + PRODUCTS + LAUNCH * PRODUCT
    blocks = tl.load(p_layer + BLOCKS + LAUNCH).to(tl.int32)
    b_sum, o, m = multiply(p_weight, p_product, block, True, p_given, p_found, given, first, second)
    tl.store(p_room + tl.load(p_layer + TO) + o, b_sum, m)
    b_sum = tl.where(m, b_sum, 0.0)
    largest, squares = piece_of(b_sum)
    p_piece = p_room + tl.load(p_layer + PIECE) + block
    tl.store(p_piece, largest)
    tl.store(p_piece + blocks, squares)
    dot = tl.zeros((), p_room.dtype.element_ty)
    if LAUNCH == LEFT:
        b_product = b_sum * vector_of(p_u, p_found_u, given_u, 1.0, 1.0, o, m)
        dot = tl.sum(b_product)
    tl.store(p_piece + 2 * blocks, dot)
