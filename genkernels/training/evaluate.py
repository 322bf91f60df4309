"""Held-out likelihood: bits per dimension for images, nats for points."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from genkernels._seeds import derive_seed, fixed_seed
from genkernels.training.order import fetch

UNITS = {"bits_per_dim": "bits/dim", "nats": "nats"}


def metric_of(levels: int | None) -> str:
    """``bits_per_dim`` for images, which have grey levels, ``nats`` (negative log-density) for continuous points."""
    return "nats" if levels is None else "bits_per_dim"


@dataclass(frozen=True)
class HeldOut:
    """A likelihood on held-out examples; lower is better.

    Attributes:
        metric: ``bits_per_dim`` or ``nats``.
        value: the mean over `examples`, NaN where one of them is.
        standard_error: of that mean.
        examples: how many were seen.
    """

    metric: str
    value: float
    standard_error: float
    examples: int

    @property
    def unit(self) -> str:
        return UNITS[self.metric]

    def to_dict(self) -> dict:
        return asdict(self)


def combine(metric: str, sums: torch.Tensor) -> HeldOut:
    """The mean from ``[sum, sum of squares, count]`` (fp64), which processes may have added up among themselves."""
    total, squares, count = sums.tolist()
    if not count:
        raise ValueError("evaluate: at least 1 example must be seen, got 0")
    mean = total / count
    variance = max(0.0, squares / count - mean * mean) if math.isfinite(mean) else math.nan
    return HeldOut(metric, mean, math.sqrt(variance / count), int(count))


def spread(dataset: Dataset, count: int) -> Dataset:
    """`count` examples evenly spread over a data set, or all of it where `count` is 0 or no smaller."""
    if not count or count >= len(dataset):
        return dataset
    return Subset(dataset, [i * len(dataset) // count for i in range(count)])


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    *,
    levels: int | None,
    batch_size: int = 64,
    seed: int = 0,
    class_conditional: bool = False,
    rank: int = 0,
    world_size: int = 1,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    stop: Callable[[], bool] | None = None,
) -> HeldOut | None:
    """The model's mean negative log-likelihood over a data set, every example once, in fp32 and in evaluation mode.

    The sum is divided by the examples seen, so a last batch that is only partly full counts by its size. The
    dequantisation noise is a function of `seed`, whatever the global generators hold, and they are left as they were.

    Equivalent to (images)::

        torch.cat([model.bits_per_dim(x) for x, y in DataLoader(dataset, batch_size)]).mean()

    Args:
        model: has ``bits_per_dim(x, y=None)`` (images) or ``log_prob(x, y=None)`` (points), each ``[N]``.
        dataset: gives ``(x, y)``.
        levels: grey levels of the images, or None for points.
        batch_size: examples at once.
        seed: of the dequantisation noise.
        class_conditional: gives `y` to the model.
        rank, world_size: this process takes every `world_size`-th batch.
        reduce: adds an fp64 tensor up over the processes.
        stop: asked before each batch; True abandons the evaluation.

    Returns:
        The result, or None where `stop` said so.

    Raises:
        ValueError: the data set is empty.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), fixed_seed(derive_seed(seed, "evaluate", rank)), no_autocast(device):
            for first in range(rank * batch_size, len(dataset), world_size * batch_size):
                if stop is not None and stop():
                    return None
                x, y = fetch(dataset, list(range(first, min(first + batch_size, len(dataset)))))
                x, y = x.to(device), y.to(device) if class_conditional else None
                values = (-model.log_prob(x, y) if levels is None else model.bits_per_dim(x, y)).double()
                sums += torch.stack([values.sum(), (values * values).sum(), values.new_tensor(len(values))])
    finally:
        model.train(was_training)
    return combine(metric_of(levels), reduce(sums) if reduce else sums)


@contextlib.contextmanager
def no_autocast(device: torch.device):
    """Likelihoods and samples are computed in the weights' own precision, also in the middle of a mixed-precision
    run."""
    with torch.autocast(device.type, enabled=False):
        yield
