r"""Spectral norm of many weights at once on the GPU: 3 launches for any number of them, 2 for their gradients.

.. math:: a = A v,\quad u = a / \lVert a\rVert,\quad b = A^\top u,\quad v = b / \lVert b\rVert,\quad
    \sigma = \lVert b\rVert,\quad \hat W = f W,\qquad
    \nabla_W = f G + s D,\quad s = g_\sigma - \langle G, \hat W\rangle / \sigma

A is what a weight W does to one sample, as a matrix or as a convolution; D is u vᵀ or the correlation of u and v at
each tap. Miyato et al. 2018; Behrmann et al. 2019. `genkernels.reference.spectral_norm` has the maths.

Launches: `_left_kernel` (a) and `_right_kernel` (b) once an iteration, `_finish_kernel` (σ, Ŵ, u, v) at last; backward
`_inner_kernel` (⟨G, Ŵ⟩) and `_gradient_kernel`. A program finds its layer in `owners`, one number a program; sizes,
places in the workspace and how to gather stand in a table of 64-bit integers that is made once for a list of shapes,
addresses in another that is made each call and copied without waiting (while a CUDA graph is captured, where a copy
would read the host's memory again at each replay, written by small kernels).

Matrices: one read of W for both products. A program takes 8 rows: a of them, then, W coming out of a cache, what these
rows give to b, scaled by their largest \|a\| so that no square of σ arises; `_right_kernel` adds up.
Convolutions: a, b and D are products ``[rows, depth]`` by ``[depth, columns]`` whose right factor is gathered from a
vector. Column and depth are numbers written in radices of three axes (positions or taps) with a channel on top, and

    place = column digit · by_column + depth digit · by_depth + offset,  at = (place + image · period) / divisor

along each axis, with a 0 where that is no place of the vector; circular padding has images. So zero padded, circular,
strided, dilated, grouped and transposed convolutions and all three products are one piece of code.

Norms: each program leaves the largest magnitude of its numbers and their sum of squares in units of it; the next
launch's programs combine them in one order. u and v are divided where they are read. A norm that is 0 or not finite
leaves them what they were, and then `_right_kernel` reads W once more.

No atomics, sums in an order that depends on the layer's shape alone: the same bits each run and in any company. Offsets
are 64-bit, but those in a vector. Bytes: forward two reads and one write of the weights and a quarter of partial sums,
backward three reads and one write. Addresses from a table come without a promise of alignment, so accesses are of one
number each.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from genkernels.triton import _math
from genkernels.triton._recording import SampleCalls, meta

#: Tiles: of `_left_kernel`'s matrices, of `_right_kernel`'s, of products, of what goes number by number.
ROWS, COLUMNS = tl.constexpr(8), tl.constexpr(512)
PARTS, NARROW = tl.constexpr(32), tl.constexpr(64)
TILE_ROWS, TILE_COLUMNS = tl.constexpr(32), tl.constexpr(64)
BLOCK = tl.constexpr(1024)
PIECES = tl.constexpr(256)

LAUNCHES = ("left", "right", "finish", "inner", "gradient")
LEFT, RIGHT, FINISH, INNER, GRADIENT = (tl.constexpr(i) for i in range(5))

# a layer's row in the table of sizes
IS_MATRIX, M, K, DISTANCE = (tl.constexpr(i) for i in range(4))
U_NUMBERS, V_NUMBERS, NUMBERS = (tl.constexpr(i) for i in range(4, 7))
A_AT, U_AT, B_AT, V_AT, SIGMA_AT, LEFT_AT, RIGHT_AT, PARTIAL_AT, SUMS_AT = (tl.constexpr(i) for i in range(7, 16))
BLOCKS, FIRST, TRANSPOSED, PRODUCTS = tl.constexpr(16), tl.constexpr(21), tl.constexpr(26), tl.constexpr(27)
# a product, of which a row has three: left, right, gradient
P_ROWS, P_COLUMNS, P_DEPTH, P_ROW_TILES, P_COLUMN_TILES = (tl.constexpr(i) for i in range(5))
P_GROUP, P_PITCH, P_INNER, P_SKIP, P_CHANNELS, P_PLACES = (tl.constexpr(i) for i in range(5, 11))
P_AXES, AXIS = tl.constexpr(11), tl.constexpr(9)  # three axes of nine numbers, those of `_Axis`
PRODUCT = tl.constexpr(11 + 27)
FIELDS = tl.constexpr(27 + 3 * (11 + 27))
POINTERS = tl.constexpr(6)


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _layer(p_owners, p_table, p_addresses, LAUNCH: tl.constexpr):
    """This program's layer: its number, its rows of both tables, and which of the layer's programs it is."""
    pid = tl.program_id(0)
    layer = tl.load(p_owners + pid).to(tl.int64)
    p_layer = p_table + layer * FIELDS
    return layer, p_layer, p_addresses + layer * POINTERS, pid - tl.load(p_layer + FIRST + LAUNCH).to(tl.int32)


@triton.jit
def _address(p_layer, WHICH: tl.constexpr, T: tl.constexpr):
    return tl.load(p_layer + WHICH).to(tl.pointer_type(T))


@triton.jit
def _piece(b_x):
    """(largest magnitude, sum of squares in units of it) of a vector or a tile."""
    largest = tl.max(tl.abs(b_x))
    b_ratio = b_x / tl.where(largest > 0, largest, 1.0)
    return largest, tl.sum(b_ratio * b_ratio)


@triton.jit
def _combine(p_pieces, blocks, count):
    """(largest, squares, dot) of the first `count` of a launch's pieces [3, blocks]."""
    A: tl.constexpr = p_pieces.dtype.element_ty
    b_largest = tl.zeros((PIECES,), A)
    for i in range(0, count, PIECES):
        o = i + tl.arange(0, PIECES)
        b_largest = tl.maximum(b_largest, tl.load(p_pieces + o, o < count, other=0.0))
    largest = tl.max(b_largest, axis=0)
    unit = tl.where(largest > 0, largest, 1.0)
    b_squares = tl.zeros((PIECES,), A)
    b_dot = tl.zeros((PIECES,), A)
    for i in range(0, count, PIECES):
        o = i + tl.arange(0, PIECES)
        b_ratio = tl.load(p_pieces + o, o < count, other=0.0) / unit
        b_squares += b_ratio * b_ratio * tl.load(p_pieces + blocks + o, o < count, other=0.0)
        b_dot += tl.load(p_pieces + 2 * blocks + o, o < count, other=0.0)
    return largest, tl.sum(b_squares, axis=0), tl.sum(b_dot, axis=0)


