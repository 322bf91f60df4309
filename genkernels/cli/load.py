"""What `sample` and `eval` share: a run's model on its device, the model's own options, and data that must fit it."""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator

from genkernels._config import check_threads
from genkernels._words import UsageError, nearest, notice


def load_data(spec: str | None, root: str | None, quiet: bool = False):
    """`genkernels.data.load`, which tells how far it is where that takes long."""
    from genkernels import data
    from genkernels._bar import Waiting

    if spec is None:
        raise UsageError("the run's config.json must say which data it was trained on, it does not")
    terminal = not quiet and getattr(sys.stderr, "isatty", lambda: False)()
    if spec.startswith("hf:") and not terminal:  # the bars of what downloads
        for name in ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
    waiting = Waiting(sys.stderr, f"genkernels: {spec}", terminal, quiet=quiet)
    try:
        return data.load(spec, root=root, progress=waiting.update)
    finally:
        waiting.close()


@contextlib.contextmanager
def surroundings(arguments) -> Iterator[None]:
    """The backend and the threads that were asked for."""
    from genkernels._machine import cpu_threads
    from genkernels.backends import current_backend, use_backend

    check_threads(arguments.threads)
    if arguments.seed is not None and not -(2**63) <= arguments.seed < 2**63:
        raise UsageError(f"--seed must be an integer of 64 bits, got {arguments.seed}")
    with use_backend(arguments.backend or current_backend()), cpu_threads(arguments.threads):
        yield


def load(arguments):
    """The run's model, ready on the device, ``config.json`` and the checkpoint. Says which damaged checkpoint it passed
    over."""
    import torch

    from genkernels.data.bundle import listed
    from genkernels.training.checkpoint import CheckpointError, list_checkpoints, step_of
    from genkernels.training.rundir import RunDirectory, load_model

    gpu = torch.cuda.is_available()
    if arguments.accelerator == "gpu" and not gpu:
        raise UsageError("accelerator gpu needs an NVIDIA GPU and a CUDA build of torch: this torch sees no GPU")
    which = arguments.checkpoint
    if which not in ("best", "last") and not which.isdecimal():
        raise UsageError(f"--checkpoint must be best, last or a step, got {which!r}")
    try:
        model, config, state, notes = load_model(arguments.run, which)
    except CheckpointError as error:
        kept = list_checkpoints(RunDirectory(arguments.run).checkpoints)
        if not which.isdecimal() or int(which) in map(step_of, kept):
            raise
        steps = listed([f"{step_of(path):,}" for path in reversed(kept)]) or "none"
        raise UsageError(f"--checkpoint: {arguments.run} has none of step {which}, it has those of {steps}") from error
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


def check_fits(bundle, model, config: dict, part: str | None = None):
    """The data with their labels counted as the run counts its classes.

    Args:
        bundle, model, config: the data, the run's model and its ``config.json``.
        part: where they are the run's own data, the part that must be what it was; None for other data.

    Raises:
        UsageError: their shape or grey levels are not those of the run's data, their classes, where the model has some,
            are not among the run's, or they are its own data and have changed.
    """
    from genkernels.data.bundle import listed
    from genkernels.data.provenance import check_part, classes_of

    data, form = config["data"], bundle.form
    ours, theirs = _words(data.get("shape"), data.get("grey_levels")), _words(list(form.shape), form.grey_levels)
    if ours != theirs:
        raise UsageError(f"the data must be as those of the run, {ours}, got {bundle.name} with {theirs}")
    if model.num_classes:
        known = classes_of(data, bundle, model.num_classes)
        strange = [name for name in bundle.classes or () if name not in known]
        if strange or not bundle.classes:
            raise UsageError(
                f"the model has classes, the data must have labels, and no class beside {listed(known)}: got "
                f"{bundle.name} with {listed(strange) if strange else 'no labels'}"
            )
        bundle = bundle.counted_by(known)
    if part:
        check_part(data, bundle, part)
    return bundle


def class_names(model, config: dict) -> list[str]:
    """What the user calls the classes of a run; those of earlier versions are called by their numbers."""
    return config["data"].get("classes") or [str(i) for i in range(model.num_classes or 0)]


def class_numbers(given: list[str], model, config: dict) -> list[int]:
    """The numbers of the classes that ``--label`` names: several of them with commas between, or by several flags."""
    from genkernels.data.bundle import listed

    names = class_names(model, config)
    wished = [label for text in given for label in ([text] if text in names else text.split(","))]
    for i, label in enumerate(wished):
        if model.num_classes and label not in names:  # what a model without classes says to one is told by `sample`
            hint = nearest(label, names, listed=True)
            raise UsageError(f"--label must be one of {listed(names)}, got {label!r}{hint}")
        if label in wished[:i]:
            raise UsageError(f"--label must name a class once, got {label!r} twice")
    return [names.index(label) for label in wished] if model.num_classes else [0] * bool(wished)


def _words(shape, levels) -> str:
    return f"points of shape {shape}" if levels is None else f"images of shape {shape} with {levels} grey levels"
