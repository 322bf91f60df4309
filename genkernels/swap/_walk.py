"""The walk over a model."""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib import metadata
from typing import Any

import torch
from torch import nn

from genkernels.ops import checks
from genkernels.swap._report import Change, Entry, Report
from genkernels.swap._rules import Becomes, Library

WHO = "swap_"
#: Library: the file here that knows it. It is read where the model has a class of that library, not before.
FILES = {
    "torch": "torch", "nflows": "nflows", "normflows": "normflows", "zuko": "zuko", "FrEIA": "freia",
    "pytorch_generative": "pytorch_generative", "pythae": "pythae",
}  # fmt: skip
#: Why a module of a compiled part of a model stays.
COMPILED = "within a compiled module, which would not notice: swap first, compile then"
#: The dtypes in which a swapped module gives what the other gave, up to the last digits.
EXACT = (torch.float32, torch.float64)


def swap_(model: nn.Module, dtype: torch.dtype | None = None) -> Report:
    r"""Lets the modules that a model has from other libraries compute by this library's operators, in place.

    A module is swapped where the result is the same: values, log-determinants and gradients, in both directions, in
    training and in evaluation, with and without a context; and where it is faster. Everything else stays. What changes
    is the module's class, to a subclass of its own: its parameters, the keys of its state dict, its hooks and
    ``isinstance`` stay as they are, so that optimisers, checkpoints and the code around it notice nothing.

    Equivalent to (one coupling of nflows)::

        model.transform.__class__ = genkernels.swap.nflows.AffineCoupling

    Args:
        model: a model of nflows 0.14, normflows 1.7.3, zuko 1.6.0, FrEIA 0.2, pythae 0.1.2 or pytorch-generative
            (commit d1f0a5c), or any with torch's spectral norm.
        dtype: a half dtype: modules that are held in it are swapped too. Kernels compute halves in fp32 and round
            once, so that results there differ by the other library's roundings. By default fp32 and fp64 alone.

    Returns:
        A `Report`: what became of each module or why it stayed; ``report.undo()`` is the way back.

    Raises:
        TypeError: no eager module was given: another object, a scripted model, a compiled one (swap first, compile
            then), or no dtype.

    A model with nothing to swap is told in a warning. No library is imported that the model does not use.
    """
    _check(model, dtype)
    places, compiled = _places(model), _compiled(model)
    entries, changes, unknown = [], [], set()
    choices: list[tuple[str, Any, Library, Becomes | str]] = []
    for name, thing in places:
        library, kind = _library_of(thing)
        if library is None:
            continue
        choice = COMPILED if id(thing) in compiled else _choice(library, kind, thing, dtype)
        if library.versions and (version := metadata.version(library.name)) not in library.versions:
            unknown.add(f"{library.name} {version} is installed; its swaps were held against {library.versions[-1]}.")
            choice = f"{library.name} {version} is not known here, {library.versions[-1]} is"
        choices.append((name, thing, library, choice))
    swapped: dict[str, list] = {}
    for _, thing, library, choice in choices:
        if not isinstance(choice, str):
            swapped.setdefault(library.name, []).append(thing)
    alone = {name: _read(name).together(model, things) if name else "" for name, things in swapped.items()}
    for name, thing, library, choice in choices:
        choice = choice if isinstance(choice, str) else alone[library.name] or choice
        was = f"{library.name} {type(thing).__name__}".strip()
        if isinstance(choice, str):
            entries.append(Entry(name, was, "", choice))
            continue
        entries.append(Entry(name, was, f"{choice.to.__module__}.{choice.to.__name__}", choice.note))
        changes.append(Change(thing, type(thing), choice.to))
    for thing, _, to in changes:
        thing.__class__ = to
    for name, things in swapped.items():
        if name and not alone[name]:
            _read(name).join(model, things)
    notes = sorted(unknown)
    if not changes:
        why = "each of them has its reason in the report" if entries else f"there is none of {', '.join(FILES)}"
        warnings.warn(f"{WHO}: no module of this {type(model).__name__} was swapped: {why}", stacklevel=2)
        notes += [] if entries else [why]
    report = Report(entries, notes, changes)
    return report


