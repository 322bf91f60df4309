"""`folder:PATH[?size=S]`: a folder of png, jpg, jpeg, webp and bmp images, searched with all its subfolders.

- If it has the subfolders ``train`` and ``test`` (or, for want of it, ``val``, ``valid`` or ``validation``),
  they are the two parts and nothing else in the folder is read. Else about a tenth is held out, chosen by a
  hash of each file's path below the folder, so that adding files moves none of the old ones to the other
  side.
- If every image lies in a subfolder and there are two subfolders or more, these are the classes, in the order
  of their names. With ``train`` and ``test`` each has its class folders, and ``test`` none that ``train``
  lacks; classes count only where both have them.
- Within a part the images come in a fixed shuffled order, so that the first n are a fair sample. Hidden files
  and folders are passed over; links are followed.
"""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from genkernels.data.bundle import DataBundle, make_bundle
from genkernels.data.images import build, survey
from genkernels.data.spec import DataError, image_side, resolve, split_options
from genkernels.data.split import hash_order, held_out

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_TEST_NAMES = ("test", "val", "valid", "validation")


class Files:
    """An image `Source` of files below one folder."""

    def __init__(self, base: Path, paths: list[str]):
        self.base, self.paths = base, paths

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return self.paths[index]

    def encoded(self, index: int) -> Path:
        return self.base / self.paths[index]

    def keys(self) -> list[bytes]:
        return [os.fsencode(path) for path in self.paths]

    def pick(self, indices: np.ndarray) -> Files:
        return Files(self.base, [self.paths[i] for i in indices])

    def classes(self) -> list[str] | None:
        """The class folder of each file, or None where the files are not sorted into any."""
        heads = [path.split("/")[0] if "/" in path else "" for path in self.paths]
        return heads if "" not in heads and len(set(heads)) > 1 else None


def load(spec: str, rest: str, root: str | PathLike[str] | None) -> DataBundle:
    path, options = split_options(spec, rest, {"size": image_side})
    if not path:
        raise DataError(f"{spec}: the spec must name a folder, as in folder:pictures?size=32")
    base = resolve(spec, path, root)
    if not os.path.exists(base):
        raise DataError(f"{spec}: there is no folder {str(base)!r}")
    if not os.path.isdir(base):
        raise DataError(f"{spec}: {str(base)!r} must be a folder, and is a file")

    test_name = next((name for name in _TEST_NAMES if os.path.isdir(base / name)), None)
    if test_name and os.path.isdir(base / "train"):
        parts = [_files(spec, base / "train"), _files(spec, base / test_name)]
        form = survey(spec, parts, options.get("size"))
        labels, num_classes = _paired_labels(spec, parts, test_name)
        orders = [hash_order(part.keys()) for part in parts]
    else:
        files = _files(spec, base)
        form = survey(spec, [files], options.get("size"))
        labels, num_classes = [_labels(files.classes())] * 2, _count(files.classes())
        orders = list(held_out(spec, files.keys(), "images"))
        parts = [files, files]
    labels = [
        y[order] if y is not None else torch.zeros(len(order), dtype=torch.int64)
        for y, order in zip(labels, orders, strict=True)
    ]
    sources = [part.pick(order) for part, order in zip(parts, orders, strict=True)]
    what = f"{'colour' if form.channels == 3 else 'grey'} images {form.height}x{form.width} from {path!r}"
    parts = build(sources, labels, form)
    return make_bundle(spec, what, parts, form.shape, grey_levels=256, num_classes=num_classes)


def _files(spec: str, base: Path) -> Files:
    """All images below `base`, sorted by path; a linked folder is entered once."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{spec}: the folder {error.filename!r} cannot be read ({error.strerror})")

    paths: list[str] = []
    seen: set[str] = set()
    for folder, below, names in os.walk(base, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not name.startswith("."))
        inside = Path(folder).relative_to(base)
        paths += [
            (inside / name).as_posix()
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS
        ]
    if not paths:
        raise DataError(f"{spec}: {str(base)!r} must hold images ({' '.join(sorted(EXTENSIONS))}), and holds none")
    return Files(base, sorted(paths))


def _labels(classes: list[str] | None) -> Tensor | None:
    if classes is None:
        return None
    index = {name: i for i, name in enumerate(sorted(set(classes)))}
    return torch.tensor([index[name] for name in classes], dtype=torch.int64)


def _count(classes: list[str] | None) -> int | None:
    return len(set(classes)) if classes else None


def _paired_labels(spec: str, parts: list[Files], test_name: str) -> tuple[list[Tensor | None], int | None]:
    """Labels of both parts, numbered by the class folders of ``train``; none unless both parts have them."""
    train, test = parts[0].classes(), parts[1].classes()
    if train is None or test is None:
        return [None, None], None
    index = {name: i for i, name in enumerate(sorted(set(train)))}
    strange = sorted(set(test) - set(index))
    if strange:
        raise DataError(f"{spec}: every class folder of {test_name} must be in train too, and {strange[0]!r} is not")
    labels = [torch.tensor([index[name] for name in names], dtype=torch.int64) for names in (train, test)]
    return labels, len(index)
