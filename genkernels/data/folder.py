"""`folder:PATH[?size=S]`: a folder of png, jpg, jpeg, webp and bmp images, searched with all its subfolders.
`folder:A,B[?size=S]`: two of them as two domains, an image of each in a datum (`CycleGAN`).

- If it has the subfolders ``train`` and ``test`` (or, for want of it, ``val``, ``eval``, ``dev`` or ``holdout``), they
  are the two parts and nothing else in the folder is read. Upper and lower case, longer forms (``training``,
  ``validation``) and a word beside (``train_images``) mean the same; other names that look like such a pair are
  refused. Else about a tenth is held out, chosen by a hash of each file's path below the folder, so that adding files
  moves none of the old ones to the other side.
- If every image lies in a subfolder and there are two subfolders or more, these are the classes, in the order
  of their names; folders that hold all images, one in the other, are passed over. With ``train`` and ``test`` each has
  its class folders, and ``test`` none that ``train`` lacks; classes count only where both have them.
- Within a part the images come in a fixed shuffled order, so that the first n are a fair sample. Hidden files
  and folders are passed over, and files with other suffixes, which are counted; links are followed.
- Two domains are brought to one size and one number of channels. About a tenth of each is held out by the hash; their
  subfolders mean nothing. A datum is ``[2C, H, W]``, A's channels before B's; the smaller domain begins anew where it
  ends.
"""

from __future__ import annotations

import os
from collections import Counter
from os import PathLike
from pathlib import Path

import numpy as np
import torch

from genkernels.data.bundle import DataBundle, listed, make_bundle
from genkernels.data.domains import Domains
from genkernels.data.images import Progress, build, survey
from genkernels.data.parts import find_parts, refuse_parts
from genkernels.data.spec import DataError, image_side, resolve, split_options
from genkernels.data.split import hash_order, held_out

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class Files:
    """An image `Source` of files below one folder; where there are several, `label` says which in a file's name."""

    def __init__(self, base: Path, paths: list[str], label: str = ""):
        self.base, self.paths, self.label = base, paths, label

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return f"{self.label}/{self.paths[index]}" if self.label else self.paths[index]

    def encoded(self, index: int) -> Path:
        return self.base / self.paths[index]

    def keys(self) -> list[bytes]:
        return [os.fsencode(path) for path in self.paths]

    def pick(self, indices: np.ndarray) -> Files:
        return Files(self.base, [self.paths[i] for i in indices], self.label)

    def depth(self) -> int:
        """How many folders, one in the other, hold all files."""
        parents = [path.split("/")[:-1] for path in self.paths]
        return len(os.path.commonprefix(parents))

    def folders(self, depth: int) -> list[str]:
        """The folder of each file at that depth, "" where it lies above."""
        return [path.split("/")[depth] if path.count("/") > depth else "" for path in self.paths]


def load(spec: str, rest: str, root: str | PathLike[str] | None, progress: Progress | None = None) -> DataBundle:
    path, options = split_options(spec, rest, {"size": image_side})
    if not path:
        raise DataError(f"{spec}: the spec must name a folder, as in folder:pictures?size=32")
    if "," in path and not os.path.exists(resolve(spec, path, root)):
        return _load_domains(spec, path.split(","), options.get("size"), root, progress)
    base = _base(spec, path, root)
    notes: list[str] = []
    names = find_parts(_subfolders(spec, base))
    files = [_files(spec, base / name, notes, name) for name in names or ("",)]
    form, contents, more = survey(spec, files, options.get("size"), progress)
    classes, labels = _classes(spec, files, names, notes)
    if names:
        orders = [hash_order(part.keys()) for part in files]
        notes += _beside(base, names)
    else:
        orders = held_out(spec, files[0].keys(), "images")
        files, contents, labels = files * 2, contents * 2, labels * 2
    labels = [y[order] for y, order in zip(labels, orders, strict=True)]
    contents = [hashes[order] for hashes, order in zip(contents, orders, strict=True)]
    sources = [part.pick(order) for part, order in zip(files, orders, strict=True)]
    what = f"{'colour' if form.channels == 3 else 'grey'} images {form.height}x{form.width} from {path!r}"
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


