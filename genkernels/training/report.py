"""What a user sees and finds of a run: the bar, ``losses.csv``, TensorBoard. All of them follow the terms' names."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from genkernels._files import replacing
from genkernels.training.bar import bar_on, rate_text

if TYPE_CHECKING:
    from genkernels.models import Estimate

SMOOTH = 20  # values that the one shown is the mean of
LOGGED = 1000  # points of a TensorBoard curve


class Report:
    """Tells of one run; in processes other than the first, of nothing.

    Args:
        session: the run.
        start: steps done before.
        quiet: shows no progress.

    Attributes:
        history: each column's value in every step, None where its player did not move.
    """

    def __init__(self, session, start: int, quiet: bool) -> None:
        self.session = session
        main = session.fabric.is_global_zero
        self.bar = bar_on(sys.stderr, session.total, start, quiet=quiet or not main)
        self.noun = "images" if session.bundle.form.is_image else "points"
        self.history: dict[str, list[float | None]] = {}
        self._file: LossFile | None = None
        self._curves = Curves()
        if session.run and main:
            names = [session.column(player, term) for player in session.players for term in ("loss", "grad_norm")]
            self._file = LossFile(session.run.losses, start, names)
            self._curves = Curves(session.run.tensorboard, start)
            self.history = self._file.history()
        self._recent: dict[str, list[float]] = {}
        self._logged = start

    def note(self, text: str) -> None:
        """A line that stays."""
        self.bar.note(text)

    def rows(self, first: int, rows: list[dict], seconds: list[float], rate: Callable[[], float | None]) -> None:
        """The terms of the steps from `first` on."""
        s = self.session
        for i, row in enumerate(rows):
            if s.fabric.is_global_zero:
                remember(self.history, row)
            if self._file:
                lr = s.config.lr_at(first + i, s.total)
                self._file.append(first + i, row, lr, seconds[i] if i < len(seconds) else 0.0)
        if self._file:
            self._file.flush()
        shown = [name for name in dict.fromkeys(n for row in rows for n in row) if not name.endswith("grad_norm")]
        for name in shown:
            values = [row[name] for row in rows if name in row]
            self._recent[name] = [*self._recent.get(name, []), *values][-max(SMOOTH, len(values)) :]
        if rows:
            self._show(first + len(rows), rate)

    def _show(self, step: int, rate: Callable[[], float | None]) -> None:
        means = {name: sum(values) / len(values) for name, values in self._recent.items()}

        def parts() -> list[str]:
            terms = [f"{name} {number(value)}" for name, value in means.items()]
            evaluations = self.session.judge.evaluations
            held = [f"held out {number(evaluations[-1][1])}"] if evaluations else []
            return [part for part in (rate_text(rate(), self.noun), *terms, *held) if part]

        self.bar.update(step, parts)
        if step - self._logged >= self.session.total / LOGGED or step == self.session.total:
            self._logged = step
            lr = self.session.config.lr_at(step - 1, self.session.total)
            self._curves.scalars(step, "train", {**means, "lr": lr, "examples_per_second": rate()})

    def evaluated(
        self, step: int, estimates: dict[str, Estimate], *, few: int, everything: int, better: bool, best: list | None
    ) -> None:
        """An evaluation on `few` of the held-out examples."""
        first, *others = estimates.values()
        mark = "  (best)" if better else f"  (best {best[1]:.4f} at step {best[0]})" if best else ""
        part = f" ({few:,} of {everything:,})" if few != everything else ""
        more = "".join(f", {e.name} {e.value:.4f} {e.unit}".rstrip() for e in others)
        self.note(f"step {step}: held out{part} {first.value:.4f} {first.unit}".rstrip() + mark + more)
        self._curves.scalars(step, "held_out", {name: e.value for name, e in estimates.items()})

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._curves.image(step, name, pixels)

    def to_disk(self) -> None:
        """The losses, at least: no checkpoint must be ahead of them."""
        if self._file:
            self._file.flush(to_disk=True)

    def close(self) -> None:
        self.bar.close()
        self._curves.close()
        if self._file:
            self._file.close()


def number(value: float) -> str:
    """Three decimals, or as many digits as a very large or very small number takes."""
    return f"{value:.3f}" if value == 0 or 1e-2 <= abs(value) < 1e5 else f"{value:.3g}"


def remember(history: dict[str, list[float | None]], row: dict[str, float]) -> None:
    """Adds one step's terms to the history of all."""
    length = max(map(len, history.values()), default=0)
    for name in {**history, **row}:
        history.setdefault(name, [None] * length).append(row.get(name))


