"""How training says that it cannot go on. Each message is one sentence."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """Training began and could not go on."""
