"""A causal network as integers: the stages of `autoregressive_sampling` as a backend gets them, and where a sample's
caches lie.

The plan, in words: the number of stages S; elements of a sample's state; S + 1 `PlaneRecord`, plane 0 being the image;
S `StageRecord`; and of each stage the numbers of the planes that it adds, then its `InputRecord`. Offsets, into the
plan and into the state, are among the words, so that whoever reads it computes none: `read` here,
csrc/common/stages.h there. `genkernels.reference._stages.flatten` writes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

PLANES = 2  #: word where the planes begin


class PlaneRecord(NamedTuple):
    """A plane of the network, and its place in a sample's state: a ring of the last rows that anything reads.

    Image row i lies in slot ``i % rows``, from ``at + slot * pitch`` on: ``width + 2 * border`` pixels, a pixel's
    channels together; the borders stay 0.
    """

    channels: int
    vertical: int
    rows: int
    border: int
    at: int
    pitch: int


class InputRecord(NamedTuple):
    """A plane that a stage convolves, with weight ``tensors[tensor]`` of ``kh`` by ``kw`` taps."""

    plane: int
    tensor: int
    kh: int
    kw: int


class StageRecord(NamedTuple):
    """A stage of the network; plane k + 1 is made by stage k."""

    width: int  #: channels before the activation
    made: int  #: and after it
    activation: int
    residual: int  #: plane, or -1
    vertical: int
    bias: int  #: among the tensors, or -1
    condition: int  #: likewise
    condition_map: int  #: whether the condition is [N, out, H, W]
    added: int  #: word of the plan where the numbers of the added planes begin
    inputs: int  #: where they end and the `InputRecord` begin
    end: int  #: where these end


def state_size(plan: Sequence[int]) -> int:
    """Elements that a sample's caches take: of each plane the last rows that anything reads."""
    return plan[1]


def read(plan: Sequence[int]) -> tuple[list[PlaneRecord], list[tuple[StageRecord, list[int], list[InputRecord]]]]:
    """The planes of a plan, and its stages, each with the planes that it adds and its inputs."""

    def records(kind, begin, end):
        size = len(kind._fields)
        return [kind(*plan[at : at + size]) for at in range(begin, end, size)]

    count, first = plan[0], PLANES + (plan[0] + 1) * len(PlaneRecord._fields)
    planes = records(PlaneRecord, PLANES, first)
    stages = records(StageRecord, first, first + count * len(StageRecord._fields))
    return planes, [(s, list(plan[s.added : s.inputs]), records(InputRecord, s.inputs, s.end)) for s in stages]
