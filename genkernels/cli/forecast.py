"""What a run will take: its number of parameters, and its time by what is tried on a copy of the model: a few steps, an
evaluation of one batch, a few samples."""

from __future__ import annotations

import copy
import inspect
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch.utils.data import Subset

from genkernels._bar import duration
from genkernels._config import TrainConfig
from genkernels._machine import cpu_threads
from genkernels._seeds import fixed_seed
from genkernels._words import memory_ran_out
from genkernels.data.batches import fetch
from genkernels.training.average import Average
from genkernels.training.checks import resolved
from genkernels.training.judge import evaluate
from genkernels.training.sampling import drawing, sample

TRIES, ENOUGH, LONG = 6, 0.5, 5.0  # at most so many, or seconds; after a longer first one, which has to do, no other


def forecast(model: torch.nn.Module, bundle, config: TrainConfig) -> str:
    """Words on a run that is to begin: its time is told on the CPU alone, a GPU would have to be warmed up for it.
    Model and generators are left as they were."""
    words = f"{sum(p.numel() for p in model.parameters()):,} parameters"
    config = resolved(config, len(bundle.train), bundle.form.is_image)
    seconds = run_seconds(model, bundle, config) if config.accelerator == "cpu" and config.world_size == 1 else None
    if seconds is None:
        return words
    steps = config.total_steps(len(bundle.train))
    return f"{words}, about {duration(max(1, seconds))} for {steps:,} steps of {config.batch_size:,}"


def run_seconds(model: torch.nn.Module, bundle, config: TrainConfig) -> float | None:
    """Seconds that steps, evaluations and sheets take; None where a copy cannot be tried. What the memory does not hold
    is raised here, before anything is written."""
    steps = config.total_steps(len(bundle.train))
    try:
        with fixed_seed(config.seed), cpu_threads(config.threads):
            trial = copy.deepcopy(model).train()
            seconds = steps * step_seconds(trial, bundle, config)
            if seconds < LONG * steps:
                pauses = config.pauses(0, steps, len(bundle.test))
                seconds += pauses["evaluate"] * evaluation_seconds(trial, bundle, config)
                seconds += pauses["draw"] * sheet_seconds(trial, config)
            return seconds
    except Exception as error:
        if memory_ran_out(error):
            raise
        return None  # training meets it again, and says what it is


def step_seconds(trial: torch.nn.Module, bundle, config: TrainConfig) -> float:
    """Seconds of a step. Moves the model."""
    x, y = fetch(bundle.train, [i % len(bundle.train) for i in range(config.batch_size)])
    if begin := getattr(trial, "begin", None):
        begin(x, y)
    moves = [_move(trial, name, player, config) for name, player in trial.players().items()]
    spent: list[float] = []
    while len(spent) < TRIES and (len(spent) < 2 or sum(spent) < ENOUGH) and sum(spent[:1]) < LONG:
        spent.append(sum(move(x, y) for move in moves))
    return statistics.median(spent[1:] or spent)  # the first loads what it needs


def _move(trial: torch.nn.Module, name: str, player, config: TrainConfig) -> Callable[..., float]:
    """A player's move, which gives its seconds, spread over the steps in which it does not."""
    optimizer = torch.optim.Adam([p for p in player.module.parameters() if p.requires_grad], lr=1e-9, fused=True)
    average = Average(player.module, config.ema) if config.ema and player.averaged else None

    def move(x: torch.Tensor, y: torch.Tensor) -> float:
        began = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16-mixed"):
            trial.losses(name, x, y, 0)["loss"].backward()
        if config.clip:
            torch.nn.utils.clip_grad_norm_(player.module.parameters(), config.clip)
        optimizer.step()
        if average:
            average.update_parameters(player.module)
        return (time.perf_counter() - began) / player.every

    return move


def evaluation_seconds(trial: torch.nn.Module, bundle, config: TrainConfig) -> float:
    """Seconds of an evaluation during the run, by that of its first batch."""
    count = min(config.eval_examples or len(bundle.test), len(bundle.test))
    size = min(config.eval_batch_size or config.batch_size, count)
    began = time.perf_counter()
    evaluate(trial, Subset(bundle.test, range(size)), batch_size=size)
    return (time.perf_counter() - began) * math.ceil(count / size)


def sheet_seconds(trial: torch.nn.Module, config: TrainConfig) -> float:
    """Seconds of the samples on a sheet, by that of their first rows of pixels, or of the first of them."""
    if not trial.has_prior:
        return 0.0
    began = time.perf_counter()
    if "progress" in inspect.signature(trial.sample).parameters:
        share = 1.0

        def enough(done: int, rows: int) -> None:
            nonlocal share
            if time.perf_counter() - began > ENOUGH:
                share = done / rows
                raise _Enough

        try:
            with drawing(trial, 0) as (_, generator):
                trial.sample(config.samples, generator=generator, progress=enough)
        except _Enough:
            pass
        return (time.perf_counter() - began) / share
    few = min(8 if len(trial.shape) == 3 else 500, config.samples)
    sample(trial, few)
    return (time.perf_counter() - began) * config.samples / few


class _Enough(Exception):
    """Leaves a model's `sample` from within."""
