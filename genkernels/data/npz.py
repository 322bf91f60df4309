"""`npz:PATH[?layout=nchw|nhwc]`: arrays in a numpy archive. Python objects in it are never unpickled.

Names: ``x`` alone (about a tenth is held out, chosen by a hash of each row's bytes, so that equal rows stay
together), or ``train`` and ``test``, or ``x_train`` and ``x_test``. Labels, if any, are integers of 0 or more:
``y``, or ``y_train`` and ``y_test``, which has none that ``y_train`` lacks. The numbers that occur are the classes, and
are what they are called, also on the command line (``--label 7``). ``grey_levels`` (or ``levels``, as older archives
call it), one integer from 2 to 256, says how many values a pixel can take (else 256).

What the data are follows from their type and shape:

==========================  ==========================================================
uint8 ``[N, H, W]``         grey images, more than 4 pixels wide
uint8 ``[N, A, B, C]``      images; channels first if A is 1 or 3, last if C is 1 or 3;
                            where both or neither are, ``?layout=`` has to say
float ``[N, D]``            points, kept as they are, in float32; refused where a
                            column's values would become one another
anything else               refused, with what would be taken
==========================  ==========================================================
"""

from __future__ import annotations

import os
import zipfile
from os import PathLike
from pathlib import Path

import numpy as np
import torch

from genkernels.data.bundle import DataBundle, TensorPairs, make_bundle
from genkernels.data.spec import DataError, reason, resolve, split_options
from genkernels.data.split import hashes_of_rows, held_out

_NAMINGS = (("x", "x"), ("train", "test"), ("x_train", "x_test"))
_CHOICE = "x, or train and test, or x_train and x_test"
_KNOWN = ("x", "train", "test", "x_train", "x_test", "y", "y_train", "y_test", "grey_levels", "levels")


def load(spec: str, rest: str, root: str | PathLike[str] | None) -> DataBundle:
    path, options = split_options(spec, rest, {"layout": _layout})
    if not path:
        raise DataError(f"{spec}: the spec must name a file, as in npz:images.npz")
    arrays = _read(spec, resolve(spec, path, root))
    train_name, test_name = _naming(spec, arrays)
    names = list(dict.fromkeys((train_name, test_name)))
    xs = [_check(spec, name, arrays[name], options.get("layout")) for name in names]
    labels, classes = _labels(spec, arrays, names, xs)
    if xs[0].shape[1:] != xs[-1].shape[1:] or xs[0].dtype != xs[-1].dtype:
        raise DataError(
            f"{spec}: {train_name} and {test_name} must agree in shape and type, got {_form(xs[0])} and {_form(xs[-1])}"
        )
    images = xs[0].dtype == np.uint8
    grey_levels = _grey_levels(spec, arrays, names, xs) if images else None
    notes = _places(names[0], xs[0]) + (_dark(names, xs, grey_levels) if images else _coarse(names[0], xs[0]))
    if len(xs) == 2 and not images:
        notes += _unlike(names, xs)
    contents = [hashes_of_rows(x) for x in xs]
    if len(xs) == 1:
        orders = held_out(spec, (row.tobytes() for row in xs[0]), "rows")
        xs, labels, contents = ([each[0][order] for order in orders] for each in (xs, labels, contents))
    parts = [TensorPairs(torch.from_numpy(x), torch.from_numpy(y)) for x, y in zip(xs, labels, strict=True)]
    shape = xs[0].shape[1:]
    what = f"images {'x'.join(map(str, shape))}" if images else f"points of {shape[0]} numbers"
    return make_bundle(
        spec,
        f"{what} from {path!r}",
        parts,
        shape,
        grey_levels=grey_levels,
        classes=classes,
        labels=labels,
        contents=contents,
        notes=notes,
    )


def _layout(value: str) -> str:
    if value not in ("nchw", "nhwc"):
        raise ValueError("nchw or nhwc")
    return value


def _read(spec: str, path: Path) -> dict[str, np.ndarray]:
    """The arrays with a name that means something here."""
    if not os.path.exists(path):
        raise DataError(f"{spec}: there is no file {str(path)!r}")
    if not os.path.isfile(path):
        raise DataError(f"{spec}: {str(path)!r} must be a file, and is a folder")
    what = repr(str(path))
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise DataError(f"{spec}: {what} must be an archive of numpy.savez, and is none or is cut")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                arrays = {}
                for name in filter(_KNOWN.__contains__, archive.files):
                    what = f"the array {name!r} of {str(path)!r}"
                    arrays[name] = archive[name]
                if not arrays:
                    raise DataError(f"{spec}: {what} must hold {_CHOICE}, got {_listed(archive.files)}")
                return arrays
    except DataError:
        raise
    except Exception as error:  # a damaged archive raises from zipfile, zlib, struct, ast or numpy
        if "allow_pickle" in str(error):
            raise DataError(f"{spec}: {what} holds Python objects, which are never unpickled") from None
        raise DataError(f"{spec}: {what} cannot be read ({reason(error)})") from error


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:8])) + (", …" if len(names) > 8 else "") if names else "nothing"


