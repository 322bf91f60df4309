"""The tables that programs read: sizes and places, made once for a list of shapes, and addresses."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from genkernels.triton._spectral_norm.layers import (
    BLOCK,
    BLOCKS,
    FIRST,
    LAUNCHES,
    NARROW,
    P_COLUMN_TILES,
    P_ROW_TILES,
    PIECES,
    POINTERS,
    PRODUCT,
    ROWS,
    TILE_COLUMNS,
    TILE_ROWS,
)


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


class Axis(NamedTuple):
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
            axes += Axis(*one, self.x[a], images[a])
        tiles = triton.cdiv(rows, TILE_ROWS.value), triton.cdiv(columns, TILE_COLUMNS.value)
        channels, places = (per_group, y) if kind == "spread" else (inputs, x)
        return [rows, columns, depth, *tiles, *left, channels, places, *axes]


def _sides(layer: _Layer) -> tuple[int, ...]:
    """Above 1 along the axes that the weight has."""
    return _three([2] * (len(layer.shape) - 2))


def _three(sizes, other: int = 1) -> tuple[int, ...]:
    return (*(other,) * (3 - len(sizes)), *sizes)


class Tables(NamedTuple):
    """What a list of shapes asks for."""

    sizes: Tensor  #: int64 [L, FIELDS]
    owners: tuple[Tensor, ...]  #: for each launch int32 [programs], the layers
    room: int  #: numbers of the workspace
    sums: int  #: and of what `inner_kernel` leaves


_KEPT: dict[tuple, Tables] = {}


def tables_of(weights, u, v, plan) -> Tables:
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
        _KEPT[key] = Tables(torch.tensor(rows).to(device), owners, room, sums)
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


def addresses_of(tensors: list[list[Tensor]]) -> Tensor:
    """int64 [L, POINTERS] of what each layer's row of `tensors` holds, without waiting for the device."""
    numbers = [[t.data_ptr() for t in row] + [0] * (POINTERS.value - len(row)) for row in tensors]
    like = tensors[0][0]
    if like.device.type != "cuda":
        return torch.tensor(numbers, device=like.device)
    if not torch.cuda.is_current_stream_capturing():
        return torch.tensor(numbers, pin_memory=True).to(like.device, non_blocking=True)
    flat = [n for row in numbers for n in row]
    flat += [0] * (-len(flat) % 8)
    return write(like.new_empty((len(flat),), dtype=torch.int64), flat)


def write(table: Tensor, numbers: list[int]) -> Tensor:
    """Numbers that travel as kernels' arguments: a copy from the host would be made anew at each replay of a graph."""
    for begin in range(0, len(numbers), 8):
        _write_kernel[(1,)](table, begin, *numbers[begin : begin + 8])
    return table
