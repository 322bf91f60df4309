"""What a run leaves: the `Result` that `fit` returns, and ``metrics.json``."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from genkernels._machine import cpu_text, versions
from genkernels.training.config import TrainConfig
from genkernels.training.evaluate import HeldOut
from genkernels.training.record import LossFile
from genkernels.training.rundir import RunDirectory

if TYPE_CHECKING:
    from genkernels.data import DataBundle


@dataclass
class Result:
    """What came of a run.

    Attributes:
        steps: optimiser steps that the model has seen, those before a resume included.
        metric: ``bits_per_dim`` (images) or ``nats`` (points); lower is better.
        losses: the training loss of every step, in the metric's unit.
        held_out: on all held-out examples after the last step, by the averaged weights where an average is kept; None
            if interrupted.
        best: ``[step, value]`` of the best evaluation during the run (on `TrainConfig.eval_examples`), or None.
        evaluations: every ``[step, value]`` during the run.
        examples_per_second: from the median step, warm-up left out, over all devices.
        seconds: wall time of this call.
        device, backend, precision: what it ran on.
        out: the run's folder, or None.
        checkpoint: the newest one, or None.
        signal: the number of the signal that interrupted the run, or None.
        stopped_early: whether `TrainConfig.patience` ended it.
        notes: sentences about damaged checkpoints that were passed over.
        model: the trained model, with the averaged weights where an average is kept (the trained ones if interrupted).
    """

    steps: int
    metric: str
    losses: list[float]
    held_out: HeldOut | None
    best: list | None
    evaluations: list[list]
    examples_per_second: float | None
    seconds: float
    device: str
    backend: str
    precision: str
    out: Path | None = None
    checkpoint: Path | None = None
    signal: int | None = None
    stopped_early: bool = False
    notes: list[str] = field(default_factory=list)
    model: nn.Module | None = None

    @property
    def interrupted(self) -> bool:
        return self.signal is not None


def metrics(result: Result, description: dict, bundle: DataBundle, config: TrainConfig) -> dict:
    unit = "bits_per_dim" if result.metric == "bits_per_dim" else "nats"
    return {
        "model": description["name"] or description["class"],
        "parameters": description["parameters"],
        "data": bundle.name,
        "steps": result.steps,
        "stopped_early": result.stopped_early,
        "seconds": result.seconds,
        "images_per_second": result.examples_per_second,
        "metric": unit,
        "held_out": result.held_out.to_dict() if result.held_out else None,
        "best": {"step": result.best[0], unit: result.best[1]} if result.best else None,
        "train_loss": statistics.fmean(result.losses[-50:]) if result.losses else None,
        "evaluations": [{"step": step, unit: value} for step, value in result.evaluations],
        "losses": "losses.csv",
        "checkpoint": result.checkpoint.name if result.checkpoint else None,
        "device": result.device,
        "device_name": _device_name(result.device),
        "backend": result.backend,
        "precision": result.precision,
        "config": config.to_dict(),
        "hparams": description["hparams"],
        "versions": versions(),
        "notes": result.notes,
    }


def recorded(run: RunDirectory, images: int) -> tuple[list[float], float | None]:
    """Losses and speed of a run that already has all its steps, from ``losses.csv``."""
    rows = LossFile.read(run.losses)
    seconds = [s for row in rows if (s := float(row["seconds"])) > 0]
    return [float(row["loss"]) for row in rows], images / statistics.median(seconds) if seconds else None


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    return cpu_text()
