"""Who runs a case in this process: the reference, the reference compiled, and each of our backends.

A provider's `open` gives a `Session` (`check`, `work`), or raises `Unavailable` with the reason why it cannot run here.
Peers run in processes of their own: `genkernels.benchmarks.peers`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from genkernels.backends import BackendUnavailable, use_backend
from genkernels.benchmarks.cases import Case
from genkernels.benchmarks.measure import LONG, WIDE_FLOOR, Inputs, Standard, Work, poisoned_memory, values

#: The backends that can run on each kind of device.
BACKENDS = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}


class Unavailable(Exception):
    """This provider cannot run this case here; the message says why."""


@dataclass
class Problem:
    """One case, drawn: its inputs, and what every provider's values are held against."""

    case: Case
    inputs: Inputs
    standard: Standard
    sets: int  # how many input sets to rotate among
    _shared: list[Inputs] = field(default_factory=list, repr=False)
    _folder: tempfile.TemporaryDirectory | None = field(default=None, repr=False)

    def rotating(self) -> list[Inputs]:
        """The input sets, one collection for all providers of this process. Nobody writes to them."""
        while len(self._shared) < self.sets:
            self._shared.append(self.inputs.fresh(self.case.direction))
        return self._shared

    def file(self) -> Path:
        """All that another process needs to hold a provider against the gate and time it; written once."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory()
            case = self.case
            contents = {
                "operator": case.operator,
                "settings": dict(case.settings),
                "direction": case.direction,
                "shape": list(case.shape),
                "args": self.inputs.args,
                "cotangents": self.inputs.cotangents,
                "constants": self.inputs.constants,
                "standard": vars(self.standard),
                "sets": self.sets,
                "threads": torch.get_num_threads(),
            }
            torch.save(contents, Path(self._folder.name) / "problem.pt")
        return Path(self._folder.name) / "problem.pt"

    def close(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()


class Session(Protocol):
    """A provider at work on one case."""

    def check(self) -> str:
        """What is wrong with its values; empty where they pass the gate."""

    def warm_up(self) -> float:
        """Settles the length of a turn; the seconds of one call."""

    def turn(self) -> list[float]:
        """Samples of one turn, in seconds a call."""

    def peak_bytes(self) -> int | None: ...

    def close(self) -> None: ...


class Provider(Protocol):
    name: str
    ours: bool  # a gate failure of ours fails the whole run
    # `gated` False: its values are its own affair, its rows say so, and a case without it has no such row

    def open(self, problem: Problem) -> Session: ...


class LocalSession:
    """A provider in this process: an op, and the context that it runs in."""

    def __init__(self, problem: Problem, op: Callable, context: Callable, ours: bool):
        self.problem, self.op, self.context, self.ours = problem, op, context, ours
        self.work: Work | None = None

    def check(self) -> str:
        case, standard = self.problem.case, self.problem.standard
        # drawn before the memory is poisoned: the provider is to be tested, not the copying of its inputs
        first, second = (self.problem.inputs.fresh(case.direction) for _ in range(2))
        with self.context():
            produced = values(self.op, first, case.direction)
            if not self.ours:
                return standard.fault(produced, floor=WIDE_FLOOR)
            if fault := standard.fault(produced):
                return fault
            with poisoned_memory():
                produced = values(self.op, second, case.direction)
        fault = standard.fault(produced)
        return fault and f"with uninitialised memory set to NaN: {fault}"

    def warm_up(self) -> float:
        self.work = Work(self.op, self.problem.rotating(), self.problem.case.direction)
        with self.context():
            return self.work.warm_up()

    def turn(self) -> list[float]:
        with self.context():
            return self.work.turn()

    def peak_bytes(self) -> int | None:
        with self.context():
            return self.work.peak_bytes()

    def close(self) -> None:
        self.work = None


class Trusted(LocalSession):
    """Its values are not looked at."""

    def check(self) -> str:
        return ""


@dataclass
class Backend:
    """``case.op`` with one of our backends forced; ``reference`` is one of them."""

    name: str
    ours: bool = True

    def open(self, problem: Problem) -> LocalSession:
        if self.name == "reference" and problem.standard.seconds > LONG:
            # the standard is this very call's, a moment ago
            return Trusted(problem, problem.case.op, lambda: use_backend(self.name), self.ours)
        try:
            with use_backend(self.name):
                # the operator itself may have no such kernel: it says so when called
                values(problem.case.op, problem.inputs.fresh(problem.case.direction), problem.case.direction)
        except BackendUnavailable as error:
            raise Unavailable(str(error)) from None
        return LocalSession(problem, problem.case.op, lambda: use_backend(self.name), self.ours)


@dataclass
class Compiled:
    """``torch.compile`` of the plain reference, whole graph, static shapes: the stronger baseline."""

    name: str = "compiled"
    ours: bool = False

    def open(self, problem: Problem) -> LocalSession:
        case = problem.case
        if problem.inputs.args[0].device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
            raise Unavailable("needs a C++ compiler (g++) on the CPU, and none was found")
        if isinstance(case.compiled, str):
            raise Unavailable(case.compiled)
        torch.compiler.reset()  # cases share code objects, and dynamo gives up after a few variants of one
        op = case.compiled() if case.compiled else torch.compile(case.reference, fullgraph=True, dynamic=False)
        try:
            values(op, problem.inputs.fresh(case.direction), case.direction)
        except Exception as error:  # every layer of the compiler has its own exceptions
            raise Unavailable(f"torch.compile failed: {type(error).__name__}: {first_line(error)}") from None
        return LocalSession(problem, op, contextlib.nullcontext, self.ours)


@dataclass
class Yardstick:
    """``case.yardstick``, no gate: what the operator is measured by where the reference is far away."""

    name: str = "one pass"
    ours: bool = False
    gated: bool = False

    def open(self, problem: Problem) -> LocalSession:
        return Trusted(problem, problem.case.yardstick, contextlib.nullcontext, self.ours)


def local(device: str) -> list[Provider]:
    """The providers of this process, baselines first."""
    return [Backend("reference"), Compiled(), *(Backend(name) for name in BACKENDS[device]), Yardstick()]


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