class LossFile:
    """``losses.csv``: appended at every look, cut back to the checkpoint's step when a run goes on from there.

    A row is ``step``, each player's ``loss`` and ``grad_norm``, ``lr``, ``seconds``, then what other terms there are.
    A player that does not move in a step leaves its cells empty.

    Args:
        path: of the file.
        start: rows of earlier steps are kept.
        names: of the losses and gradient norms.
    """

    def __init__(self, path: Path, start: int, names: list[str]) -> None:
        self._path = path
        kept = [row for row in self.read(path) if int(row["step"]) < start] if start else []
        own = ["step", *names, "lr", "seconds"]
        self._begin([*own, *(name for name in (kept[0] if kept else ()) if name not in own)], kept)

    def _begin(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        self._columns = columns
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        with replacing(self._path) as file:
            file.write(text.getvalue().encode())
        self._file = open(self._path, "a", newline="")
        self._writer = csv.DictWriter(self._file, columns, restval="", lineterminator="\n")

    def append(self, step: int, terms: dict[str, float], lr: float, seconds: float) -> None:
        if new := [name for name in terms if name not in self._columns]:  # a term that no step before it had
            self._file.close()
            self._begin([*self._columns, *new], self.read(self._path))
        # repr of a float reads back as the same number: losses of two runs can be compared exactly
        cells = {n: f"{value:.6g}" if n.endswith("grad_norm") else repr(value) for n, value in terms.items()}
        self._writer.writerow({"step": step, **cells, "lr": f"{lr:.6g}", "seconds": f"{seconds:.6f}"})

    def flush(self, to_disk: bool = False) -> None:
        self._file.flush()
        if to_disk:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def history(self) -> dict[str, list[float | None]]:
        """Each term's value in every step."""
        return history_of(self.read(self._path))

    @staticmethod
    def read(path: Path) -> list[dict[str, str]]:
        """The whole rows of a file that may end in half a row, as a killed process leaves it."""
        try:
            text = path.read_text()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind("\n") + 1]
        return [row for row in csv.DictReader(io.StringIO(whole)) if None not in row.values() and None not in row]


def history_of(rows: list[dict[str, str]]) -> dict[str, list[float | None]]:
    """The columns of ``losses.csv`` that are terms."""
    names = [name for name in (rows[0] if rows else ()) if name not in ("step", "lr", "seconds")]
    return {name: [float(row[name]) if row[name] else None for row in rows] for name in names}


class Curves:
    """Writes curves and pictures for TensorBoard where the package is installed: a convenience, not a condition.

    Args:
        folder: of the event files; None writes nothing.
        start: the step a resumed run begins at; what lies beyond it in older files is hidden.
    """

    def __init__(self, folder: Path | None = None, start: int = 0) -> None:
        self._writer = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except Exception:  # absent, or at odds with another package: its import runs a good part of protobuf
            return
        self._writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def scalars(self, step: int, group: str, values: dict[str, float | None]) -> None:
        """One point of each curve ``group/name``."""
        if self._writer:
            for name, value in values.items():
                if value is not None:
                    self._writer.add_scalar(f"{group}/{name}", value, step)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """A picture ``[H, W]`` or ``[H, W, 3]`` of bytes."""
        if self._writer:
            self._writer.add_image(name, pixels, step, dataformats="HW" if pixels.ndim == 2 else "HWC")

    def close(self) -> None:
        if self._writer:
            self._writer.close()
            self._writer = None
