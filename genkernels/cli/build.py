"""A model from its command-line name, the data it is for, and what the user set."""

from __future__ import annotations

import ast
import inspect
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from genkernels._machine import free_memory
from genkernels._seeds import fixed_seed
from genkernels._words import UsageError, bytes_text, memory_ran_out, nearest
from genkernels.data import NAMES
from genkernels.data.bundle import listed
from genkernels.models import model_class

if TYPE_CHECKING:
    from genkernels.models import Model

__all__ = ["build", "chosen_preset", "fitted", "keyed", "model_class", "model_kwargs"]

FEW = 1000  # examples to train on
#: Of a parameter: itself, its gradient, two moments, its average; single precision.
_BYTES = 5 * 4


def chosen_preset(kind: type, bundle, preset: str | None) -> str | None:
    """The name of the preset that is asked for, or of the first of `candidates`."""
    return candidates(kind, bundle, preset)[0]


def candidates(kind: type, bundle, preset: str | None) -> list[str | None]:
    """Names of the presets to try, the best first: the one that is named; else the one called like the data set; else,
    by the form of the data, ``points``, or those sizes of images that are called like a data set of this package. The
    nearest in the number of values comes first, of few examples the smallest: the sizes of papers are to be named.

    Raises:
        UsageError: the model has none of that name.
    """
    presets = kind.presets
    if preset is not None:
        if preset not in presets:
            hint = nearest(preset, presets) or "; it has none"
            raise UsageError(f"unknown preset {preset!r} of {kind.__name__}{hint}")
        return [preset]
    if bundle.name in presets:
        return [bundle.name]
    if not bundle.form.is_image:
        return ["points"] if "points" in presets else [None]
    values = {name: math.prod(presets[name].sizes["shape"]) for name in presets if name in NAMES}
    few, own = len(bundle.train) < FEW, math.prod(bundle.form.shape)
    return sorted(values, key=lambda name: values[name] if few else abs(math.log(own / values[name]))) or [None]


def fitted(
    kind: type,
    name: str,
    bundle,
    *,
    preset: str | None,
    settings: list[str],
    base: dict | None = None,
    seed: int = 0,
    **flags,
) -> tuple[Model, str | None, str]:
    """The model, of a size that fits its data; the name of its preset; and words on that.

    Args:
        seed: of its weights, which are those that the same sizes have without a search. The others: as for
            `model_kwargs`.

    Raises:
        UsageError: none of the sizes fits, and what the first of them lacks.
    """
    refusal, own = None, {key for key, _ in keyed(settings)}
    for size in [None] if base is not None else candidates(kind, bundle, preset):
        arguments = model_kwargs(kind, name, bundle, preset=size, settings=settings, base=base, **flags)
        by_form = size is not None and size not in (preset, bundle.name)
        for changed in _adapted(arguments, own) if by_form else [{}]:
            try:
                with fixed_seed(seed):
                    model = build(kind, name, arguments | changed)
                return model, size, _of_size(kind, bundle, size, by_form)
            except UsageError as error:
                refusal = refusal or error
    raise UsageError(f"{refusal}{_other_size(bundle, str(refusal))}") from refusal


def _adapted(arguments: dict, own: set[str]) -> Iterator[dict]:
    """Ways in which a preset's sizes may fit pictures of another height and width; what the user set stays."""
    yield {}
    if "scales" in arguments and "scales" not in own:
        yield from ({"scales": scales} for scales in range(arguments["scales"] - 1, 0, -1))
    if "strides" in arguments and "strides" not in own:
        yield {"strides": tuple(math.gcd(stride, *arguments["shape"][1:]) for stride in arguments["strides"])}


def _of_size(kind: type, bundle, size: str | None, by_form: bool) -> str:
    if not by_form:
        return "" if size is None else f" at the preset {size}"
    if not bundle.form.is_image:
        return f" at the preset {size}"
    others = [name for name in kind.presets if name != size and "-" not in name and name != "points"]
    more = f" (by name: --preset {' or '.join(others)})" if others else ""
    form = "x".join(map(str, bundle.form.shape))
    return f" at the preset {size}, which fits {form} and {len(bundle.train):,} examples{more}"


def _other_size(bundle, refusal: str) -> str:
    """The option that would scale pictures of one's own, where a model's refusal is about their size."""
    about_size = any(word in refusal for word in ("multiple", "divide", "even"))
    if not about_size or not bundle.name.startswith(("folder:", "hf:")) or "?" in bundle.name:
        return ""
    side = max(8, round(min(bundle.form.shape[1:]) / 8) * 8)
    return f"; --data '{bundle.name}?size={side}' scales and crops the pictures"


def model_kwargs(
    kind: type,
    name: str,
    bundle,
    *,
    preset: str | None,
    settings: list[str],
    reversible: bool,
    classes: bool,
    base: dict | None = None,
) -> dict:
    """The constructor's arguments: the preset's sizes, then what the data say, then what the user set.

    Args:
        kind: the model's class.
        name: its command-line name.
        bundle: the data: what follows from them holds whatever a preset says.
        preset: a name in ``kind.presets``, or None, as for `chosen_preset`.
        settings: ``key=value`` strings.
        reversible, classes: the flags.
        base: sizes in place of a preset's: another run's.

    Raises:
        UsageError: an unknown preset or argument, one that contradicts the data, or classes that the data do not have.
    """
    chosen = None if base is not None else chosen_preset(kind, bundle, preset)
    arguments = dict(kind.presets[chosen].sizes if chosen else base or {})
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
    """Calls the constructor; what it refuses, and a model that this machine has no room for, becomes a sentence that
    names the model."""
    try:
        _check_room(kind, name, arguments)
        return kind(**arguments)
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        sentence = str(error).removeprefix(f"{kind.__name__}.__init__() ")
        raise UsageError(sentence if sentence.lower().startswith(name) else f"{name}: {sentence}") from error
    except Exception as error:  # torch itself
        if memory_ran_out(error):
            size = re.search(r"allocate (\d+) bytes", str(error))
            needed = f": one of its tensors takes {bytes_text(int(size[1]))}" if size else ""
            raise UsageError(f"{name} of these sizes is more than the memory here{needed}") from error
        raise UsageError(f"{name} cannot be built from {arguments}: {str(error).splitlines()[0]}") from error


def _check_room(kind: type, name: str, arguments: dict) -> None:
    """Refuses a model whose training takes more memory than there is, before any is taken: built without storage."""
    free = free_memory()
    try:
        with torch.device("meta"), fixed_seed(0):
            needed = _BYTES * sum(p.numel() for p in kind(**arguments).parameters())
    except Exception:  # one that cannot be built so; what is wrong with it, building it says
        return
    if free is not None and needed > free:
        raise UsageError(
            f"{name} of these sizes has {needed // _BYTES:,} parameters, whose training takes {bytes_text(needed)} at "
            f"least: {bytes_text(free)} are free"
        )


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
