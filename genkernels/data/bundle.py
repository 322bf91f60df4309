"""What `load` hands out: a training and a held-out part of one data set, and what a model must know of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
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


class Relabelled(Dataset):
    """A data set whose label k is told as ``numbers[k]``."""

    def __init__(self, dataset: Dataset, numbers: Sequence[int]):
        self.dataset, self.numbers = dataset, list(numbers)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, y = self.dataset[index]
        return x, self.numbers[y]


@dataclass(frozen=True)
class Form:
    """What a model must know of its data.

    Attributes:
        shape: of one example, ``(C, H, W)`` or ``(D,)``.
        grey_levels: how many values a pixel can take (indices 0 to grey_levels − 1), None for points.
        num_classes: how many labels there are (0 to num_classes − 1), None where there are none.
        domains: how many images, each of another domain and in no relation, a datum holds, one behind the other along
            its channels.
    """

    shape: tuple[int, ...]
    grey_levels: int | None = None
    num_classes: int | None = None
    domains: int = 1

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
        classes: the user's name of each label, in order: the class folder, the number in the archive.
        untrained: those of them that no example of ``train`` has.
        notes: sentences about what the data may not seem to be; ``genkernels train`` tells them once.
        digest: of each part's examples and labels in their order, ``{"train": ..., "test": ...}``, by which a run knows
            them again; None for the sets that come with the package, whose name says what they are.
    """

    name: str
    train: Dataset = field(repr=False)
    test: Dataset = field(repr=False)
    form: Form
    description: str
    classes: tuple[str, ...] | None = None
    untrained: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    digest: dict[str, str] | None = None

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

    def counted_by(self, classes: Sequence[str]) -> DataBundle:
        """The same data with each label's number that of its name in `classes`, which must hold all of its own."""
        if self.classes is None or tuple(classes) == self.classes:
            return self
        numbers = [list(classes).index(name) for name in self.classes]
        parts = {"train": Relabelled(self.train, numbers), "test": Relabelled(self.test, numbers)}
        form = replace(self.form, num_classes=len(classes))
        return replace(self, **parts, form=form, classes=tuple(classes))


def make_bundle(
    spec: str,
    what: str,
    parts: Sequence[Dataset],
    shape: Sequence[int],
    *,
    grey_levels: int | None = None,
    domains: int = 1,
    classes: Sequence[str] | None = None,
    labels: Sequence[np.ndarray | Tensor] | None = None,
    contents: Sequence[np.ndarray] | None = None,
    notes: Sequence[str] = (),
) -> DataBundle:
    """A `DataBundle` of ``parts = (train, test)`` whose description begins with `what`.

    Args:
        spec, what, parts, shape, grey_levels, domains: as in the bundle.
        classes: names of the labels.
        labels, contents: of a user's own data, for each part the labels and a hash of each example.
        notes: what the loader noticed.
    """
    train, test = parts
    notes = [*notes, *_grey_in_colour(parts, shape)]
    digest, untrained = None, ()
    if contents is not None and labels is not None:
        labels = [np.asarray(y, dtype="<i8") for y in labels]
        digest = {part: _digest(x, y) for part, x, y in zip(("train", "test"), contents, labels, strict=True)}
        known = np.sort(contents[0])
        places = np.searchsorted(known, contents[1]).clip(max=len(known) - 1)
        if both := int((known[places] == contents[1]).sum()):
            notes.append(f"{both:,} of the {len(test):,} held-out examples are among those to train on too")
        held = np.bincount(labels[0], minlength=len(classes or ()))
        untrained = tuple(name for name, count in zip(classes or (), held, strict=False) if not count)
    form = Form(tuple(shape), grey_levels, len(classes) if classes else None, domains)
    description = f"{what}{_counted(classes)}; {len(train):,} to train on, {len(test):,} held out"
    names = tuple(classes) if classes else None
    return DataBundle(spec, train, test, form, description, names, untrained, tuple(notes), digest)


def listed(names: Sequence[object], most: int = 6) -> str:
    """Names in one line, those in the midst of many left out."""
    shown = list(map(str, names))
    return ", ".join(shown if len(shown) <= most else [*shown[: most - 2], "…", shown[-1]])


def _counted(classes: Sequence[str] | None) -> str:
    if not classes:
        return ""
    names = "" if list(classes) == [str(i) for i in range(len(classes))] else f" ({listed(classes)})"
    return f", {len(classes)} {'class' if len(classes) == 1 else 'classes'}{names}"


def _digest(contents: np.ndarray, labels: np.ndarray) -> str:
    digest = hashlib.blake2b(np.asarray(contents, dtype="<u8").tobytes(), digest_size=16)
    digest.update(labels.tobytes())
    return digest.hexdigest()


def _grey_in_colour(parts: Sequence[Dataset], shape: Sequence[int]) -> list[str]:
    """Whether most pictures of three channels are grey, judged by some of each part, evenly spread."""
    if len(shape) != 3 or shape[0] != 3:
        return []
    looked = grey = 0
    for part in parts:
        most = 256 if isinstance(part, TensorDataset) else 32  # others have to be decoded for it
        for i in range(0, len(part), max(1, len(part) // most)):
            x = part[i][0]
            looked, grey = looked + 1, grey + int(bool((x[0] == x[1]).all() and (x[1] == x[2]).all()))
    if 2 * grey < looked:
        return []
    among = "" if looked == sum(map(len, parts)) else " that were looked at"
    return [
        f"{grey:,} of {looked:,} pictures{among} are grey in three equal channels: bits/dim do not compare with those "
        "of one channel (save all of them as grey for that)"
    ]
