"""Compiles native code for tests, once for all processes of this machine."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path


def compile_once(name: str, suffix: str, inputs: Iterable[Path], command: Callable[[str, Path], list[str]]) -> Path:
    """The library that ``command(name, output)`` makes; made again only when the command or an input has changed.

    Args:
        name: Begins the file's name, and `command` is given it with the stamp of its inputs.
        inputs: Every file that is read; the command alone is not enough, headers are not on it.
    """
    stamp = hashlib.sha256(repr(command(name, Path("output"))).encode())
    for path in inputs:
        stamp.update(path.read_bytes())
    name = f"{name}_{stamp.hexdigest()[:12]}"
    folder = Path(tempfile.gettempdir()) / f"genkernels-tests-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    library = folder / f"{name}{suffix}"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # parallel workers wait for the first of them
        if not library.exists():
            unfinished = library.with_suffix(".tmp")
            done = subprocess.run(command(name, unfinished), capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{name} does not compile:\n{done.stderr}")
            unfinished.replace(library)
    return library
