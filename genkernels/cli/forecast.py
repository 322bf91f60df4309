"""What a run will take: its number of parameters, and its time by a step that is tried on a copy of the model."""

from __future__ import annotations

import copy
import statistics
import time

import torch

from genkernels._bar import duration
from genkernels._config import TrainConfig
from genkernels._machine import cpu_threads
from genkernels._seeds import fixed_seed
from genkernels._words import memory_ran_out
from genkernels.data.batches import fetch

TRIES, ENOUGH, LONG = 6, 0.5, 5.0  # at most so many, or seconds; after a longer first one, which has to do, no other


def forecast(model: torch.nn.Module, bundle, config: TrainConfig) -> str:
    """Words on a run that is to begin. Its time is that of the steps alone, and told on the CPU alone: a GPU would have
    to be warmed up for it. Model and generators are left as they were."""
    words = f"{sum(p.numel() for p in model.parameters()):,} parameters"
    on_cpu = config.accelerator == "cpu" or (config.accelerator == "auto" and not torch.cuda.is_available())
    seconds = step_seconds(model, bundle, config) if on_cpu and config.world_size == 1 else None
    if seconds is None:
        return words
    steps = config.total_steps(len(bundle.train))
    return f"{words}, about {duration(max(1, steps * seconds))} for {steps:,} steps of {config.batch_size:,}"


def step_seconds(model: torch.nn.Module, bundle, config: TrainConfig) -> float | None:
    """Seconds that losses and gradients of a batch take; None where a copy cannot be tried. What the memory does not
    hold is raised here, before anything is written."""
    try:
        with fixed_seed(config.seed), cpu_threads(config.threads):
            trial = copy.deepcopy(model).train()
            x, y = fetch(bundle.train, [i % len(bundle.train) for i in range(config.batch_size)])
            if begin := getattr(trial, "begin", None):
                begin(x, y)
            spent: list[float] = []
            while len(spent) < TRIES and (len(spent) < 2 or sum(spent) < ENOUGH) and sum(spent[:1]) < LONG:
                with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16-mixed"):
                    spent.append(sum(_move(trial, name, player, x, y) for name, player in trial.players().items()))
            return statistics.median(spent[1:] or spent)  # the first loads what it needs
    except Exception as error:
        if memory_ran_out(error):
            raise
        return None  # training meets it again, and says what it is


def _move(trial: torch.nn.Module, name: str, player, x: torch.Tensor, y: torch.Tensor) -> float:
    """Seconds of a player's move, spread over the steps in which it does not."""
    began = time.perf_counter()
    trial.losses(name, x, y, 0)["loss"].backward()
    return (time.perf_counter() - began) / player.every
