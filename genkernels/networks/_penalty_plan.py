"""What the passes of `genkernels.networks.gradient_penalty` need to know beforehand of a network: who reads what, until
when, and whose memory it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from genkernels.networks.passes import Steps
from genkernels.networks.properties import is_piecewise_linear
from genkernels.networks.steps import Activate, Input, Offset, Reshape

#: Roles of tensors that are added to what a step computes from its input.
ADDED = ("bias", "offset")
#: Steps that may give the very memory that they took.
_PASSING_ON = (Input, Offset, Reshape)


class Plan:
    """One for all batches, which add to its gradients.

    Args:
        steps: of the network. read: their tensors, of `parameters`. wanted: those by which gradients are asked for, by
            id. by_x: whether one by an input is. with_loss: whether the scores count beside the slopes.

    Attributes:
        bends: whether the last, ordinary pass back is needed. multiplied: of each output that the gradient of a weight
            reads, the last step whose weight reads its memory; beyond all steps for the memory of the input, which is
            the caller's; 0 for the others. ahead, behind: whether the tangent of an output is read, and whether the
            last pass back has to reach it.
    """

    def __init__(self, steps: Steps, read: Sequence[dict], wanted: Mapping[int, Tensor], by_x: bool, with_loss: bool):
        self.steps, self.wanted, self.by_x = steps, wanted, by_x
        # undetached, autocast would remember its casts of them, made without a graph, for passes that need one
        self.weights = [{k: t.detach() if isinstance(t, Tensor) else t for k, t in own.items()} for own in read]
        self.roles = [[(role, id(t)) for role, t in own.items() if id(t) in wanted] for own in read]
        self.bends = bool(wanted or by_x) and not is_piecewise_linear(steps)
        self.readers: list[list[int]] = [[] for _ in steps]
        for index, step in enumerate(steps):
            for i in step.reads:
                self.readers[i].append(index)
        self.multiplied = self._multiplied() if with_loss or self.bends else [0] * len(steps)
        self.ahead, self.behind = self._ahead(), self._behind()
        self.gradients: dict[int, Tensor] = {}

    def collect(self, key: int, gradient: Tensor) -> None:
        """Adds to the gradient by one of `wanted`."""
        gradient, found = gradient.to(self.wanted[key].dtype), self.gradients.get(key)
        self.gradients[key] = gradient if found is None else found.add_(gradient)

    def gradient_by(self, key: int) -> Tensor:
        found = self.gradients.get(key)
        return torch.zeros_like(self.wanted[key]) if found is None else found

    def is_fresh(self, index: int) -> bool:
        """Whether what a step gives is memory of its own, that one step alone reads."""
        return not isinstance(self.steps[index], _PASSING_ON) and len(self.readers[index]) == 1

    def forget(self, outputs: list, index: int) -> None:
        """Drops what no step after this one reads."""
        for i in self.steps[index].reads:
            if self.readers[i][-1] == index:
                outputs[i] = None

    def _has_weight(self, index: int) -> bool:
        return any(role not in ADDED for role, _ in self.roles[index])

    def _multiplied(self) -> list[int]:
        last, memory, reads = [0] * len(self.steps), list(range(len(self.steps))), [False] * len(self.steps)
        for index, step in enumerate(self.steps):
            if isinstance(step, _PASSING_ON) and step.reads:
                memory[index] = memory[step.reads[0]]
            if self._has_weight(index):
                reads[step.reads[0]] = True
                last[memory[step.reads[0]]] = index
        last[0] = len(self.steps) if last[0] else 0
        return [last[memory[i]] if read else 0 for i, read in enumerate(reads)]

    def _ahead(self) -> list[bool]:
        needed = [False] * len(self.steps)
        for index in range(len(self.steps) - 1, 0, -1):
            step = self.steps[index]
            if needed[index] or self._has_weight(index) or (self.bends and isinstance(step, Activate)):
                for i in step.reads:
                    needed[i] = True
        return needed

    def _behind(self) -> list[bool]:
        needed = [self.by_x]
        for index, step in enumerate(self.steps[1:], start=1):
            needed.append(bool(self.roles[index]) or any(needed[i] for i in step.reads))
        return needed
