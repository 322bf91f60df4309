"""Other libraries' versions of our operators, each in a process of its own.

Importing one can change torch for the whole process, and none may slow down or break another. A peer's process lives
for the whole run, so that peers too take turns with the other providers; it is asked by lines of JSON, and gets tensors
by file.

``peers/<operator>.py`` holds the adapters of one operator:

- ``PEERS``: the peers that have this operator, in the order of the table;
- ``unsupported(peer, case) -> str``: why a peer does not compute this case, empty where it does; imports nothing of the
  peer;
- ``adapter(peer, settings, direction, shape) -> Adapter``: runs in the peer's process.

An adapter changes nothing in the peer's own path: it replaces the network by a stub that returns the ready tensor.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch

from genkernels.benchmarks.cases import Case
from genkernels.benchmarks.providers import Problem, Unavailable

PACKAGES = ("nflows", "normflows", "FrEIA", "zuko", "torchdeq", "torch")
PATIENCE = 300.0  # seconds: a peer that is silent for longer counts as hung


def as_they_are(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The `arrange` of a peer that takes the case's inputs in their places."""
    return args


@dataclass(frozen=True)
class Adapter:
    """A peer's operator, called as the case's; `arrange` puts our inputs into the peer's own layout, outside the
    clock."""

    op: Callable
    arrange: Callable[..., tuple[torch.Tensor, ...]] = as_they_are


def adapters(operator: str):
    """The module of adapters of one operator, or None."""
    name = f"{__name__}.{operator}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def of(case: Case) -> tuple[str, ...]:
    """The peers that have this case's operator."""
    module = adapters(case.operator)
    if module is None:
        return ()
    return module.offered(case) if hasattr(module, "offered") else module.PEERS


@dataclass
class Peer:
    """One peer library as a provider; its process starts with the first case that it runs."""

    name: str
    ours: bool = False
    _process: subprocess.Popen | None = field(default=None, repr=False)
    _errors: IO[str] | None = field(default=None, repr=False)

    def open(self, problem: Problem) -> PeerSession:
        case = problem.case
        module = adapters(case.operator)
        if module is None or self.name not in module.PEERS:
            raise Unavailable(f"has no {case.operator}")
        if importlib.util.find_spec(self.name) is None:
            raise Unavailable("is not installed (pip install 'genkernels[bench]')")
        if reason := module.unsupported(self.name, case):
            raise Unavailable(reason)
        return PeerSession(self, problem)

    def ask(self, **message) -> dict:
        """Sends one request, gives its answer.

        Raises:
            Unavailable: the process died, hung or reports that the peer raised.
        """
        process = self._process or self._start()
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            line = self._line()
        except (OSError, TimeoutError) as error:
            line = ""
            lost = str(error)
        else:
            lost = "its process ended" if not line else ""
        if not line:
            tail = self._complaint()
            self.close()
            raise Unavailable(f"{lost}{': ' + tail if tail else ''}")
        answer = json.loads(line)
        if "error" in answer:
            raise Unavailable(f"raised {answer['error']}")
        return answer

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, self._errors):
                with contextlib.suppress(OSError):  # what the dead process did not read is lost
                    stream.close()

    def _start(self) -> subprocess.Popen:
        root = str(Path(__file__).resolve().parents[3])
        threads = str(torch.get_num_threads())
        paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "genkernels.benchmarks.peers.worker", self.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            bufsize=1,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": threads},
        )
        return self._process

    def _line(self) -> str:
        # one answer a request, so nothing can wait in the reader's buffer while select sees an empty pipe
        ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
        if not ready:
            raise TimeoutError(f"no answer in {PATIENCE:.0f} s")
        return self._process.stdout.readline()

    def _complaint(self) -> str:
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        return lines[-1] if lines else ""


class PeerSession:
    """A peer at work on one case."""

    def __init__(self, peer: Peer, problem: Problem):
        self.peer, self.problem = peer, problem

    def check(self) -> str:
        return self.peer.ask(do="open", file=str(self.problem.file()))["fault"]

    def warm_up(self) -> float:
        return self.peer.ask(do="warm_up")["seconds"]

    def turn(self) -> list[float]:
        return self.peer.ask(do="turn")["seconds"]

    def peak_bytes(self) -> int:
        return self.peer.ask(do="peak")["bytes"]

    def close(self) -> None:
        if self.peer._process is not None:
            with contextlib.suppress(Unavailable):  # it is gone: nothing is left to drop
                self.peer.ask(do="close")
