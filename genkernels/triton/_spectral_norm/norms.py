"""Norms of vectors that many programs hold parts of, and the vectors, divided by them wherever they are read."""

from __future__ import annotations

import triton
import triton.language as tl

from genkernels.triton._spectral_norm.layers import BLOCK, PIECES


@triton.jit
def piece_of(b_x):
    """(largest magnitude, sum of squares in units of it) of a vector or a tile."""
    largest = tl.max(tl.abs(b_x))
    b_ratio = b_x / tl.where(largest > 0, largest, 1.0)
    return largest, tl.sum(b_ratio * b_ratio)


@triton.jit
def combine(p_pieces, blocks, count):
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
def norm_of(largest, squares):
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
def vector_of(p_given, p_found, given, first, second, o, m):
    """Numbers of u or v: as given to the operator, or found and still to be divided by their norm."""
    # Triton's interpreter makes numbers of a mask and a scalar, and takes none for a mask
    b_given = tl.load(p_given + o, (m & given) != 0, other=0.0).to(p_found.dtype.element_ty)
    b_found = tl.load(p_found + o, (m & (given == 0)) != 0, other=0.0) * first * second
    return tl.where(given, b_given, b_found)


@triton.jit
def keep(p_to, p_given, p_found, given, first, second, wanted, count, block, blocks):
    """Writes what u or v is from now on, a share a program, where it is not what lies there."""
    for i in range(block * BLOCK, tl.where(wanted, count, 0), blocks * BLOCK):
        o = i + tl.arange(0, BLOCK)
        b_x = vector_of(p_given, p_found, given, first, second, o, o < count)
        tl.store(p_to + o, b_x.to(p_to.dtype.element_ty), o < count)