def _load_domains(
    spec: str, paths: list[str], size: int | None, root: str | PathLike[str] | None, progress: Progress | None
) -> DataBundle:
    if len(paths) != 2:
        raise DataError(f"{spec}: two folders must be given as two domains, got {len(paths)}")
    if not all(path.strip() for path in paths):
        raise DataError(f"{spec}: two folders must be given as two domains, got one without a name")
    notes: list[str] = []
    files = [_files(spec, _base(spec, path, root), notes, path.rstrip("/")) for path in paths]
    form, contents, more = survey(spec, files, size, progress)
    orders = [held_out(spec, domain.keys(), f"images in {path!r}") for domain, path in zip(files, paths, strict=True)]
    parts, hashes, labels = [], [], []
    for part in zip(*orders, strict=True):
        sources = [domain.pick(order) for domain, order in zip(files, part, strict=True)]
        unlabelled = [torch.zeros(len(order), dtype=torch.int64) for order in part]
        parts.append(Domains(*build(sources, unlabelled, form, progress)))
        hashes.append(np.concatenate([content[order] for content, order in zip(contents, part, strict=True)]))
        labels.append(np.repeat([0, 1], [len(order) for order in part]))  # which domain, for the digest
    kind = "colour" if form.channels == 3 else "grey"
    counts = " and ".join(f"{len(domain):,} in {path!r}" for domain, path in zip(files, paths, strict=True))
    what = f"{kind} images {form.height}x{form.width} of two domains, {counts}"
    shape = (2 * form.channels, form.height, form.width)
    notes += more
    told = {"labels": labels, "contents": hashes, "notes": notes}
    return make_bundle(spec, what, parts, shape, grey_levels=256, domains=2, **told)


def _base(spec: str, path: str, root: str | PathLike[str] | None) -> Path:
    base = resolve(spec, path, root)
    if not os.path.exists(base):
        raise DataError(f"{spec}: there is no folder {str(base)!r}")
    if not os.path.isdir(base):
        raise DataError(f"{spec}: {str(base)!r} must be a folder, and is a file")
    return base


def _subfolders(spec: str, base: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(base) if not name.startswith(".") and os.path.isdir(base / name))
    except OSError as error:
        raise DataError(f"{spec}: the folder {str(base)!r} cannot be read ({error.strerror})") from None


def _files(spec: str, base: Path, notes: list[str], label: str) -> Files:
    """All images below `base`, sorted by path; a linked folder is entered once."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{spec}: the folder {error.filename!r} cannot be read ({error.strerror})")

    paths: list[str] = []
    left_out: Counter[str] = Counter()
    seen: set[str] = set()
    for folder, below, names in os.walk(base, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            notes.append(f"{folder!r} links to a folder that is read already, and is passed over")
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not name.startswith("."))
        inside = Path(folder).relative_to(base)
        refuse_parts(spec, below, f"in {str(Path(folder))!r}")
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if not name.startswith("."):
                if suffix in EXTENSIONS:
                    paths.append((inside / name).as_posix())
                else:
                    left_out[suffix or "no suffix"] += 1
    counts = [f"{n:,} {suffix}" for suffix, n in sorted(left_out.items(), key=lambda item: (-item[1], item[0]))]
    told = f"left out for their suffix: {listed(counts)}"
    if not paths:
        raise DataError(
            f"{spec}: {str(base)!r} must hold images ({' '.join(sorted(EXTENSIONS))}), and holds none"
            f"{f' ({told})' if left_out else ''}"
        )
    if left_out:
        notes.append(f"files of {str(base)!r} {told}")
    return Files(base, sorted(paths), label)


def _beside(base: Path, names: tuple[str, str]) -> list[str]:
    """What lies beside the two parts and is not read."""
    others = [name for name in sorted(os.listdir(base)) if not name.startswith(".") and name not in names]
    return [f"{names[0]!r} and {names[1]!r} alone are read, and not {listed(others)}"] if others else []


def _classes(
    spec: str, files: list[Files], names: tuple[str, str] | None, notes: list[str]
) -> tuple[list[str] | None, list[np.ndarray]]:
    """The class folders of the first part, and each part's labels: zeros and None where one has a file outside them."""
    depth = files[0].depth()
    folders = [part.folders(depth) for part in files]
    classes = sorted(set(folders[0]) - {""})
    loose = next((p.paths[f.index("")] for p, f in zip(files, folders, strict=True) if "" in f), None)
    if len(classes) < 2 or loose:
        if len(classes) > 1:
            notes.append(f"no classes: {loose!r} lies in no class folder")
        return None, [np.zeros(len(part), dtype=np.int64) for part in files]
    if strange := sorted(set(folders[-1]) - set(classes)):
        raise DataError(
            f"{spec}: every class folder of {names[1]} must be in {names[0]} too, and {strange[0]!r} is not"
        )
    index = {name: i for i, name in enumerate(classes)}
    return classes, [np.array([index[name] for name in part], dtype=np.int64) for part in folders]
