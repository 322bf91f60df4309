"""From a module to the steps that it consists of."""

from __future__ import annotations

import inspect
import threading
import weakref
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from genkernels.networks import _layer_rules, _pooling_rules, _tensor_rules  # noqa: F401 (they fill the registry)
from genkernels.networks._outside import outside
from genkernels.networks._registry import FUNCTIONS, LAYERS
from genkernels.networks._state import State, Untouched, state_of
from genkernels.networks._symbols import Symbol
from genkernels.networks._tracer import Tracer, Untraceable, autocast_modes
from genkernels.networks.steps import Step

__all__ = ["SUPPORTED", "Untraceable", "trace", "traced"]


class Supported(NamedTuple):
    """One kind of step, and what becomes one.

    Attributes:
        kind: as in `Step.kind`. layers: classes of ``torch.nn``. functions: of ``torch`` and ``torch.nn.functional``,
            methods of tensors, operators. condition: what must hold.
    """

    kind: str
    layers: tuple[str, ...]
    functions: tuple[str, ...]
    condition: str


class Table(tuple):
    """The supported layers and functions, a `Supported` a kind of step; ``print`` shows them as a list."""

    def __str__(self) -> str:
        lines = []
        for row in self:
            lines.append(f"{row.kind}: {', '.join([*row.layers, *row.functions])}")
            lines.append(f"    {row.condition}")
        return "\n".join(lines)


_CONDITIONS = {
    "linear": "functions: the weight and the bias are parameters or buffers",
    "conv": "padding by zeros or circular, also 'same'; functions as for linear",
    "conv_transpose": "without output_size",
    "upfirdn2d": "FilteredUpsample and FilteredDownsample of genkernels.nn",
    "activation": "and layers with a `genkernels_activation` (lipswish, clipswish, or one of these); BiasLeakyReLU of "
    "genkernels.nn without a clamp",
    "add": "of two values of one shape, or of a value and a number, parameter or buffer that broadcasts over it",
    "scale": "by a number, a parameter or a buffer that broadcasts over the value",
    "avg_pool": "adaptive ones where the output's size divides the input's",
    "max_pool": "without return_indices",
    "upsample": "nearest, linear, bilinear, trilinear; no antialias",
    "reshape": "the batch stays the first axis: x.shape[0] or -1",
    "sum": "over axes other than the batch's",
    "concat": "along an axis other than the batch's",
    "embedding": "of labels, where they come beside the input; values may be multiplied by it or have it added",
    "identity": "dropout in evaluation mode or with p=0; such layers become no step",
}


def _supported() -> Table:
    def names(registry, kind: str) -> tuple[str, ...]:
        names = (target.__name__ for target, rule in registry.items() if rule.kind == kind)
        return tuple(dict.fromkeys(name.removeprefix("__").removesuffix("__") for name in names))

    return Table(
        Supported(kind, names(LAYERS, kind), names(FUNCTIONS, kind), text) for kind, text in _CONDITIONS.items()
    )


#: What a network may consist of.
SUPPORTED = _supported()

_LOCK = threading.RLock()  # fx replaces methods of nn.Module while it traces


def trace(module: nn.Module, example: Tensor) -> tuple[Step, ...]:
    """Turns a network into steps, from its input to its output, each of which reads outputs of steps before it.

    The module's ``forward`` is called once, with a stand-in for its input; nothing is computed. Modules may be nested
    in any way; shapes may be read and compared, but for the batch's size. Layers are read, not copied: a step fetches
    the weight from its layer in every pass, so that training, parametrisations (``torch.nn.utils.parametrizations``),
    averaged copies and ``torch.func.functional_call`` are honoured. What works in place becomes an ordinary step where
    it is clear what later ones read. A layer with hooks or a forward of its own, or of a subclass, is refused.

    Args:
        module: of layers that are in `SUPPORTED`, from one tensor to one. example: ``[N, *input]``, of which only the
            shape counts, and not N.

    Returns:
        the steps. The first one is the input, the last one the network's output. They keep the layers alive.

    Raises:
        ValueError: the network holds what has no rule. It is an `Untraceable`; its message names the layer and says
            why.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> [(step.kind, step.path, step.shape) for step in trace(net, torch.zeros(5, 2))]
        [('input', '', (2,)), ('linear', '0', (8,)), ('activation', '1', (8,)), ('linear', '2', (1,))]
        >>> trace(nn.Sequential(nn.Linear(2, 8), nn.LayerNorm(8)), torch.zeros(5, 2))
        Traceback (most recent call last):
        genkernels.networks.Untraceable: trace: layer '1' (LayerNorm) is none of Linear, Conv1d, …: it has no rule
    """
    if torch.compiler.is_dynamo_compiling():
        return outside(trace, module, example)
    return _trace(module, _sample(module, example))[0]


