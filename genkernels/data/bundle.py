"""What `load` hands out: a training and a held-out part of one data set, and what a model must know of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from genkernels.data.spec import DataError


class TensorPairs(TensorDataset):
    """A data set held in memory: ``.tensors = (x, y)`` with x ``[N, ...]`` and y ``[N]`` int64.

    It differs from `torch.utils.data.TensorDataset` in giving the label as an int, as every data set here
    does.
    """

    def __init__(self, x: Tensor, y: Tensor | None = None):
        super().__init__(x, torch.zeros(len(x), dtype=torch.int64) if y is None else y)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, y = self.tensors
        return x[index], int(y[index])


@dataclass(frozen=True)
class Form:
    """What a model must know of its data.

    Attributes:
        shape: of one example, ``(C, H, W)`` or ``(D,)``.
        grey_levels: how many values a pixel can take (indices 0 to grey_levels − 1), None for points.
        num_classes: how many labels there are (0 to num_classes − 1), None where there are none.
    """

    shape: tuple[int, ...]
    grey_levels: int | None = None
    num_classes: int | None = None

    @property
    def is_image(self) -> bool:
        return self.grey_levels is not None


@dataclass(frozen=True, eq=False)
class DataBundle:
    """A data set in two disjoint parts.

    Attributes:
        name: the spec it was loaded from.
        train: map-style, gives ``(x, y)``: x uint8 ``[C, H, W]`` level indices or float32 ``[D]``; y an int,
            0 where there are no labels. Data sets in memory hold their stacked tensors in ``.tensors``.
        test: the held-out part, in the same form.
        form: what a model must know of them.
        description: one line for people.
    """

    name: str
    train: Dataset = field(repr=False)
    test: Dataset = field(repr=False)
    form: Form
    description: str

    def take(self, split: Literal["train", "test"], n: int) -> tuple[Tensor, Tensor]:
        """The first n examples of a part, or all of them where there are fewer, as copies.

        Args:
            split: ``"train"`` or ``"test"``.
            n: how many, 0 or more.

        Returns:
            x ``[n, *form.shape]`` and y ``[n]`` int64.

        Raises:
            ValueError: an unknown split or a negative n.
            TypeError: n is not an int.

        Equivalent to::

            x, y = zip(*(part[i] for i in range(n)))
            torch.stack(x), torch.tensor(y)
        """
        if split not in ("train", "test"):
            raise DataError(f"take: split must be 'train' or 'test', got {split!r}")
        if not isinstance(n, int) or isinstance(n, bool):
            raise TypeError(f"take: n must be an int, got {type(n).__name__}")
        if n < 0:
            raise DataError(f"take: n must be 0 or more, got {n}")
        part = self.train if split == "train" else self.test
        if isinstance(part, TensorDataset):
            x, y = part.tensors
            return x[:n].clone(), y[:n].clone()
        pairs = [part[i] for i in range(min(n, len(part)))]
        if not pairs:
            dtype = torch.uint8 if self.form.is_image else torch.float32
            return torch.empty((0, *self.form.shape), dtype=dtype), torch.empty(0, dtype=torch.int64)
        return torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs], dtype=torch.int64)


def make_bundle(
    spec: str,
    what: str,
    parts: Sequence[Dataset],
    shape: Sequence[int],
    *,
    grey_levels: int | None = None,
    num_classes: int | None = None,
) -> DataBundle:
    """A `DataBundle` of ``parts = (train, test)`` whose description begins with `what`."""
    train, test = parts
    classes = f", {num_classes} classes" if num_classes else ""
    description = f"{what}{classes}; {len(train):,} to train on, {len(test):,} held out"
    return DataBundle(spec, train, test, Form(tuple(shape), grey_levels, num_classes), description)
