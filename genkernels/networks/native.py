"""Networks of residual blocks that have kernels of their own: what `genkernels.ops.log_det_series` and
`invertible_residual` take, read from a module."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from genkernels._options import Nonlinearity
from genkernels.networks import _outside
from genkernels.networks._outside import sample_of, while_compiling
from genkernels.networks.passes import parameters
from genkernels.networks.properties import Link, chain
from genkernels.networks.steps import Step
from genkernels.networks.trace import Untraceable, traced

WORDS = Nonlinearity.words()


class NativeBlock(NamedTuple):
    """The arguments of both operators behind x, in their order.

    Attributes:
        weights, biases: of each map, a bias None where there is none, ``[N, outputs]`` where a context makes it each
            sample's own. activation: between any two of them. parameters:
            ``[maps − 1]``, None where the activation has none.
    """

    weights: list[Tensor]
    biases: list[Tensor | None]
    activation: str
    parameters: Tensor | None


def native_block(module: nn.Module, x: Tensor, context: Tensor | None = None) -> tuple[NativeBlock | None, str]:
    """The network as an alternation of linear maps, or of 1×1 and 3×3 convolutions of stride 1 with zeros around, and
    one activation; its weights read now.

    Args:
        module: of one input, or of a context beside. x: ``[N, ...]``.
        context: only adds to what the first map gives in ``module(x)``: ``module.context_shift(context)``, of
            ``[N, outputs]``.

    Returns:
        the block and "", or None and the reason why the network is none.
    """
    shift = None if context is None else getattr(module, "context_shift", None)
    if context is not None and not callable(shift):
        return None, "it is given a context and has no method context_shift(context)"
    block, reason = _in_graph(module, x) if torch.compiler.is_compiling() else _read(module, x)
    if block is None or shift is None:
        return block, reason
    first, *others = block.biases
    own = shift(context).to(x.dtype)
    return block._replace(biases=[own if first is None else own + first, *others]), ""


def _read(module: nn.Module, x: Tensor) -> tuple[NativeBlock | None, str]:
    steps, links, reason = _links(module, x)
    if reason:
        return None, reason
    try:
        read = dict(zip(map(id, steps), parameters(steps), strict=True))
    except ValueError as refusal:  # a normalised convolution that its first call will tell the size of its input
        return None, str(refusal)
    maps = [read[id(link.map)] for link in links]
    weights, biases = [own["weight"] for own in maps], [own.get("bias") for own in maps]
    if any(t is not None and t.dtype != x.dtype for t in (*weights, *biases)):
        return None, f"its tensors are not all {x.dtype}, as x is"
    activations = [link.activation for link in links[:-1]]
    given = [list(read[id(step)].values()) for step in activations]
    return NativeBlock(weights, biases, activations[0].name, _together(given, x)), ""


def _links(module: nn.Module, x: Tensor) -> tuple[tuple[Step, ...], tuple[Link, ...], str]:
    """Steps and links of the network, or why it is none."""
    try:
        steps = traced(module, x)
    except Untraceable as refusal:
        return (), (), str(refusal)
    links, reason = chain(steps)
    return steps, links or (), reason or _why_not(links, x.dim())


def _in_graph(module: nn.Module, x: Tensor) -> tuple[NativeBlock | None, str]:
    """The same within a compiled pass, which holds where the tensors are."""
    if not _outside.ASKS_OF_MODULES:
        return None, "this version of torch.compile asks nothing of modules"
    maps, activation, given, reason = _places(module, sample_of(x))
    if reason:
        return None, reason
    module(x)  # binds the pass to all that a forward of the network reads

    def read(place):
        return getattr(module.get_submodule(place[0]), place[1]) if isinstance(place, tuple) else place

    weights, biases = [read(weight) for weight, _ in maps], [read(bias) for _, bias in maps]
    if any(t is not None and t.dtype != x.dtype for t in (*weights, *biases)):
        return None, f"its tensors are not all {x.dtype}, as x is"
    return NativeBlock(weights, biases, activation, _together([[read(p) for p in places] for places in given], x)), ""


@while_compiling
def _places(module: nn.Module, sample: tuple[int, ...]) -> tuple[tuple, str, tuple, str]:
    """Of each map where its weight and its bias are, a module's path and an attribute's name; the activation; of each
    what it is given; and the reason why the network is none, or ""."""
    _, links, reason = _links(module, torch.empty((1, *sample), device="meta"))
    if reason:
        return (), "", (), reason

    def places(step: Step) -> dict:
        return {s.role: (s.path, s.name) if s.owner is not None else s.constant for s in step.sources}

    maps = tuple((places(link.map)["weight"], places(link.map).get("bias")) for link in links)
    given = tuple(tuple(places(link.activation).values()) for link in links[:-1])
    return maps, links[0].activation.name, given, ""


def _why_not(links: tuple[Link, ...], axes: int) -> str:
    if len(links) < 2 or any(link.activation is None for link in links[:-1]) or links[-1].activation is not None:
        return "it is no alternation of two maps or more with activations between them"
    for link in links:
        step = link.map
        if step is None:
            return "it begins with an activation"
        if step.kind == "conv":
            kernels = (((0, 0), (0, 0)), ((1, 1), (1, 1)))
            fits = step.groups == 1 and not step.circular and step.stride == step.dilation == (1, 1)
            if axes != 4 or not fits or tuple(map(tuple, step.padding)) not in kernels:
                return f"{step.label} is no 1×1 or 3×3 convolution of stride 1 with zeros around"
    names = {link.activation.name for link in links[:-1]}
    if len(names) > 1 or not names <= set(WORDS):
        return f"its activations must be one of {', '.join(WORDS)}, got {', '.join(sorted(names))}"
    for before, after in zip(links[:-1], links[1:], strict=True):
        if before.map.shape[1:] != after.map.shape[1:]:
            return f"{after.map.label} changes the size of the image"
    return ""


def _together(given: list[list], x: Tensor) -> Tensor | None:
    if not given[0]:
        return None
    values = [value for (value,) in given]
    if all(isinstance(value, Tensor) for value in values):
        return torch.stack([value.reshape(()) for value in values]).to(x.dtype)
    return x.new_tensor([float(value) for value in values])
