"""Processes of their own: a command line for tests that kill or interrupt it, and two that train together."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
_HEAVY = ["genkernels.cli", "genkernels.data", "genkernels.models", "genkernels.training", "lightning.fabric"]
_HEAVY += ["torch.utils.tensorboard"]


def end_with_parent() -> None:
    """For `subprocess`, as ``preexec_fn``: kills this process when the one that started it ends, killed or not
    (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _end_with_test() -> None:
    """The same where the test's process is not the parent, which is the one that forks."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGKILL)


def two_ranks(module: str) -> dict[str, str]:
    """What either of two processes, ``python -m module RANK STORE RESULT``, finds wrong, by case."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", module]
        files = [Path(folder, f"result {rank}") for rank in range(2)]
        ranks = [
            subprocess.Popen([*command, str(rank), f"{folder}/store", file], cwd=REPOSITORY, stderr=subprocess.PIPE)
            for rank, file in enumerate(files)
        ]
        try:
            errors = [rank.communicate(timeout=120)[1].decode() for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert [rank.returncode for rank in ranks] == [0, 0], errors
        first, second = (json.loads(file.read_text()) for file in files)
        return {case: what or second[case] for case, what in first.items()}


def two_ranks_once(module: str) -> dict[str, str]:
    """`two_ranks`, run by the first worker of pytest-xdist that asks; the others wait for what it found. A test that
    runs the tests of a copy of the repository has the same workers' names in its environment: what was found is kept by
    the folder, too."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        return two_ranks(module)
    folder = Path(tempfile.gettempdir()) / f"genkernels-tests-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    copy = hashlib.sha256(str(REPOSITORY).encode()).hexdigest()[:16]
    with (folder / f"{module}-{run}-{copy}.json").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if not (text := file.read()):
            file.write(text := json.dumps(two_ranks(module)))
        return json.loads(text)


class Command:
    """``genkernels ARGV``, as `subprocess.Popen` has it, but forked from a process that has imported, once for all
    tests, what takes seconds. It ends with the test's process.

    Args:
        argv: of the command line.
        before: called first, in the new process; pickled by name.
    """

    def __init__(self, *argv: str, before: Callable[[], None] | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_HEAVY)
        handle, name = tempfile.mkstemp(suffix=".stderr")
        os.close(handle)
        self._stderr = Path(name)
        self._process = context.Process(target=_run, args=(argv, before, name, os.getcwd(), _threads()))
        self._process.start()

    @property
    def stderr(self) -> str:
        """What it has said so far."""
        return self._stderr.read_text()

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        """What it ends with, as `subprocess.Popen` gives it; a TimeoutError where it does not end."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"the process did not end within {timeout} s")
        return self._process.exitcode


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _run(argv: tuple[str, ...], before: Callable[[], None] | None, stderr: str, folder: str, threads: int) -> None:
    threading.Thread(target=_end_with_test, daemon=True).start()
    os.chdir(folder)
    for path, number in ((os.devnull, 1), (stderr, 2)):
        handle = os.open(path, os.O_WRONLY)
        os.dup2(handle, number)
        os.close(handle)
    import torch

    from genkernels.cli import main

    torch.set_num_threads(threads)  # the test's own: their sums are then the same, bit for bit
    if before:
        before()
    sys.exit(main(list(argv)))
