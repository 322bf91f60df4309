"""What the file of a library says: for each of its classes, what an object of it becomes, or why it stays.

A swap changes the *class* of an object to a subclass of what it was, and nothing else: parameters, buffers, the keys of
the state dict, hooks, the name in its parent, ``isinstance`` and every reference to it stay, and so does what an
optimiser holds. The subclass overrides the methods that compute, ``forward`` and ``inverse``. Undoing gives the object
its class back. What a swapped class keeps in an object has a name that begins with ``_gk_``; it is taken off again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.compiler import is_compiling
from torch.jit import is_tracing


class Becomes(NamedTuple):
    """The class that an object is given, a subclass of its own, and what there is to know about it."""

    to: type
    note: str = ""


@dataclass(frozen=True)
class Library:
    """The swaps of one library.

    Args:
        name: as it is imported, and as it is installed.
        versions: those that the swaps were held against; none where the library is torch itself.
        rules: for each class what becomes of an object, or the reason why it stays.
        parts: for each module the objects that hang on it and are no modules (hooks), by a word for each.
        together: called with all objects that would be swapped; the reason why all of them stay, "" where they do not.
        join: called with all objects of the library that were swapped in one call.
        otherwise: the rule of a class that `rules` has not, of what belongs to no library.
    """

    name: str
    versions: tuple[str, ...]
    rules: dict[type, Callable[[Any], Becomes | str]]
    parts: Callable[[nn.Module], dict[str, Any]] = lambda module: {}
    together: Callable[[nn.Module, list], str] = lambda model, objects: ""
    join: Callable[[nn.Module, list], None] = lambda model, objects: None
    otherwise: Callable[[Any], Becomes | str] | None = None

    def rule(self, kind: type) -> Callable[[Any], Becomes | str]:
        return self.rules[kind] if self.otherwise is None else self.otherwise


#: Measured on one core: as one operation 0.5 to 1.1 times as fast for up to 200,000 values, at most 3 times beyond.
ACTNORM = (
    "one multiplication and one addition, a few per cent of a block, which as one operation are slower where small"
)


def stays(reason: str) -> Callable[[Any], str]:
    """The rule of a class that is never swapped."""
    return lambda thing: reason


def becomes(to: type, note: str = "") -> Callable[[Any], Becomes]:
    """The rule of a class that always is."""
    return lambda thing: Becomes(to, note)


def left_alone(module: nn.Module) -> bool:
    """Whether a call takes the other library's way: within ``torch.compile`` and ``torch.jit.trace``, which see through
    it, and in a replica of `nn.DataParallel`, which shares what a swapped class keeps with the replicas on other
    devices."""
    return is_compiling() or is_tracing() or "_is_replica" in module.__dict__


#: Activations that are the ReLU, however they are given.
RELUS = (torch.relu, torch.nn.functional.relu)


def is_relu(activation) -> bool:
    return activation in RELUS or type(activation) is nn.ReLU
