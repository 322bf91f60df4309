"""The implementations of an operator, by the operators' own names: whatever runs here is held to the same checks.

- ``reference``: plain PyTorch, the definition;
- ``cpu``: the C++ library;
- ``triton``, ``cuda``: on a GPU;
- ``triton interpreted``: the Triton launchers and kernels, run by Triton's interpreter on the CPU. It must be chosen
  before Triton is imported, so it takes a pytest process of its own, which runs nothing else:
  ``TRITON_INTERPRET=1 python -m pytest tests/ops tests/triton``;
- ``cuda emulated``: ``csrc/cuda/<op>.cu`` compiled for the CPU (``tests/cuda/emulation.h`` says how).

The last two stand in for the C++ library's kernels in ``torch.ops.genkernels`` while a test runs, so that public
functions, gradients and ``torch.compile`` reach them as they reach any kernel.
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, TypeVar

import torch

from genkernels import backends, ops
from tests import interpreter
from tests.cuda import emulation

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
if INTERPRETED and importlib.util.find_spec("triton"):
    interpreter.patch_once()
#: The CPU library is not the build that this processor would choose (tests/ops/test_builds.py).
OTHER_BUILD = "ATEN_CPU_CAPABILITY" in os.environ

Chosen = TypeVar("Chosen")


class Implementation(NamedTuple):
    name: str
    device: str
    backend: str  #: what `genkernels.use_backend` is told
    operator: str = ""

    @property
    def functions(self):
        """The torch operators by name, as attributes: of the reference, or of the registered operator."""
        if self.backend == "reference":
            return reference_of(self.operator)
        return torch.ops.genkernels

    @property
    def compiles(self) -> bool:
        """Whether each shape costs a compilation."""
        return self.name == "triton"

    @property
    def is_slow(self) -> bool:
        """Whether a thread's work takes a function call or more."""
        return self.name in ("triton interpreted", "cuda emulated")

    @property
    def is_interpreted(self) -> bool:
        return self.name == "triton interpreted"

    def some(self, cases: Sequence[Chosen], turn: int = 0, interpreted: Sequence[Chosen] | None = None, **others):
        """Of cases that meet the same paths: all; where each is a compilation, one, another for another `turn`.

        Args:
            interpreted: those that Triton's interpreter takes, which needs a second for what a GPU does in no time.
            others: the same for further implementations, by name (``emulated``, ``cpu``).
        """
        if self.compiles:
            return [cases[turn % len(cases)]]
        chosen = {"triton interpreted": interpreted, "cuda emulated": others.get("emulated"), "cpu": others.get("cpu")}
        return cases if chosen.get(self.name) is None else chosen[self.name]


def few(rows: Sequence[tuple], *names: str):
    """Whether parameters of those names begin a row. A row may go on, with what the test itself goes through
    (`tests.checks.behind`)."""
    begun = {row[: len(names)] for row in rows}
    return lambda **given: tuple(given[name] for name in names) in begun


def interpreted_few(rows: Sequence[tuple], *names: str):
    """For ``when`` (tests/ops/conftest.py): Triton's interpreter takes the cases that are among a `few`, others take
    all."""
    chosen = few(rows, *names)
    return lambda implementation, **given: not implementation.is_interpreted or chosen(**given)


def slow_few(rows: Sequence[tuple], *names: str):
    """The same for Triton's interpreter and the emulated CUDA kernels."""
    chosen = few(rows, *names)
    return lambda implementation, **given: not implementation.is_slow or chosen(**given)


def reference_of(operator: str):
    """The module of the definition, which has the torch operators by name."""
    return importlib.import_module(f"genkernels.reference.{operator}")


IMPLEMENTATIONS = (
    Implementation("reference", "cpu", "reference"),
    Implementation("reference on a GPU", "cuda", "reference"),
    Implementation("cpu", "cpu", "cpu"),
    Implementation("triton", "cuda", "triton"),
    Implementation("cuda", "cuda", "cuda"),
    Implementation("triton interpreted", "cpu", "cpu"),
    Implementation("cuda emulated", "cpu", "cpu"),
)


