"""A causal network as a list of stages: the raw tensors that autoregressive sampling works on, and one pass over
them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from genkernels._plan import PLANES, InputRecord, PlaneRecord, StageRecord, read

ACTIVATIONS = ("none", "relu", "gate")


@dataclass(frozen=True)
class Stage:
    r"""One step of a causal network: plane k+1 from the planes before it, plane 0 being the image in [−1, 1].

    .. math:: p_{k+1} = \mathrm{act}\Big(\sum_i \mathrm{conv2d}(p_i, w_i) + \sum_j p_j + \mathrm{bias} +
        \mathrm{condition}\Big) + p_r

    Args:
        inputs: pairs of a plane's number and a weight ``[out, in, kh, kw]``, kh and kw odd, zero padding ``(kh // 2, kw
            // 2)``. Weights at dead
            taps are already 0: a pixel may depend on rows above and on pixels to its left, on itself in planes other
                than 0, and, where data
            channels are drawn one after the other, on channel groups up to its own (earlier than its own in plane 0).
        added: numbers of planes of ``out`` channels, added before the activation.
        bias: ``[out]``. condition: ``[N, out]`` or ``[N, out, H, W]``.
        activation: ``none``, ``relu`` or ``gate``: the first half of the channels through tanh times the second half
            through sigmoid.
        residual: number of a plane added after the activation.
        vertical: the stage depends on rows above only: it reads vertical planes at rows up to its own, any other plane
            at rows above, and is so computed for a whole row at once.
    """

    inputs: tuple[tuple[int, Tensor], ...] = ()
    added: tuple[int, ...] = ()
    bias: Tensor | None = None
    condition: Tensor | None = None
    activation: str = "none"
    residual: int | None = None
    vertical: bool = False

    def tensors(self) -> list[Tensor]:
        """Weights, then the bias, then the condition, those that there are."""
        found = [weight for _, weight in self.inputs]
        return found + [t for t in (self.bias, self.condition) if t is not None]

    def width(self, channels: Sequence[int]) -> int:
        """Channels before the activation, where `channels` are those of the planes so far."""
        if self.inputs:
            return self.inputs[0][1].shape[0]
        return channels[self.added[0]]


def plane_channels(stages: Sequence[Stage], channels: int) -> list[int]:
    """Channels of every plane, plane 0 first."""
    found = [channels]
    for stage in stages:
        width = stage.width(found)
        found.append(width // 2 if stage.activation == "gate" else width)
    return found


def network_output(stages: Sequence[Stage], image: Tensor) -> Tensor:
    """The last plane: one pass of all stages over ``image [N, C, H, W]`` in [−1, 1]."""
    planes = [image]
    for stage in stages:
        total = None
        for index, weight in stage.inputs:
            # the bias goes with the first convolution, where it costs nothing
            bias = stage.bias if total is None else None
            part = conv2d(planes[index], weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2))
            total = part if total is None else total + part
        for index in stage.added:
            total = planes[index] if total is None else total + planes[index]
        if stage.bias is not None and not stage.inputs:
            total = total + stage.bias[:, None, None]
        if stage.condition is not None:
            total = total + (stage.condition if stage.condition.dim() == 4 else stage.condition[:, :, None, None])
        if stage.activation == "relu":
            total = total.relu()
        elif stage.activation == "gate":
            a, b = total.chunk(2, 1)
            total = a.tanh() * b.sigmoid()
        planes.append(total if stage.residual is None else total + planes[stage.residual])
    return planes[-1]


_ALIGNMENT = 16  # elements: planes begin at multiples of it


def flatten(stages: Sequence[Stage], channels: int, width: int) -> tuple[list[Tensor], list[int]]:
    """The stages as what a torch operator takes: their tensors, and all the rest as integers.

    The plan is laid out as `genkernels._plan` says, for images of `width` pixels.
    """
    sizes = plane_channels(stages, channels)
    rows, borders = [1] * len(sizes), [0] * len(sizes)
    for stage in stages:
        for plane, weight in stage.inputs:
            rows[plane] = max(rows[plane], 1 + weight.shape[2] // 2)
            borders[plane] = max(borders[plane], weight.shape[3] // 2)
    vertical = [False, *(stage.vertical for stage in stages)]
    words, state = [], 0
    for plane, count in enumerate(sizes):
        pitch = (width + 2 * borders[plane]) * count
        words += PlaneRecord(count, int(vertical[plane]), rows[plane], borders[plane], state, pitch)
        state += -(-rows[plane] * pitch // _ALIGNMENT) * _ALIGNMENT
    tensors: list[Tensor] = []
    lists: list[int] = []
    begin = PLANES + len(words) + len(stages) * len(StageRecord._fields)
    for k, stage in enumerate(stages):
        added = begin + len(lists)
        inputs = added + len(stage.added)
        lists += stage.added
        for plane, weight in stage.inputs:
            lists += InputRecord(plane, len(tensors), *weight.shape[2:])
            tensors.append(weight)
        at = []
        for tensor in (stage.bias, stage.condition):
            at.append(-1 if tensor is None else len(tensors))
            tensors += [] if tensor is None else [tensor]
        words += StageRecord(
            width=stage.width(sizes[: k + 1]),
            made=sizes[k + 1],
            activation=ACTIVATIONS.index(stage.activation),
            residual=-1 if stage.residual is None else stage.residual,
            vertical=int(stage.vertical),
            bias=at[0],
            condition=at[1],
            condition_map=int(stage.condition is not None and stage.condition.dim() == 4),
            added=added,
            inputs=inputs,
            end=begin + len(lists),
        )
    return tensors, [len(stages), state, *words, *lists]


def unflatten(tensors: Sequence[Tensor], plan: Sequence[int]) -> list[Stage]:
    """The inverse of `flatten`."""
    return [
        Stage(
            inputs=tuple((i.plane, tensors[i.tensor]) for i in inputs),
            added=tuple(added),
            bias=None if s.bias < 0 else tensors[s.bias],
            condition=None if s.condition < 0 else tensors[s.condition],
            activation=ACTIVATIONS[s.activation],
            residual=None if s.residual < 0 else s.residual,
            vertical=bool(s.vertical),
        )
        for s, added, inputs in read(plan)[1]
    ]


def level_values(image: Tensor, levels: int, dtype: torch.dtype) -> Tensor:
    """Level indices 0 … levels − 1 as a network sees them: ``2·i/(levels − 1) − 1``."""
    return 2 * image.to(dtype) / (levels - 1) - 1
