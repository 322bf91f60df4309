"""`hf:NAME[@REVISION][:CONFIG][?size=S]`: image data sets of the Hugging Face Hub, through `datasets` and the user's
network.

NAME may also be a local folder that `datasets.load_dataset` can read (parquet files, an image folder). REVISION is a
branch, a tag or a commit of the repository on the hub; only a commit is the same data for ever. Downloading shows the
bars of `datasets`, on a terminal; reading headers and decoding are told where they take long.

- Image column: the one called ``image`` or ``img``, else the first of type Image.
- Label column: ``label``, ``labels``, ``fine_label``, ``class``, ``target`` or ``y`` if it holds class labels
  or integers, else the first of type ClassLabel; left out where any label is missing or negative, or where the held-out
  part has a class that the training part lacks. Classes are called as the data set calls them, and those without an
  example are none.
- Parts: ``train`` and ``test``, else ``train`` and ``validation`` (``valid``, ``val``, ``dev``). A data set
  with one split only has about a tenth of it held out, chosen by a hash of each image's encoded bytes: equal
  files stay together.
"""

from __future__ import annotations

import os
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genkernels.data.bundle import DataBundle, listed, make_bundle
from genkernels.data.images import Progress, build, counted, survey
from genkernels.data.parts import refuse_parts
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


def load(spec: str, rest: str, root: str | PathLike[str] | None, progress: Progress | None = None) -> DataBundle:
    body, options = split_options(spec, rest, {"size": image_side})
    name, revision, config = _parse(spec, body)
    local = os.path.isdir(name)
    library = require(spec, "datasets", "datasets")
    splits = _fetch(spec, library, name, revision, config, root)
    train_name, test_name = _parts(spec, splits)
    names = list(dict.fromkeys((train_name, test_name)))
    tables = [splits[part] for part in names]
    for part, table in zip(names, tables, strict=True):
        if not len(table):
            raise DataError(f"{spec}: the split {part!r} must hold images, and is empty")

    image = _image_column(spec, library, tables[0])
    label = _label_column(library, tables[0])
    notes: list[str] = []
    labels, classes = _labels(spec, library, names, tables, label, notes)
    cells = [
        Cells(table.cast_column(image, library.Image(decode=False)), image, part)
        for part, table in zip(names, tables, strict=True)
    ]
    form, contents, more = survey(spec, cells, options.get("size"), progress)
    sources: list[Any] = list(cells)
    if len(cells) == 1:
        (only,) = cells
        keys = (only.key(i) for _, _, i in counted(cells, "dividing", progress))
        orders = held_out(spec, keys, "images")
        sources = [Rows(only, order) for order in orders]
        labels, contents = ([each[0][order] for order in orders] for each in (labels, contents))
    where = f"the local folder {name!r}" if local else f"{name} of the Hugging Face Hub"
    what = f"{where}{f' at {revision}' if revision else ''}, {form.channels}x{form.height}x{form.width}"
    parts = build(sources, [torch.from_numpy(y) for y in labels], form, progress)
    return make_bundle(
        spec,
        what,
        parts,
        form.shape,
        grey_levels=256,
        classes=classes,
        labels=labels,
        contents=contents,
        notes=[*notes, *more],
    )


def _parse(spec: str, body: str) -> tuple[str, str | None, str | None]:
    """``NAME[@REVISION][:CONFIG]`` in its parts; a folder's name may hold an ``@``."""
    named, _, config = body.partition(":")
    name, at, revision = (named, "", "") if os.path.isdir(named) else named.rpartition("@")
    name, revision = (name, revision) if at else (named, "")
    if "@" in config:
        raise DataError(f"{spec}: the revision must stand before the configuration, NAME@REVISION:CONFIG")
    if not name:
        raise DataError(f"{spec}: the spec must name a data set, as in hf:ylecun/mnist")
    if at and not revision.strip():
        raise DataError(f"{spec}: a branch, a tag or a commit must stand after @, got nothing")
    if at and os.path.isdir(name):
        raise DataError(f"{spec}: a local folder has no revisions, got {revision!r} of {name!r}")
    return name, revision or None, config or None


def _fetch(
    spec: str, library: Any, name: str, revision: str | None, config: str | None, root: str | PathLike[str] | None
) -> Any:
    """All splits, fetched or from the cache; whatever goes wrong in there becomes one sentence."""
    given = {"revision": revision} if revision else {}
    try:
        return library.load_dataset(name, config, cache_dir=None if root is None else str(root), **given)
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


def _labels(
    spec: str, library: Any, names: list[str], tables: list[Any], column: str | None, notes: list[str]
) -> tuple[list[np.ndarray], list[str] | None]:
    """Labels of each table, numbered by the classes that the first one has, and the classes' names; zeros and None
    where they cannot be used."""
    none = [np.zeros(len(table), dtype=np.int64) for table in tables], None
    if column is None:
        return none
    lists = [list(table[column][:]) if column in table.features else [None] for table in tables]
    if any(label is None or label < 0 for labels in lists for label in labels):
        notes.append(f"labels are left out: some of the column {column!r} are missing or negative")
        return none
    feature = tables[0].features[column]
    called = dict(enumerate(feature.names if isinstance(feature, library.ClassLabel) else []))
    present = sorted(set(lists[0]))
    classes = [called.get(label, str(label)) for label in present]
    if strange := sorted(set(lists[-1]) - set(present)):
        lacking = listed([called.get(label, label) for label in strange])
        notes.append(f"labels are left out: {names[-1]!r} has the classes {lacking}, and {names[0]!r} has not")
        return none
    if unused := [name for name in called.values() if name not in classes]:
        notes.append(f"classes without an example are left out: {listed(unused)}")
    refuse_parts(spec, classes, f"classes of the column {column!r}")
    return [np.searchsorted(present, labels) for labels in lists], classes
