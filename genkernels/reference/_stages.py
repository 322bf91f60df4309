"""A causal network as a list of stages: the raw tensors that autoregressive sampling works on, and one pass over
them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from genkernels._options import Activation

ACTIVATIONS = Activation.words()


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
        weights = [weight for _, weight in self.inputs]
        return weights + [t for t in (self.bias, self.condition) if t is not None]

    def width(self, channels: Sequence[int]) -> int:
        """Channels before the activation, where `channels` are those of the planes so far."""
        if self.inputs:
            return self.inputs[0][1].shape[0]
        return channels[self.added[0]]


def plane_channels(stages: Sequence[Stage], channels: int) -> list[int]:
    """Channels of every plane, plane 0 first."""
    of_planes = [channels]
    for stage in stages:
        width = stage.width(of_planes)
        of_planes.append(width // 2 if stage.activation == "gate" else width)
    return of_planes


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


def flatten(stages: Sequence[Stage], channels: int) -> tuple[list[Tensor], list[int]]:
    """The stages as what a torch operator takes: their tensors, and the rest as integers.

    The plan: the number of stages, then for each: channels before the activation, activation, residual (−1 for none),
    vertical, whether there is a bias, dimensions of the condition (0 for none), the count of added planes and they, the
    count of inputs and their planes.
    """
    found = plane_channels(stages, channels)
    tensors: list[Tensor] = []
    plan = [len(stages)]
    for k, stage in enumerate(stages):
        plan += [stage.width(found[: k + 1]), ACTIVATIONS.index(stage.activation)]
        plan += [-1 if stage.residual is None else stage.residual, int(stage.vertical), int(stage.bias is not None)]
        plan += [0 if stage.condition is None else stage.condition.dim(), len(stage.added), *stage.added]
        plan += [len(stage.inputs), *(index for index, _ in stage.inputs)]
        tensors += stage.tensors()
    return tensors, plan


def unflatten(tensors: Sequence[Tensor], plan: Sequence[int]) -> list[Stage]:
    """The inverse of `flatten`."""
    numbers, left = iter(plan), iter(tensors)
    stages = []
    for _ in range(next(numbers)):
        next(numbers)
        activation, residual, vertical, has_bias, condition = (next(numbers) for _ in range(5))
        added = tuple(next(numbers) for _ in range(next(numbers)))
        inputs = tuple([(next(numbers), next(left)) for _ in range(next(numbers))])
        stages.append(
            Stage(
                inputs=inputs,
                added=added,
                bias=next(left) if has_bias else None,
                condition=next(left) if condition else None,
                activation=ACTIVATIONS[activation],
                residual=None if residual < 0 else residual,
                vertical=bool(vertical),
            )
        )
    return stages


def level_values(image: Tensor, levels: int, dtype: torch.dtype) -> Tensor:
    """Level indices 0 … levels − 1 as a network sees them: ``2·i/(levels − 1) − 1``."""
    return 2 * image.to(dtype) / (levels - 1) - 1
