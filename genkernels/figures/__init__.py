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

from genkernels._named_files import NamedFiles

__all__ = ["find", "names"]

_FILES = NamedFiles(__name__, __path__, "figure")
names, find = _FILES.names, _FILES.find
