"""The list of what may stand in a network: rules by layer and by function, and what rules share.

A rule turns a call into steps. It is called with the tracer, then with the layer and its input, or with a function's
own arguments. The rules themselves are in `_layer_rules`, `_tensor_rules`
and `_pooling_rules`.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from genkernels.networks.steps import Source


class Rule(NamedTuple):
    """How to build steps of a `kind`; for a layer its class, and the ``forward`` of which the rule knows."""

    kind: str
    build: Callable
    cls: type[nn.Module] | None = None
    forward: Callable | None = None
    signature: inspect.Signature | None = None


LAYERS: dict[type[nn.Module], Rule] = {}
NAMED: dict[str, Rule] = {}
FUNCTIONS: dict[Callable, Rule] = {}


def layer(kind: str, *classes: type[nn.Module]) -> Callable:
    def add(build):
        LAYERS.update({cls: Rule(kind, build, cls, cls.forward) for cls in classes})
        return build

    return add


def named(kind: str, name: str) -> Callable:
    """A rule for layers of ours that say by ``genkernels_layer`` that they are of this name."""

    def add(build):
        NAMED[name] = Rule(kind, build)
        return build

    return add


def function(kind: str, *targets: Callable) -> Callable:
    """A rule for functions and methods of tensors."""

    def add(build):
        FUNCTIONS.update({target: Rule(kind, build, signature=inspect.signature(build)) for target in targets})
        return build

    return add


def layer_rule(m: nn.Module) -> Rule | None:
    """The rule for a layer's class, parametrised or not; a class of ours says by ``genkernels_layer`` that its
    ``forward`` computes what that of a class of torch does, or what is known by a name."""
    cls = _class_of(m)
    if cls not in LAYERS and (told := cls.__dict__.get("genkernels_layer")):
        rule = NAMED[told] if isinstance(told, str) else LAYERS[told]
        return rule._replace(cls=cls, forward=cls.forward)
    return LAYERS.get(cls)


def _class_of(m: nn.Module) -> type[nn.Module]:
    """A module's class as it was before ``torch.nn.utils.parametrize`` derived another one from it."""
    return type(m).__base__ if "parametrizations" in m._modules else type(m)


def forward_of(m: nn.Module) -> Callable:
    """The ``forward`` of a module's class; where that says that it computes what another does, and how alone is its
    own, this one. It names itself beside it, as a decorator hands on what a function has about it."""
    forward = type(m).forward
    own, computes = getattr(forward, "genkernels_forward", (None, None))
    return computes if own is forward else forward


def why_not(m: nn.Module) -> tuple | None:
    """Why a module without a rule is refused, for `Tracer.refuse`; None where its ``forward`` tells what it does."""
    told = (cls for cls in type(m).__mro__ if cls in LAYERS or "genkernels_layer" in cls.__dict__)
    base = next((cls.__name__ for cls in told), None)
    if base is not None:
        return (f"is a subclass of {base}: it may do something else",)
    if isinstance(m, _BatchNorm) and (m.training or m.running_mean is None):
        return "couples the samples of a batch: it normalises by their statistics", True
    if isinstance(m, nn.Sequential) or not _class_of(m).__module__.startswith("torch."):
        return None
    return (f"is none of {', '.join(cls.__name__ for cls in list(LAYERS)[:2])}, …: it has no rule",)


# --- shared by rules --------------------------------------------------------------------------------------------------

#: What may be meant where a sample has an axis too few.
HINT = " (the first axis of the example is the batch)"


def source(own, role: str) -> Source:
    """Of a parameter, a buffer or what labels give, in the role that it plays in a step."""
    return replace(own._source, role=role)


def is_number(x) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def each(value, dims: int) -> tuple:
    """A number for each of `dims` axes."""
    return tuple(value) if isinstance(value, tuple | list) else (value,) * dims


def spatial(b, x, dims: int, channels: int | None = None) -> tuple[int, ...]:
    """The spatial axes of a sample, which has one more, for channels."""
    shape = b.shape(x)
    if len(shape) != dims + 1 or channels not in (None, shape[0]):
        what = "channels" if channels is None else f"{channels} channels"
        b.refuse(f"takes samples of {what} and {dims} spatial axes, got {list(shape)}{HINT}")
    return shape[1:]


def filled(b, shape: tuple) -> tuple:
    if min(shape[1:], default=1) < 1:
        b.refuse(f"gives nothing: its output would be {list(shape)}")
    return shape


def axis_of(b, dim: int, axes: int) -> int:
    """`dim` counted from the front, among `axes` with the batch as axis 0; refuses the batch."""
    axis = operator.index(dim) + (axes if dim < 0 else 0)
    if axis == 0:
        b.refuse("couples the samples of a batch: it works along their axis", True)
    if not 0 < axis < axes:
        b.refuse(f"has no axis {dim}")
    return axis