def _naming(spec: str, arrays: dict[str, np.ndarray]) -> tuple[str, str]:
    complete = [pair for pair in _NAMINGS if pair[0] in arrays and pair[1] in arrays]
    started = [name for pair in _NAMINGS for name in dict.fromkeys(pair) if name in arrays]
    if len(complete) == 1 and set(started) == set(complete[0]):
        return complete[0]
    raise DataError(f"{spec}: the archive must hold either {_CHOICE}, got {_listed(started)}")


def _form(x: np.ndarray) -> str:
    return f"{x.dtype} {list(x.shape)}"


def _check(spec: str, name: str, x: np.ndarray, layout: str | None) -> np.ndarray:
    """Images as contiguous uint8 ``[N, C, H, W]``, points as contiguous finite float32 ``[N, D]``."""
    if x.size == 0:
        raise DataError(f"{spec}: {name} must hold something, got {_form(x)}")
    if x.dtype == np.uint8 and x.ndim == 3:
        if x.shape[2] in (1, 3, 4):
            raise DataError(
                f"{spec}: {name} must be images, got {_form(x)}, which looks like one picture of {x.shape[2]} channels "
                f"and not like {len(x)} grey ones ({name}[None] says the one, {name}[..., None] the other)"
            )
        return np.ascontiguousarray(x)[:, None]
    if x.dtype == np.uint8 and x.ndim == 4:
        return np.ascontiguousarray(x if _channels_first(spec, name, x, layout) else x.transpose(0, 3, 1, 2))
    if np.issubdtype(x.dtype, np.floating) and x.ndim == 2:
        with np.errstate(over="ignore"):  # a double beyond float32 becomes inf and is told below
            points = np.ascontiguousarray(x, dtype=np.float32)
        bad = np.argwhere(~np.isfinite(points))
        if len(bad):
            raise DataError(
                f"{spec}: {name} must be finite in float32, got {len(bad)} numbers that are not, "
                f"the first at {bad[0].tolist()}"
            )
        _refuse_merged(spec, name, x)
        return points
    raise DataError(
        f"{spec}: {name} must be uint8 images [N, H, W], [N, H, W, C] or [N, C, H, W], or float points "
        f"[N, D], got {_form(x)}"
    )


def _refuse_merged(spec: str, name: str, x: np.ndarray) -> None:
    """A DataError where float32 makes one value of many: it takes more than a quarter of a column's distinct values
    away and leaves fewer than 4,096. Where it leaves more, no model would see what it takes."""
    if x.dtype.itemsize <= 4:
        return
    x = _sorted_columns(x)
    distinct, left = _distinct(x), _distinct(x.astype(np.float32))
    merged = np.flatnonzero((4 * left < 3 * distinct) & (left < 4096))
    if len(merged):
        column = merged[0]
        raise DataError(
            f"{spec}: of {distinct[column]:,} distinct values of column {column} of {name}, float32, in which models "
            f"compute, leaves {left[column]:,}: subtract its mean and divide by its standard deviation first"
        )


def _places(name: str, x: np.ndarray) -> list[str]:
    """Whether something else than the examples may come first: columns, or rows of pixels as MATLAB has them."""
    count, *shape = x.shape
    if count >= shape[0] if len(shape) == 1 else not (shape[0] == 1 and shape[1] == count != shape[2]):
        return []
    each = f"{shape[0]:,} numbers" if len(shape) == 1 else "x".join(map(str, shape[1:]))
    return [f"{name} is read as {count:,} examples of {each}: do the examples come first?"]


def _coarse(name: str, x: np.ndarray) -> list[str]:
    """Columns with so few distinct values that a density of them has no bound."""
    x = _sorted_columns(x)
    distinct = _distinct(x)
    few = np.flatnonzero((distinct == 1) | (20 * distinct < len(x)))
    if not len(few):
        return []
    values = f"{distinct[few[0]]:,} distinct value{'s' if distinct[few[0]] > 1 else ''}"
    others = f", and {len(few) - 1:,} more have few" if len(few) > 1 else ""
    return [
        f"column {few[0]} of {name} has {values}{others}: such data have no density, the likelihood grows for as "
        "long as one trains (pictures belong in uint8 images; counts want noise)"
    ]


