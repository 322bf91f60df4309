"""Checkpoints that are whole or absent.

A checkpoint is an ordinary ``torch.save`` file whose zip comment carries the SHA-256 of all bytes before it, so
``torch.load(path, weights_only=True)`` reads it anywhere, while `read_checkpoint` refuses one that was cut short or
altered. It is written beside its final name, flushed to the disk and only then renamed: a process killed at any moment
leaves the earlier checkpoints and at most a ``.tmp`` file, which the next run removes.

Format 2 holds ``step``, ``model`` (all weights as trained), ``average`` and ``optimizers`` (both by player),
``precision``, ``evaluations``, ``best`` and ``stale``. Format 1, of models with one player, is still read.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from pathlib import Path
from typing import BinaryIO

import torch

from genkernels._files import replacing
from genkernels._words import UsageError

FORMAT = 2
_MARK = b"genkernels sha256 "
_TRAILER = len(_MARK) + 64
_END_OF_ZIP = b"PK\x05\x06"
_NAME = re.compile(r"step-(\d{8,})\.ckpt")


class CheckpointError(UsageError):
    """A checkpoint is missing, cut short, altered, or of another format."""


class TrainingError(RuntimeError):
    """Training began and could not go on."""


def write_checkpoint(path: Path, state: dict) -> None:
    """Writes `state` (plain containers, numbers, strings and tensors) to `path`, whole or not at all: where the disk
    refuses, an OSError, `path` is as it was before."""
    with replacing(path, parents=False) as file:  # a run folder that was removed is not begun anew
        try:
            torch.save({"format": FORMAT, **state}, file)
        except RuntimeError as error:  # torch trips over its half-written file, and hides what the disk said
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        file.seek(-22, os.SEEK_END)
        if file.read(4) != _END_OF_ZIP:
            raise RuntimeError("torch.save no longer ends its file with a bare zip record: the checksum has no place")
        file.seek(-2, os.SEEK_END)
        file.write(_TRAILER.to_bytes(2, "little"))  # length of the comment that follows
        size = file.tell()
        digest = _digest(file, size)
        file.seek(size)
        file.write(_MARK + digest.encode())


def verify_checkpoint(path: Path) -> None:
    """Reads the file once and compares its checksum; a CheckpointError where it is missing, cut short or altered."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END) - _TRAILER
            if size <= 0:
                raise CheckpointError(f"checkpoint {path} is cut short: {size + _TRAILER} bytes are left")
            file.seek(size)
            trailer = file.read(_TRAILER)
            if not trailer.startswith(_MARK):
                raise CheckpointError(
                    f"checkpoint {path} is cut short or was not written by genkernels: its checksum is missing"
                )
            if _digest(file, size) != trailer[len(_MARK) :].decode("ascii", "replace"):
                raise CheckpointError(f"checkpoint {path} is damaged: its bytes do not match their checksum")
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror or error}") from None


def read_checkpoint(path: Path, map_location="cpu") -> dict:
    """Reads a checkpoint after comparing its checksum. Never runs code from the file. A CheckpointError where it is
    missing, cut short, altered, or of a format that this version does not know."""
    path = Path(path)
    verify_checkpoint(path)
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict) or state.get("format") not in (1, FORMAT):
        got = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"checkpoint {path} must be of format 1 or {FORMAT}, got {got}; another version wrote it")
    if not isinstance(state.get("step"), int) or not isinstance(state.get("model"), dict):
        raise CheckpointError(f"checkpoint {path} must hold a model and its step, it holds {', '.join(state)}")
    return _of_one_player(state) if state["format"] == 1 else state


def _of_one_player(state: dict) -> dict:
    """Format 1 as format 2: what there was of one optimiser and one average belongs to the player ``model``."""
    average, optimizer = state.pop("ema", None), state.pop("optimizer", None)
    state["average"] = {"model": {"updates": average["updates"], "weights": average["average"]}} if average else {}
    if optimizer is not None:
        state["optimizers"] = {"model": optimizer}
    return state


def step_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.ckpt"


def step_of(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


def list_checkpoints(folder: Path) -> list[Path]:
    """The periodic checkpoints of a folder, newest first."""
    found = (path for path in folder.glob("step-*.ckpt") if _NAME.fullmatch(path.name))
    return sorted(found, key=step_of, reverse=True)


def read_newest(folder: Path) -> tuple[Path, dict, list[str]]:
    """The newest sound checkpoint of a folder, ``(path, state, notes)``: one sentence in `notes` for each newer one
    that was passed over. A CheckpointError where none is sound."""
    notes: list[str] = []
    for path in list_checkpoints(folder):
        try:
            state = read_checkpoint(path)
            if state["step"] != step_of(path):
                raise CheckpointError(
                    f"checkpoint {path} must be of the step in its name, it is of step {state['step']}"
                )
            return path, state, notes
        except CheckpointError as error:
            notes.append(str(error))
    if notes:
        raise CheckpointError("; ".join(notes))
    raise CheckpointError(f"no checkpoint in {folder}")


def keep_newest(folder: Path, count: int) -> None:
    """Removes all periodic checkpoints but the newest `count`."""
    for path in list_checkpoints(folder)[count:]:
        path.unlink(missing_ok=True)


def _digest(file: BinaryIO, size: int) -> str:
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(min(size, 1 << 20)):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()
