"""The stages of a causal network as the Triton kernel of autoregressive_sampling takes them: records, and packed
weights.

The plan, with the layout of a sample's state: `genkernels._plan`.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from genkernels._plan import PlaneRecord, StageRecord, read, state_size

RELU = tl.constexpr(1)
GATE = tl.constexpr(2)
VECTOR = tl.constexpr(4)  # numbers that are loaded at once


class Part(NamedTuple):
    """What a stage adds to its sums, read off a plane: ``at + (row % rows) * pitch + column * step + e``, e below
    `count`.

    A kernel row of an input, times weights; or the plane as it is, which has no weights.
    """

    at: int
    rows: int
    pitch: int
    step: int  #: channels of a pixel
    up: int  #: rows above the current one
    count: int  #: numbers of the stretch, but for the centre where groups are drawn one after the other
    centre: int  #: channels of a group at the centre; 0 where the centre is in `count`, or not seen at all
    own: int  #: whether a group sees its own channels at the centre
    weights: int


class Stage(NamedTuple):
    block: int  #: outputs of a block
    padded: int  #: and with its padding
    width: int  #: of all blocks, with theirs
    made: int  #: channels after the activation
    activation: int
    vertical: int
    biases: int
    sums: int
    condition: int  #: -1 for none
    condition_row: int  #: 0 unless it is a map
    condition_column: int
    # the parts: products of a whole row, planes added to a whole row, products at a pixel, planes added at a pixel
    row: int
    row_added: int
    pixel: int
    pixel_added: int
    end: int
    out_at: int
    out_rows: int
    out_pitch: int
    residual_at: int  #: -1 for none
    residual_rows: int
    residual_pitch: int


# where a kernel finds a field of a record; `at`, `rows` and `pitch` of a ring follow one another
P_AT, P_STEP, P_UP, P_COUNT, P_CENTRE, P_OWN, P_WEIGHTS = map(tl.constexpr, (0, *range(3, 9)))
PART = tl.constexpr(len(Part._fields))
(
    S_BLOCK,
    S_PADDED,
    S_WIDTH,
    S_MADE,
    S_ACTIVATION,
    S_VERTICAL,
    S_BIASES,
    S_SUMS,
    S_CONDITION,
    S_CONDITION_ROW,
    S_CONDITION_COLUMN,
    S_ROW,
    S_ROW_ADDED,
    S_PIXEL,
    S_PIXEL_ADDED,
    S_END,
    S_OUT_AT,
    S_RESIDUAL_AT,
) = map(tl.constexpr, (*range(17), 19))
STAGE = tl.constexpr(len(Stage._fields))


def _ring(plane: PlaneRecord, column: int = 0) -> tuple[int, int, int]:
    """at, rows and pitch of a plane, from the pixel at `column` on."""
    return plane.at + (plane.border + column) * plane.channels, plane.rows, plane.pitch


class Network:
    """The plan and its tensors as the kernel takes them: records, and packed weights, biases and conditions."""

    def __init__(self, tensors, plan, groups: int, noise: Tensor, begin: int, end: int):
        self.groups, self.columns = groups, noise.shape[3]
        self.state_size = state_size(plan)
        self.planes, stages = read(plan)
        self.image_ring = _ring(self.planes[0])
        self.weights: list[Tensor] = []
        self.biases: list[Tensor] = []
        self.conditions: list[Tensor] = []
        self.parts: list[Part] = []
        self.stages: list[Stage] = []
        self.weights_size = self.biases_size = self.sums_size = self.condition_size = 0
        self.gated = any(s.activation == GATE.value for s, *_ in stages)
        self.block = max(s.width // self._blocks(s) for s, *_ in stages)
        for k, stage in enumerate(stages):
            self._add(*stage, self.planes[k + 1], tensors, noise, begin, end)

    def _blocks(self, stage: StageRecord) -> int:
        """Of outputs: halves of a gate, in each the data channels' groups."""
        return (2 if stage.activation == GATE.value else 1) * (1 if stage.vertical else self.groups)

    def _pad(self, t: Tensor, blocks: int) -> Tensor:
        """The last dimension, cut into blocks, with each padded."""
        t = t.unflatten(-1, (blocks, -1))
        return F.pad(t, (0, -t.shape[-1] % VECTOR.value)).flatten(-2)

    def _add(self, stage: StageRecord, added, inputs, out: PlaneRecord, tensors, noise: Tensor, begin, end) -> None:
        blocks = self._blocks(stage)
        block = stage.width // blocks
        padded = -(-block // VECTOR.value) * VECTOR.value
        width = blocks * padded
        row, pixel = [], []
        for index, tensor, kh, kw in inputs:
            plane, weight = self.planes[index], tensors[tensor]
            stretch = kw * plane.channels * width
            for y in range(kh // 2 + 1):
                up = kh // 2 - y
                whole = up > 0 or plane.vertical
                if stage.vertical and not whole:
                    continue  # such weights are 0
                taps = kw if up or stage.vertical else kw // 2 + 1
                count = (taps if whole else taps - 1) * plane.channels
                centre = 0 if whole else plane.channels // self.groups
                at = self.weights_size + y * stretch
                (row if whole else pixel).append(
                    Part(*_ring(plane, -(kw // 2)), plane.channels, up, count, centre, int(index != 0), at)
                )
            self.weights.append(self._pad(weight.permute(2, 3, 1, 0)[: kh // 2 + 1], blocks).flatten())
            self.weights_size += (kh // 2 + 1) * stretch
        row_added, pixel_added = [], []
        for index in added:
            plane = self.planes[index]
            whole = stage.vertical or plane.vertical
            (row_added if whole else pixel_added).append(Part(*_ring(plane), plane.channels, 0, 0, 0, 0, 0))
        # the first part of each of the four runs, and the end of the last
        runs = (row, row_added, pixel, pixel_added)
        bounds = accumulate(map(len, runs), initial=len(self.parts))
        self.parts += [part for run in runs for part in run]
        self.biases.append(noise.new_zeros(width) if stage.bias < 0 else self._pad(tensors[stage.bias], blocks))
        condition, by_row, by_column = -1, 0, 0
        if stage.condition >= 0:
            condition, given = self.condition_size, tensors[stage.condition]
            if stage.condition_map:
                given = given[:, :, begin:end].permute(0, 2, 3, 1)
                by_row, by_column = self.columns * width, width
            self.conditions.append(self._pad(given, blocks).flatten(1))
            self.condition_size += self.conditions[-1].shape[1]
        residual = (-1, 1, 0) if stage.residual < 0 else _ring(self.planes[stage.residual])
        self.stages.append(
            Stage(
                block,
                padded,
                width,
                out.channels,
                stage.activation,
                int(stage.vertical),
                self.biases_size,
                self.sums_size,
                condition,
                by_row,
                by_column,
                *bounds,
                *_ring(out),
                *residual,
            )
        )
        self.biases_size += width
        self.sums_size += width * self.columns
