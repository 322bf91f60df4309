"""What the operators of residual blocks ask of a block's network, and what they settle about its dtypes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genkernels._options import Nonlinearity
from genkernels.ops import _autocast as autocast
from genkernels.ops import _checks as checks

WORDS = Nonlinearity.words()


def settled(
    who: str,
    label: str,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    parameters: Tensor | None,
    activation: str,
    others: dict[str, Tensor | None],
) -> tuple[int, Tensor, list[Tensor], list[Tensor], Tensor, list[Tensor | None]]:
    """``(activation, x, weights, biases, parameters, others)`` of one dtype, biases and parameters whole.

    Raises:
        ValueError: a shape, a device or the activation is wrong. TypeError: a dtype is.
    """
    number = checks.option(who, "activation", activation, WORDS)
    weights = list(weights)
    count = len(weights)
    if count < 2:
        raise ValueError(f"{who}: weights must be those of two maps or more, got {count}")
    biases = [None] * count if biases is None else list(biases)
    if len(biases) != count:
        raise ValueError(f"{who}: biases must be as many as weights, {count}, got {len(biases)}")
    named = {label: x} | {f"weights[{i}]": w for i, w in enumerate(weights)}
    optional = {f"biases[{i}]": b for i, b in enumerate(biases)} | {"parameters": parameters} | others
    checks.tensors(who, named | optional, tuple(optional))
    given = {name: t for name, t in (named | optional).items() if t is not None}
    if autocast.active(x):
        dtype = autocast.widest(*given.values())
        given = {name: t.to(dtype) for name, t in given.items()}
    else:
        checks.same_dtype(who, given)
    x, weights = given[label], [given[f"weights[{i}]"] for i in range(count)]
    _check_maps(who, label, x, weights, mirrored=number == Nonlinearity.CLIPSWISH)
    whole = []
    for i, weight in enumerate(weights):
        bias = given.get(f"biases[{i}]")
        whole.append(weight.new_zeros(len(weight)) if bias is None else bias)
        own = whole[i].dim() == 2
        shape, meaning = ([len(x), len(weight)], "[N, outputs]") if own else ([len(weight)], "[outputs]")
        checks.shape(who, f"biases[{i}]", whole[i], shape, meaning)
    parameters = given.get("parameters")
    parameters = weights[0].new_ones(count - 1) if parameters is None else parameters
    checks.shape(who, "parameters", parameters, [count - 1], "[maps - 1]")
    return number, x, weights, whole, parameters, [given.get(name) for name in others]


def _check_maps(who: str, label: str, x: Tensor, weights: list[Tensor], mirrored: bool) -> None:
    if x.dim() not in (2, 4):
        raise ValueError(f"{who}: {label} must be [N, D] or [N, C, H, W], got {list(x.shape)}")
    width = x.shape[1]
    for i, weight in enumerate(weights):
        meaning = "[outputs, inputs]" if x.dim() == 2 else "[outputs, inputs, k, k] with k = 1 or 3"
        square = x.dim() == 2 or weight.dim() == 4 and tuple(weight.shape[2:]) in ((1, 1), (3, 3))
        if weight.dim() != x.dim() or not square or not weight.numel():
            raise ValueError(f"{who}: weights[{i}] must be {meaning}, none of them 0, got {list(weight.shape)}")
        if weight.shape[1] != width:
            raise ValueError(f"{who}: weights[{i}] must take {width} inputs, got {list(weight.shape)}")
        width = len(weight) * (2 if mirrored else 1)
    if len(weights[-1]) != x.shape[1]:
        raise ValueError(
            f"{who}: the last of weights must have as many outputs as {label} has channels, {x.shape[1]}, got "
            f"{len(weights[-1])}"
        )


def takes_exact_first(weights: Sequence[Tensor], size: Sequence[int]) -> bool:
    """Whether the trace has a closed form: three maps, the middle one pixel by pixel; `size` is that of an image."""
    if len(weights) != 3:
        return False
    if weights[0].dim() == 2:
        return True
    first, middle, last = (w.shape[-1] for w in weights)
    return middle == 1 and first == last and (first == 1 or min(size) >= 2)


def number(who: str, name: str, value) -> float:
    """A finite number, 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"{who}: {name} must be a finite number, 0 or more, got {value!r}")
    return float(value)


def fakes(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], parameters: Tensor) -> list[Tensor]:
    """What the gradients look like."""
    return [t.new_empty(t.shape) for t in (x, *weights, *biases, parameters)]


def work(x: Tensor) -> torch.dtype:
    return autocast.work_dtype(x)
