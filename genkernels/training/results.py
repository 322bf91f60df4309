"""What a run leaves: the `Result` that `fit` returns, and ``metrics.json``."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import torch

from genkernels._bar import duration, rate_text
from genkernels._config import TrainConfig
from genkernels._loss_file import term_of
from genkernels._machine import cpu_text, versions

if TYPE_CHECKING:
    from genkernels.data import DataBundle
    from genkernels.models import Estimate, Model


@dataclass(repr=False)
class Result:
    """What came of a run; ``print(result)`` says it in three lines.

    Attributes:
        steps: that the model has seen, those before a resume included.
        history: each term's value in every step, by the names of ``losses.csv``; None where its player did not move.
        held_out: estimates by name on all held-out examples after the last step, by the averaged weights where an
            average is kept; empty if interrupted.
        best: ``[step, value]`` of the best evaluation during the run (on `TrainConfig.eval_examples`), by the first of
            the estimates, or None.
        evaluations: every ``[step, value, ...]`` during the run, a value for each estimate.
        examples_per_second: from the median step, warm-up left out, over all devices.
        device, backend, precision: what it ran on. out: the run's folder. checkpoint: the newest.
        model: the trained model, with the averaged weights where an average is kept (the trained ones if interrupted),
            in the mode that it had before.
        signal: the number of the signal that interrupted the run, or None.
        stopped_early: whether `TrainConfig.patience` ended it. seconds: wall time of this call.
        notes: sentences on the data that a run begins with, and on what one that goes on has lost or has not as it was.
    """

    steps: int
    history: dict[str, list[float | None]]
    held_out: dict[str, Estimate]
    best: list | None
    evaluations: list[list]
    examples_per_second: float | None
    device: str
    backend: str
    precision: str
    out: Path | None
    model: Model
    checkpoint: Path | None = None
    signal: int | None = None
    stopped_early: bool = False
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        noun = "images" if len(self.model.shape) == 3 else "points"
        speed = f", {rate_text(self.examples_per_second, noun)} (median step)" if self.examples_per_second else ""
        time = f"{duration(self.seconds)} in all, {self.device}, backend {self.backend}"
        several = len(self.held_out) > 1
        held = ", ".join(f"{e.name} {e}" if several or not e.unit else f"{e}" for e in self.held_out.values())
        seen = f" over {next(iter(self.held_out.values())).examples:,} {noun}" if self.held_out else "not evaluated"
        best = f"; best {self.best[1]:.4f} at step {self.best[0]:,}" if self.best else ""
        out = "nothing was written"
        if self.out:
            curves = f"; tensorboard --logdir {quote(str(self.out))}" if (self.out / "tensorboard").is_dir() else ""
            out = f"{self.out}: metrics.json, losses.csv, best.ckpt, samples/, checkpoints/{curves}"
        return f"{self.steps:,} steps{speed}, {time}\nheld out: {held}{seen}{best}\n{out}"

    __repr__ = __str__

    @property
    def interrupted(self) -> bool:
        return self.signal is not None

    @property
    def losses(self) -> list[float]:
        """The first player's loss in every step in which it moved."""
        names = (name for name in self.history if term_of(name) == "loss")
        return [value for value in self.history.get(next(names, ""), []) if value is not None]


def metrics(result: Result, description: dict, bundle: DataBundle, config: TrainConfig) -> dict:
    """The contents of ``metrics.json``; ``train`` holds the mean of each term's last 50 values."""
    names = list(result.held_out)
    history = {name: [v for v in values if v is not None] for name, values in result.history.items()}
    cpu = not result.device.startswith("cuda")
    same = ("steps", "stopped_early", "seconds", "device", "backend", "precision", "notes")
    return {
        "model": description["name"] or description["class"],
        "data": bundle.name,
        **{name: description[name] for name in ("parameters", "hparams")},
        **{name: getattr(result, name) for name in same},
        "images_per_second": result.examples_per_second,
        "metric": names[0],
        "held_out": {name: estimate.to_dict() for name, estimate in result.held_out.items()},
        "best": {"step": result.best[0], names[0]: result.best[1]} if result.best else None,
        "evaluations": [{"step": step, **dict(zip(names, row, strict=False))} for step, *row in result.evaluations],
        "train": {name: statistics.fmean(values[-50:]) for name, values in history.items() if values},
        "losses": "losses.csv",
        "checkpoint": result.checkpoint.name if result.checkpoint else None,
        "device_name": cpu_text() if cpu else torch.cuda.get_device_name(torch.device(result.device)),
        "config": config.to_dict(),
        "versions": versions(),
    }
