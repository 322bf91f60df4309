"""How this library says no: one sentence that names what must hold, what came, and what may have been meant."""

from __future__ import annotations

import contextlib
import difflib
import sys
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


def memory_ran_out(error: BaseException) -> bool:
    """Whether that is what an error says, of the CPU's memory or of a GPU's."""
    name = type(error).__name__  # torch's own is not imported for this
    return isinstance(error, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in str(error)


def bytes_text(count: float) -> str:
    """``3.4 GB``."""
    power = next((i for i in range(4) if count < 1000 ** (i + 1)), 4)
    value = count / 1000**power
    return f"{value:.0f} bytes" if not power else f"{value:.{int(value < 100)}f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def notice(sentence: str) -> None:
    """A line on stderr, where there is one and its reader has not gone."""
    with contextlib.suppress(OSError, AttributeError):
        sys.stderr.write(f"genkernels: {' '.join(sentence.splitlines())}\n")
        sys.stderr.flush()
