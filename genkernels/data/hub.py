"""`hf:NAME[:CONFIG][?size=S]`: image data sets of the Hugging Face Hub, through `datasets` and the user's
network.

NAME may also be a local folder that `datasets.load_dataset` can read (parquet files, an image folder).

- Image column: the one called ``image`` or ``img``, else the first of type Image.
- Label column: ``label``, ``labels``, ``fine_label``, ``class``, ``target`` or ``y`` if it holds class labels
  or integers, else the first of type ClassLabel; left out where any label is missing or negative.
- Parts: ``train`` and ``test``, else ``train`` and ``validation`` (``valid``, ``val``, ``dev``). A data set
  with one split only has about a tenth of it held out, chosen by a hash of each image's encoded bytes: equal
  files stay together.
"""

from __future__ import annotations

from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkernels.data.bundle import DataBundle, make_bundle
from genkernels.data.images import build, survey
from genkernels.data.spec import DataError, image_side, reason, require, split_options
from genkernels.data.split import held_out

_IMAGES = ("image", "img")
_LABELS = ("label", "labels", "fine_label", "class", "target", "y")
_TEST_NAMES = ("test", "validation", "valid", "val", "dev")


class Cells:
    """An image `Source` over a column of a table, the images left encoded."""

    def __init__(self, table: Any, column: str, split: str):
        """`table` is a `datasets.Dataset` whose image column was cast to ``Image(decode=False)``."""
        self.table, self.column, self.split = table.select_columns([column]), column, split

    def __len__(self) -> int:
        return len(self.table)

    def name(self, index: int) -> str:
        return f"{self.split}[{index}]"

    def encoded(self, index: int) -> Path | BytesIO:
        cell = self.table[int(index)][self.column]
        if cell is None:
            raise ValueError("the cell is empty")
        return Path(cell["path"]) if cell["bytes"] is None else BytesIO(cell["bytes"])

    def key(self, index: int) -> bytes:
        """The encoded bytes, by which a split decides."""
        encoded = self.encoded(index)
        return encoded.read_bytes() if isinstance(encoded, Path) else encoded.getvalue()


class Rows:
    """Some rows of a `Source`, in a given order."""

    def __init__(self, source: Cells, rows: np.ndarray):
        self.source, self.rows = source, rows

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return self.source.name(int(self.rows[index]))

    def encoded(self, index: int) -> Path | BytesIO:
        return self.source.encoded(int(self.rows[index]))


def load(spec: str, rest: str, root: str | PathLike[str] | None) -> DataBundle:
    body, options = split_options(spec, rest, {"size": image_side})
    name, _, config = body.partition(":")
    if not name:
        raise DataError(f"{spec}: the spec must name a data set, as in hf:ylecun/mnist")
    library = require(spec, "datasets", "datasets")
    splits = _fetch(spec, library, name, config or None, root)
    train_name, test_name = _parts(spec, splits)
    names = list(dict.fromkeys((train_name, test_name)))
    tables = [splits[part] for part in names]
    for part, table in zip(names, tables, strict=True):
        if not len(table):
            raise DataError(f"{spec}: the split {part!r} must hold images, and is empty")

    image = _image_column(spec, library, tables[0])
    label = _label_column(library, tables[0])
    labels, num_classes = _labels(library, tables, label)
    cells = [
        Cells(table.cast_column(image, library.Image(decode=False)), image, part)
        for part, table in zip(names, tables, strict=True)
    ]
    form = survey(spec, cells, options.get("size"))
    sources: list[Any] = list(cells)
    if len(cells) == 1:
        (only,) = cells
        orders = held_out(spec, (only.key(i) for i in range(len(only))), "images")
        sources, labels = [Rows(only, order) for order in orders], [labels[0][order] for order in orders]
    what = f"{name} of the Hugging Face Hub, {form.channels}x{form.height}x{form.width}"
    parts = build(sources, labels, form)
    return make_bundle(spec, what, parts, form.shape, grey_levels=256, num_classes=num_classes)


def _fetch(spec: str, library: Any, name: str, config: str | None, root: str | PathLike[str] | None) -> Any:
    """All splits, fetched or from the cache; whatever goes wrong in there becomes one sentence."""
    try:
        return library.load_dataset(name, config, cache_dir=None if root is None else str(root))
    except ConnectionError as error:
        raise DataError(
            f"{spec}: the Hugging Face Hub cannot be reached, and the cache does not hold {name!r} ({reason(error)})"
        ) from error
    except Exception as error:  # hub, http, parquet and script errors share no base class
        raise DataError(f"{spec}: datasets cannot load {name!r} ({type(error).__name__}: {reason(error)})") from error


def _parts(spec: str, splits: Any) -> tuple[str, str]:
    """Names of the training and the held-out split; the same name twice where one has to be divided."""
    test = next((name for name in _TEST_NAMES if name in splits), None)
    if "train" in splits:
        return "train", test or "train"
    if len(splits) == 1:
        return (next(iter(splits)),) * 2
    raise DataError(f"{spec}: one of the splits must be called 'train', got {', '.join(map(repr, splits))}")


def _image_column(spec: str, library: Any, table: Any) -> str:
    images = [name for name, feature in table.features.items() if isinstance(feature, library.Image)]
    if not images:
        columns = ", ".join(f"{name!r} ({type(feature).__name__})" for name, feature in table.features.items())
        raise DataError(f"{spec}: a column of type Image is needed, got {columns}")
    return next((name for name in _IMAGES if name in images), images[0])


def _label_column(library: Any, table: Any) -> str | None:
    def holds_labels(feature: Any) -> bool:
        integers = isinstance(feature, library.Value) and feature.dtype.startswith(("int", "uint"))
        return isinstance(feature, library.ClassLabel) or integers

    named = [name for name in _LABELS if name in table.features and holds_labels(table.features[name])]
    typed = [name for name, feature in table.features.items() if isinstance(feature, library.ClassLabel)]
    return next(iter(named + typed), None)


def _labels(library: Any, tables: list[Any], column: str | None) -> tuple[list[Tensor], int | None]:
    """Labels of each table and how many there are; zeros and None where any label is missing."""
    none = [torch.zeros(len(table), dtype=torch.int64) for table in tables]
    if column is None or any(column not in table.features for table in tables):
        return none, None
    lists = [list(table[column][:]) for table in tables]
    if any(label is None or label < 0 for labels in lists for label in labels):
        return none, None
    feature = tables[0].features[column]
    highest = max(max(labels) for labels in lists)
    count = feature.num_classes if isinstance(feature, library.ClassLabel) else highest + 1
    return [torch.tensor(labels, dtype=torch.int64) for labels in lists], max(count, highest + 1)
