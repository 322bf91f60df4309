"""The two ways in which training says no. Each message is one sentence that names what must hold and what came."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """What was asked for cannot be done: a name, a path or a setting is wrong. Raised before the first step."""


class TrainingError(RuntimeError):
    """Training began and could not go on."""


def nearest(name: str, names: Iterable[str], *, listed: bool = False) -> str:
    """``'; did you mean glow?'``, or what the choices are where nothing is near.

    Args:
        name: what came.
        names: what is allowed.
        listed: the sentence has listed them already.
    """
    names = list(names)
    near = difflib.get_close_matches(str(name).lower(), names, n=3, cutoff=0.55)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; choose from {', '.join(names)}" if names and not listed else ""