@triton.jit
def _norm(largest, squares):
    """The norm, whether one can divide by it, and the division as two products that neither overflow nor underflow."""
    if largest.dtype == tl.float64:
        value = tl.where(largest > 0, largest * tl.sqrt(squares), squares)
        HUGE: tl.constexpr = 2.0**512
    else:
        value = tl.where(largest > 0, largest * tl.sqrt_rn(squares), squares)
        HUGE: tl.constexpr = 2.0**64
    usable = (value > 0) & (value < float("inf"))
    first = tl.where(value > HUGE, 1 / HUGE, tl.where(value < 1 / HUGE, HUGE, 1.0)).to(value.dtype)
    first = tl.where(usable, first, 1.0)
    second = 1.0 / tl.where(usable, value * first, 1.0)
    return value, usable, first, second


@triton.jit
def _vector(p_given, p_found, given, first, second, o, m):
    """Numbers of u or v: as given to the operator, or found and still to be divided by their norm."""
    # Triton's interpreter makes numbers of a mask and a scalar, and takes none for a mask
    b_given = tl.load(p_given + o, (m & given) != 0, other=0.0).to(p_found.dtype.element_ty)
    b_found = tl.load(p_found + o, (m & (given == 0)) != 0, other=0.0) * first * second
    return tl.where(given, b_given, b_found)


@triton.jit
def _keep(p_to, p_given, p_found, given, first, second, wanted, count, block, blocks):
    """Writes what u or v is from now on, a share a program, where it is not what lies there."""
    for i in range(block * BLOCK, tl.where(wanted, count, 0), blocks * BLOCK):
        o = i + tl.arange(0, BLOCK)
        b_x = _vector(p_given, p_found, given, first, second, o, o < count)
        tl.store(p_to + o, b_x.to(p_to.dtype.element_ty), o < count)


@triton.jit
def _column_offsets(p_layer, o_k):
    """Offsets of columns in row 0, and the distance of rows."""
    rows = tl.load(p_layer + M)
    distance = tl.load(p_layer + DISTANCE).to(tl.int32)
    b_run = o_k // distance
    return b_run.to(tl.int64) * (rows * distance) + (o_k - b_run * distance), distance.to(tl.int64)


