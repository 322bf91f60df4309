"""What `sample` and `eval` share: a run's model on its device, a forced backend, and an early look at where results
go."""

from __future__ import annotations

import sys

from genkernels._words import UsageError


def load(arguments):
    """The run's model, ready on the device, ``config.json`` and the checkpoint. Says which damaged checkpoint it passed
    over."""
    import torch

    from genkernels.training.rundir import load_model

    gpu = torch.cuda.is_available()
    if arguments.accelerator == "gpu" and not gpu:
        raise UsageError("accelerator gpu needs an NVIDIA GPU and a CUDA build of torch: this torch sees no GPU")
    model, config, state, notes = load_model(arguments.run, arguments.checkpoint)
    for note in notes:
        print(f"genkernels: {note}", file=sys.stderr)
    return model.to("cuda" if gpu and arguments.accelerator != "cpu" else "cpu"), config, state


def classes_of(config: dict) -> int | None:
    """How many classes the run's model is conditioned on; None where it is not."""
    return config["data"].get("num_classes") if config["train"].get("class_conditional") else None


def check_fits(bundle, config: dict) -> None:
    """The data must have the shape, the levels and, where the model is class-conditional, labels like those that it was
    trained on."""
    data = config["data"]
    ours, theirs = _form(data.get("shape"), data.get("levels")), _form(list(bundle.shape), bundle.levels)
    if ours != theirs:
        raise UsageError(f"the data must be as those of the run, {ours}, got {bundle.name} with {theirs}")
    if (classes := classes_of(config)) is not None and not 1 <= (bundle.num_classes or 0) <= classes:
        got = f"{bundle.num_classes} classes" if bundle.num_classes else "no labels"
        raise UsageError(
            f"the model is class-conditional, the data must have at most {classes} classes: got {bundle.name} "
            f"with {got}"
        )


def _form(shape, levels) -> str:
    return f"points of shape {shape}" if levels is None else f"images of shape {shape} with {levels} levels"
