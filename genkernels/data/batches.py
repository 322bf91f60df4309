"""Batches of any data set by their indices, and a look for values that are not finite."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, default_collate

from genkernels._words import UsageError
from genkernels.data.bundle import DataBundle

LOOKED_AT = 100_000  # examples of each part, which takes a second or two


def fetch(dataset: Dataset, indices: Sequence[int]):
    """One batch ``(x, y)`` of tensors: by indexing data in memory, else by ``__getitems__`` or one by one."""
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
        x, y = dataset.tensors
        return x[indices], y[indices]
    many = getattr(dataset, "__getitems__", None)
    return default_collate(many(indices) if many else [dataset[i] for i in indices])


def not_finite(x: Tensor) -> int | None:
    """Which example of a batch is the first to hold a NaN or an infinity; None where none does."""
    if not x.is_floating_point() or (fine := x.isfinite().flatten(1).all(1)).all():
        return None
    return int((~fine).nonzero()[0])


def check_data(bundle: DataBundle) -> None:
    """A UsageError where a part of the data is empty, or holds a NaN or an infinity among its first examples."""
    for part, dataset in (("train", bundle.train), ("test", bundle.test)):
        if not len(dataset):
            raise UsageError(f"data {bundle.name}: the {part} part must hold at least 1 example, got 0")
        if not fetch(dataset, [0])[0].is_floating_point():
            continue
        for first in range(0, min(len(dataset), LOOKED_AT), 1024):
            at = not_finite(fetch(dataset, list(range(first, min(first + 1024, len(dataset)))))[0])
            if at is not None:
                raise UsageError(
                    f"data {bundle.name}: every value must be finite, {part} example {first + at} holds NaN or infinity"
                )
