"""The passes of `genkernels.networks.gradient_penalty`, where the maths is, of one batch."""

from __future__ import annotations

import torch
from torch import Tensor

from genkernels.networks._penalty_plan import ADDED, Plan
from genkernels.networks.passes import Steps
from genkernels.networks.pooling import MaxPool
from genkernels.networks.properties import is_piecewise_linear
from genkernels.networks.steps import Activate, Add, Concatenate, Offset, Reduce, Reshape

#: Steps that may give the very memory of a cotangent back.
_PASSING_BACK = (Add, Concatenate, Offset, Reduce, Reshape)


class Run:
    """`forward`, `pull`, `push`, in this order and without grad mode, each on what those before have left.

    Attributes:
        scores: ``[N]``. slopes: ``[N, *input]``. of_x: the gradient by x, None where it is zero. values: outputs of
            steps, as long as the gradient of a weight is to read them. points: of an activation what tells its slope,
            of a maximum where it was. dtypes: of the outputs. deltas: gradients of each sample's score by outputs of
            steps with tensors that are wanted, and of activations where any bends.
    """

    def __init__(self, plan: Plan, x: Tensor):
        self.plan, self.layout, self.steps, self.weights, self.x = plan, plan.layout, plan.steps, plan.weights, x
        self.values, self.points, self.deltas, self.dtypes = ([None] * len(plan.steps) for _ in range(4))
        self.of_x: Tensor | None = None

    def forward(self) -> Tensor:
        """The scores, means of what the network gives of a sample, in fp32 at least."""
        values = [self.x] + [None] * (len(self.steps) - 1)
        for index, step in enumerate(self.steps):
            if index:
                values[index] = self._value(index, [values[i] for i in step.reads])
            self.dtypes[index] = values[index].dtype
            if self.layout.multiplied[index]:
                self.values[index] = values[index]
            self._forget(values, index)
        output = values[-1].reshape(len(self.x), -1)
        # a score that is NaN has the slope NaN: derivatives of activations would hide it
        self.seed = torch.where(values[-1].isnan(), values[-1], 1 / output.shape[1])
        self.scores = output.to(torch.promote_types(output.dtype, torch.float32)).mean(1)
        return self.scores

    def pull(self) -> Tensor:
        """The slopes; the deltas are found on the way."""
        cotangents = _Cotangents(self.steps, self.dtypes, self.seed)
        for index in range(len(self.steps) - 1, 0, -1):
            w, owned = cotangents.take(index)
            if self.layout.roles[index] or (self.layout.bends and self.layout.activates[index]):
                self.deltas[index], owned = w, False
            cotangents.add(index, self._pulled(index, w, owned))
        self.slopes, _ = cotangents.take(0)
        return self.slopes

    def push(self, tangent: Tensor | None, by_score: Tensor | None) -> None:
        """The gradients.

        Args:
            tangent: of x, the penalty's gradient by the slopes, and None without penalty. by_score: the loss's gradient
                by the scores, and None without loss.
        """
        tangents: list = [tangent] + [None] * (len(self.steps) - 1)
        sources: list = [None] * len(self.steps)
        for index, step in enumerate(self.steps[1:], start=1):
            given = [tangents[i] for i in step.reads]
            self._multiply(index, given[0], by_score)
            if tangent is not None and self.layout.bends and isinstance(step, Activate):
                sources[index] = self._source(index, given[0])
            self.deltas[index] = None  # before the next tangent, which takes as much
            if tangent is not None and self.layout.ahead[index]:
                tangents[index] = self._pushed(index, given)
            self._forget(tangents, index)
            if not self.layout.bends:
                self.points[index] = None
                self._forget(self.values, index)
        if self.layout.bends:
            self._back(sources, by_score)
        elif by_score is not None:
            self.of_x = _weighed(self.slopes, by_score)

    def gradient_by_x(self) -> Tensor:
        return torch.zeros_like(self.x) if self.of_x is None else self.of_x.to(self.x.dtype)

    def _back(self, sources: list, by_score: Tensor | None) -> None:
        """One ordinary pass back of the loss and of what the slopes' change adds at the inputs of activations."""
        plan, layout, cotangents = self.plan, self.layout, _Cotangents(self.steps, self.dtypes)
        if by_score is not None:
            cotangents.held[-1] = _weighed(self.seed, by_score)
        for index in range(len(self.steps) - 1, 0, -1):
            step, own = self.steps[index], self.weights[index]
            w, owned = cotangents.take(index)
            for role, number in layout.roles[index] if w is not None else ():
                if role in ADDED:
                    plan.collect(number, step.bias_gradient(own, w))
                else:
                    plan.collect(number, step.weight_gradient(own, w, self.values[step.reads[0]]))
            if any(layout.behind[i] for i in step.reads):
                if w is not None:
                    cotangents.add(index, self._pulled(index, w, owned))
                if sources[index] is not None:
                    cotangents.add(index, (sources[index],))
            self.values[index] = self.points[index] = sources[index] = None
        self.of_x, _ = cotangents.take(0)

    # --------------------------------------------------------------------------------------------------------- one step

    def _forget(self, outputs: list, index: int) -> None:
        """Drops what no step after this one reads."""
        for i in self.layout.dropped[index]:
            outputs[i] = None

    def _value(self, index: int, inputs: list[Tensor]) -> Tensor:
        step, own = self.steps[index], self.weights[index]
        if isinstance(step, MaxPool):
            value, self.points[index] = step.value_and_places(*inputs)
            return value
        if not isinstance(step, Activate):
            return step.value(own, *inputs)
        value = step.value(own, *inputs, in_place=self.layout.over[index])
        self.points[index] = value if step.by_value else inputs[0]
        return value

    def _pulled(self, index: int, w: Tensor, owned: bool) -> tuple[Tensor, ...]:
        step, own = self.steps[index], self.weights[index]
        if isinstance(step, Activate):
            return (step.scaled(own, self.points[index], w, in_place=owned),)
        return step.pull(own, self.points[index], w, tuple(self.steps[i].shape for i in step.reads))

    def _pushed(self, index: int, tangents: list[Tensor]) -> Tensor:
        step, own, point = self.steps[index], self.weights[index], self.points[index]
        if isinstance(step, Activate):
            return step.scaled(own, point, *tangents, in_place=self.layout.fresh[step.reads[0]])
        return step.push(own, point, *tangents)

    def _source(self, index: int, tangent: Tensor) -> Tensor | None:
        """What the change of an activation's slopes adds at its input."""
        step = self.steps[index]
        if is_piecewise_linear((step,)):
            return None
        return step.bent(self.weights[index], self.points[index], tangent * self.deltas[index])

    def _multiply(self, index: int, tangent: Tensor | None, by_score: Tensor | None) -> None:
        """The gradients of a step's tensors as far as deltas tell them: of a network that bends, the penalty's part."""
        step, own, delta = self.steps[index], self.weights[index], self.deltas[index]
        by_score = None if self.layout.bends else by_score
        for role, number in self.layout.roles[index]:
            if role in ADDED:
                if by_score is not None:
                    self.plan.collect(number, step.bias_gradient(own, delta, by_score))
            elif by_score is not None:
                self.plan.collect(number, step.weight_gradient(own, delta, self._mixed(index, tangent, by_score)))
            elif tangent is not None:
                self.plan.collect(number, step.weight_gradient(own, delta, tangent))

    def _mixed(self, index: int, tangent: Tensor | None, by_score: Tensor) -> Tensor:
        """What a delta is multiplied with: a step's input, as the loss weighs each sample, plus its tangent."""
        before = self.steps[index].reads[0]
        value, out = self.values[before], None
        if self.layout.multiplied[before] == index:
            out = value
        factors = _factors(by_score, value)
        if tangent is None:
            return torch.mul(value, factors, out=out)
        return torch.addcmul(tangent.to(value.dtype), value, factors, out=out)


