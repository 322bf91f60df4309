"""What `sample` and `eval` share: a run's model on its device, the model's own options, and data that must fit it."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from genkernels._words import UsageError, nearest, notice


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
        notice(note)
    return model.to("cuda" if gpu and arguments.accelerator != "cpu" else "cpu"), config, state


def options(settings: list[str], function: Callable, name: str, reserved: tuple[str, ...]) -> dict:
    """``KEY=VALUE`` strings as keyword arguments of a model's method.

    Args:
        settings: the strings.
        function: the method, bound to the model.
        name: the model's, for people.
        reserved: arguments that have an option, or a meaning, of their own.

    Raises:
        UsageError: one is not an argument of the method.
    """
    from genkernels.cli.build import keyed

    parameters = inspect.signature(function).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    allowed = [key for key, p in parameters.items() if key not in reserved and p.kind is not p.VAR_KEYWORD]
    values = dict(keyed(settings))
    for key in values:
        if key in reserved:
            raise UsageError(f"--set {key}: it cannot be set, the command itself says what it is")
        if key not in allowed and not anything:
            hint = nearest(key, allowed) or "; it takes none"
            raise UsageError(f"{name}'s {function.__name__} has no option {key!r}{hint}")
    return values


def check_fits(bundle, model, config: dict) -> None:
    """The data must have the shape, the grey levels and, where the model has classes, labels like those that it was
    trained on."""
    data, form = config["data"], bundle.form
    ours, theirs = _words(data.get("shape"), data.get("grey_levels")), _words(list(form.shape), form.grey_levels)
    if ours != theirs:
        raise UsageError(f"the data must be as those of the run, {ours}, got {bundle.name} with {theirs}")
    if model.num_classes and not 1 <= (form.num_classes or 0) <= model.num_classes:
        got = f"{form.num_classes} classes" if form.num_classes else "no labels"
        raise UsageError(
            f"the model is class-conditional, the data must have at most {model.num_classes} classes: "
            f"got {bundle.name} with {got}"
        )


def _words(shape, levels) -> str:
    return f"points of shape {shape}" if levels is None else f"images of shape {shape} with {levels} grey levels"
