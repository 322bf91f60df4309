"""A run's folder: what lies where, who may write into it, and how a model comes back from it.

::

    RUN/config.json                        the model, the training settings, and the data: how to load them, their
                                           classes, how many there are, and a digest by which they are known again
    RUN/checkpoints/step-00001000.ckpt     the two newest periodic checkpoints, all that a resume needs; that of step 0
                                           holds the weights that the run began with
    RUN/best.ckpt                          the weights with the best held-out value
    RUN/samples/step-00001000.png          a sheet of samples, and others that the model has: -NAME.png
    RUN/losses.csv                         one row a step, a column for each term
    RUN/metrics.json                       the results, at the end
    RUN/tensorboard/                       event files
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from genkernels._files import lock, refuse_unwritable, remove_leftovers, write_json
from genkernels._machine import versions
from genkernels._words import UsageError, near_names, nearest
from genkernels.models._registry import hparams_of_format_1
from genkernels.training.checkpoint import CheckpointError, read_checkpoint, read_newest, step_path

if TYPE_CHECKING:
    from genkernels.models import Model

_FILES = ("config.json", "best.ckpt", "losses.csv", "metrics.json")
_FOLDERS = ("checkpoints", "samples", "tensorboard")
_DAMAGED = "losses.csv.damaged"  # what a resume could not read of losses.csv is kept there


class RunDirectory:
    """The paths of one run, and the lock that keeps a second writer out."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path).expanduser()
        self.config, self.best, self.losses, self.metrics = (self.path / name for name in _FILES)
        self.checkpoints, self.samples, self.tensorboard = (self.path / name for name in _FOLDERS)
        self._lock: int | None = None

    def __str__(self) -> str:
        return str(self.path)

    def prepare(self, *, resume: bool = False, overwrite: bool = False) -> None:
        """Makes the folder ready to be written and locks it. Where it holds a run or something else, is locked or
        cannot be written, a UsageError says so, and nothing is touched. To `resume`, a run must be there; to
        `overwrite` removes it, its own files only."""
        self.check(resume=resume, overwrite=overwrite)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"the run folder {self} cannot be written: {error.strerror or error}") from None
        try:
            self._lock = lock(self.path)
        except BlockingIOError:
            raise UsageError(f"the run in {self} is being trained by another process") from None
        try:
            self.check(resume=resume, overwrite=overwrite)  # another process may have come and gone before the lock
        except UsageError:
            self.release()
            raise
        # The configuration goes last: killed half-way, the folder is still recognised as a run.
        for path in [self.path / name for name in (*_FOLDERS, _DAMAGED, *reversed(_FILES))] if overwrite else ():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        for folder in (self.path, self.checkpoints, self.samples):
            folder.mkdir(exist_ok=True)
            remove_leftovers(folder)

    def check(self, *, resume: bool = False, overwrite: bool = False) -> None:
        """The part of `prepare` that touches nothing."""
        begun = self.config.is_file()
        if resume and overwrite:
            raise UsageError("give --resume or --overwrite, not both")
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"the run folder {self} must be a folder, it is a file")
        for folder in (self.checkpoints, self.samples):
            if folder.exists() and not folder.is_dir() and begun:
                raise UsageError(f"{folder} must be a folder, it is a file")
        if resume and not begun:
            raise UsageError(f"there is no run to resume in {self}: it has no config.json")
        if begun and not resume and not overwrite:
            raise UsageError(f"{self} already holds a run: continue it with --resume or replace it with --overwrite")
        if not begun and self.path.is_dir() and not all(map(self._unfinished, self.path.iterdir())):
            raise UsageError(f"{self} is not empty and holds no run (no config.json): choose another folder with --out")
        refuse_unwritable(self.config, f"the run folder {self}")

    def _unfinished(self, path: Path) -> bool:
        """Whether it is what a process leaves that ends before it has written the configuration."""
        if path in (self.checkpoints, self.samples):
            return path.is_dir() and not any(path.iterdir())
        return path.match(f"{self.config.name}.*.tmp")

    def release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)  # the kernel does the same when the process dies
            self._lock = None

    def read_config(self) -> dict:
        """The contents of ``config.json``; a UsageError where there is none, or where it is damaged."""
        if not self.path.is_dir():
            raise UsageError(f"there is no run in {self}: no such folder{_near_folder(self.path)}")
        if not self.config.exists():
            raise UsageError(f"there is no run in {self}: it has no config.json")
        return read_config(self.config)

    def write_config(self, *, model: dict, data: dict, train: dict) -> None:
        write_json(self.config, {"format": 1, "model": model, "data": data, "train": train, "versions": versions()})


