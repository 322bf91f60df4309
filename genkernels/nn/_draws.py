"""What random layers draw from: torch's own generator, or the one that a model's caller gave it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

_GIVEN: ContextVar[torch.Generator | None] = ContextVar("the generator of random layers", default=None)


@contextlib.contextmanager
def drawing_from(generator: torch.Generator | None) -> Iterator[None]:
    """Within, layers that draw (the log-determinant of `InvertibleResidual`) do so from this one; None changes
    nothing."""
    if generator is None:
        yield
        return
    token = _GIVEN.set(generator)
    try:
        yield
    finally:
        _GIVEN.reset(token)


def given_generator() -> torch.Generator | None:
    return None if torch.compiler.is_compiling() else _GIVEN.get()