@functools.cache
def why_absent(name: str) -> str:
    """Why an implementation does not run in this process; empty where it does."""
    if (name == "triton interpreted") != INTERPRETED:
        return (
            "it runs in a process of its own, started without TRITON_INTERPRET"
            if INTERPRETED
            else ("it runs in a process of its own, started with TRITON_INTERPRET=1")
        )
    if name == "reference on a GPU":
        return "" if torch.cuda.is_available() else "no CUDA device is available"
    if name in ("triton interpreted", "cuda emulated"):
        if missing := backends.why_missing("cpu"):
            return f"it stands in for the CPU library: {missing}"
        if name == "cuda emulated" and not shutil.which(os.environ.get("CXX", "g++")):
            return "there is no C++ compiler (g++) on PATH"
        return "" if importlib.util.find_spec("triton") or name == "cuda emulated" else "Triton is not installed"
    return backends.why_missing(name) or ""


def of(operator: str, torch_op: str | None = None) -> list[Implementation]:
    """Those that run here, of an operator or, where that is named, of one of its torch operators."""
    names = [torch_op] if torch_op else list(ops.OPERATORS[operator].torch_ops)
    found = [i for i in IMPLEMENTATIONS if not why_absent(i.name) and any(_has(i.name, operator, n) for n in names)]
    if any(i.name in ("triton", "cuda") for i in found):  # where there are kernels, the definition is run on the CPU
        found = [i for i in found if i.name != "reference on a GPU"]
    return [i._replace(operator=operator) for i in found]


def _has(name: str, operator: str, torch_op: str) -> bool:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if name.startswith("reference"):
        return True
    if name == "cpu":
        return has_kernel(f"genkernels::{torch_op}", "CPU")
    if name.startswith("triton"):
        return torch_op in _launchers(operator)
    if not (emulation.ROOT / "csrc" / "cuda" / f"{operator}.cu").exists():
        return False
    if name == "cuda":
        return has_kernel(f"genkernels_cuda::{torch_op}", "CUDA")
    return emulation.registers(operator, torch_op)


@functools.cache
def _launchers(operator: str) -> dict:
    if not (emulation.ROOT / "genkernels" / "triton" / f"{operator}.py").exists():
        return {}
    module = importlib.import_module(f"genkernels.triton.{operator}")
    return {name: getattr(module, name) for name in ops.OPERATORS[operator].torch_ops if hasattr(module, name)}


@contextmanager
def in_force(implementation: Implementation) -> Iterator[None]:
    """Makes its operator run by `implementation`, through its public functions and as ``torch.ops.genkernels``."""
    operator = implementation.operator
    with ExitStack() as stack:
        kernels = {}
        if implementation.name == "triton interpreted":
            kernels = _launchers(operator)
        if implementation.name == "cuda emulated":
            emulated = emulation.load(operator)
            names = [n for n in ops.OPERATORS[operator].torch_ops if emulation.registers(operator, n)]
            kernels = {name: getattr(emulated, name) for name in names}
        if kernels:
            stack.enter_context(_stand_ins(kernels))
            stack.enter_context(_without_others(operator, kernels))
        stack.enter_context(backends.use_backend(implementation.backend))
        yield


@contextmanager
def _stand_ins(kernels: dict) -> Iterator[None]:
    with torch.library._scoped_library("genkernels", "IMPL") as library, warnings.catch_warnings():
        # numpy, in which the interpreter computes, warns of each overflow that a GPU passes over
        warnings.filterwarnings("ignore", category=RuntimeWarning)
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        for name, kernel in kernels.items():
            library.impl(name, kernel, "CPU", allow_override=True)
        yield


@contextmanager
def _without_others(operator: str, kernels: dict) -> Iterator[None]:
    """Torch operators of which the C++ library alone has a kernel have none, as on a GPU: public functions then take
    what is stood in for."""
    own = [op for name, op in ops.OPERATORS[operator].torch_ops.items() if name not in kernels]
    others = [op for op in own if op.has("cpu") and not op.has("triton") and not op.has("cuda")]
    before = [op.kernels for op in others]
    for op in others:
        op.kernels = op.kernels | {"cpu": "nothing stands in for it"}
    try:
        yield
    finally:
        for op, own in zip(others, before, strict=True):
            op.kernels = own


def summary() -> list[str]:
    """One line for what runs here, one for each that does not."""
    here = [i.name for i in IMPLEMENTATIONS if not why_absent(i.name) and i.name != "reference on a GPU"]
    absent = [f"not {i.name}: {why_absent(i.name)}" for i in IMPLEMENTATIONS if why_absent(i.name)]
    return [f"implementations held to the operators' tests: {', '.join(here)}", *absent]
