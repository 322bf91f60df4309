"""The data sets that `genkernels train MODEL --data SPEC` knows, and loaders for a user's own.

>>> from genkernels import data
>>> bundle = data.load("moons", seed=0)
>>> x, y = bundle.take("test", 3)
>>> x.shape, bundle.form
(torch.Size([3, 2]), Form(shape=(2,), grey_levels=None, num_classes=2, domains=1))

The rules of a user's own data, ``folder:``, ``npz:`` and ``hf:``, are those of the modules `genkernels.data.folder`,
`.npz`, `.hub` and, for pictures, `.images`; `docs/data.md` and ``genkernels data --help`` have them on one page.
``genkernels data SPEC`` shows what is understood of data: their parts, classes and counts, grey levels, what was left
out, sixteen pictures.

Importing this takes torch and numpy alone; scikit-learn, Pillow and `datasets` are imported by the loaders
that need them. Nothing is downloaded except by ``hf:``.
"""

from __future__ import annotations

import os
from os import PathLike

from genkernels._words import near_names
from genkernels.data import digits, folder, hub, npz, photos, points
from genkernels.data.bundle import DataBundle, Form, TensorPairs
from genkernels.data.images import Progress
from genkernels.data.spec import DataError

__all__ = ["NAMES", "DataBundle", "Form", "DataError", "TensorPairs", "load"]

NAMES: dict[str, str] = {
    "digits": "1,797 scanned handwritten digits, 8x8, 17 grey levels, 10 classes (scikit-learn)",
    "photos32": "32x32 crops of two photographs, a stripe of each held out (scikit-learn)",
    "photos64": "64x64 crops of the same photographs",
    "two_photos32": "32x32 crops of either photograph as two domains, which nobody has paired",
    **{name: f"{picture}, points in the plane" for name, (_, _, picture) in points.SETS.items()},
    "hf:NAME[@REVISION][:CONFIG][?size=S]": "images of the Hugging Face Hub, through the package datasets",
    "folder:PATH[?size=S]": "your png, jpg, webp, bmp images; subfolders are classes",
    "folder:A,B[?size=S]": "images of two domains, which nobody has paired",
    "npz:PATH[?layout=nchw|nhwc]": "your arrays x or x_train, x_test, with labels y or y_train, y_test",
}

#: What others, and presets of models, call a set of points.
_ALSO_CALLED = {"ring2d": "eight_gaussians", "ring": "eight_gaussians", "8gaussians": "eight_gaussians"}
_ALSO_CALLED |= {"two_moons": "moons", "2spirals": "spirals", "circles": "rings"}

_PREFIXES = {"hf": hub.load, "folder": folder.load, "npz": npz.load}


def load(
    spec: str, *, root: str | PathLike[str] | None = None, seed: int = 0, progress: Progress | None = None
) -> DataBundle:
    """Load a data set as a training and a held-out part that share nothing.

    What is held out of finite data depends on the data alone, never on `seed`, so that a model trained with
    one seed can be evaluated with another. `seed` draws what is drawn: the points of the 2-D sets and the
    places of the photo crops.

    Args:
        spec: one of `NAMES`.
        root: where relative paths of ``folder:`` and ``npz:`` start (default: the current folder), and the
            cache folder of ``hf:`` (default: that of `datasets`).
        seed: any integer; the same seed gives the same data.
        progress: called as ``progress("decoding", done, total)`` now and then while the images of ``folder:`` or
            ``hf:`` are looked at and decoded.

    Returns:
        A `DataBundle`; images are uint8 level indices ``[C, H, W]``, points float32 ``[D]``, labels ints.

    Raises:
        DataError: an unknown spec, data that cannot be read or used, or a missing package; one sentence, spec
            first.
        TypeError: a spec that is no string, or a seed that is no int.
    """
    if not isinstance(spec, str):
        raise TypeError(f"load: spec must be a str such as 'digits', got {type(spec).__name__}")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"load: seed must be an int, got {type(seed).__name__}")
    if spec == "digits":
        return digits.load(spec)
    if spec in ("photos32", "photos64"):
        return photos.load(spec, int(spec.removeprefix("photos")), seed)
    if spec == "two_photos32":
        return photos.load_domains(spec, 32, seed)
    if spec in points.SETS:
        return points.load(spec, seed)
    prefix, colon, rest = spec.partition(":")
    if colon and prefix in _PREFIXES:
        return _PREFIXES[prefix](spec, rest, root, *([] if prefix == "npz" else [progress]))
    raise DataError(f"{spec}: no data set has this name; {_advice(spec)}")


def _advice(spec: str) -> str:
    """What the writer of an unknown spec may have meant."""
    if os.path.isdir(spec):
        return f"for images in a folder write folder:{spec}"
    if os.path.isfile(spec) and spec.endswith(".npz"):
        return f"for an archive write npz:{spec}"
    if spec in _ALSO_CALLED:
        return f"for {points.SETS[_ALSO_CALLED[spec]][2]} write {_ALSO_CALLED[spec]}"
    head, colon, rest = spec.partition(":")
    names = {f"{prefix}:": f"{prefix}:{rest or '…'}" for prefix in _PREFIXES}
    names |= {name: name for name in NAMES if ":" not in name}
    near = near_names(head + colon, names, count=3)
    if near:
        return f"the nearest: {', '.join(names[name] for name in near)}"
    return f"the names: {', '.join(names.values())}"
