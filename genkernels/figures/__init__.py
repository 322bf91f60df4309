"""Figures: what one would show of a run, each drawn anew by ``genkernels figure NAME``.

To add one, add ``figures/<name>.py`` with three names, and nothing else anywhere::

    TITLE = "Samples of a run from cold to hot"          # what `genkernels figure` lists it with

    def add_arguments(parser) -> None:                   # its own options, beside --out
        parser.add_argument("--run", required=True, metavar="RUN", help="the run's folder")

    def draw(arguments) -> np.ndarray:                   # pixels, or a matplotlib figure
        ...

What is heavy to import (torch, a model) is imported in ``draw``: the list of figures answers at once. A figure says in
its title what it shows: model, data, step, and what was varied. What it cannot draw it refuses with a `UsageError`.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from genkernels._words import UsageError, nearest

__all__ = ["find", "names"]


def names() -> list[str]:
    """The figures that there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def find(name: str) -> ModuleType:
    """The module of a figure.

    Raises:
        UsageError: there is none of this name; says the nearest.
    """
    if name not in names():
        hint = nearest(name, names(), listed=True)
        raise UsageError(f"figure: NAME must be one of {', '.join(names())}, got {name!r}{hint}")
    return importlib.import_module(f"{__name__}.{name}")
