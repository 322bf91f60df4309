"""Which backends exist here, which is in force, and why one is missing.

A backend is one way to run an operator: ``reference`` (plain PyTorch, everywhere), ``cpu`` (the C++ library),
``triton`` and ``cuda`` (kernels for an NVIDIA GPU). ``auto`` picks the fastest that runs on a tensor's device.

The choice is one per process, not one per thread: autograd runs backward passes on threads of its own, and they must
see the choice that the forward pass saw.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from genkernels._words import UsageError, nearest

NAMES = ("auto", "reference", "cpu", "triton", "cuda")
LIBRARY_FOLDER = Path(__file__).parent / "_lib"

_forced = os.environ.get("GENKERNELS_BACKEND", "auto") or "auto"


class BackendUnavailable(RuntimeError):
    """A backend was forced that cannot run here; the message says which condition failed."""


def _checked(name: str) -> str:
    if name in NAMES:
        return name
    raise UsageError(f"backend must be one of {', '.join(NAMES)}, got {name!r}{nearest(name, NAMES, listed=True)}")


def current_backend() -> str:
    """The backend in force: ``auto`` unless `use_backend` or ``GENKERNELS_BACKEND`` forces one."""
    return _forced if _forced in NAMES else _checked(_forced)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend inside a ``with`` block, in the whole process.

    Args:
        name: ``auto``, ``reference``, ``cpu``, ``triton`` or ``cuda``.

    Raises:
        UsageError: the name is unknown.
        BackendUnavailable: the backend cannot run on this machine; says why.

    Example:
        >>> import genkernels as gk
        >>> with gk.use_backend("reference"):
        ...     gk.current_backend()
        'reference'
    """
    global _forced
    _checked(name)
    if name != "auto" and (reason := why_missing(name)):
        raise BackendUnavailable(f"backend {name!r} cannot run here: {reason}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def cpu_variant() -> str | None:
    """The build of the CPU library that suits this processor: ``avx512``, ``avx2`` (x86-64-v3) or ``generic``."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "generic"
    capability = torch.backends.cpu.get_cpu_capability()
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(capability)


def library_path(kind: str) -> Path | None:
    """The file that holds the ``cpu`` or ``cuda`` kernels for this machine, or None where there is none."""
    names = ["libgenkernels_cuda.so"] if kind == "cuda" else []
    if kind == "cpu":
        variant = cpu_variant()
        names = [f"libgenkernels_cpu_{variant}.so"] if variant else []
    return next((p for name in names if (p := LIBRARY_FOLDER / name).exists()), None)


def built() -> dict:
    """What the compiled libraries were built from, as setup.py wrote it down: ``commit``, ``torch``, and for ``cpu``
    and ``cuda`` the ``compiler`` with the ``variants`` or ``architectures``. Empty where nothing was built."""
    try:
        return json.loads((LIBRARY_FOLDER / "built.json").read_bytes())
    except (OSError, ValueError):
        return {}


def _load(kind: str) -> str | None:
    """Loads a compiled library; the reason why it could not, or None."""
    path = library_path(kind)
    if path is None:
        if kind == "cpu" and cpu_variant() is None:
            return "this x86-64 processor lacks AVX2 (x86-64-v3)"
        command = f"GENKERNELS_BUILD={kind} pip install --no-build-isolation ."
        return f"the {kind.upper()} library was not built ({command} builds it)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return None


# Settled once, at import, into plain values: torch.compile traces through why_missing and must find nothing to execute
# there.
_ABSENT: dict[str, str | None] = {
    "cpu": _load("cpu"),
    "cuda": _load("cuda") if torch.version.cuda else "this build of torch has no CUDA",
    "triton": None if importlib.util.find_spec("triton") else "the package triton is not installed",
}


def why_missing(name: str) -> str | None:
    """None where the backend runs on this machine, else the condition that failed."""
    if name == "cpu":  # asked in every call of an operator
        return _ABSENT[name]
    _checked(name)
    if name in ("auto", "reference"):
        return None
    if torch.version.cuda is None:
        return "this build of torch has no CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    return _ABSENT[name]


def describe() -> list[dict[str, str]]:
    """One row a backend, ``{"backend", "runs", "why"}``, for ``genkernels info``."""
    rows = []
    for name in NAMES[1:]:
        reason = why_missing(name)
        note = reason or ""
        if name == "cpu" and not reason:
            note = f"{cpu_variant()} build"
        rows.append({"backend": name, "runs": "no" if reason else "yes", "why": note})
    return rows
