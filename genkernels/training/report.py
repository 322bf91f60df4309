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
from genkernels.training.bar import bar_on, number, rate_text

if TYPE_CHECKING:
    from genkernels.models import Estimate

SMOOTH = 20  # values that the one shown is the mean of
LOGGED = 1000  # points of a TensorBoard curve
RESERVED = ("step", "grad_norm", "lr", "seconds")  # columns that are no terms


class Report:
    """Tells of one run; in processes other than the first, of nothing.

    Attributes:
        history: each term's value in every step, None where its player did not move.
        seconds: how long the steps before this call took. file: ``losses.csv``, or None.
    """

    def __init__(self, session, start: int, quiet: bool) -> None:
        self.session, self.main = session, session.fabric.is_global_zero
        self.bar = bar_on(sys.stderr, session.total, start, quiet=quiet or not self.main)
        self.note = self.bar.note
        self.noun = "images" if session.bundle.form.is_image else "points"
        self.history, self.seconds, self.file, self._writer = {}, [], None, None
        if session.run and self.main:
            names = [session.column(player, term) for player in session.players for term in ("loss", "grad_norm")]
            self.file = LossFile(session.run.losses, start, names)
            self._writer = tensorboard(session.run.tensorboard, start)
            rows = LossFile.read(session.run.losses)
            self.history, self.seconds = history_of(rows), [float(row["seconds"]) for row in rows]
        self._recent: dict[str, list[float]] = {}
        self._logged = start

    def rows(self, first: int, rows: list[dict], seconds: list[float], rate: Callable[[], float | None]) -> None:
        """The terms of the steps from `first` on."""
        for i, row in enumerate(rows):
            if self.file:
                lr = self.session.config.lr_at(first + i, self.session.total)
                self.file.append(first + i, row, lr, seconds[i] if i < len(seconds) else 0.0)
            shown = {name: value for name, value in row.items() if name.rpartition("/")[2] not in RESERVED}
            if self.main:
                remember(self.history, shown)
            for name, value in shown.items():
                self._recent.setdefault(name, []).append(value)
        if self.file:
            self.file.flush()
        self._recent = {name: values[-max(SMOOTH, len(rows)) :] for name, values in self._recent.items()}
        if rows:
            self._show(first + len(rows), rate)

    def _show(self, step: int, rate: Callable[[], float | None]) -> None:
        total, evaluations = self.session.total, self.session.judge.evaluations
        means = {name: sum(values) / len(values) for name, values in self._recent.items()}
        parts = {**means, **({"held out": evaluations[-1][1]} if evaluations else {})}
        texts = [f"{name} {number(value)}" for name, value in parts.items()]
        self.bar.update(step, lambda: [text for text in (rate_text(rate(), self.noun), *texts) if text])
        if step - self._logged >= total / LOGGED or step == total:
            self._logged = step
            facts = {"lr": self.session.config.lr_at(step - 1, total), "examples_per_second": rate()}
            self._scalars(step, "train", {**means, **facts})

    def evaluated(self, step: int, estimates: dict[str, Estimate], part: str, better: bool, best: list | None) -> None:
        """What an evaluation during the run found."""
        texts = [f"{e.value:.4f} {e.unit}".rstrip() for e in estimates.values()]
        more = "".join(f", {name} {text}" for name, text in list(zip(estimates, texts, strict=True))[1:])
        mark = "  (best)" if better else f"  (best {best[1]:.4f} at step {best[0]})" if best else ""
        self.note(f"step {step}: held out{part} {texts[0]}{mark}{more}")
        self._scalars(step, "held_out", {name: e.value for name, e in estimates.items()})

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """A picture ``[H, W]`` or ``[H, W, 3]`` of bytes."""
        if self._writer:
            self._writer.add_image(name, pixels, step, dataformats="HW" if pixels.ndim == 2 else "HWC")

    def _scalars(self, step: int, group: str, values: dict[str, float | None]) -> None:
        for name, value in values.items() if self._writer else ():
            if value is not None:
                self._writer.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        for part in (self.bar, self._writer, self.file):
            if part:
                part.close()


class LossFile:
    """``losses.csv``: appended at every look, cut back to the checkpoint's step when a run goes on from there.

    A row is ``step``, the `names` of losses and gradient norms, ``lr``, ``seconds``, then what other terms there are. A
    player that does not move in a step leaves its cells empty. Rows of steps before `start` are kept.
    """

    def __init__(self, path: Path, start: int, names: list[str]) -> None:
        self._path = path
        kept = [row for row in self.read(path) if int(row["step"]) < start]
        self._begin(list(dict.fromkeys(["step", *names, "lr", "seconds", *(kept[0] if kept else ())])), kept)

    def _begin(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        self._columns, text = columns, io.StringIO(newline="")
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
        cells = {n: f"{value:.6g}" if n.rpartition("/")[2] in RESERVED else repr(value) for n, value in terms.items()}
        self._writer.writerow({"step": step, **cells, "lr": f"{lr:.6g}", "seconds": f"{seconds:.6f}"})

    def flush(self, to_disk: bool = False) -> None:
        self._file.flush()
        if to_disk:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def read(path: Path) -> list[dict[str, str]]:
        """The whole rows of a file that may end in half a row, as a killed process leaves it."""
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        return [row for row in csv.DictReader(io.StringIO(whole)) if None not in row.values() and None not in row]


def remember(history: dict[str, list[float | None]], row: dict[str, float]) -> None:
    """Adds one step's terms to the history of all."""
    length = max(map(len, history.values()), default=0)
    for name in {**history, **row}:
        history.setdefault(name, [None] * length).append(row.get(name))


def history_of(rows: list[dict[str, str]]) -> dict[str, list[float | None]]:
    """What `remember` makes of the steps in ``losses.csv``."""
    names = [name for name in (rows[0] if rows else ()) if name.rpartition("/")[2] not in RESERVED]
    return {name: [float(row[name]) if row[name] else None for row in rows] for name in names}


def tensorboard(folder: Path, start: int):
    """A writer of event files where the package is installed: a convenience, not a condition. What lies beyond `start`
    in older files is hidden."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception:  # absent, or at odds with another package: its import runs a good part of protobuf
        return None
    return SummaryWriter(str(folder), purge_step=start + 1 if start else None)
