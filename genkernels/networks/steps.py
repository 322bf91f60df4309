"""The steps of a network: what each computes, its linear part, and the transpose of that.

A step is plain data that reads its layer's tensors anew in every pass. Everything but activations and max-pooling is
affine in its inputs, so that three functions a step are all that forward, pullback and pushforward need:

- ``value(weights, *inputs)``, as the layer computes it;
- ``push(weights, slope, *tangents)``, the linear part L at these inputs;
- ``pull(weights, slope, cotangent, sizes)``, its transpose, a cotangent an input. `sizes` are the inputs' shapes.

Two more tell the gradients of ⟨cotangent, L x⟩ by what L consists of (``weight``, ``factor``), and of
⟨cotangent, value⟩ by what is added (``bias``, ``offset``), summed over samples.

`weights` are the step's tensors by role (``weight``, ``bias``, …), `slope` is what ``slope(weights, x)`` gave at the
point: the derivative of an activation, the places of a maximum, None of an affine step. Tensors have one leading axis,
of samples or of several probes a sample, one probe after the other; only slopes, which belong to samples, tell the two
apart. All are ordinary differentiable operations.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from genkernels.networks.activations import ACTIVATIONS

Size = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Source:
    """Where a step finds one of its tensors: the module that holds it and the attribute to read, or a constant; or,
    `of_labels`, the module that gives it for the labels of a batch, ``[N, ...]`` with an entry a sample."""

    role: str
    name: str = ""
    path: str = ""
    owner: nn.Module | weakref.ref | None = None
    constant: Any = None
    of_labels: bool = False

    def read(self, labels: Tensor | None = None):
        owner = self.owner
        if isinstance(owner, weakref.ref):
            owner = owner()
            if owner is None:
                raise ReferenceError(f"traced: the module of these steps, which held {self.path or 'it'}, is gone")
        if self.of_labels:
            return owner(labels)
        return self.constant if owner is None else getattr(owner, self.name)

    def weakly(self) -> Source:
        return self if self.owner is None else replace(self, owner=weakref.ref(self.owner))


@dataclass(frozen=True, eq=False, kw_only=True)
class Step:
    """One step of a network.

    Attributes:
        label: what it is in messages, "layer 'body.3' (Conv2d)". path: of the layer, or of the module that calls a
            function. reads: the indices of the steps whose outputs it takes. shape: its output's, without the batch.
        sources: where its tensors are.
    """

    kind: ClassVar[str]
    label: str
    path: str
    reads: tuple[int, ...]
    shape: Size
    sources: tuple[Source, ...] = ()

    def slope(self, weights: dict, x: Tensor) -> Tensor | None:
        return None

    def push(self, weights: dict, slope: Tensor | None, *tangents: Tensor) -> Tensor:
        return self.value(weights, *tangents)

    def value(self, weights: dict, *inputs: Tensor) -> Tensor:
        raise NotImplementedError

    def pull(self, weights: dict, slope: Tensor | None, cotangent: Tensor, sizes: tuple[Size, ...]) -> tuple:
        raise NotImplementedError

    def weight_gradient(self, weights: dict, cotangent: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError

    def bias_gradient(self, weights: dict, cotangent: Tensor, factors: Tensor | None = None) -> Tensor:
        """`factors` ``[N]`` weigh the samples."""
        raise NotImplementedError


class Input(Step):
    kind = "input"


# --------------------------------------------------------------------------------------------------------- elementwise


@dataclass(frozen=True, eq=False, kw_only=True)
class Activate(Step):
    """`name` is one of `ACTIVATIONS`; its parameters are among `sources`."""

    kind = "activation"
    name: str

    def value(self, weights, x, in_place=False):
        """`in_place`, which the piecewise linear ones have, writes over x."""
        place = {"inplace": True} if in_place else {}
        return ACTIVATIONS[self.name].value(x, *weights.values(), **place)

    def slope(self, weights, x):
        return ACTIVATIONS[self.name].slope(x, *weights.values())

    def curvature(self, weights, x):
        return ACTIVATIONS[self.name].curvature(x, *weights.values())

    def push(self, weights, slope, tangent):
        return _times(tangent, slope)

    def pull(self, weights, slope, cotangent, sizes):
        return (_times(cotangent, slope),)

    @property
    def by_value(self) -> bool:
        return ACTIVATIONS[self.name].by_value

    def scaled(self, weights: dict, x: Tensor, vectors: Tensor, in_place: bool) -> Tensor:
        """A vector a sample times the slopes at x, or at the value, for those `by_value`."""
        activation = ACTIVATIONS[self.name]
        vectors = vectors if vectors.dtype == x.dtype else vectors.to(x.dtype)
        if activation.scaled is None:
            return vectors * activation.slope(x, *weights.values())
        out = vectors if in_place else torch.empty_like(x)
        return activation.scaled(vectors, x, *weights.values(), grad_input=out)

    def bent(self, weights: dict, x: Tensor, vectors: Tensor) -> Tensor:
        """A vector a sample, which may be written over, times the curvatures there."""
        activation = ACTIVATIONS[self.name]
        if activation.bent is None:
            return vectors * activation.curvature(x, *weights.values())
        return activation.bent(vectors.to(x.dtype), x, *weights.values())


def _times(probes: Tensor, slope: Tensor) -> Tensor:
    """Each probe of a sample times the sample's slopes."""
    if probes.shape == slope.shape:
        return probes * slope
    return (probes.reshape(-1, *slope.shape) * slope).flatten(0, 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Scale(Step):
    """x times a number or a tensor that broadcasts over it, or over it where `divide`."""

    kind = "scale"
    divide: bool = False

    def value(self, weights, x):
        return x / weights["factor"] if self.divide else x * weights["factor"]

    def pull(self, weights, slope, cotangent, sizes):
        return (self.value(weights, cotangent),)

    def weight_gradient(self, weights, cotangent, x):
        factor = weights["factor"]
        by_product = (cotangent * x).sum_to_size(factor.shape)
        return -by_product / factor.square() if self.divide else by_product


@dataclass(frozen=True, eq=False, kw_only=True)
class Offset(Step):
    """x plus `coefficient` times a number or a tensor that broadcasts over it."""

    kind = "add"
    coefficient: float = 1

    def value(self, weights, x):
        return x + (weights["offset"] if self.coefficient == 1 else self.coefficient * weights["offset"])

    def push(self, weights, slope, tangent):
        return tangent

    def pull(self, weights, slope, cotangent, sizes):
        return (cotangent,)

    def bias_gradient(self, weights, cotangent, factors=None):
        if factors is not None:
            cotangent = cotangent * factors.view(-1, *[1] * (cotangent.dim() - 1))
        return self.coefficient * cotangent.sum_to_size(weights["offset"].shape)


class ChannelOffset(Offset):
    """x plus a number for each index of the first axis of a sample."""

    def value(self, weights, x):
        return x + weights["offset"].view(-1, *[1] * (x.dim() - 2))

    def bias_gradient(self, weights, cotangent, factors=None):
        sums = cotangent.flatten(2).sum(2) if cotangent.dim() > 2 else cotangent
        return sums.sum(0) if factors is None else factors.to(sums.dtype) @ sums


@dataclass(frozen=True, eq=False, kw_only=True)
class Add(Step):
    """x + coefficient · y."""

    kind = "add"
    coefficient: float = 1

    def value(self, weights, x, y):
        return torch.add(x, y, alpha=self.coefficient)

    def pull(self, weights, slope, cotangent, sizes):
        return cotangent, cotangent if self.coefficient == 1 else self.coefficient * cotangent


# --------------------------------------------------------------------------------------------------------- rearranging


class Reshape(Step):
    kind = "reshape"

    def value(self, weights, x):
        return x.reshape(len(x), *self.shape)

    def pull(self, weights, slope, cotangent, sizes):
        return (cotangent.reshape(len(cotangent), *sizes[0]),)


@dataclass(frozen=True, eq=False, kw_only=True)
class Reduce(Step):
    """The sum or `mean` over `axes`, counted with the batch as axis 0."""

    kind = "sum"
    axes: Size
    mean: bool

    def value(self, weights, x):
        reduced = x.mean(self.axes) if self.mean else x.sum(self.axes)
        return reduced.reshape(len(x), *self.shape)

    def pull(self, weights, slope, cotangent, sizes):
        kept = [1 if axis in self.axes else n for axis, n in enumerate(sizes[0], start=1)]
        x = cotangent.reshape(len(cotangent), *kept)
        if self.mean:
            x = x / prod(sizes[0][axis - 1] for axis in self.axes)
        return (x.expand(len(x), *sizes[0]),)


@dataclass(frozen=True, eq=False, kw_only=True)
class Concatenate(Step):
    kind = "concat"
    axis: int

    def value(self, weights, *inputs):
        return torch.cat(inputs, self.axis)

    def pull(self, weights, slope, cotangent, sizes):
        return cotangent.split([size[self.axis - 1] for size in sizes], self.axis)


class Mirror(Step):
    """x and -x beside one another along the first axis of a sample."""

    kind = "mirror"

    def value(self, weights, x):
        return torch.cat([x, -x], 1)

    def pull(self, weights, slope, cotangent, sizes):
        upper, lower = cotangent.chunk(2, 1)
        return (upper - lower,)
