"""Sums over all rows: gradients of maps in parts, the trace of a block."""

from __future__ import annotations

import triton
import triton.language as tl

from genkernels.triton._block.table import SIZES
from genkernels.triton._block.tiles import gather, place, product


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
def trace_kernel(
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
def outer_kernel(
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
        b_y, b_x = place(o_r, height, width, TAPS)
        b_in = gather(p_in, o_r, m_r, o_k, m_k, inputs, b_y, b_x, height, width, TAPS)
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
def add_parts_kernel(p_parts, p_out, inputs, columns, taps, parts, count, BLOCK: tl.constexpr):
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
