"""A layer's row in the table of sizes, and how a program finds its own."""

from __future__ import annotations

import triton
import triton.language as tl

#: Tiles: of `left_kernel`'s matrices, of `right_kernel`'s, of products, of what goes number by number.
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
P_AXES, AXIS = tl.constexpr(11), tl.constexpr(9)  # three axes of nine numbers, those of `Axis`
PRODUCT = tl.constexpr(11 + 27)
FIELDS = tl.constexpr(27 + 3 * (11 + 27))
POINTERS = tl.constexpr(6)


@triton.jit
def find_layer(p_owners, p_table, p_addresses, LAUNCH: tl.constexpr):
    """This program's layer: its number, its rows of both tables, and which of the layer's programs it is."""
    pid = tl.program_id(0)
    layer = tl.load(p_owners + pid).to(tl.int64)
    p_layer = p_table + layer * FIELDS
    return layer, p_layer, p_addresses + layer * POINTERS, pid - tl.load(p_layer + FIRST + LAUNCH).to(tl.int32)


@triton.jit
def address_of(p_layer, WHICH: tl.constexpr, T: tl.constexpr):
    return tl.load(p_layer + WHICH).to(tl.pointer_type(T))