def _check(model, dtype) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{WHO}: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"{WHO}: model must be eager, got a scripted one: swap the model that it was made of")
    if _is_compiled(model):
        raise TypeError(f"{WHO}: model must be eager, got a compiled one: swap first, compile then")
    if dtype is not None:
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{WHO}: dtype must be a torch.dtype, got {dtype!r}")
        if dtype not in checks.FLOATS:
            raise TypeError(f"{WHO}: dtype must be one that kernels compute in, got {dtype}")


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


def _compiled(model: nn.Module) -> set[int]:
    """What stands within a compiled part of a model, and what hangs on it."""
    found = set()
    for part in model.modules():
        if _is_compiled(part):
            found |= {id(thing) for module in part.modules() for thing in (module, *_parts(module).values())}
    return found


def _places(model: nn.Module) -> list[tuple[str, Any]]:
    """Every module, and what hangs on it, once, with all its names."""
    names: dict[int, list[str]] = {}
    things: dict[int, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        parts = {"": module} | _parts(module)
        for word, thing in parts.items():
            things[id(thing)] = thing
            names.setdefault(id(thing), []).append(f"{name} ({word})" if word else name)
    return [(", ".join(names[key]), thing) for key, thing in things.items()]


def _parts(module: nn.Module) -> dict[str, Any]:
    hooks = module._forward_pre_hooks.values()
    return _read("torch").parts(module) if hooks else {}


def _read(name: str) -> Library:
    return importlib.import_module(f"genkernels.swap.{FILES[name]}").LIBRARY


def _library_of(thing) -> tuple[Library | None, type | None]:
    """The library with a rule for one of the classes of a thing, and that class, the most derived one."""
    for kind in type(thing).__mro__:
        package = kind.__module__.partition(".")[0]
        if package in FILES and package in sys.modules:
            library = _read(package)
            if kind in library.rules:
                return library, kind
    if isinstance(thing, nn.Conv2d) and isinstance(getattr(thing, "mask", None), torch.Tensor):
        copies = importlib.import_module("genkernels.swap.copies")
        if copies.is_masked(thing):
            return copies.LIBRARY, type(thing)
    return None, None


def _choice(library: Library, kind: type, thing, dtype: torch.dtype | None) -> Becomes | str:
    if type(thing).__module__.startswith("genkernels.swap."):
        return "swapped already"
    if isinstance(thing, torch.jit.ScriptModule):
        return "scripted"
    if type(thing) is not kind:
        return _subclass(thing, kind)
    replaced = [name for name, value in vars(kind).items() if callable(value) and name in vars(thing)]
    if "forward" in vars(thing) and "forward" not in replaced:
        replaced.append("forward")
    if replaced:
        return f"{', '.join(sorted(replaced))} of this one was replaced"
    if isinstance(thing, nn.Module):
        tensors = [*thing.parameters(), *thing.buffers()]
        devices = sorted({str(t.device) for t in tensors})
        if len(devices) > 1:
            return f"on several devices: {', '.join(devices)}"
        dtypes = {t.dtype for t in thing.parameters() if t.dim()}  # numbers by themselves change no tensor's dtype
        if others := sorted(str(t) for t in dtypes if t not in EXACT and t != dtype):
            return f"held in {', '.join(others)}: results would differ by roundings, dtype= asks for it"
        if len(dtypes) > 1:
            return f"of several dtypes: {', '.join(sorted(map(str, dtypes)))}"
    return library.rule(kind)(thing)


def _subclass(thing, kind: type) -> str:
    between = type(thing).__mro__[: type(thing).__mro__.index(kind)]
    changed = sorted({name for cls in between for name, value in vars(cls).items() if _is_method(name, value)})
    does = f"changes {', '.join(changed)}" if changed else "may be told from it by other code"
    return f"a subclass of {kind.__name__}, which {does}"


def _is_method(name: str, value) -> bool:
    return callable(value) and (not name.startswith("__") or name == "__call__")