@triton.jit
def _sweep(p_weight, p_layer, p_room, block, p_v, p_found_v, given, first, second, p_u, p_found_u, given_u, alone):
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
        b_sum += b_w * _vector(p_v, p_found_v, given, first, second, o_k, m_k)[None, :]
    b_a = tl.sum(b_sum, axis=1)
    tl.store(p_room + tl.load(p_layer + A_AT) + o_r, b_a, m_r)
    b_a = tl.where(m_r, b_a, 0.0)
    largest, squares = _piece(b_a)
    p_piece = p_room + tl.load(p_layer + LEFT_AT) + block
    tl.store(p_piece, largest)
    tl.store(p_piece + blocks, squares)
    tl.store(p_piece + 2 * blocks, tl.sum(b_a * _vector(p_u, p_found_u, given_u, 1.0, 1.0, o_r, m_r), axis=0))
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
def _gather(p_weight, p_layer, p_room, block, usable, first, second, p_u, p_found_u, given):
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
        b_sum += b_w * _vector(p_u, p_found_u, given, first, second, o_r, m_r)[:, None]
    b_b = tl.sum(b_sum, axis=0)
    tl.store(p_room + tl.load(p_layer + B_AT) + o_k, b_b, m_k)
    largest, squares = _piece(tl.where(m_k, b_b, 0.0))
    p_piece = p_room + tl.load(p_layer + RIGHT_AT) + block
    tl.store(p_piece, largest)
    tl.store(p_piece + blocks, squares)
    tl.store(p_piece + 2 * blocks, 0.0)


@triton.jit
def _axis(p_axis):
    """The numbers of `_Axis`."""
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
def _multiply(p_left, p_product, block, wanted, p_given, p_found, given, first, second):
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
                    b_right += _vector(p_given, p_found, given, first, second, o_v, m2)
        b_sum += tl.dot(b_left, b_right, input_precision="ieee", out_dtype=A)
    o_out = (group * rows + o_row).to(tl.int64)[:, None] * columns + o_column[None, :]
    return b_sum, o_out, m_row[:, None] & m_column[None, :]


