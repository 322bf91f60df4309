"""What holds of a whole network."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from genkernels.networks._registry import why_not
from genkernels.networks.activations import ACTIVATIONS
from genkernels.networks.steps import Activate, Step


def is_piecewise_linear(steps: tuple[Step, ...]) -> bool:
    """Whether the second derivatives of all activations are 0: ReLU, LeakyReLU, and max-pooling beside affine steps."""
    return all(ACTIVATIONS[step.name].piecewise_linear for step in steps if isinstance(step, Activate))


def couples_samples(module: nn.Module) -> str:
    """The layer of a module through which the samples of a batch depend on one another, in words, or "".

    Then a sample has no gradient of its own. Batch norm in training is known here; what couples samples in another way
    (a mean over the batch, as in minibatch statistics) `trace` refuses with `Untraceable.couples_samples` set.
    """
    for path, child in module.named_modules():
        reason = why_not(child)
        if reason is not None and len(reason) > 1:
            return f"layer {path!r} ({type(child).__name__}) {reason[0]}"
    return ""


class Link(NamedTuple):
    """A linear map and what follows it.

    Attributes:
        map: a Linear or Convolution step; None where the network begins with its activation. activation: an Activate
            step or None. mirrored: whether the activation takes [x, -x] (CLipSwish).
    """

    map: Step | None
    activation: Step | None = None
    mirrored: bool = False


def chain(steps: tuple[Step, ...]) -> tuple[tuple[Link, ...] | None, str]:
    """The network as an alternation of maps and activations, if it is one: the blocks that have kernels of their own.

    Returns:
        the links and "", or None and the reason why the network is no such chain: what reads something else than the
        step before it, a step of another kind, linear layers and convolutions mixed, two activations in a row.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from genkernels.networks import trace
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 2))
        >>> links, reason = chain(trace(net, torch.zeros(1, 2)))
        >>> [(link.map.path, link.activation and link.activation.name) for link in links]
        [('0', 'silu'), ('2', None)]
    """
    links: list[Link] = []
    mirrored = False
    for index, step in enumerate(steps[1:], start=1):
        if step.reads != (index - 1,):
            return None, f"{step.label} reads more than the step before it"
        if mirrored and step.kind != "activation":
            return None, f"{step.label} follows [x, -x], which is no activation"
        if step.kind in ("linear", "conv"):
            kinds = {link.map.kind for link in links if link.map}
            if kinds - {step.kind}:
                return None, f"{step.label} stands among {kinds.pop()} steps"
            if step.kind == "linear" and len(step.shape) > 1:
                return None, f"{step.label} acts on samples of {len(step.shape)} axes"
            links.append(Link(step))
        elif step.kind == "mirror":
            mirrored = True
        elif step.kind == "activation":
            links = links or [Link(None)]
            if links[-1].activation is not None:
                return None, f"{step.label} follows an activation"
            links[-1] = Link(links[-1].map, step, mirrored)
            mirrored = False
        else:
            return None, f"{step.label} is a step of kind {step.kind!r}"
    if mirrored or not any(link.map for link in links):
        return None, "there is no linear layer or convolution"
    return tuple(links), ""
