"""Rows of numbers in tiles: how operators that take [N, L] element by element are cut into programs.

A program takes a tile of ROWS rows by COLS numbers: many rows where they are short, a part of one where they are long.
L is given as a number of units of V, the longest access of at most 16 bytes that divides it: the compiler so knows that
rows begin where such an access may. Offsets are 64-bit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl

SIZES = ("rows", "units", "blocks")  # not worth a compilation for each value


@triton.jit
def tile(rows, units, blocks, V: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """This program's rows [ROWS], which of them there are, its offsets [ROWS, COLS], and which of them there are."""
    pid = tl.program_id(0)  # 32 bits wide in hardware, and cheaper to divide so
    o_row = (pid // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_col = (pid % blocks).to(tl.int64) * COLS + tl.arange(0, COLS)
    length = units.to(tl.int64) * V
    m_row = o_row < rows
    return o_row, m_row, (o_row * length)[:, None] + o_col[None, :], m_row[:, None] & (o_col < length)[None, :]


class Plan(NamedTuple):
    """A launch, by shape alone: no autotuning, so the first call does what every later call does."""

    grid: tuple[int]
    sizes: tuple[int, int, int]  #: the kernels' rows, units, blocks
    constants: dict[str, int]  #: V, ROWS, COLS
    warps: int


def plan(rows: int, length: int, itemsize: int, numbers: int = 0) -> Plan:
    """For programs of that many numbers, a power of two; else of two 16-byte accesses a tensor for each of 128
    threads."""
    numbers = numbers or 4096 // itemsize
    unit = math.gcd(length, 16 // itemsize)
    cols = min(triton.next_power_of_2(length), numbers)
    blocks = triton.cdiv(length, cols)
    constants = {"V": unit, "ROWS": numbers // cols, "COLS": cols}
    grid = triton.cdiv(rows, numbers // cols) * blocks
    return Plan((grid,), (rows, length // unit, blocks), constants, 4 if numbers * itemsize <= 4096 else 8)