@triton.jit
def _apply(
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
    b_sum, o, m = _multiply(p_weight, p_product, block, True, p_given, p_found, given, first, second)
    tl.store(p_room + tl.load(p_layer + TO) + o, b_sum, m)
    b_sum = tl.where(m, b_sum, 0.0)
    largest, squares = _piece(b_sum)
    p_piece = p_room + tl.load(p_layer + PIECE) + block
    tl.store(p_piece, largest)
    tl.store(p_piece + blocks, squares)
    dot = tl.zeros((), p_room.dtype.element_ty)
    if LAUNCH == LEFT:
        b_product = b_sum * _vector(p_u, p_found_u, given_u, 1.0, 1.0, o, m)
        dot = tl.sum(b_product)
    tl.store(p_piece + 2 * blocks, dot)


@triton.jit(do_not_specialize=("turn", "alone"))
def _left_kernel(p_owners, p_table, p_addresses, p_room, turn, alone, T: tl.constexpr):
    """a = A v and its pieces, of matrices the partial sums of b; turn: iterations before; alone: no b is wanted."""
    _, p_layer, p_address, block = _layer(p_owners, p_table, p_addresses, LEFT)
    p_weight = _address(p_address, 0, T)
    p_u = _address(p_address, 1, T)
    p_v = _address(p_address, 2, T)
    rights = tl.load(p_layer + BLOCKS + RIGHT).to(tl.int32)
    pieces = tl.where(turn > 0, rights, 0)
    largest, squares, _ = _combine(p_room + tl.load(p_layer + RIGHT_AT), rights, pieces)
    _, usable, first, second = _norm(largest, squares)
    given = (usable == 0) & (turn <= 1)
    p_kept = p_room + tl.load(p_layer + V_AT)
    p_found = p_room + tl.where(usable, tl.load(p_layer + B_AT), tl.load(p_layer + V_AT))
    blocks = tl.load(p_layer + BLOCKS + LEFT).to(tl.int32)
    wanted = (usable | (turn == 1)) & (turn > 0)
    _keep(p_kept, p_v, p_found, given, first, second, wanted, tl.load(p_layer + V_NUMBERS).to(tl.int32), block, blocks)
    p_kept_u = p_room + tl.load(p_layer + U_AT)
    if tl.load(p_layer + IS_MATRIX) != 0:
        _sweep(
            p_weight, p_layer, p_room, block, p_v, p_found, given, first, second, p_u, p_kept_u, turn == 0, alone != 0
        )
    else:
        _apply(
            p_weight,
            p_layer,
            p_room,
            block,
            p_v,
            p_found,
            given,
            first,
            second,
            p_u,
            p_kept_u,
            turn == 0,
            LEFT,
            A_AT,
            LEFT_AT,
        )


@triton.jit(do_not_specialize=("turn",))
def _right_kernel(p_owners, p_table, p_addresses, p_room, turn, T: tl.constexpr):
    """b = Aᵀ u and its pieces; u, for the iterations to come; and σ for the case that v stays what it is."""
    _, p_layer, p_address, block = _layer(p_owners, p_table, p_addresses, RIGHT)
    p_weight = _address(p_address, 0, T)
    p_u = _address(p_address, 1, T)
    lefts = tl.load(p_layer + BLOCKS + LEFT).to(tl.int32)
    largest, squares, dot = _combine(p_room + tl.load(p_layer + LEFT_AT), lefts, lefts)
    value, usable, first, second = _norm(largest, squares)
    given = (usable == 0) & (turn == 0)
    p_kept = p_room + tl.load(p_layer + U_AT)
    p_found = p_room + tl.where(usable, tl.load(p_layer + A_AT), tl.load(p_layer + U_AT))
    blocks = tl.load(p_layer + BLOCKS + RIGHT).to(tl.int32)
    wanted = usable | (turn == 0)
    _keep(p_kept, p_u, p_found, given, first, second, wanted, tl.load(p_layer + U_NUMBERS).to(tl.int32), block, blocks)
    tl.store(p_room + tl.load(p_layer + SIGMA_AT), tl.where(usable, value, dot), block == 0)
    if tl.load(p_layer + IS_MATRIX) != 0:
        _gather(p_weight, p_layer, p_room, block, usable, first, second, p_u, p_found, given)
    else:
        _apply(
            p_weight,
            p_layer,
            p_room,
            block,
            p_u,
            p_found,
            given,
            first,
            second,
            p_u,
            p_found,
            given,
            RIGHT,
            B_AT,
            RIGHT_AT,
        )


@triton.jit
def _factor(sigma, coefficient, coefficient_low, at_most):
    """Whether a weight is divided by its norm at all, and the factor; the coefficient in two parts, for fp64."""
    c = tl.zeros((), sigma.dtype) + coefficient + coefficient_low
    divides = tl.where(at_most != 0, (sigma > c) | (sigma != sigma), sigma != 0)
    return divides, tl.where(divides, c / tl.where(divides, sigma, 1.0), 1.0)


@triton.jit(do_not_specialize=("iterations", "coefficient", "coefficient_low", "at_most"))
def _finish_kernel(
    p_owners, p_table, p_addresses, p_room, p_sigma, iterations, coefficient, coefficient_low, at_most, T: tl.constexpr
):
    """σ, and all that the operator returns."""
    layer, p_layer, p_address, block = _layer(p_owners, p_table, p_addresses, FINISH)
    lefts = tl.load(p_layer + BLOCKS + LEFT).to(tl.int32)
    rights = tl.load(p_layer + BLOCKS + RIGHT).to(tl.int32)
    blocks = tl.load(p_layer + BLOCKS + FINISH).to(tl.int32)
    iterates = iterations > 0
    _, _, dot = _combine(p_room + tl.load(p_layer + LEFT_AT), lefts, tl.where(iterates, 0, lefts))
    largest, squares, _ = _combine(p_room + tl.load(p_layer + RIGHT_AT), rights, tl.where(iterates, rights, 0))
    value, usable, first, second = _norm(largest, squares)
    other = tl.load(p_room + tl.load(p_layer + SIGMA_AT), iterates, other=0.0)
    sigma = tl.where(usable, value, tl.where(iterates, other, dot))
    tl.store(p_sigma + layer, sigma, block == 0)
    _, factor = _factor(sigma, coefficient, coefficient_low, at_most)
    o = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < tl.load(p_layer + NUMBERS)
    b_w = _math.widened(tl.load(_address(p_address, 0, T) + o, m, other=0.0))
    tl.store(_address(p_address, 3, T) + o, (b_w * factor).to(T), m)
    p_u = _address(p_address, 1, T)
    p_v = _address(p_address, 2, T)
    p_kept = p_room + tl.load(p_layer + U_AT)
    count = tl.load(p_layer + U_NUMBERS).to(tl.int32)
    _keep(_address(p_address, 4, T), p_u, p_kept, iterations == 0, 1.0, 1.0, True, count, block, blocks)
    given = (usable == 0) & (iterations <= 1)
    p_found = p_room + tl.where(usable, tl.load(p_layer + B_AT), tl.load(p_layer + V_AT))
    count = tl.load(p_layer + V_NUMBERS).to(tl.int32)
    _keep(_address(p_address, 5, T), p_v, p_found, given, first, second, True, count, block, blocks)


@triton.jit(do_not_specialize=("coefficient", "coefficient_low", "at_most"))
def _inner_kernel(
    p_owners, p_table, p_addresses, p_sums, p_sigma, coefficient, coefficient_low, at_most, T: tl.constexpr
):
    """Programs' sums of G · Ŵ; nothing is read where Ŵ is W whatever its norm."""
    layer, p_layer, p_address, block = _layer(p_owners, p_table, p_addresses, INNER)
    divides, factor = _factor(tl.load(p_sigma + layer), coefficient, coefficient_low, at_most)
    p_grad = _address(p_address, 0, T)
    p_weight = _address(p_address, 1, T)
    numbers = tl.load(p_layer + NUMBERS)
    b_sum = tl.zeros((BLOCK,), p_sums.dtype.element_ty)
    stride = tl.load(p_layer + BLOCKS + INNER) * BLOCK
    for i in range(block.to(tl.int64) * BLOCK, tl.where(divides, numbers, 0), stride):
        o = i + tl.arange(0, BLOCK)
        b_w = _math.widened(tl.load(p_weight + o, o < numbers, other=0.0))
        b_sum += _math.widened(tl.load(p_grad + o, o < numbers, other=0.0)) * (b_w * factor)
    tl.store(p_sums + tl.load(p_layer + SUMS_AT) + block, tl.sum(b_sum, axis=0))


@triton.jit(do_not_specialize=("coefficient", "coefficient_low", "at_most"))
def _gradient_kernel(
    p_owners,
    p_table,
    p_addresses,
    p_sums,
    p_sigma,
    p_grad_sigma,
    coefficient,
    coefficient_low,
    at_most,
    T: tl.constexpr,
):
    """f G + s D."""
    layer, p_layer, p_address, block = _layer(p_owners, p_table, p_addresses, GRADIENT)
    sigma = tl.load(p_sigma + layer)
    divides, factor = _factor(sigma, coefficient, coefficient_low, at_most)
    o_sum = tl.arange(0, PIECES)
    b_sum = tl.load(p_sums + tl.load(p_layer + SUMS_AT) + o_sum, o_sum < tl.load(p_layer + BLOCKS + INNER), other=0.0)
    by_sigma = tl.where(divides, -tl.sum(b_sum, axis=0) / tl.where(divides, sigma, 1.0), 0.0)
    if p_grad_sigma is not None:
        by_sigma += tl.load(p_grad_sigma + layer)
    p_grad = _address(p_address, 0, T)
    p_u = _address(p_address, 2, T)
    p_v = _address(p_address, 3, T)
    p_out = _address(p_address, 4, T)
    if tl.load(p_layer + IS_MATRIX) != 0:
        # number (run · rows + row) · distance + inside has row `row` and column run · distance + inside
        rows = tl.load(p_layer + M).to(tl.int32)
        distance = tl.load(p_layer + DISTANCE).to(tl.int32)
        start = block.to(tl.int64) * BLOCK
        line = start // distance
        o_inside = (start - line * distance).to(tl.int32) + tl.arange(0, BLOCK)
        run = line // rows
        o_row = (line - run * rows).to(tl.int32) + o_inside // distance
        o_column = (run.to(tl.int32) + o_row // rows) * distance + o_inside % distance
        o = start + tl.arange(0, BLOCK)
        m = o < tl.load(p_layer + NUMBERS)
        b_d = _math.widened(tl.load(p_u + o_row % rows, m, other=0.0))
        b_d *= _math.widened(tl.load(p_v + o_column, m, other=0.0))
        b_out = _math.widened(tl.load(p_grad + o, m, other=0.0)) * factor
        tl.store(p_out + o, tl.where(by_sigma != 0, b_out + by_sigma * b_d, b_out).to(T), m)
    else:
        # the left factor is y, the right one x
        p_product = p_layer + PRODUCTS + 2 * PRODUCT
        transposed = tl.load(p_layer + TRANSPOSED) != 0
        p_y = tl.load(p_address + tl.where(transposed, 3, 2)).to(tl.pointer_type(T))
        p_x = tl.load(p_address + tl.where(transposed, 2, 3)).to(tl.pointer_type(T))
        b_tile, o_tile, m_tile = _multiply(p_y, p_product, block, by_sigma != 0, p_x, p_sums, True, 1.0, 1.0)
        b_grad = _math.widened(tl.load(p_grad + o_tile, m_tile, other=0.0)) * factor
        b_grad = tl.where(by_sigma != 0, b_grad + by_sigma * b_tile, b_grad)
        tl.store(p_out + o_tile, b_grad.to(T), m_tile)


@triton.jit(do_not_specialize=("begin", "n0", "n1", "n2", "n3", "n4", "n5", "n6", "n7"))
def _write_kernel(p_table, begin, n0, n1, n2, n3, n4, n5, n6, n7):
    """Eight numbers of a table."""
    p_to = p_table + begin
    tl.store(p_to, n0.to(tl.int64))
    tl.store(p_to + 1, n1.to(tl.int64))
    tl.store(p_to + 2, n2.to(tl.int64))
    tl.store(p_to + 3, n3.to(tl.int64))
    tl.store(p_to + 4, n4.to(tl.int64))
    tl.store(p_to + 5, n5.to(tl.int64))
    tl.store(p_to + 6, n6.to(tl.int64))
    tl.store(p_to + 7, n7.to(tl.int64))


# ------------------------------------------------------------------------------------------------------------- tables


class _Axis(NamedTuple):
    """Of a product along one axis: the radices of a column's and a depth's number, how far a step of either leads,
    from where, the vector's size, what a place is divided by, and at what period it has images, so many each way."""

    column: int
    depth: int
    by_column: int
    by_depth: int
    offset: int
    size: int
    divisor: int
    period: int
    images: int


class _Layer(NamedTuple):
    """One weight's part of a plan, on three axes; x and y are the sizes of its inputs and outputs, y to x if
    transposed."""

    shape: tuple[int, ...]
    x: tuple[int, ...]
    y: tuple[int, ...]
    circular: bool
    groups: int
    transposed: bool
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def product(self, kind: str) -> list[int]:
        """What a product's fields hold; kind: "convolve" (x to y), "spread" (y to x) or "correlate" (D)."""
        kernel = _three(self.shape[2:])
        taps, per_group, inputs = math.prod(kernel), self.shape[0] // self.groups, self.shape[1]
        x, y, images = math.prod(self.x), math.prod(self.y), [int(self.circular and n > 1) for n in _sides(self)]
        rows, columns, depth, left = {
            "convolve": (per_group, y, inputs * taps, (per_group * inputs * taps, inputs * taps, 1, 0)),
            "spread": (inputs, x, per_group * taps, (per_group * inputs * taps, taps, taps, (inputs - 1) * taps)),
            "correlate": (per_group, inputs * taps, y, (per_group * y, y, 1, 0)),
        }[kind]
        axes = []
        for a in range(3):
            stride, dilation, padding = self.stride[a], self.dilation[a], self.padding[a]
            one = {
                "convolve": (self.y[a], kernel[a], stride, dilation, -padding, self.x[a], 1),
                "spread": (self.x[a], kernel[a], 1, -dilation, padding, self.y[a], stride),
                "correlate": (kernel[a], self.y[a], dilation, stride, -padding, self.x[a], 1),
            }[kind]
            axes += _Axis(*one, self.x[a], images[a])
        tiles = triton.cdiv(rows, TILE_ROWS.value), triton.cdiv(columns, TILE_COLUMNS.value)
        channels, places = (per_group, y) if kind == "spread" else (inputs, x)
        return [rows, columns, depth, *tiles, *left, channels, places, *axes]


def _sides(layer: _Layer) -> tuple[int, ...]:
    """Above 1 along the axes that the weight has."""
    return _three([2] * (len(layer.shape) - 2))


def _three(sizes, other: int = 1) -> tuple[int, ...]:
    return (*(other,) * (3 - len(sizes)), *sizes)


class _Tables(NamedTuple):
    """What a list of shapes asks for."""

    sizes: Tensor  #: int64 [L, FIELDS]
    owners: tuple[Tensor, ...]  #: for each launch int32 [programs], the layers
    room: int  #: numbers of the workspace
    sums: int  #: and of what `_inner_kernel` leaves


_KEPT: dict[tuple, _Tables] = {}


def _tables(weights, u, v, plan) -> _Tables:
    """Made once for a list of shapes, and kept: graphs captured with them may be replayed at any time."""
    device = weights[0].device
    key = (str(device), tuple(plan), *(tuple(t.shape) for some in (weights, u, v) for t in some))
    if key not in _KEPT:
        rows, room, sums, firsts = [], 0, 0, [0] * len(LAUNCHES)
        per_layer = len(plan) // len(weights)
        for i, (weight, left, right) in enumerate(zip(weights, u, v, strict=True)):
            row, blocks, room, sums = _row(weight, left, right, plan[i * per_layer : (i + 1) * per_layer], room, sums)
            row[FIRST.value : FIRST.value + len(LAUNCHES)] = firsts
            firsts = [first + count for first, count in zip(firsts, blocks, strict=True)]
            rows.append(row)
        counts = torch.tensor([row[BLOCKS.value : BLOCKS.value + len(LAUNCHES)] for row in rows])
        layers = torch.arange(len(rows), dtype=torch.int32)
        owners = tuple(layers.repeat_interleave(counts[:, launch]).to(device) for launch in range(len(LAUNCHES)))
        _KEPT[key] = _Tables(torch.tensor(rows).to(device), owners, room, sums)
    return _KEPT[key]


#: Of u and of v: places in a vector are computed in 32 bits.
MOST_NUMBERS = 2**30


def _row(weight: Tensor, u: Tensor, v: Tensor, record, room: int, sums: int) -> tuple[list[int], list[int], int, int]:
    """A layer's row of the table but for its first programs, its programs, and where the next one's numbers begin."""
    most = max(u.numel(), v.numel())
    if most > MOST_NUMBERS:
        raise ValueError(f"spectral_norm: the Triton kernels take at most 2^30 numbers of u and v, got {most}")
    kind, axis, groups, transposed, *rest = record
    stride, padding, dilation = rest[:3], rest[3:6], rest[6:9]
    if kind == 0:
        rows, products = weight.shape[axis], [0] * (3 * PRODUCT.value)
        distance = math.prod(weight.shape[axis % weight.dim() + 1 :])
        blocks = [triton.cdiv(rows, ROWS.value), triton.cdiv(v.numel(), NARROW.value)]
        gradient = triton.cdiv(weight.numel(), BLOCK.value)
    else:
        rows = distance = 1
        x, y = (u, v) if transposed else (v, u)
        layer = _Layer(
            tuple(weight.shape),
            _three(x.shape[1:]),
            _three(y.shape[1:]),
            kind == 2,
            groups,
            bool(transposed),
            *(
                _three(values[5 - weight.dim() :], other)
                for values, other in ((stride, 1), (padding, 0), (dilation, 1))
            ),
        )
        forth = ("spread", "convolve") if transposed else ("convolve", "spread")
        found = [layer.product(name) for name in (*forth, "correlate")]
        *blocks, gradient = (p[P_ROW_TILES.value] * p[P_COLUMN_TILES.value] * groups for p in found)
        products = [n for p in found for n in p]
    finish = triton.cdiv(weight.numel(), BLOCK.value)
    blocks += [finish, min(finish, PIECES.value), gradient]
    row = [int(kind == 0), rows, v.numel(), distance, u.numel(), v.numel(), weight.numel()]
    partial = blocks[0] * v.numel() if kind == 0 else 0
    for size in (u.numel(), u.numel(), v.numel(), v.numel(), 1, 3 * blocks[0], 3 * blocks[1], partial):
        row.append(room)
        room += size
    row += [sums, *blocks, *[0] * len(LAUNCHES), int(transposed), *products]
    return row, blocks, room, sums + blocks[3]


def _addresses(tensors: list[list[Tensor]]) -> Tensor:
    """int64 [L, POINTERS] of what each layer's row of `tensors` holds, without waiting for the device."""
    numbers = [[t.data_ptr() for t in row] + [0] * (POINTERS.value - len(row)) for row in tensors]
    like = tensors[0][0]
    if like.device.type != "cuda":
        return torch.tensor(numbers, device=like.device)
    if not torch.cuda.is_current_stream_capturing():
        return torch.tensor(numbers, pin_memory=True).to(like.device, non_blocking=True)
    flat = [n for row in numbers for n in row]
    flat += [0] * (-len(flat) % 8)
    return _write(like.new_empty((len(flat),), dtype=torch.int64), flat)


def _write(table: Tensor, numbers: list[int]) -> Tensor:
    """Numbers that travel as kernels' arguments: a copy from the host would be made anew at each replay of a graph."""
    for begin in range(0, len(numbers), 8):
        _write_kernel[(1,)](table, begin, *numbers[begin : begin + 8])
    return table


# ---------------------------------------------------------------------------------------------------------- launchers

_TYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _split(coefficient: float) -> tuple[float, float]:
    """Two fp32 numbers, as which kernels take a number."""
    high = torch.tensor(coefficient, dtype=torch.float32).item()
    return high, coefficient - high


def _run(kernel, launch: int, tables: _Tables, addresses: Tensor, *arguments, dtype: torch.dtype) -> None:
    owners = tables.owners[launch]
    # a product's factors stand in registers, which they fit into; ptxas alone settles for 128 and may spill
    kernel[(owners.numel(),)](
        owners, tables.sizes, addresses, *arguments, T=_TYPES[dtype], num_warps=8, maxnreg=255, enable_fp_fusion=True
    )


def spectral_norm(weights, u, v, plan, iterations: int, coefficient: float, at_most: bool) -> list[Tensor]:
    """The normalised weights, every u, every v and the norms, of contiguous tensors on one GPU; the caller has checked
    them."""
    dtype = weights[0].dtype
    work = torch.promote_types(dtype, torch.float32)
    out = [[torch.empty_like(t) for t in some] for some in (weights, u, v)]
    sigma = weights[0].new_empty((len(weights),), dtype=work)
    with torch.cuda.device_of(weights[0]):
        tables = _tables(weights, u, v, plan)
        addresses = _addresses([list(row) for row in zip(weights, u, v, *out, strict=True)])
        room = weights[0].new_empty((tables.room,), dtype=work)
        for turn in range(max(1, iterations)):
            _run(_left_kernel, LEFT.value, tables, addresses, room, turn, int(iterations == 0), dtype=dtype)
            if iterations:
                _run(_right_kernel, RIGHT.value, tables, addresses, room, turn, dtype=dtype)
        options = iterations, *_split(coefficient), int(at_most)
        _run(_finish_kernel, FINISH.value, tables, addresses, room, sigma, *options, dtype=dtype)
    return [*out[0], *out[1], *out[2], sigma]


def spectral_norm_backward(
    grads, grad_sigma, weights, u, v, sigma, plan, coefficient: float, at_most: bool
) -> list[Tensor]:
    """The gradients by the weights. Conditions as for `spectral_norm`."""
    dtype = weights[0].dtype
    out = [torch.empty_like(w) for w in weights]
    with torch.cuda.device_of(weights[0]):
        tables = _tables(weights, u, v, plan)
        addresses = _addresses([list(row) for row in zip(grads, weights, u, v, out, strict=True)])
        sums = sigma.new_empty((tables.sums,))
        options = *_split(coefficient), int(at_most)
        _run(_inner_kernel, INNER.value, tables, addresses, sums, sigma, *options, dtype=dtype)
        _run(_gradient_kernel, GRADIENT.value, tables, addresses, sums, sigma, grad_sigma, *options, dtype=dtype)
    return out


# ------------------------------------------------------------------------------------------ ahead-of-time compilation


def sample_calls() -> SampleCalls:
    """Every type, with and without a gradient of σ: shapes, geometries and iterations are not compiled in."""
    plan = [0, 0, 1, 0, *(1, 1, 1), *(0, 0, 0), *(1, 1, 1), 1, 0, 1, 0, *(1, 1, 1), *(0, 1, 1), *(1, 1, 1)]
    calls = []
    for dtype in _TYPES:
        tensor = partial(meta, dtype=dtype)
        weights = [tensor(64, 48), tensor(8, 4, 3, 3)]
        u, v = [tensor(64), tensor(8, 6, 6)], [tensor(48), tensor(4, 6, 6)]
        sigma = meta(2, dtype=torch.promote_types(dtype, torch.float32))
        label = str(dtype).removeprefix("torch.")
        calls.append((label, partial(spectral_norm, weights, u, v, plan, 1, 1.0, False)))
        for grad_sigma in (sigma, None):
            backward = (weights, grad_sigma, weights, u, v, sigma, plan, 1.0, True)
            name = f"{label}{'' if grad_sigma is None else ' with a gradient of sigma'}"
            calls.append((name, partial(spectral_norm_backward, *backward)))
    calls.append(("while a graph is captured", partial(_write, meta(8, dtype=torch.int64), list(range(8)))))
    return calls
