"""Files that are whole or absent, and an early look at whether one can be written."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from genkernels._words import UsageError


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """An OSError that leaves the block names the file: that of a full disk names none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # with a name, one without a number loses its words
            error.filename = error.filename or str(path)
        raise


def named_by(error: OSError) -> str:
    """The file that an error names; empty where it names none."""
    return os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""


@contextlib.contextmanager
def replacing(path: str | os.PathLike, parents: bool = True) -> Iterator[BinaryIO]:
    """Opens a temporary file that takes the place of `path` when the block ends well, and vanishes when it does not.

    It is flushed to the disk before it is renamed: a process killed at any moment leaves the earlier file, and at most
    a ``.tmp`` beside it. Missing `parents` are made.
    """
    path = Path(path)
    if parents:
        path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with naming(path), os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp gives 0600; results are shared like any other file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_json(path: str | os.PathLike, value, indent: int = 2) -> None:
    """Writes a JSON file whole or not at all. NaN and infinities become null: JSON has no word for them."""
    with replacing(path) as file:
        file.write(json.dumps(_plain(value), indent=indent, allow_nan=False).encode() + b"\n")


def refuse_unwritable(path: str | os.PathLike, label: str | None = None) -> None:
    """Finds out before any work whether a file can be written at `path`, by trying in its folder or the nearest one
    that exists; leaves nothing behind.

    Args:
        path: of the file.
        label: what the sentence calls it; None takes the path.

    Raises:
        UsageError: it cannot; says why.
    """
    path = Path(path)
    label = str(path) if label is None else label
    if path.is_dir():
        raise UsageError(f"{label} must be a file, it is a folder")
    folder = next((p for p in path.absolute().parents if p.exists()), Path("/"))
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = f"{folder} is not a folder" if not folder.is_dir() else error.strerror or str(error)
        raise UsageError(f"{label} cannot be written: {reason}") from None
    if path.exists() and not os.access(path, os.W_OK):
        raise UsageError(f"{label} cannot be written: permission denied")


def lock(folder: Path) -> int | None:
    """Keeps other processes from locking the folder too, until ``os.close(handle)`` or this process's end.

    Returns:
        The handle; None where there are no such locks, on this platform or this file system.

    Raises:
        BlockingIOError: another process has it.
    """
    try:
        return _flock(folder, "LOCK_EX")
    except BlockingIOError:  # or has only looked: see `locked`
        time.sleep(0.1)
        return _flock(folder, "LOCK_EX")


def locked(folder: Path) -> bool:
    """Whether another process has the `lock` of a folder: one that was killed has it no more."""
    try:
        handle = _flock(folder, "LOCK_SH")
    except BlockingIOError:
        return True
    except OSError:
        return False
    if handle is not None:
        os.close(handle)
    return False


def _flock(folder: Path, kind: str) -> int | None:
    try:
        import fcntl
    except ImportError:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, getattr(fcntl, kind) | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return handle


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of a process that was killed while it wrote."""
    for path in folder.glob("*.tmp"):
        path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder; the rename itself is still atomic
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return str(value) if isinstance(value, Path) else value