def _unlike(names: list[str], xs: list[np.ndarray]) -> list[str]:
    """Columns that one part seems to have in other units than the other."""
    (mean, there), (spread, other) = ([f(x, axis=0, dtype=np.float64) for x in xs] for f in (np.mean, np.std))
    far = (np.abs(there - mean) > 5 * spread) | (other > 5 * spread) | (5 * other < spread)
    if len(xs[1]) < 10 or not far.any():
        return []
    i = int(far.argmax())
    return [
        f"column {i} of {names[1]} (mean {there[i]:.3g}, spread {other[i]:.3g}) is unlike that of {names[0]} "
        f"(mean {mean[i]:.3g}, spread {spread[i]:.3g}): are both in the same units?"
    ]


def _sorted_columns(x: np.ndarray) -> np.ndarray:
    """Some hundred thousand of its numbers, evenly spread rows, each column sorted."""
    return np.sort(x[:: 1 + min(x.size // 2**18, len(x) // 64)], axis=0)


def _distinct(x: np.ndarray) -> np.ndarray:
    """How many values each sorted column has."""
    return 1 + (np.diff(x, axis=0) != 0).sum(0)


def _dark(names: list[str], xs: list[np.ndarray], grey_levels: int) -> list[str]:
    """Arrays that use less than half of the grey levels."""
    tops = {name: int(x.max()) for name, x in zip(names, xs, strict=True)}
    return [
        f"{name} has no pixel above {top} of 0 to {grey_levels - 1}: bits/dim count {grey_levels} grey levels ("
        "an integer grey_levels in the archive says how many there are)"
        for name, top in tops.items()
        if 2 * top < grey_levels - 1
    ]


def _channels_first(spec: str, name: str, x: np.ndarray, layout: str | None) -> bool:
    if layout is not None:
        return layout == "nchw"
    first, last = x.shape[1] in (1, 3), x.shape[3] in (1, 3)
    if first == last:
        raise DataError(
            f"{spec}: {name} must have 1 or 3 channels either second or last, got {_form(x)} "
            "(end the spec with ?layout=nchw or ?layout=nhwc)"
        )
    return first


def _labels(
    spec: str, arrays: dict[str, np.ndarray], names: list[str], xs: list[np.ndarray]
) -> tuple[list[np.ndarray], list[str] | None]:
    """Labels int64 ``[N]`` of each part, numbered by the classes of the first, and their names; zeros and None where
    the archive has none."""
    wanted = ["y"] if names == ["x"] else ["y_train", "y_test"]
    present = [name for name in ("y", "y_train", "y_test") if name in arrays]
    if not present:
        return [np.zeros(len(x), dtype=np.int64) for x in xs], None
    if present != wanted:
        beside = " and ".join(names)
        raise DataError(f"{spec}: labels beside {beside} must be {' and '.join(wanted)}, got {_listed(present)}")
    labels = []
    for label, name, x in zip(wanted, names, xs, strict=True):
        y = arrays[label]
        if not np.issubdtype(y.dtype, np.integer) or y.shape not in ((len(x),), (len(x), 1)):
            raise DataError(f"{spec}: {label} must be integers [{len(x)}], one a row of {name}, got {_form(y)}")
        if y.min() < 0 or y.max() >= 2**63:
            raise DataError(f"{spec}: {label} must lie in 0 to 2^63 - 1, got {y.min()} to {y.max()}")
        labels.append(y.reshape(-1).astype(np.int64))
    classes = np.unique(labels[0])
    if len(strange := np.setdiff1d(labels[-1], classes)):
        raise DataError(f"{spec}: every class of {wanted[-1]} must be in {wanted[0]} too, and {strange[0]} is not")
    return [np.searchsorted(classes, y) for y in labels], [str(label) for label in classes]


def _grey_levels(spec: str, arrays: dict[str, np.ndarray], names: list[str], xs: list[np.ndarray]) -> int:
    present = [key for key in ("grey_levels", "levels") if key in arrays]
    if not present:
        return 256
    if len(present) == 2:
        raise DataError(f"{spec}: the archive must hold grey_levels or levels, got both")
    (key,) = present
    array = arrays[key]
    if array.size != 1 or not np.issubdtype(array.dtype, np.integer) or not 2 <= int(array.item()) <= 256:
        raise DataError(f"{spec}: {key} must be one integer from 2 to 256, got {array.tolist()!r:.40}")
    grey_levels = int(array.item())
    for name, x in zip(names, xs, strict=True):
        if x.max() >= grey_levels:
            raise DataError(
                f"{spec}: with {grey_levels} grey levels {name} must lie in 0 to {grey_levels - 1}, got {x.max()}"
            )
    return grey_levels
