"""How this library says no: one sentence that names what must hold, what came, and what may have been meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """What was asked for cannot be done: a name, a path or a setting is wrong. Nothing was begun."""


def nearest(name: object, names: Iterable[str], *, listed: bool = False) -> str:
    """The end of a sentence about an unknown name: ``'; did you mean glow?'``, or the choices where nothing is near.

    Args:
        name: what came.
        names: what is allowed.
        listed: the sentence has listed them already.
    """
    names = list(names)
    if near := near_names(name, names):
        return f"; did you mean {' or '.join(near)}?"
    return f"; choose from {', '.join(names)}" if names and not listed else ""


def near_names(name: object, names: Iterable[str], count: int = 2) -> list[str]:
    """The names that `name` may have been meant for, the nearest first; upper and lower case count as one."""
    by_lower = {known.lower(): known for known in names}
    return [by_lower[n] for n in difflib.get_close_matches(str(name).lower(), by_lower, n=count, cutoff=0.55)]
