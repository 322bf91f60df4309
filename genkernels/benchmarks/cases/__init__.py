'''What is measured. A case file gives inputs and counts; it holds no timing, no tolerance and no provider.

To measure one more operator, add ``cases/<operator>.py`` with one function, and nothing else anywhere::

    """Benchmark cases of `genkernels.ops.scale`: y = x * s."""

    def cases(device: str, quick: bool) -> list[Case]:
        shape = (16, 24) if quick else (4096, 4096)
        return [
            Case(
                name="scale",                                    # or "scale/<variant>"
                shape=shape,                                     # what a reader knows the row by
                dtype=torch.float32,
                direction="forward+backward",
                inputs=lambda rng: {"x": torch.randn(shape, generator=rng, device=rng.device),
                                    "s": torch.rand(shape[1], generator=rng, device=rng.device)},
                op=genkernels.ops.scale,                         # called op(x, s)
                reference=reference.scale,                       # genkernels.reference.scale, called the same way
                outputs=("y",),
                bytes=...,
                flops=...,
            )
        ]

- ``device`` is ``"cpu"`` or ``"cuda"`` (choose sizes that fill it); ``quick`` asks for a few small rows, for CI.
- ``inputs(rng)`` draws fresh, realistic, random tensors on ``rng.device`` in their final dtypes; the dict's order is
  the order of the operator's arguments. No zeros and no constants: they hide unwritten outputs and can run faster.
- ``direction`` says what one timed call does:

  ====================  =============================================================================================
  contains "+backward"  the operator, then ``torch.autograd.grad`` of its outputs, with ready random output gradients
                        (so that no loss is timed), by every floating-point input
  ``step``              the operator with gradients enabled; it differentiates by itself, its results are compared
  anything else         the operator under ``torch.no_grad()``: ``forward``, ``inverse``, ``sample``, ``reverse``, …
  ====================  =============================================================================================

- ``bytes`` and ``flops``: the fewest that the operator must move and do in that direction, whole call: every input read
  once and every output written once, in full tensors (what one pass saves for the other is read again; what the
  backward needs not is not counted). A transcendental function counts as one flop.
- ``compiled``, where the reference is no single graph that ``torch.compile`` can take: a function that gives the
  compiled baseline (a loop around a compiled body), or the sentence why there is none.
- ``yardstick``: something else on the same inputs that the operator is to be measured by ("one forward pass"). It takes
  its turns among the others as the provider ``one pass``, without a gate, and the table gets a column for it.
- ``constants`` names inputs that are not differentiated though they are floats (a buffer).
- ``settings`` are the options that tell variants apart. A peer's adapter (``peers/<operator>.py``) reads them.
'''

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from genkernels._words import UsageError, near_names

#: What ``genkernels bench`` measures beside operators: `genkernels.benchmarks.training_step`. It has no file here.
WHOLE_STEPS = "training_step"


def constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes once what a reference needs beside its inputs (a mask): cached; for ``torch.compile`` a constant, not part
    of the graph."""
    cached = functools.cache(function)

    @torch.compiler.assume_constant_result
    def look_up(*arguments):
        return cached(*arguments)

    return look_up


@dataclass(frozen=True)
class Case:
    """One row group of the table: one operator, variant, shape, dtype and direction. See the head of this file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    direction: str
    inputs: Callable[[torch.Generator], Mapping[str, Tensor]]
    op: Callable[..., Any]
    reference: Callable[..., Any]
    outputs: tuple[str, ...]
    bytes: int
    flops: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    compiled: Callable[[], Callable[..., Any]] | str | None = None
    yardstick: Callable[..., Any] | None = None
    constants: tuple[str, ...] = ()

    @property
    def operator(self) -> str:
        return self.name.split("/", 1)[0]

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def title(self) -> str:
        return "  ".join((self.name, "×".join(map(str, self.shape)), self.dtype_name, self.direction))


def operators() -> list[str]:
    """The operators that have a case file, by name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def of_operator(operator: str, device: str, quick: bool) -> list[Case]:
    return importlib.import_module(f"{__name__}.{operator}").cases(device, quick)


def find(names: Iterable[str], *, device: str = "cpu", quick: bool = False) -> list[Case]:
    """The cases of these names, in the order asked for; all of them for no name.

    Args:
        names: operators (``affine_coupling``: all its variants) or variants (``affine_coupling/exp``).
        device: ``"cpu"`` or ``"cuda"``.
        quick: the small set.

    Raises:
        ValueError: a name is unknown; the message has the nearest names.
    """
    known = operators()
    found: dict[int, Case] = {}
    for name in list(names) or known:
        operator = name.split("/", 1)[0]
        group = of_operator(operator, device, quick) if operator in known else []
        chosen = [case for case in group if name in (operator, case.name)]
        if not chosen:
            raise UsageError(_unknown(name, known, device, quick))
        titles = {case.title for case in found.values()}
        found |= {id(case): case for case in chosen if case.title not in titles}
    return list(found.values())


def _unknown(name: str, known: list[str], device: str, quick: bool) -> str:
    variants = {case.name for operator in known for case in of_operator(operator, device, quick)}
    options = sorted({*known, *variants, WHOLE_STEPS})
    near = near_names(name, options, count=3) or known[:8]
    return f"bench: CASE must be an operator or one of its variants, got {name!r}; nearest: {', '.join(near)}"
