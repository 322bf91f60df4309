"""genkernels: fast kernels, layers and models for deep generative modelling in PyTorch.

Everything below loads when it is first named, so that ``import genkernels as gk`` and ``genkernels --help`` answer at
once; nothing but torch and numpy is pulled in until a name needs more. ``torch.ops.genkernels`` fills with the first
use of ``gk.ops`` or of anything that stands on it.
"""

from __future__ import annotations

import importlib

from genkernels._version import __version__

_ROOMS = ("ops", "reference", "nn", "losses", "testing", "models", "data", "metrics")
_ROOMS += ("pictures", "training", "benchmarks", "swap")
_FUNCTIONS = {"swap_": "genkernels.swap"}
_BACKENDS = ("BackendUnavailable", "current_backend", "use_backend")

__all__ = ["__version__", *_BACKENDS, *_ROOMS, *_FUNCTIONS]


def __getattr__(name: str):
    if name in _ROOMS:
        return importlib.import_module(f"genkernels.{name}")
    if name in _BACKENDS:
        return getattr(importlib.import_module("genkernels.backends"), name)
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module 'genkernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
