"""What a module tree looks like to one who would call it: told apart cheaply, so that what was traced is traced again
when it has changed.

Counted are the modules themselves, their classes and their ``forward``, training mode, hooks, which parameters and
buffers there are and of what shape, and every plain attribute: numbers, strings, arrays, containers, and objects with
attributes of their own, three deep. Values of tensors do not count: what branches on them is not traced. Not seen are
globals, attributes of classes, closures, what objects hold in other ways, and the attributes of objects whose class
says ``genkernels_remembers = True``: they keep what follows from tensors (normalised weights), which a call may renew.
"""

from __future__ import annotations

import functools
import pickle
import random
import types
import weakref
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

#: Attributes of every module that a call does not read, or that are looked at by themselves.
_PASSED_OVER = frozenset(nn.Module().__dict__) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = frozenset((int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, type))
_DEPTH = 3


class State:
    """What a module tree looks like.

    Attributes:
        signs: equal for equal trees, as long as the objects live whose ids are among them. objects: these, weakly.
    """

    def __init__(self):
        self.signs: list = []
        self.objects: list[Callable] = []

    def still(self, now: State) -> bool:
        """Whether a tree that looked like this looks like `now`."""
        return self.signs == now.signs and all(ref() is not None for ref in self.objects)


def state_of(module: nn.Module) -> State:
    state = State()
    state.signs.append(bool(modules._has_any_global_hook()))
    _add_module(state, module, {})
    return state


def _add_module(state: State, module: nn.Module, seen: dict[int, int]) -> None:
    signs, kind, attributes = state.signs, type(module), module.__dict__
    if id(module) in seen:
        signs.append(seen[id(module)])
        return
    seen[id(module)] = len(seen)
    signs += id(module), kind, getattr(kind, "forward", None)
    state.objects.append(weakref.ref(module))
    for name in _HOOKS:
        if hooks := attributes[name]:
            signs += name, *hooks
    for tensors in (attributes["_parameters"], attributes["_buffers"]):
        for name, tensor in tensors.items():
            signs += name, None if tensor is None else tensor.shape
    for name in _read_by_calls(tuple(attributes)):
        value = attributes[name]
        signs.append(name)
        if (kind := type(value)) in _PLAIN:
            signs += kind, value
        else:
            _add_value(state, value, seen, 0)
    for name, child in attributes["_modules"].items():
        signs.append(name)
        if child is not None:
            _add_module(state, child, seen)


@functools.lru_cache(maxsize=1024)
def _read_by_calls(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of a module's attributes that are told one by one: most of the many that it has are every module's."""
    return tuple(name for name in names if name not in _PASSED_OVER)


def _add_value(state: State, value, seen: dict[int, int], depth: int) -> None:
    kind, signs = type(value), state.signs
    if kind in _PLAIN:
        signs += kind, value
    elif kind is tuple and _PLAIN.issuperset(kinds := list(map(type, value))):
        signs += kinds, value
    elif id(value) in seen:
        signs += kind, id(value)
    elif isinstance(value, nn.Module):
        _add_module(state, value, seen)
    elif isinstance(value, np.ndarray):
        signs += value.shape, value.dtype.str, value.tobytes()
    elif isinstance(value, dict):
        seen[id(value)] = len(seen)
        signs += kind, len(value)
        for key, item in value.items():
            _add_value(state, key, seen, depth)
            _add_value(state, item, seen, depth)
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        seen[id(value)] = len(seen)
        signs += kind, len(value)
        for item in value:
            _add_value(state, item, seen, depth)
    else:
        _add_object(state, value, seen, depth)


def _add_object(state: State, value, seen: dict[int, int], depth: int) -> None:
    seen[id(value)] = len(seen)
    state.signs += type(value), id(value)
    try:
        state.objects.append(weakref.ref(value))
    except TypeError:
        state.objects.append(_strongly(value))
    if getattr(type(value), "genkernels_remembers", False):
        return
    if depth < _DEPTH and not isinstance(value, (Tensor, types.ModuleType, types.FunctionType, type)):
        for name, attribute in getattr(value, "__dict__", {}).items():
            state.signs.append(name)
            _add_value(state, attribute, seen, depth + 1)


def _strongly(value):
    return lambda: value


class Untouched:
    """The attributes of a module tree and the generators of Python and NumPy, before its ``forward`` was called with
    stand-ins."""

    def __init__(self, module: nn.Module):
        self._module, self._state = module, state_of(module)
        kept = [d for m in module.modules() for d in (m.__dict__, m._parameters, m._buffers, m._modules)]
        self._kept = [(d, dict(d)) for d in kept]
        self._random = _generators()

    def state(self) -> State | None:
        """The module's state if it is what it was, else None."""
        return self._state if self._state.still(state_of(self._module)) else None

    def drew(self) -> bool:
        return _generators() != self._random

    def restore(self) -> None:
        """Attributes that were set, and tensors, as they were."""
        for now, before in self._kept:
            now.clear()
            now.update(before)


def _generators() -> bytes:
    return pickle.dumps((random.getstate(), np.random.get_state(legacy=False)))
