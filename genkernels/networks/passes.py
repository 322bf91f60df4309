"""Passes over the steps of a network: its values, and products of its Jacobian with vectors, without autograd's graph.

With J the Jacobian of the network at x, one forward pass keeps the slopes of the activations, and each further product
is the chain of the layers' linear maps (or of their transposes) with these slopes::

    at = linearize(steps, x)
    pullback(steps, at, w)      # Jᵀ w
    pushforward(steps, at, t)   # J t

All of it is written in differentiable operations: where grad mode is on, gradients of a product by weights and by x
are right too, and second derivatives of activations enter them by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from genkernels.networks.steps import Activate, Step

Steps = tuple[Step, ...]


class Linearization(NamedTuple):
    """A network at one batch of inputs.

    Attributes:
        values: the output of each step. weights: of each step, by role. slopes: of each step, None but for activations
            (their derivatives) and max-pooling (where the maxima were).
    """

    values: tuple[Tensor, ...]
    weights: tuple[dict, ...]
    slopes: tuple[Tensor | None, ...]


def parameters(steps: Steps, labels: Tensor | None = None) -> tuple[dict, ...]:
    """The tensors of each step by role (``weight``, ``bias``, …), read from the layers now, each once: what is computed
    on access (spectral norm, weight norm) is computed one time for all that is done with them.

    Args:
        steps: of `trace` or `traced`. labels: of the batch that follows, ``[N]``, where the network takes them.
    """
    read: dict[tuple, object] = {}
    found = []
    for step in steps:
        tensors = {}
        for source in step.sources:
            key = (id(source.owner), source.name) if source.owner is not None else (id(source), "")
            if key not in read:
                read[key] = source.read(labels)
            tensors[source.role] = read[key]
        found.append(tensors)
    return tuple(found)


def forward(steps: Steps, x: Tensor, weights: Sequence[dict] | None = None) -> tuple[Tensor, ...]:
    """The output of each step; the last one is the network's.

    Args:
        steps: of `trace`. x: ``[N, *input]``. weights: of `parameters`, read now if not given.

    Raises:
        ValueError: x is of another shape than the network was traced for.
    """
    shape = steps[0].shape
    if tuple(x.shape[1:]) != shape or x.dim() == 0:
        raise ValueError(f"forward: x must be [N, {', '.join(map(str, shape))}], got {list(x.shape)}")
    weights = parameters(steps) if weights is None else weights
    values = [x]
    for step, own in zip(steps[1:], weights[1:], strict=True):
        values.append(step.value(own, *(values[i] for i in step.reads)))
    return tuple(values)


def linearize(steps: Steps, x: Tensor, weights: Sequence[dict] | None = None) -> Linearization:
    """The network at `x`: what `pullback` and `pushforward` need, computed once.

    Args: as for `forward`.
    """
    weights = parameters(steps) if weights is None else tuple(weights)
    values = forward(steps, x, weights)
    slopes = [step.slope(own, values[step.reads[0]]) if step.reads else None for step, own in _paired(steps, weights)]
    return Linearization(values, weights, tuple(slopes))


def curvatures(steps: Steps, at: Linearization) -> tuple[Tensor | None, ...]:
    """The second derivative of each activation at its input, None for the other steps, all of whose are 0.

    Args:
        steps: of `trace`. at: of `linearize`.
    """
    return tuple(
        step.curvature(own, at.values[step.reads[0]]) if isinstance(step, Activate) else None
        for step, own in _paired(steps, at.weights)
    )


def pullback(steps: Steps, at: Linearization, cotangent: Tensor, every: bool = False):
    """The product Jᵀ w of the transposed Jacobian with a vector a sample, or with several.

    Args:
        steps: of `trace`. at: of `linearize`. cotangent: w, ``[N, *output]``, or ``[probes, N, *output]``.
        every: gives the cotangent at the output of each step instead, the first one of which is Jᵀ w.

    Returns:
        ``[N, *input]``, or ``[probes, N, *input]``; a tuple of such for `every`.

    Raises:
        ValueError: the cotangent is of another shape.
    """
    w, probes = _folded("pullback", "cotangent", cotangent, at.values[0], steps[-1].shape)
    cotangents: list = [None] * len(steps)
    cotangents[-1] = w
    for index in range(len(steps) - 1, 0, -1):
        step = steps[index]
        sizes = tuple(steps[i].shape for i in step.reads)
        pulled = step.pull(at.weights[index], at.slopes[index], cotangents[index], sizes)
        for i, part in zip(step.reads, pulled, strict=True):
            part = part.to(at.values[i].dtype)  # as autograd has it where autocast gave a half type on the way
            cotangents[i] = part if cotangents[i] is None else cotangents[i] + part
        if not every:
            cotangents[index] = None
    return tuple(_unfolded(c, probes) for c in cotangents) if every else _unfolded(cotangents[0], probes)


def pushforward(steps: Steps, at: Linearization, tangent: Tensor, every: bool = False):
    """The product J t of the Jacobian with a vector a sample, or with several.

    Args:
        steps: of `trace`. at: of `linearize`. tangent: t, ``[N, *input]``, or ``[probes, N, *input]``.
        every: gives the tangent of each step's output instead, the last one of which is J t.

    Returns:
        ``[N, *output]``, or ``[probes, N, *output]``; a tuple of such for `every`.

    Raises:
        ValueError: the tangent is of another shape.
    """
    t, probes = _folded("pushforward", "tangent", tangent, at.values[0], steps[0].shape)
    tangents = [t]
    for index, step in enumerate(steps[1:], start=1):
        tangents.append(step.push(at.weights[index], at.slopes[index], *(tangents[i] for i in step.reads)))
    return tuple(_unfolded(t, probes) for t in tangents) if every else _unfolded(tangents[-1], probes)


def _paired(steps: Steps, weights: Sequence[dict]):
    return zip(steps, weights, strict=True)


def _folded(who: str, label: str, vectors: Tensor, x: Tensor, shape: tuple) -> tuple[Tensor, torch.Size]:
    """Probes and samples on one axis, and what it was before."""
    lead = vectors.shape[: vectors.dim() - len(shape)]
    if tuple(vectors.shape[len(lead) :]) != shape or len(lead) not in (1, 2) or lead[-1] != len(x):
        wanted = ", ".join(map(str, (len(x), *shape)))
        raise ValueError(f"{who}: {label} must be [{wanted}] or [probes, {wanted}], got {list(vectors.shape)}")
    return vectors if len(lead) == 1 else vectors.flatten(0, 1), lead


def _unfolded(vectors: Tensor, lead: torch.Size) -> Tensor:
    return vectors if len(lead) == 1 else vectors.reshape(*lead, *vectors.shape[1:])
