"""A model from its command-line name, the data it is for, and what the user set."""

from __future__ import annotations

import ast
import inspect

from torch import nn

from genkernels._words import UsageError, nearest


def model_kwargs(
    kind: type, name: str, bundle, *, preset: str | None, settings: list[str], reversible: bool, classes: bool
) -> dict:
    """The constructor's arguments: the preset's sizes, then what the data say, then what the user set.

    Args:
        kind: the model's class.
        name: its command-line name.
        bundle: the data: shape and levels follow from it, whatever a preset says.
        preset: a name in ``kind.presets``; None takes the one called like the data set, or ``points`` for points, if
            there is one.
        settings: ``key=value`` strings.
        reversible, classes: the flags.

    Raises:
        UsageError: an unknown preset or argument, one that contradicts the data, or classes that the data do not have.
    """
    presets = getattr(kind, "presets", {})
    if preset is not None and preset not in presets:
        raise UsageError(f"unknown preset {preset!r} of {name}{nearest(preset, presets) or '; it has none'}")
    if preset is None:
        fitting = (bundle.name, "points") if bundle.levels is None else (bundle.name,)
        preset = next((p for p in fitting if p in presets), None)
    arguments = dict(presets.get(preset, {}))
    allowed = _parameters(kind)
    for key in ("image_shape", "features", "data_levels", "num_classes"):
        arguments.pop(key, None)
    facts = _facts(bundle, allowed, name)
    arguments |= facts
    if classes:
        if not bundle.num_classes:
            raise UsageError(f"--class-conditional needs labels: the data {bundle.name} have none")
        _needs(allowed, "num_classes", name, "--class-conditional")
        arguments["num_classes"] = bundle.num_classes
    if reversible:
        _needs(allowed, "reversible", name, "--reversible")
        arguments["reversible"] = True
    for text in settings:
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            raise UsageError(f"--set takes KEY=VALUE, got {text!r}")
        if allowed is not None and key not in allowed:
            raise UsageError(f"{name} has no argument {key!r}{nearest(key, allowed)}")
        arguments[key] = _value(value)
        if key in facts and arguments[key] != facts[key]:
            raise UsageError(f"--set {key}: it follows from the data {bundle.name}, {facts[key]}, got {arguments[key]}")
        if key == "num_classes" and (arguments[key] or None) != (bundle.num_classes if classes else None):
            raise UsageError("--set num_classes: it follows from the labels of the data, give --class-conditional")
    return arguments


def _facts(bundle, allowed: list[str] | None, name: str) -> dict:
    """Shape and levels of the data, by the names that the model gives them."""
    if allowed is not None and "image_size" in allowed:  # a model of integer images
        if bundle.levels is None:
            raise UsageError(f"{name} is a model of images, the data {bundle.name} are points: try maf, glow or nice")
        channels, *size = bundle.shape
        return {"image_size": tuple(size), "channels": channels, "levels": bundle.levels}
    if bundle.levels is None:
        return {"features": bundle.shape[0]}
    return {"image_shape": tuple(bundle.shape), "data_levels": bundle.levels}


def build(kind: type, name: str, arguments: dict) -> nn.Module:
    """Calls the constructor; what it refuses becomes a sentence that names the model."""
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        sentence = str(error).removeprefix(f"{kind.__name__}.__init__() ")
        raise UsageError(sentence if sentence.lower().startswith(name) else f"{name}: {sentence}") from error
    except Exception as error:  # torch itself: a negative width, more memory than there is
        raise UsageError(f"{name} cannot be built from {arguments}: {str(error).splitlines()[0]}") from error


def model_class(name: str) -> type:
    from genkernels.models import MODELS

    if name not in MODELS:
        raise UsageError(f"unknown model {name!r}{nearest(name, MODELS)}")
    return MODELS[name]


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