def traced(module: nn.Module, example: Tensor, labelled: bool = False) -> tuple[Step, ...]:
    """As `trace`, but each module is traced once for each shape of its samples, in training and in evaluation, and
    again when it has changed.

    A module that is `labelled` is called with labels ``[N]`` beside its input: what they give, which does not depend on
    the input, are tensors of the steps with an entry a sample, read by `parameters`.

    A call costs a walk over the modules and their attributes. A replaced layer, a hook, another mode of training, a
    parametrisation, a changed attribute that ``forward`` may read: each is seen, and the module is traced anew. Nothing
    is written on the module, and its steps neither keep it alive nor survive it. A refusal is remembered too.

    Args: as for `trace`.
    """
    if torch.compiler.is_dynamo_compiling():
        return outside(traced, module, example, labelled)
    sample = _sample(module, example)
    with _LOCK:
        entries, key = _TRACED.setdefault(module, {}), (sample, labelled, module.training, autocast_modes())
        entry = entries.get(key)
        if entry is None or not entry.state.still(state_of(module)):
            entry = entries[key] = _traced(module, sample, labelled)
            for oldest in list(entries)[:-_MOST]:
                del entries[oldest]
    if entry.refusal is not None:
        raise Untraceable(*entry.refusal)
    return entry.steps


class _Entry(NamedTuple):
    state: State
    steps: tuple[Step, ...] = ()
    refusal: tuple | None = None


#: What was traced, by module, and by shape of a sample and modes. The steps hold layers weakly, or no module would go.
_TRACED: weakref.WeakKeyDictionary[nn.Module, dict[tuple, _Entry]] = weakref.WeakKeyDictionary()
_MOST = 16


class Unsteady(Untraceable):
    """A forward that changes or draws something; it is not remembered, as another thread may have been at work."""


def _traced(module: nn.Module, sample: tuple[int, ...], labelled: bool) -> _Entry:
    before = state_of(module)
    try:
        steps, state = _trace(module, sample, labelled)
    except Unsteady:
        raise
    except Untraceable as refusal:
        return _Entry(before, refusal=(*refusal.args, refusal.couples_samples))
    return _Entry(state, tuple(replace(step, sources=tuple(s.weakly() for s in step.sources)) for step in steps))


def _trace(module: nn.Module, sample: tuple[int, ...], labelled: bool = False) -> tuple[tuple[Step, ...], State]:
    _one_input(module, labelled)
    with _LOCK:
        before = Untouched(module)
        try:
            steps = Tracer(module).steps(sample, labelled)
        finally:
            state, drew = before.state(), before.drew()
            if state is None:
                before.restore()
    name = type(module).__name__
    if state is None:
        raise Unsteady(f"trace: the network ({name}) changes attributes of its modules in its forward")
    if drew:
        raise Unsteady(f"trace: the network ({name}) draws random numbers in its forward, or another thread meanwhile")
    return steps, state


def _sample(module: nn.Module, example: Tensor) -> tuple[int, ...]:
    """The shape of one sample, once it is clear that module and example are what they must be."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"trace: module must be an nn.Module, got {type(module).__name__}")
    if type(example) is Symbol or not isinstance(example, Tensor) or example.dim() == 0:
        got = "shape []" if type(example) is not Symbol and isinstance(example, Tensor) else type(example).__name__
        raise TypeError(f"trace: example must be a tensor [N, *input], got {got}")
    return tuple(example.shape[1:])


def _one_input(module: nn.Module, labelled: bool) -> None:
    try:
        parameters = inspect.signature(type(module).forward).parameters.values()
    except (TypeError, ValueError, AttributeError):  # not told, as of a scripted module
        return
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    wanted = [p.name for p in parameters if p.default is p.empty and p.kind in kinds][1:]  # without self
    if len(wanted) > 1 + labelled:
        names, kind, beside = ", ".join(wanted), type(module).__name__, " beside labels" if labelled else ""
        raise Untraceable(f"trace: the network ({kind}) takes several inputs ({names}): it must take one{beside}")
