"""What operators ask of their arguments, one sentence each: who asks, what must hold, what came.

Layers and losses ask the same through `genkernels.ops.checks`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
#: Levels of a discretised logistic: fp32 tells their edges apart.
MOST_LEVELS = 65536


def tensor(who: str, label: str, value, dtypes: Sequence[torch.dtype] = FLOATS, kind: str = "") -> None:
    """That `value` is a tensor of one of `dtypes`; `kind` says in words what these are, where their list does not."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{who}: {label} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        listed = " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
        raise TypeError(f"{who}: {label} must be {kind or listed}, got {value.dtype}")


def tensors(who: str, named: Mapping[str, Tensor | None], optional: Sequence[str] = ()) -> None:
    """That all of `named` are tensors of floats on one device, but for those of the labels `optional` that are None."""
    device = None
    for label, value in named.items():
        if value is None and label in optional:
            continue
        if not isinstance(value, Tensor) or value.dtype not in FLOATS:
            tensor(who, label, value)
        if device is None:
            lead, device = label, value.device
        elif value.device != device:
            same_device(who, {lead: named[lead], label: value})


def same_device(who: str, tensors: Mapping[str, Tensor | None]) -> None:
    """That all `tensors`, by their labels, lie where the first one does."""
    lead = None
    for label, value in tensors.items():
        if lead is None:
            first, lead = label, value.device
        elif value is not None and value.device != lead:
            raise ValueError(f"{who}: {first} and {label} must be on one device, got {lead} and {value.device}")


def same_dtype(who: str, tensors: Mapping[str, Tensor | None]) -> None:
    """That all `tensors`, by their labels, have the dtype of the first one."""
    lead = None
    for label, value in tensors.items():
        if lead is None:
            first, lead = label, value.dtype
        elif value is not None and value.dtype != lead:
            raise TypeError(f"{who}: {label} must have the dtype of {first}, {lead}, got {value.dtype}")


def shape(who: str, label: str, value: Tensor, expected: Sequence[int], meaning: str, where: str = "") -> None:
    """That `value` has the shape `expected`, which `meaning` says in letters, ``[N, C]``, and `where` explains."""
    if list(value.shape) != list(expected):
        raise ValueError(f"{who}: {label} must be {meaning} = {list(expected)}{where}, got {list(value.shape)}")


def integer(who: str, label: str, value, least: int, most: int | None = None) -> int:
    """`value`, an integer from `least` on, up to `most` where there is one."""
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= least and (most is None or value <= most)
    if not fits:
        span = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{who}: {label} must be an integer {span}, got {value!r}")
    return value


def flag(who: str, label: str, value) -> bool:
    """`value`, True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{who}: {label} must be True or False, got {value!r}")
    return value


def option(who: str, label: str, value, words: Sequence[str]) -> int:
    """The place of `value` among `words`, which is the number that kernels know it by (`Option.words`)."""
    if value not in words:
        raise ValueError(f"{who}: {label} must be one of {', '.join(words)}, got {value!r}")
    return words.index(value)


def positive(who: str, label: str, value) -> float:
    """`value`, a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{who}: {label} must be a finite number above 0, got {value!r}")
    return float(value)


def temperature(who: str, value) -> float:
    """A temperature as every backend can hold it: below fp32's normal numbers it counts as 0, above 2^127 as that."""
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{who}: temperature must be a finite number, 0 or more, got {value!r}")
    return 0.0 if value < 2.0**-126 else float(min(value, 2.0**127))


def uniform(noise: Tensor, dtype: torch.dtype) -> Tensor:
    """Noise from [0, 1) in fp32 or fp64, still below 1: what fp32 rounds to 1 would draw what has no probability."""
    if noise.dtype == dtype:
        return noise
    narrowed = torch.promote_types(noise.dtype, dtype) != dtype
    return noise.to(dtype).clamp(max=1 - 2.0**-24) if narrowed else noise.to(dtype)
