"""genkernels: fast kernels, layers and models for deep generative modelling in PyTorch.

``import genkernels as gk`` pulls in torch and numpy alone; ``gk.nn``, ``gk.models``, ``gk.data`` and ``gk.training``
load when first named.
"""

from __future__ import annotations

import importlib

from genkernels import ops, reference
from genkernels._version import __version__
from genkernels.backends import BackendUnavailable, current_backend, use_backend

_ROOMS = ("nn", "models", "data", "training", "benchmarks")

__all__ = [
    "BackendUnavailable", "__version__", "current_backend", "ops", "reference", "use_backend", *_ROOMS,
]  # fmt: skip


def __getattr__(name: str):
    if name in _ROOMS:
        return importlib.import_module(f"genkernels.{name}")
    raise AttributeError(f"module 'genkernels' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
