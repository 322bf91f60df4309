"""The passes of `genkernels.networks.gradient_penalty`, where the maths is, and what they leave for one another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genkernels.networks.passes import Steps
from genkernels.networks.pooling import MaxPool
from genkernels.networks.properties import is_piecewise_linear
from genkernels.networks.steps import Activate, Add, Concatenate, Input, Offset, Reduce, Reshape, Step

#: Roles of tensors that are added to what a step computes from its input.
_ADDED = ("bias", "offset")
#: Steps that may give the very memory that they took, forwards, and of a cotangent backwards.
_PASSING_ON = (Input, Offset, Reshape)
_PASSING_BACK = (Add, Concatenate, Offset, Reduce, Reshape)


class Run:
    """One computation, pass by pass: `forward`, `pull`, `push`, in this order, without grad mode.

    Args:
        steps: of the network. read: their tensors, of `parameters`. wanted: those by which gradients are asked for, by
            id. by_x: whether x is such a one. with_loss: whether the scores count too.

    Attributes:
        values: outputs of steps, as long as the gradient of a weight is to read them. points: of an activation what
            tells its slope, of a maximum where it was. deltas: gradients of each sample's score by outputs of steps
            with tensors that are wanted, and of activations where any bends.
    """

    def __init__(self, steps: Steps, read: Sequence[dict], wanted: dict[int, Tensor], by_x: bool, with_loss: bool):
        self.steps, self.wanted, self.by_x = steps, wanted, by_x
        # undetached, autocast would remember its casts of them, made without a graph, for passes that need one
        self.weights = [{k: t.detach() if isinstance(t, Tensor) else t for k, t in own.items()} for own in read]
        self.roles = [[(role, id(t)) for role, t in own.items() if id(t) in wanted] for own in read]
        self.bends = bool(wanted or by_x) and not is_piecewise_linear(steps)
        self.readers: list[list[int]] = [[] for _ in steps]
        for index, step in enumerate(steps):
            for i in step.reads:
                self.readers[i].append(index)
        self.multiplied = self._multiplied(with_loss or self.bends)
        self.values, self.points, self.deltas = ([None] * len(steps) for _ in range(3))
        self.gradients: dict[int, Tensor] = {}
        self.of_x: Tensor | None = None

    def gradient_by(self, key: int) -> Tensor:
        """The gradient by one of `wanted`."""
        found = self.gradients.get(key)
        return torch.zeros_like(self.wanted[key]) if found is None else found

    def gradient_by_x(self) -> Tensor:
        return torch.zeros_like(self.x) if self.of_x is None else self.of_x.to(self.x.dtype)

    # ------------------------------------------------------------------------------------------------------- the passes

    def forward(self, x: Tensor) -> Tensor:
        """The scores ``[N]``, means of what the network gives of a sample, in fp32 at least."""
        self.x, values = x, [x] + [None] * (len(self.steps) - 1)
        for index, step in enumerate(self.steps):
            if index:
                values[index] = self._value(index, [values[i] for i in step.reads])
            if self.multiplied[index]:
                self.values[index] = values[index]
            self._forget(values, index)
        output = values[-1].reshape(len(x), -1)
        self.seed = torch.full_like(values[-1], 1 / output.shape[1])
        return output.to(torch.promote_types(output.dtype, torch.float32)).mean(1)

    def pull(self) -> Tensor:
        """The slopes ``[N, *input]``; the deltas are found on the way."""
        cotangents = _Signals(self.steps)
        cotangents.held[-1] = self.seed
        for index in range(len(self.steps) - 1, 0, -1):
            w, owned = cotangents.take(index)
            if self.roles[index] or (self.bends and isinstance(self.steps[index], Activate)):
                self.deltas[index], owned = w, False
            cotangents.add(index, self._pulled(index, w, owned))
        self.slopes, _ = cotangents.take(0)
        return self.slopes

    def push(self, tangent: Tensor, by_score: Tensor | None, rows: slice) -> None:
        """The gradients.

        Args:
            tangent: of x, of the `rows` that are penalised. by_score: the loss's gradient by the scores, or None.
        """
        tangents: list = [tangent] + [None] * (len(self.steps) - 1)
        needed, sources = self._needed_ahead(), [None] * len(self.steps)
        for index, step in enumerate(self.steps[1:], start=1):
            given = [tangents[i] for i in step.reads]
            self._multiply(index, given[0], by_score, rows)
            if self.bends and isinstance(step, Activate):
                sources[index] = self._source(index, given[0], rows)
            if needed[index]:
                tangents[index] = self._pushed(index, given, rows)
            self.deltas[index] = None
            self._forget(tangents, index)
            if not self.bends:
                self.points[index] = None
                self._forget(self.values, index)
        if self.bends:
            self._back(sources, by_score, rows)
        elif self.by_x and by_score is not None:
            self.of_x = _weighed(self.slopes, by_score)

    def _back(self, sources: list, by_score: Tensor | None, rows: slice) -> None:
        """One ordinary pass back of the loss and of what the slopes' change adds at the inputs of activations."""
        needed, cotangents = self._needed_behind(), _Signals(self.steps)
        if by_score is not None:
            cotangents.held[-1] = _weighed(self.seed, by_score)
        for index in range(len(self.steps) - 1, 0, -1):
            step, own = self.steps[index], self.weights[index]
            w, owned = cotangents.take(index)
            for role, key in self.roles[index] if w is not None else ():
                if role in _ADDED:
                    self._collect(key, step.bias_gradient(own, w))
                else:
                    self._collect(key, step.weight_gradient(own, w, self.values[step.reads[0]]))
            if any(needed[i] for i in step.reads):
                if w is not None:
                    cotangents.add(index, self._pulled(index, w, owned))
                if sources[index] is not None:
                    cotangents.add(index, (_filled(sources[index], rows, len(self.x)),))
            self.values[index] = self.points[index] = sources[index] = None
        self.of_x, _ = cotangents.take(0)

    # --------------------------------------------------------------------------------------------------------- one step

    def _value(self, index: int, inputs: list[Tensor]) -> Tensor:
        step, own = self.steps[index], self.weights[index]
        if isinstance(step, MaxPool):
            value, self.points[index] = step.value_and_places(*inputs)
            return value
        if not isinstance(step, Activate):
            return step.value(own, *inputs)
        if self.bends or not is_piecewise_linear((step,)):
            self.points[index] = inputs[0]
            return step.value(own, *inputs)
        before = step.reads[0]  # whose memory the output takes, if nobody else reads it
        in_place = self._is_fresh(before) and not isinstance(self.steps[before], Activate)
        self.points[index] = step.value(own, *inputs, in_place=in_place)
        return self.points[index]

    def _pulled(self, index: int, w: Tensor, owned: bool) -> tuple[Tensor, ...]:
        step, own = self.steps[index], self.weights[index]
        if isinstance(step, Activate):
            return (step.scaled(own, self.points[index], w, in_place=owned),)
        return step.pull(own, self.points[index], w, tuple(self.steps[i].shape for i in step.reads))

    def _pushed(self, index: int, tangents: list[Tensor], rows: slice) -> Tensor:
        step, own, point = self.steps[index], self.weights[index], self.points[index]
        point = None if point is None else point[rows]
        if isinstance(step, Activate):
            return step.scaled(own, point, *tangents, in_place=self._is_fresh(step.reads[0]))
        return step.push(own, point, *tangents)

    def _source(self, index: int, tangent: Tensor, rows: slice) -> Tensor | None:
        """What the change of an activation's slopes adds at its input."""
        step = self.steps[index]
        if is_piecewise_linear((step,)):
            return None
        curvature = step.curvature(self.weights[index], self.points[index][rows])
        return curvature.mul_(tangent).mul_(self.deltas[index][rows])

    def _multiply(self, index: int, tangent: Tensor | None, by_score: Tensor | None, rows: slice) -> None:
        """The gradients of a step's tensors as far as the tangents tell them."""
        step, own, delta = self.steps[index], self.weights[index], self.deltas[index]
        shares = by_score is not None and not self.bends
        for role, key in self.roles[index]:
            if role not in _ADDED:
                x = self._mixed(index, tangent, by_score, rows) if shares else tangent
                self._collect(key, step.weight_gradient(own, delta if shares else delta[rows], x))
            elif shares:
                self._collect(key, step.bias_gradient(own, delta, by_score))

    def _mixed(self, index: int, tangent: Tensor, by_score: Tensor, rows: slice) -> Tensor:
        """What a delta is multiplied with: a step's input, as the loss weighs each sample, plus its tangent."""
        before = self.steps[index].reads[0]
        value, is_last = self.values[before], self.multiplied[before] == index
        factors = by_score.to(value.dtype).view(-1, *[1] * (value.dim() - 1))
        mixed = value.mul_(factors) if is_last else value * factors
        mixed[rows] += tangent
        return mixed

    def _collect(self, key: int, gradient: Tensor) -> None:
        gradient, found = gradient.to(self.wanted[key].dtype), self.gradients.get(key)
        self.gradients[key] = gradient if found is None else found.add_(gradient)

    # ---------------------------------------------------------------------------------------------- what is read, where

    def _is_fresh(self, index: int) -> bool:
        """Whether what a step gives is memory of its own, that one step alone reads."""
        return not isinstance(self.steps[index], _PASSING_ON) and len(self.readers[index]) == 1

    def _forget(self, outputs: list, index: int) -> None:
        """Drops what no step after this one reads."""
        for i in self.steps[index].reads:
            if self.readers[i][-1] == index:
                outputs[i] = None

    def _multiplied(self, by_values: bool) -> list[int]:
        """Of each output that the gradient of a weight reads, the last step whose weight reads its memory; beyond all
        steps for the memory of x, which is the caller's; 0 for the others."""
        last, memory, readers = [0] * len(self.steps), list(range(len(self.steps))), [False] * len(self.steps)
        for index, step in enumerate(self.steps):
            if isinstance(step, _PASSING_ON) and step.reads:
                memory[index] = memory[step.reads[0]]
            if by_values and any(role not in _ADDED for role, _ in self.roles[index]):
                readers[step.reads[0]] = True
                last[memory[step.reads[0]]] = index
        last[0] = len(self.steps) if last[0] else 0
        return [last[memory[i]] if reads else 0 for i, reads in enumerate(readers)]

    def _needed_ahead(self) -> list[bool]:
        """Whether the tangent of a step's output is read."""
        needed = [False] * len(self.steps)
        for index in range(len(self.steps) - 1, 0, -1):
            step = self.steps[index]
            multiplies = any(role not in _ADDED for role, _ in self.roles[index])
            if needed[index] or multiplies or (self.bends and isinstance(step, Activate)):
                for i in step.reads:
                    needed[i] = True
        return needed

    def _needed_behind(self) -> list[bool]:
        """Whether the last pass back has to reach a step's output."""
        needed = [self.by_x]
        for index, step in enumerate(self.steps[1:], start=1):
            needed.append(bool(self.roles[index]) or any(needed[i] for i in step.reads))
        return needed


