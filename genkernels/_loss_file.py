"""``losses.csv``: one row a step, a column for each term of the losses."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from genkernels._files import naming, replacing

RESERVED = ("step", "grad_norm", "lr", "seconds")  # columns that are no terms


class LossFile:
    """``losses.csv``: appended at every look, cut back to the checkpoint's step when a run goes on from there.

    A row is ``step``, the `names` of losses and gradient norms, ``lr``, ``seconds``, then what other terms there are. A
    player that does not move in a step leaves its cells empty. Rows of steps before `start` are kept. Where some are no
    rows of numbers, the file as it was is kept beside as ``losses.csv.damaged``.

    Attributes:
        rows: those before `start`, by step. lost: how many are missing. repeated: the row of step `start`, if any.
    """

    def __init__(self, path: Path, start: int, names: list[str]) -> None:
        self._path = path
        found, odd = self._parse(path, [name for name in names if term_of(name) == "loss"])
        if odd:
            shutil.copyfile(path, f"{path}.damaged")
        found = {int(row["step"]): row for row in found}
        self.rows = {step: row for step, row in found.items() if 0 <= step < start}
        self.lost, self.repeated = start - len(self.rows), found.get(start, {})
        kept = list(self.rows.values())
        self._begin(list(dict.fromkeys(["step", *names, "lr", "seconds", *(kept[0] if kept else ())])), kept)

    def _begin(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        self._columns, text = columns, io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        with replacing(self._path, parents=False) as file:
            file.write(text.getvalue().encode())
        self._file = open(self._path, "a", newline="")
        self._writer = csv.DictWriter(self._file, columns, restval="", lineterminator="\n")

    def append(self, step: int, terms: dict[str, float], lr: float, seconds: float) -> None:
        if new := [name for name in terms if name not in self._columns]:  # a term that no step before it had
            self.flush()
            self._file.close()
            self._begin([*self._columns, *new], self.read(self._path))
        # repr of a float reads back as the same number: losses of two runs can be compared exactly
        cells = {n: f"{value:.6g}" if term_of(n) in RESERVED else repr(value) for n, value in terms.items()}
        with naming(self._path):
            self._writer.writerow({"step": step, **cells, "lr": f"{lr:.6g}", "seconds": f"{seconds:.6f}"})

    def flush(self, to_disk: bool = False) -> None:
        with naming(self._path):
            self._file.flush()
            if to_disk:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # all rows were flushed at the last look
            self._file.close()

    @classmethod
    def read(cls, path: Path) -> list[dict[str, str]]:
        """The rows of a file that may end in half a row, as a killed process leaves it."""
        return cls._parse(path)[0]

    @staticmethod
    def _parse(path: Path, needed: Iterable[str] = ()) -> tuple[list[dict[str, str]], int]:
        """Rows of numbers under a head that has the `needed` columns, and how many others there are."""
        text = path.read_bytes().decode(errors="replace") if path.exists() else ""
        rows, odd = [], 0
        try:
            for row in csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])):
                if row.keys() >= {"step", *needed} and _are_numbers(row):
                    rows.append(row)
                else:
                    odd += 1
        except csv.Error:
            odd += 1
        return rows, odd


def _are_numbers(row: dict) -> bool:
    """Whether a row is whole, and each of its cells a number or empty."""
    try:
        int(row["step"]), [float(cell) for cell in row.values() if cell != ""]
    except (TypeError, ValueError):  # a cell too few is None, those too many are a list
        return False
    return True


def term_of(column: str) -> str:
    """``loss`` for ``critic/loss``: where there are several players each has its own column of a term."""
    return column.rpartition("/")[2]