def describe_model(model: Model) -> dict:
    """What ``config.json`` says about a model; ``name`` is None where it is not one of ``genkernels.models``."""
    from genkernels.models import MODELS

    name = next((name for name, kind in MODELS.items() if type(model) is kind), None)
    hparams = dict(getattr(model, "hparams", {})) if name else {}
    parameters = sum(p.numel() for p in model.parameters())
    return {"name": name, "class": type(model).__name__, "hparams": hparams, "parameters": parameters}


def load_model(path: str | os.PathLike, which: str | int = "best") -> tuple[Model, dict, dict, list[str]]:
    """Rebuilds a run's model with its averaged weights (the trained ones where no average was kept), for evaluation.

    Args:
        path: the run's folder. which: ``best`` (by held-out examples), ``last``, or the step of a checkpoint.

    Returns:
        ``(model, config, state, notes)``: the model on the CPU, ``config.json``, the checkpoint, and a sentence for
        each checkpoint that was damaged and passed over.

    Raises:
        UsageError: no run is there, it is damaged, or its model is a class of the user's own; `which` is no word on a
            checkpoint.
    """
    if which not in ("best", "last") and not str(which).isdecimal():
        raise UsageError(f"load_model: which must be best, last or a step, got {which!r}")
    run = RunDirectory(path)
    config = run.read_config()
    model = build_model(config["model"], run.path)
    state, path, notes = None, run.best, []
    if which not in ("best", "last"):
        path = step_path(run.checkpoints, int(which))
        state = read_checkpoint(path)
    elif which == "best":
        try:
            state = read_checkpoint(path)
        except CheckpointError as error:
            notes = [str(error)] if path.exists() else []
    if state is None:
        try:
            path, state, more = read_newest(run.checkpoints)
        except CheckpointError as error:
            raise CheckpointError("; ".join([*notes, str(error)])) from None
        notes = [f"{'; '.join(notes + more)}; using {path} instead"] if notes + more else []
    load_weights(model, state, path, averaged=True)
    return model.eval(), config, state, notes


def build_model(description: dict, source: Path) -> Model:
    """The model that a ``config.json`` describes, with fresh weights."""
    from genkernels.models import MODELS, build

    name = description.get("name")
    if name is None:
        raise UsageError(f"{source} trained {description.get('class')}, a class of your own: rebuild it in Python")
    if name not in MODELS:
        raise UsageError(f"{source} names the unknown model {name!r}{nearest(name, MODELS)}")
    hparams = {k: tuple(v) if isinstance(v, list) else v for k, v in description.get("hparams", {}).items()}
    try:
        return build(name, **hparams)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the model of {source} cannot be rebuilt: {error}") from None


def load_weights(model: Model, state: dict, path: Path, *, averaged: bool) -> None:
    """Puts the weights of the checkpoint at `path` into a model; a CheckpointError where they are another model's."""
    try:
        model.load_state_dict(state["model"])
        for name, average in state.get("average", {}).items() if averaged else ():
            if average["updates"]:
                model.players()[name].module.load_state_dict(average["weights"])
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise CheckpointError(f"checkpoint {path} must hold this model's weights: {' '.join(lines[1:3])}") from None
    except KeyError as error:
        raise CheckpointError(f"checkpoint {path} must hold this model's players, it has {error}") from None


def read_config(path: Path, whole: bool = True) -> dict:
    """A run's configuration; not `whole`, of a user's own making, it may lack parts."""
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    found = {p: config.get(p, {}) for p in ("model", "data", "train")} if isinstance(config, dict) else {}
    if not found or not all(isinstance(part, dict) and (part or not whole) for part in found.values()):
        raise UsageError(f"{path} is damaged: it must have the parts model, data and train")
    if "levels" in found["data"]:  # of format 1
        found["data"]["grey_levels"] = found["data"].pop("levels")
    model, data = found["model"], found["data"]
    kinds = (("hparams", model.get("hparams", {}), dict), ("parameters", model.get("parameters", 0), int))
    for key, value, kind in (*kinds, ("spec", data.get("spec", ""), str), ("classes", data.get("classes") or [], list)):
        if not isinstance(value, kind):
            raise UsageError(f"{path} is damaged: {key} must be of type {kind.__name__}, got {value!r}")
    model["hparams"] = hparams_of_format_1(model.get("name"), model.get("hparams", {}))
    return config | found


def _near_folder(path: Path) -> str:
    """``'; did you mean runs/glow-digits?'`` among the runs beside a folder that does not exist."""
    try:
        runs = {p.name: p for p in path.parent.iterdir() if (p / "config.json").is_file()}
    except OSError:
        return ""
    near = near_names(path.name, runs)
    return f"; did you mean {' or '.join(str(runs[name]) for name in near)}?" if near else ""