class _Signals:
    """Cotangents on their way back, and whether the memory of each is nobody else's."""

    def __init__(self, steps: Steps):
        self.steps = steps
        self.held: list[Tensor | None] = [None] * len(steps)
        self.owned = [False] * len(steps)

    def take(self, index: int) -> tuple[Tensor | None, bool]:
        w, self.held[index] = self.held[index], None
        return w, self.owned[index]

    def add(self, index: int, parts: tuple[Tensor, ...]) -> None:
        """What comes back through a step, a part an input."""
        step: Step = self.steps[index]
        fresh = not isinstance(step, _PASSING_BACK)
        for i, part in zip(step.reads, parts, strict=True):
            held = self.held[i]
            if held is None:
                self.held[i], self.owned[i] = part, fresh
                continue
            alike = held.dtype == part.dtype
            if alike and (self.owned[i] or fresh):
                self.held[i] = held.add_(part) if self.owned[i] else part.add_(held)
            else:
                self.held[i] = held + part
            self.owned[i] = True


def _weighed(vectors: Tensor, factors: Tensor) -> Tensor:
    """Each sample's times its factor."""
    return vectors * factors.to(vectors.dtype).view(-1, *[1] * (vectors.dim() - 1))


def _filled(part: Tensor, rows: slice, n: int) -> Tensor:
    """`part` as rows of ``[n, ...]``, of zeros elsewhere."""
    if len(part) == n:
        return part
    full = part.new_zeros(n, *part.shape[1:])
    full[rows] = part
    return full
