"""Writing pictures, whole or not at all, and an early look at what drawing them needs."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from genkernels._files import replacing
from genkernels._words import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Endings of a file name: pixels are written as PNG; a matplotlib figure also as what can be enlarged without loss.
PIXELS, VECTORS = (".png",), (".pdf", ".svg")


def why_not(points: bool) -> str | None:
    """None where pictures can be drawn here, else a sentence about the package that is missing.

    Args:
        points: whether matplotlib is needed beside Pillow: for points, curves and whatever has a title.
    """
    for module, package in (("PIL", "Pillow"), *([("matplotlib", "matplotlib")] if points else [])):
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed: pip install 'genkernels[train]'"
    return None


def save(path: str | os.PathLike, picture: np.ndarray | Figure, facts: Mapping[str, object] | None = None) -> None:
    """Writes a picture, whole or not at all: a process killed at any moment leaves the earlier file.

    Args:
        path: of the file; missing folders are made. It ends in ``.png``; for a matplotlib figure ``.pdf`` and ``.svg``
            will do too.
        picture: ``[H, W]`` or ``[H, W, 3]`` bytes, or a matplotlib figure.
        facts: what the picture shows, by name; kept in the PNG's own text fields, where ``PIL.Image.open(path).text``
            and programs that show pictures find them.

    Raises:
        UsageError: the name ends otherwise.
    """
    path = Path(path)
    ending, allowed = path.suffix.lower(), PIXELS if isinstance(picture, np.ndarray) else PIXELS + VECTORS
    if ending not in allowed:
        raise UsageError(f"a picture's name must end in {' or '.join(allowed)}, got {str(path)!r}")
    with replacing(path) as file:
        if isinstance(picture, np.ndarray):
            from PIL import Image
            from PIL.PngImagePlugin import PngInfo

            told = PngInfo()
            for name, fact in (facts or {}).items():
                told.add_itxt(name, str(fact))
            Image.fromarray(picture).save(file, format="PNG", pnginfo=told)
        else:
            picture.savefig(file, format=ending[1:])
