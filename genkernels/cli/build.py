"""A model from its command-line name, the data it is for, and what the user set."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from genkernels._words import UsageError, nearest
from genkernels.data.bundle import listed
from genkernels.models import model_class

if TYPE_CHECKING:
    from genkernels.models import Model, Preset

__all__ = ["build", "chosen_preset", "keyed", "model_class", "model_kwargs"]


def chosen_preset(kind: type, bundle, preset: str | None) -> Preset | None:
    """The preset that is named; else the one called like the data set, or ``points`` for points, if there is one.

    Raises:
        UsageError: the model has none of that name.
    """
    presets = kind.presets
    if preset is None:
        fitting = (bundle.name,) if bundle.form.is_image else (bundle.name, "points")
        preset = next((name for name in fitting if name in presets), None)
    elif preset not in presets:
        raise UsageError(f"unknown preset {preset!r} of {kind.__name__}{nearest(preset, presets) or '; it has none'}")
    return None if preset is None else presets[preset]


def model_kwargs(
    kind: type, name: str, bundle, *, preset: str | None, settings: list[str], reversible: bool, classes: bool
) -> dict:
    """The constructor's arguments: the preset's sizes, then what the data say, then what the user set.

    Args:
        kind: the model's class.
        name: its command-line name.
        bundle: the data: what follows from them holds whatever a preset says.
        preset: a name in ``kind.presets``, or None, as for `chosen_preset`.
        settings: ``key=value`` strings.
        reversible, classes: the flags.

    Raises:
        UsageError: an unknown preset or argument, one that contradicts the data, or classes that the data do not have.
    """
    chosen = chosen_preset(kind, bundle, preset)
    arguments = dict(chosen.sizes) if chosen else {}
    arguments.pop("num_classes", None)
    allowed = _parameters(kind)
    facts = kind.fit_to(bundle.form)
    arguments |= facts
    who = "--class-conditional" if classes else name
    classes = classes or "num_classes" in facts
    if classes:
        if not bundle.form.num_classes:
            why = next(
                (f" ({note})" for note in bundle.notes if note.startswith(("no classes", "labels are left"))), ""
            )
            raise UsageError(f"{who} needs labels: the data {bundle.name} have none{why}")
        if bundle.untrained:
            raise UsageError(
                f"{who} needs an example of every class to train on: in {bundle.name} all those of "
                f"{listed(bundle.untrained)} are held out (give parts of your own, train and test)"
            )
        _needs(allowed, "num_classes", name, "--class-conditional")
        arguments["num_classes"] = bundle.form.num_classes
    if reversible:
        _needs(allowed, "reversible", name, "--reversible")
        arguments["reversible"] = True
    for key, value in keyed(settings):
        if allowed is not None and key not in allowed:
            raise UsageError(f"{name} has no argument {key!r}{nearest(key, allowed)}")
        arguments[key] = value
        if key in facts and arguments[key] != facts[key]:
            raise UsageError(f"--set {key}: it follows from the data {bundle.name}, {facts[key]}, got {arguments[key]}")
        if key == "num_classes" and (arguments[key] or None) != (bundle.form.num_classes if classes else None):
            raise UsageError("--set num_classes: it follows from the labels of the data, give --class-conditional")
    return arguments


def build(kind: type, name: str, arguments: dict) -> Model:
    """Calls the constructor; what it refuses becomes a sentence that names the model."""
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        sentence = str(error).removeprefix(f"{kind.__name__}.__init__() ")
        raise UsageError(sentence if sentence.lower().startswith(name) else f"{name}: {sentence}") from error
    except Exception as error:  # torch itself: a negative width, more memory than there is
        raise UsageError(f"{name} cannot be built from {arguments}: {str(error).splitlines()[0]}") from error


def keyed(settings: list[str]) -> Iterator[tuple[str, Any]]:
    """``KEY=VALUE`` strings as names and Python values."""
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set takes KEY=VALUE, got {text!r}")
        yield key.strip().replace("-", "_"), _value(value)


def _parameters(kind: type) -> list[str] | None:
    """Names of the constructor's arguments; None where it takes any."""
    parameters = inspect.signature(kind).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return [p.name for p in parameters]


def _needs(allowed: list[str] | None, argument: str, name: str, flag: str) -> None:
    if allowed is not None and argument not in allowed:
        raise UsageError(f"{flag}: {name} has no argument {argument!r}, it cannot do that")


def _value(text: str):
    """A Python literal, true/false/none in any case, or the text itself."""
    words = {"true": True, "false": False, "none": None}
    if text.strip().lower() in words:
        return words[text.strip().lower()]
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text
