"""Losses that differentiate a network by themselves, within a compiled pass.

They are algorithms over a critic's steps (`genkernels.networks`), or passes over a model's draws with hooks in its
graph and a way back of their own, which the compiler cannot follow from its code. So the compiled pass first holds such
a loss as one operator, of the network's tensors, that consists of others: when they are asked for, the code runs with
the stand-ins of the compiler, which so gets the products forward and back of all its passes. The operator names the
network by a key, new in each compilation, so that nothing that was compiled for another one counts as the same.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from genkernels.backends import current_backend
from genkernels.losses._critics import Critic
from genkernels.networks import Untraceable, _outside, traced
from genkernels.networks._outside import sample_of, while_compiling
from genkernels.networks.gradient_penalty import most_as_one

_NETWORKS: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()


def held(critic: Critic, x: Tensor, y: Tensor | None) -> tuple[str, list[Tensor]]:
    """A key of the critic, which is called with x (and labels y), and its tensors, if it is a network of steps; else ""
    and none."""
    critic = getattr(critic, "_orig_mod", critic)  # as it was before ``torch.compile``
    plain = isinstance(critic, nn.Module) and not isinstance(critic, DistributedDataParallel)
    if not (plain and _outside.ASKS_OF_MODULES):
        return "", []
    key = _key(critic, sample_of(x), y is not None)
    if not key:
        return "", []
    # these bind the pass to what decides the way, and to all that the critic's forward reads
    current_backend()
    critic(x) if y is None else critic(x, y)
    return key, _tensors(critic)


def held_model(model: nn.Module, read: Callable[[], Any]) -> tuple[str, list[Tensor]]:
    """A key of a model, of which the pass is bound to all that `read` reads, and its tensors."""
    current_backend()
    read()
    return _new_key(model), _tensors(model)


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers(), *(getattr(m, name) for m, name in _beside(network))]


def together(critic: nn.Module, real: Tensor, fake: Tensor, y: Tensor | None) -> bool:
    """Whether two batches had better go through a critic in one call."""
    if not _outside.ASKS_OF_MODULES:
        return False
    return len(real) + len(fake) <= _most_together(critic, sample_of(real), y is not None)


@while_compiling
def _most_together(critic: nn.Module, sample: tuple[int, ...], labelled: bool) -> int:
    try:
        return most_as_one(traced(critic, torch.empty((1, *sample), device="meta"), labelled))
    except Untraceable:
        return 0


def _beside(network: nn.Module) -> list[tuple[nn.Module, str]]:
    """Modules and the names of what else of them a compiled pass has to be given."""
    return [(m, name) for m in network.modules() for name in getattr(type(m), "genkernels_given", ())]


@while_compiling
def _key(critic: nn.Module, sample: tuple[int, ...], labelled: bool) -> str:
    try:
        traced(critic, torch.empty((1, *sample), device="meta"), labelled)
    except Untraceable:
        return ""
    return _named(critic)


@while_compiling
def _new_key(model: nn.Module) -> str:
    return _named(model)


def _named(network: nn.Module) -> str:
    key = uuid.uuid4().hex
    _NETWORKS[key] = network
    return key


def run(key: str, tensors: Sequence[Tensor], function: Callable[[nn.Module], Any]) -> Any:
    """A function of the network, which has these tensors meanwhile."""
    network = _NETWORKS[key]
    names = [name for name, _ in (*network.named_parameters(), *network.named_buffers())]
    given = {f"network.{name}": tensor for name, tensor in zip(names, tensors, strict=False)}
    beside = _beside(network)
    own = [getattr(module, name) for module, name in beside]
    try:
        _set(beside, tensors[len(names) :])
        return torch.func.functional_call(_Applied(network, function), given, ())
    finally:
        _set(beside, own)


def _set(places: Sequence[tuple[nn.Module, str]], tensors: Sequence[Tensor]) -> None:
    for (module, name), tensor in zip(places, tensors, strict=True):
        setattr(module, name, tensor)


class _Applied(nn.Module):
    def __init__(self, network: nn.Module, function: Callable[[nn.Module], Any]):
        super().__init__()
        self.network, self.function = network, function

    def forward(self) -> Any:
        return self.function(self.network)
