"""What every metric asks of the two sets that it compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from genkernels.ops import checks

#: Values of fp64 that an intermediate result may hold, 32 MiB.
MOST_VALUES = 2**22


def flattened(who: str, sets: Mapping[str, Tensor], least: int = 1) -> list[Tensor]:
    """Sets of examples, by their labels, as rows ``[N, D]`` of whatever dtype they have.

    Args:
        least: how many examples each must hold.

    Raises:
        TypeError: one is no tensor of numbers, or floats meet integers, which are on another scale. ValueError: one is
            too small, or their examples have different shapes or devices.
    """
    lead = None
    for label, x in sets.items():
        checks.tensor(who, label, x, checks.FLOATS + checks.INTEGERS, "of floats or integers")
        if x.dim() < 2 or len(x) < least or not x[0].numel():
            raise ValueError(f"{who}: {label} must be [N, ...] of at least {least} examples, got {list(x.shape)}")
        if lead is None:
            lead, first = label, x
        elif x.is_floating_point() != first.is_floating_point():
            raise TypeError(f"{who}: {lead} and {label} must be on one scale, got {first.dtype} and {x.dtype}")
        elif x.shape[1:] != first.shape[1:]:
            shapes = f"{list(first.shape[1:])} and {list(x.shape[1:])}"
            raise ValueError(f"{who}: {lead} and {label} must hold examples of one shape, got {shapes}")
    checks.same_device(who, sets)
    return [x.detach().flatten(1) for x in sets.values()]


def rows(who: str, label: str, network: Callable[[Tensor], Tensor], x: Tensor, batch_size: int) -> Tensor:
    """What a network of the user's makes of x, batch by batch: ``[N, D]``, a row an example.

    Raises:
        TypeError: it cannot be called, or gives no tensor of numbers. ValueError: it gives something else than a row an
            example.
    """
    if not callable(network):
        raise TypeError(f"{who}: {label} must be a function of a batch, got {type(network).__name__}")
    made = []
    for some in x.split(batch_size):
        found = network(some)
        checks.tensor(who, f"what {label} gives", found, checks.FLOATS + checks.INTEGERS, "of floats or integers")
        if found.dim() != 2 or len(found) != len(some):
            raise ValueError(
                f"{who}: {label} must give a row [D] for each of the {len(some)} examples, got {list(found.shape)}"
            )
        made.append(found)
    return torch.cat(made)


def all_finite(*sets: Tensor) -> bool:
    return all(x.isfinite().all().item() for x in sets)
