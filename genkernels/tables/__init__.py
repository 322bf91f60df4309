"""Tables: what one would compare in numbers, each trained and measured anew by ``genkernels table NAME``.

To add one, add ``tables/<name>.py`` with three names, and nothing else anywhere::

    TITLE = "Accuracy and bits/dim of hybrid flows"      # what `genkernels table` lists it with

    def add_arguments(parser) -> None:                   # its own options, beside --out
        training_arguments(parser, steps=600)

    def make(arguments) -> Table:                        # rows by column for the CSV, and a picture of them
        ...

What is heavy to import is imported in ``make``. A table says in its picture what was trained on what and for how long,
and of numbers that are not its own whose they are and on which data. Both files are written at the end, whole.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkernels._files import replacing
from genkernels._named_files import NamedFiles

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Table", "find", "names", "save"]

_FILES = NamedFiles(__name__, __path__, "table")
names, find = _FILES.names, _FILES.find


@dataclass(frozen=True, eq=False)
class Table:
    """What `make` gives.

    Attributes:
        rows: of the CSV, values by column; None leaves a cell empty. picture: ``[H, W, 3]`` bytes.
    """

    rows: list[dict[str, Any]]
    picture: np.ndarray


def save(path: Path, table: Table) -> None:
    """Writes the rows to `path` and the picture beside it, as ``.png``: both, or neither."""
    from genkernels import pictures

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(table.rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.rows)
    with replacing(path) as file:
        file.write(text.getvalue().encode())
        file.flush()
        pictures.save(path.with_suffix(".png"), table.picture)
