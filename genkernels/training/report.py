"""What a user sees and finds of a run: the bar, ``losses.csv``, TensorBoard. All of them follow the terms' names."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from genkernels._bar import bar_on, number, rate_text
from genkernels._loss_file import RESERVED, LossFile, term_of
from genkernels.pictures.tensorboard import Curves

if TYPE_CHECKING:
    from genkernels.models import Estimate

SMOOTH = 20  # values that the one shown is the mean of
LOGGED = 1000  # points of a TensorBoard curve


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
        self.history, self.seconds, self.file, self._curves = {}, [], None, None
        if session.run and self.main:
            names = [session.column(player, term) for player in session.players for term in ("loss", "grad_norm")]
            self.file = LossFile(session.run.losses, start, names)
            if session.config.tensorboard:
                self._curves = Curves(session.run.tensorboard, start, session.tell)
            if self.file.lost:
                session.tell(
                    f"{session.run.losses} lacks {self.file.lost:,} of the {start:,} rows before step {start:,}"
                )
            lost = dict.fromkeys(names, "")
            self.history = history_of([self.file.rows.get(step, lost) for step in range(start)])
            self.seconds = [float(row["seconds"]) for row in self.file.rows.values() if row.get("seconds")]
        self._recent: dict[str, list[float]] = {}
        self._logged = start

    def rows(self, first: int, rows: list[dict], seconds: list[float], rate: Callable[[], float | None]) -> None:
        """The terms of the steps from `first` on."""
        if self.file and rows and first == self.session.start:
            self._compare(first, rows[0])
        for i, row in enumerate(rows):
            if self.file:
                lr = self.session.config.lr_at(first + i, self.session.total)
                self.file.append(first + i, row, lr, seconds[i] if i < len(seconds) else 0.0)
            shown = {name: value for name, value in row.items() if term_of(name) not in RESERVED}
            if self.main:
                remember(self.history, shown)
            for name, value in row.items():
                self._recent.setdefault(name, []).append(value)
        if self.file:
            self.file.flush()
        self._recent = {name: values[-max(SMOOTH, len(rows)) :] for name, values in self._recent.items()}
        if rows:
            self._show(first + len(rows), rate)

    def _compare(self, step: int, row: dict[str, float]) -> None:
        """A run that goes on repeats steps that it had done since its checkpoint, to the same losses if all is as it
        was. Settings that may be changed, but for the machine's, do not change the first of them."""
        name = self.session.column(next(iter(self.session.players)), "loss")
        before, now = float(self.file.repeated.get(name) or "nan"), row.get(name, math.nan)
        if math.isfinite(before) and not math.isclose(before, now, rel_tol=1e-2, abs_tol=1e-3):
            changed = "data, weights or machine are not those of then"
            self.session.tell(
                f"the {name} of step {step} was {before:.6g} before the run stopped, is {now:.6g} now: {changed}"
            )

    def _show(self, step: int, rate: Callable[[], float | None]) -> None:
        total, evaluations = self.session.total, self.session.judge.evaluations
        means = {name: sum(values) / len(values) for name, values in self._recent.items()}
        parts = {**means, **({"held out": evaluations[-1][1]} if evaluations else {})}
        texts = [f"{name} {number(value)}" for name, value in parts.items() if term_of(name) not in RESERVED]
        self.bar.update(step, lambda: [text for text in (rate_text(rate(), self.noun), *texts) if text])
        if step - self._logged >= total / LOGGED or step == total:
            self._logged = step
            facts = {"lr": self.session.config.lr_at(step - 1, total), "examples_per_second": rate()}
            if self._curves:
                self._curves.scalars(step, "train", {**means, **facts})

    def evaluated(self, step: int, estimates: dict[str, Estimate], part: str, better: bool, best: list | None) -> None:
        """What an evaluation during the run found."""
        texts = [f"{name} {e.value:.4f} {e.unit}".rstrip() for name, e in estimates.items()]
        first = next(iter(estimates.values()))
        texts[0] = texts[0].removeprefix(f"{first.name} ") if first.unit else texts[0]  # which tells enough
        more = "".join(f", {text}" for text in texts[1:])
        mark = "  (best)" if better else f"  (best {best[1]:.4f} at step {best[0]})" if best else ""
        self.note(f"step {step}: held out{part} {texts[0]}{mark}{more}")
        if self._curves:
            self._curves.scalars(step, "held_out", {name: e.value for name, e in estimates.items()})

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """A picture ``[H, W]`` or ``[H, W, 3]`` of bytes."""
        if self._curves:
            self._curves.picture(step, name, pixels)

    def close(self) -> None:
        for part in (self.bar, self._curves, self.file):
            if part:
                part.close()


def remember(history: dict[str, list[float | None]], row: dict[str, float]) -> None:
    """Adds one step's terms to the history of all."""
    length = max(map(len, history.values()), default=0)
    for name in {**history, **row}:
        history.setdefault(name, [None] * length).append(row.get(name))


def history_of(rows: list[dict[str, str]]) -> dict[str, list[float | None]]:
    """What `remember` makes of the steps in ``losses.csv``; a step that is lost is an empty row."""
    names = dict.fromkeys(name for row in rows for name in row if term_of(name) not in RESERVED)
    return {name: [float(row[name]) if row.get(name) else None for row in rows] for name in names}
