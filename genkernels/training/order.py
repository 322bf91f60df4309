r"""Which examples and which noise a training step sees: a pure function of (seed, step, process).

The examples are one endless stream: permutation 0 of the data, then permutation 1, and so on, permutation e being drawn
from (seed, e). Step s takes the s-th group of ``batch_size * processes`` examples, so every batch is full, none is
dropped at the end of an epoch, and each example is seen exactly once an epoch. Random number generators are set anew
from (seed, step, process) before a batch is read and before a step is computed.

A run that was stopped therefore needs nothing but its step count to go on with the same data and the same noise, and
evaluating or sampling in between cannot change what follows. Storing generator states would also serve, but would make
every draw depend on all draws before it, in every process.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from genkernels._seeds import derive_seed, seed_everything
from genkernels.data.batches import fetch


class Order(Sampler):
    """The batches of the steps ``start`` to ``stop - 1`` of one process, each as ``(step, indices)``.

    Args:
        examples: size of the data set. batch_size: examples a step in each process. seed: of the permutations.
        start, stop: steps. rank, world_size: which process this is, of how many.
    """

    def __init__(
        self, examples: int, batch_size: int, seed: int, start: int, stop: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if examples < 1:
            raise ValueError(f"the data set must hold at least 1 example, got {examples}")
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.start, self.stop, self.rank, self.world_size = start, stop, rank, world_size
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", epoch))
            self._epoch, self._permutation = epoch, torch.randperm(self.examples, generator=generator).numpy()
        return self._permutation

    def batch(self, step: int) -> list[int]:
        """Indices of the examples that `step` sees in this process."""
        first = (step * self.world_size + self.rank) * self.batch_size
        indices: list[int] = []
        while len(indices) < self.batch_size:
            epoch, position = divmod(first + len(indices), self.examples)
            missing = self.batch_size - len(indices)
            indices.extend(self.permutation(epoch)[position : position + missing].tolist())
        return indices

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        for step in range(self.start, self.stop):
            yield step, self.batch(step)

    def __len__(self) -> int:
        return max(0, self.stop - self.start)


class _SeededDataset(Dataset):
    """Reads one batch under the seed of its step, so that augmentation drawn in a worker process is also repeatable."""

    def __init__(self, dataset: Dataset, seed: int, rank: int) -> None:
        self.dataset, self.seed, self.rank = dataset, seed, rank

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, key: tuple[int, list[int]]):
        step, indices = key
        seed_everything(derive_seed(self.seed, "data", step, self.rank))
        return fetch(self.dataset, indices)


def _as_it_is(batch):
    return batch


def _ignore_interrupts(_worker: int) -> None:
    # Ctrl-C reaches the whole process group: the training process alone decides what to do about it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_loader(dataset: Dataset, order: Order, *, workers: int = 0, pin_memory: bool = False) -> DataLoader:
    """A loader that gives the batches of `order`."""
    return DataLoader(
        _SeededDataset(dataset, order.seed, order.rank),
        batch_sampler=order,
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_interrupts if workers else None,
        generator=torch.Generator().manual_seed(0),  # else the loader draws from the global generator
    )
