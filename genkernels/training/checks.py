"""What is looked at before a run begins, and what is said where one breaks off."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from genkernels._config import TrainConfig
from genkernels._files import named_by
from genkernels._words import UsageError, memory_ran_out
from genkernels.nn.reversible import NotRebuilt

MOST_PICTURES, MOST_POINTS = 4096, 1_000_000  # on one sheet


def check_model(model: torch.nn.Module) -> None:
    """That it says what training asks it, and that each player has something to train."""
    needed = ("players", "losses", "evaluate", "sample", "pictures")
    if missing := [name for name in needed if not callable(getattr(model, name, None))]:
        raise UsageError(
            f"the model must be a genkernels.models.Model: {type(model).__name__} has no {' and no '.join(missing)}"
        )
    for name, player in model.players().items():
        if not any(p.requires_grad for p in player.module.parameters()):
            raise UsageError(f"{type(model).__name__}: player {name!r} must have a parameter to train, it has none")


def resolved(config: TrainConfig, examples: int, is_image: bool) -> TrainConfig:
    """Fills in what was left open and checks it against this machine."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    accelerator = config.accelerator
    if accelerator == "auto":
        accelerator = "gpu" if gpus else "cpu"
    if accelerator == "gpu" and not gpus:
        raise UsageError("accelerator gpu needs an NVIDIA GPU and a CUDA build of torch: this torch sees no GPU")
    if accelerator == "gpu" and config.devices > gpus:
        raise UsageError(f"devices must be at most the {gpus} GPU(s) of this machine, got {config.devices}")
    if accelerator == "cpu" and config.devices > (most := max(8, os.cpu_count() or 1)):
        raise UsageError(f"devices must be at most {most} on this CPU, each a process, got {config.devices:,}")
    if accelerator == "cpu" and config.precision == "16-mixed":
        raise UsageError("precision 16-mixed needs a GPU: on the CPU choose 32 or bf16-mixed")
    most = max(examples, 65536)
    if config.batch_size > most:
        raise UsageError(f"batch_size must be at most {most:,} for {examples:,} examples, got {config.batch_size:,}")
    shown = MOST_PICTURES if is_image else MOST_POINTS
    if (config.samples or 0) > shown:
        raise UsageError(f"samples must be at most {shown:,} on a sheet, got {config.samples:,}")
    tenth = max(1, config.total_steps(examples, config.world_size) // 10)
    evaluate_every = tenth if config.eval_every is None else config.eval_every
    look = 1 if accelerator == "cpu" and config.devices == 1 else 20
    return config.changed(
        accelerator=accelerator,
        strategy="ddp" if config.devices > 1 and config.strategy == "auto" else config.strategy,
        eval_every=evaluate_every,
        sample_every=evaluate_every if config.sample_every is None else config.sample_every,
        log_every=config.log_every or look,
        eval_examples=(512 if is_image else 0) if config.eval_examples is None else config.eval_examples,
        samples=config.samples or (64 if is_image else 2000),
    )


def explained(error: Exception, step: int, run) -> str | None:
    """A sentence for what can go wrong through no fault of the program; None for everything else."""
    from genkernels.data import DataError

    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if memory_ran_out(error):
        return f"memory ran out in step {step}: choose a smaller --batch-size, or --reversible where the model has it"
    if isinstance(error, NotRebuilt):
        return f"step {step} has no gradient with --reversible: {error}"
    if isinstance(error, DataError):  # from a loader process it comes with that process's traceback in front
        return f"the data could not be read in step {step}: {lines[-1].split('DataError: ')[-1]}"
    if isinstance(error, OSError):
        path, reason = named_by(error), error.strerror or lines[0]
        if run and path and run.path.absolute() in Path(path).absolute().parents:
            return f"the run folder {run} could not be written in step {step}: {reason}"
        return f"{path} could not be used in step {step}: {reason}" if path else None
    return None
