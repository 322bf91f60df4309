"""A model's constructor arguments: their types, and the record from which the same model is built again."""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any

#: Arguments of which a model has at least one: a width, or how often a part is repeated that there is no model without.
_AT_LEAST_ONE = {"width", "hidden", "steps", "transforms"}
#: How often a part is repeated, and how wide it is: of more, a model would be built until the memory is full.
_PARTS = "steps transforms couplings blocks layers hidden_layers pixel_layers prior_layers flows depth"
_AT_MOST = {"scales": 30, **dict.fromkeys(_PARTS.split(), 1000), **dict.fromkeys(("width", "hidden"), 10**6)}


def recorded(init):
    """A constructor that checks its arguments and, where it is the outermost one, records them in ``self.hparams``.

    `Model` puts it around each subclass's ``__init__``, so that a constructor holds nothing but the model. What an
    annotation says is checked where it is ``int`` (a count or a size: at least 0), ``float`` (finite), ``bool``, each
    ``str`` (not empty), each with or without ``| None``, or a tuple, which lists become; an argument without one is
    taken as it is.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self, *args, **kwargs):
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError:
            return init(self, *args, **kwargs)  # says what is missing or unknown in Python's own words
        bound.apply_defaults()
        itself, *names = bound.arguments
        kind = type(self)
        for name in names:
            parameter = signature.parameters[name]
            bound.arguments[name] = _checked(kind.__name__, name, bound.arguments[name], parameter.annotation)
        _check_vocabulary(kind, bound.arguments, signature)
        if kind.__init__ is wrapper:
            # nn.Module's constructor, which comes later, leaves what stands in __dict__
            self.__dict__["hparams"] = _record(bound, names)
        return init(*bound.args, **bound.kwargs)

    return wrapper


def _record(bound: inspect.BoundArguments, names: list[str]) -> dict[str, Any]:
    """The arguments by name, those of a ``**kwargs`` among them."""
    parameters = bound.signature.parameters
    hparams: dict[str, Any] = {}
    for name in names:
        if parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            hparams |= bound.arguments[name]
        else:
            hparams[name] = bound.arguments[name]
    return hparams


def _checked(model: str, name: str, value: Any, annotation: Any) -> Any:
    """The value, a list as a tuple where one is declared.

    Raises:
        ValueError: it is of another type than declared; a count or a size is negative.
    """
    declared = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    wanted, _, rest = declared.partition(" | ")
    if value is None and rest == "None":
        return None
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if wanted == "int" and not is_integer:
        raise ValueError(f"{model}: {name} must be an integer, got {value!r}")
    if wanted == "int" and value < (least := int(name in _AT_LEAST_ONE)):
        raise ValueError(f"{model}: {name} must be at least {least}, got {value}")
    if wanted == "int" and value > (most := _AT_MOST.get(name, 2**31 - 1)):
        raise ValueError(f"{model}: {name} must be at most {most:,}, got {value:,}")
    if wanted == "float" and not ((is_integer or isinstance(value, float)) and math.isfinite(value)):
        raise ValueError(f"{model}: {name} must be a finite number, got {value!r}")
    if wanted == "bool" and not isinstance(value, bool):
        raise ValueError(f"{model}: {name} must be True or False, got {value!r}")
    if wanted == "str" and rest in ("", "None") and not (isinstance(value, str) and value):
        raise ValueError(f"{model}: {name} must be a word, got {value!r}")
    if wanted.startswith("tuple[") and isinstance(value, list | tuple):
        return tuple(value)  # as it was, whether it comes from JSON or is a torch.Size
    if wanted.startswith("tuple[") and rest in ("", "None") and name != "shape":
        raise ValueError(f"{model}: {name} must be a list, got {value!r}")
    return value


def _check_vocabulary(kind: type, arguments: dict[str, Any], signature: inspect.Signature) -> None:
    """That ``shape`` is one of the model's data, that points have no ``grey_levels`` and data without them no
    ``logit``, whatever their defaults say."""
    if "shape" not in arguments:
        return
    shape = arguments["shape"] = checked_shape(kind, arguments["shape"])
    if len(shape) == 1 and "grey_levels" in arguments:
        if arguments["grey_levels"] not in (None, signature.parameters["grey_levels"].default):
            raise ValueError(
                f"{kind.__name__}: grey_levels must be None for points, which have none, got {arguments['grey_levels']}"
            )
        arguments["grey_levels"] = None
    if "logit" in arguments and arguments.get("grey_levels", 0) is None:
        if arguments["logit"] not in (0, signature.parameters["logit"].default):
            raise ValueError(
                f"{kind.__name__}: logit must be 0 for data without grey levels, which lie anywhere, got "
                f"{arguments['logit']}"
            )
        arguments["logit"] = 0.0


def checked_shape(kind: type, shape: Any) -> tuple[int, ...]:
    """The shape of one datum as a tuple, of the kinds of data in ``kind.takes``."""
    forms = {3: "(C, H, W)", 1: "(D,)"}
    allowed = [size for size, data in ((3, "images"), (1, "points")) if data in kind.takes]
    sizes = tuple(shape) if isinstance(shape, list | tuple) else ()
    if len(sizes) not in allowed or not all(
        isinstance(size, int) and not isinstance(size, bool) and size >= 1 for size in sizes
    ):
        wanted = " or ".join(forms[size] for size in allowed)
        raise ValueError(f"{kind.__name__}: shape must be {wanted}, integers of at least 1, got {shape!r}")
    return sizes
