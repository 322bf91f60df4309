"""What the passes of `genkernels.networks.gradient_penalty` need to know beforehand of a network: who reads what, until
when, and whose memory it is."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from genkernels.networks.passes import Steps
from genkernels.networks.properties import is_piecewise_linear
from genkernels.networks.steps import Activate, Input, Offset, Reshape, Step

#: Roles of tensors that are added to what a step computes from its input.
ADDED = ("bias", "offset")
#: Steps that may give the very memory that they took.
_PASSING_ON = (Input, Offset, Reshape)

#: Of each step the roles of its tensors by which gradients are asked for, and the number of each such tensor.
Roles = tuple[tuple[tuple[str, int], ...], ...]


class Layout:
    """What follows from a network's steps and from what is asked of them; it holds neither steps nor tensors.

    Attributes:
        bends: whether the last, ordinary pass back is needed. multiplied: of each output that the gradient of a weight
            reads, the last step whose weight reads its memory; beyond all steps for the memory of the input, which is
            the caller's; 0 for the others. ahead, behind: whether the tangent of an output is read, and whether the
            last pass back has to reach it. fresh: whether what a step gives is memory of its own, that one step alone
            reads. over: of an activation whether its value may take its input's memory. dropped: the outputs that no
            step after this one reads.
    """

    def __init__(self, steps: Steps, roles: Roles, by_x: bool, with_loss: bool):
        self.roles, self.by_x = roles, by_x
        self.bends = bool(any(roles) or by_x) and not is_piecewise_linear(steps)
        self.activates = [isinstance(step, Activate) for step in steps]
        readers: list[list[int]] = [[] for _ in steps]
        for index, step in enumerate(steps):
            for i in step.reads:
                readers[i].append(index)
        self.dropped = [[i for i in step.reads if readers[i][-1] == index] for index, step in enumerate(steps)]
        self.fresh = [not isinstance(s, _PASSING_ON) and len(readers[i]) == 1 for i, s in enumerate(steps)]
        self.over = [
            isinstance(s, Activate)
            and self.fresh[s.reads[0]]
            and not self.activates[s.reads[0]]
            and is_piecewise_linear((s,))
            for s in steps
        ]
        self.multiplied = self._multiplied(steps) if with_loss or self.bends else [0] * len(steps)
        self.ahead, self.behind = self._ahead(steps), self._behind(steps)

    def _has_weight(self, index: int) -> bool:
        return any(role not in ADDED for role, _ in self.roles[index])

    def _multiplied(self, steps: Steps) -> list[int]:
        last, memory, reads = [0] * len(steps), list(range(len(steps))), [False] * len(steps)
        for index, step in enumerate(steps):
            if isinstance(step, _PASSING_ON) and step.reads:
                memory[index] = memory[step.reads[0]]
            if self._has_weight(index):
                reads[step.reads[0]] = True
                last[memory[step.reads[0]]] = index
        last[0] = len(steps) if last[0] else 0
        return [last[memory[i]] if read else 0 for i, read in enumerate(reads)]

    def _ahead(self, steps: Steps) -> list[bool]:
        needed = [False] * len(steps)
        for index in range(len(steps) - 1, 0, -1):
            if needed[index] or self._has_weight(index) or (self.bends and self.activates[index]):
                for i in steps[index].reads:
                    needed[i] = True
        return needed

    def _behind(self, steps: Steps) -> list[bool]:
        needed = [self.by_x]
        for index, step in enumerate(steps[1:], start=1):
            needed.append(bool(self.roles[index]) or any(needed[i] for i in step.reads))
        return needed


#: Layouts by the first step of their network, which no other network has.
_LAYOUTS: weakref.WeakKeyDictionary[Step, dict[tuple, Layout]] = weakref.WeakKeyDictionary()


def _layout(steps: Steps, *asked) -> Layout:
    known = _LAYOUTS.setdefault(steps[0], {})
    key = (len(steps), *asked)
    found = known.get(key)
    if found is None:
        found = known[key] = Layout(steps, *asked)
    return found


class Plan:
    """One for all batches, which add to its gradients.

    Args:
        steps: of the network. read: their tensors, of `parameters`. recording: whether gradients are wanted by those
            that ask for one. by_x: whether one by an input is. with_loss: whether the scores count beside the slopes.

    Attributes:
        weights: what was read, without a graph. wanted: tensors by which gradients are asked for; `gradients` has as
            many, None where it is zero. layout: `Layout`.
    """

    def __init__(self, steps: Steps, read: Sequence[dict], recording: bool, by_x: bool, with_loss: bool):
        self.steps = steps
        # undetached, autocast would remember its casts of them, made without a graph, for passes that need one
        self.weights = [{k: t.detach() if isinstance(t, Tensor) else t for k, t in own.items()} for own in read]
        self.wanted: list[Tensor] = []
        self.layout = _layout(steps, self._numbered(read) if recording else ((),) * len(steps), by_x, with_loss)
        self.gradients: list[Tensor | None] = [None] * len(self.wanted)

    def _numbered(self, read: Sequence[dict]) -> Roles:
        """A tensor that several steps have has one number."""
        numbers: dict[int, int] = {}
        roles = []
        for own in read:
            asking = []
            for role, t in own.items():
                if isinstance(t, Tensor) and t.requires_grad:
                    number = numbers.setdefault(id(t), len(numbers))
                    if number == len(self.wanted):
                        self.wanted.append(t)
                    asking.append((role, number))
            roles.append(tuple(asking))
        return tuple(roles)

    def collect(self, number: int, gradient: Tensor) -> None:
        """Adds to the gradient by one of `wanted`."""
        dtype, found = self.wanted[number].dtype, self.gradients[number]
        gradient = gradient if gradient.dtype == dtype else gradient.to(dtype)
        self.gradients[number] = gradient if found is None else found.add_(gradient)

    def found(self) -> list[Tensor]:
        """The gradients by `wanted`."""
        pairs = zip(self.wanted, self.gradients, strict=True)
        return [torch.zeros_like(t) if gradient is None else gradient for t, gradient in pairs]
