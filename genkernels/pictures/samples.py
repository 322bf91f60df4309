"""Samples of a model as one looks at them: classes in rows of their own, real examples beside."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from genkernels.pictures.plots import scatter
from genkernels.pictures.sheets import blocks, sheet

MOST_ROWS = 16  # classes on a sheet; of more, some that are evenly spread


def class_rows(num_classes: int | None, count: int) -> list[int]:
    """The class of each sample of a sheet of about `count`, row by row; empty where there are no classes."""
    shown = min(num_classes or 0, MOST_ROWS, count)
    return [row * num_classes // shown for row in range(shown) for _ in range(count // shown)]


def samples(
    drawn: Tensor,
    real: Tensor | None = None,
    *,
    labels: Sequence[int] = (),
    real_labels: Tensor | None = None,
    classes: Sequence[str] | None = None,
    title: str = "",
    note: str = "",
) -> np.ndarray:
    """Draws samples, and real examples beside them.

    Args:
        drawn: images ``[N, C, H, W]`` in [0, 1], or points ``[N, D]``.
        real: real ones, in the same form.
        labels: of the images, as `class_rows` gives them: each class is a row then, of samples and of real ones.
        real_labels: ``[M]``, of the real images. classes: what they are called; None: by their numbers.
        title, note: above it all.

    Returns:
        ``[height, width, 3]`` bytes.
    """
    if drawn.ndim == 2:
        return scatter(drawn, real, title=title, note=note)
    if not len(drawn):
        raise ValueError(f"samples: drawn must hold at least 1 image, got {list(drawn.shape)}")
    if drawn.shape[1] not in (1, 3):  # a grey tile a channel
        return sheet(drawn.flatten(0, 1).unsqueeze(1), title=title, note=note)
    rows = list(dict.fromkeys(labels))
    columns = len(drawn) // len(rows) if rows else math.ceil(math.sqrt(len(drawn)))
    parts = {"samples": (drawn, columns)}
    if real is not None and len(real):
        beside = max(1, columns // 2)
        if rows:
            real = _by_row(real, torch.as_tensor(real_labels), rows, beside)
        parts["held-out pictures"] = real[: beside * math.ceil(len(drawn) / columns)], beside
    words = [classes[row] if classes else str(row) for row in rows]
    return blocks(parts, title=title, note=note, rows=[word if len(word) < 25 else f"{word[:24]}…" for word in words])


def _by_row(x: Tensor, y: Tensor, rows: Sequence[int], columns: int) -> Tensor:
    """The first `columns` examples of each class, grey where there are fewer."""
    tiles = torch.full((len(rows), columns, *x.shape[1:]), 96 / 255)
    for tile, row in zip(tiles, rows, strict=True):
        own = x[y == row][:columns].float()
        tile[: len(own)] = own
    return tiles.flatten(0, 1)
