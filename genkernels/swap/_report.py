"""What a swap did, and the way back."""

from __future__ import annotations

from typing import Any, NamedTuple

#: How the names begin of what a swapped class keeps in an object.
KEPT = "_gk_"


class Entry(NamedTuple):
    """One module of a model.

    Args:
        name: its place, as in ``model.named_modules()``; several joined by ", " where it stands in several.
        was: its class. became: the class that computes now, "" where it stayed.
        reason: why it stayed; of one that was swapped what there is to know, often "".
    """

    name: str
    was: str
    became: str
    reason: str


class Change(NamedTuple):
    thing: Any
    was: type
    became: type


class Report:
    """What became of each module that the model has from a known library.

    Attributes:
        entries: an `Entry` a module, in the order of ``model.named_modules()``.
        notes: sentences about the whole, such as a version of a library that the swaps do not know.
        changes: each object that was given another class, with both classes: what `undo` takes back.
    """

    def __init__(self, entries: list[Entry], notes: list[str], changes: list[Change]):
        self.entries, self.notes = entries, notes
        self.changes = changes

    @property
    def swapped(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.became]

    @property
    def stayed(self) -> list[Entry]:
        return [entry for entry in self.entries if not entry.became]

    def undo(self) -> None:
        """Gives every module its class back. Weights, trained since or not, are the same tensors all along.

        Raises:
            RuntimeError: a module's class is no longer the one that it was given; nothing is changed then.
        """
        for thing, _, became in self.changes:
            if type(thing) is not became:
                raise RuntimeError(
                    f"undo: a module must still be the {became.__name__} that it became, got {type(thing).__name__}: "
                    "what was put on after the swap is taken off before it"
                )
        while self.changes:
            thing, was, _ = self.changes.pop()
            thing.__class__ = was
            for name in [name for name in vars(thing) if name.startswith(KEPT)]:
                delattr(thing, name)

    def __str__(self) -> str:
        count = len(self.swapped)
        lines = [f"{count} of {len(self.entries)} modules swapped"]
        rows = [
            (entry.name or "(the model)", entry.was, f"→ {entry.became}" if entry.became else "stays", entry.reason)
            for entry in self.entries
        ]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        lines += ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows]
        return "\n".join(lines + self.notes)

    __repr__ = __str__