class _Cotangents:
    """Cotangents of outputs on their way back, and whether the memory of each is nobody else's. They are of the dtypes
    of the outputs, as autograd has them: autocast gives some of a half type."""

    def __init__(self, steps: Steps, dtypes: list[torch.dtype], last: Tensor | None = None):
        self.steps, self.dtypes = steps, dtypes
        self.held: list[Tensor | None] = [None] * (len(steps) - 1) + [last]
        self.owned = [False] * len(steps)

    def take(self, index: int) -> tuple[Tensor | None, bool]:
        w, self.held[index] = self.held[index], None
        return w, self.owned[index]

    def add(self, index: int, parts: tuple[Tensor, ...]) -> None:
        """What comes back through a step, a part an input."""
        passing = isinstance(self.steps[index], _PASSING_BACK)
        for i, given in zip(self.steps[index].reads, parts, strict=True):
            held, part = self.held[i], given.to(self.dtypes[i])
            fresh = not passing or part is not given
            if held is None:
                self.held[i], self.owned[i] = part, fresh
                continue
            if self.owned[i] or fresh:
                self.held[i] = held.add_(part) if self.owned[i] else part.add_(held)
            else:
                self.held[i] = held + part
            self.owned[i] = True


def _factors(by_score: Tensor, vectors: Tensor) -> Tensor:
    return by_score.to(vectors.dtype).view(-1, *[1] * (vectors.dim() - 1))


def _weighed(vectors: Tensor, by_score: Tensor) -> Tensor:
    """Each sample's times its factor."""
    return vectors * _factors(by_score, vectors)
