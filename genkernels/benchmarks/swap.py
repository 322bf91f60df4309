"""``genkernels bench swap`` and ``genkernels swap``: a model of another library before and after `genkernels.swap_`.

Both run in one process and take turns under the clock; what a swap changes is measured on a whole training step (loss,
backward, optimiser), on the loss alone, without a graph, and on a call that draws samples. No speed is told where the
losses differ.
"""

from __future__ import annotations

import copy
import importlib
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from genkernels._config import check_threads
from genkernels._files import refuse_unwritable, write_json
from genkernels._machine import cpu_threads, device_name, versions
from genkernels._version import commit
from genkernels._words import UsageError, nearest
from genkernels.benchmarks.swapped_models import CASES, Made
from genkernels.swap import Report, swap_

PACKAGES = ("nflows", "normflows", "zuko", "FrEIA", "pythae", "pytorch-generative")
#: Losses in fp32 that are further apart than this are not those of one model.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Row:
    """One call, before and after: the least seconds of each, and the median speed-up of pairs in a row."""

    case: str
    call: str
    before_s: float
    after_s: float
    speedup: float
    gate: str


def compare(case: str, made: Made, seconds: float = 1.0) -> tuple[Report, list[Row]]:
    """Swaps a copy of a model, and measures it beside the model itself."""
    model, loss, sample = made
    theirs, ours = copy.deepcopy(model), copy.deepcopy(model)  # Python is slower in copies: both are
    report = swap_(ours)
    pair = (theirs, ours)
    found = []
    for model in pair:
        torch.manual_seed(0)
        np.random.seed(0)  # by which normflows draws how many terms a series has
        found.append(loss(model).item())
    gate = "pass" if abs(found[0] - found[1]) <= TOLERANCE * max(1.0, abs(found[0])) else "fail"
    optimizers = [torch.optim.Adam(model.parameters(), 1e-5) for model in pair]

    def step(i: int) -> None:
        optimizers[i].zero_grad()
        loss(pair[i]).backward()
        optimizers[i].step()

    @torch.no_grad()
    def evaluate(i: int) -> None:
        loss(pair[i])

    @torch.no_grad()
    def draw(i: int) -> None:
        sample(pair[i])

    calls = {"training step": step} | ({"evaluation": evaluate} if _needs_no_graph(evaluate) else {})
    calls |= {"sampling": draw} if sample is not None else {}
    rows = []
    for name, call in calls.items():
        told = _in_turns(call, seconds) if gate == "pass" else (float("nan"),) * 3
        rows.append(Row(case, name, *told, gate))
    return report, rows


def _needs_no_graph(evaluate: Callable[[int], None]) -> bool:
    """Whether the model as it was has a loss without a graph: one that differentiates in itself has none."""
    try:
        evaluate(0)
    except RuntimeError:
        return False
    return True


def _in_turns(call: Callable[[int], None], seconds: float) -> tuple[float, float, float]:
    """Of ``call(0)`` and ``call(1)`` in turns, either first: the fastest of each, and the median of how many times as
    fast the second was. Other work on a machine comes in spells, which a pair mostly shares."""
    taken: tuple[list[float], list[float]] = ([], [])
    for i in (0, 1):
        call(i)
    began = time.perf_counter()
    while time.perf_counter() - began < 2 * seconds or len(taken[0]) < 3:
        for i in (0, 1) if len(taken[0]) % 2 else (1, 0):
            at = time.perf_counter()
            call(i)
            _wait()
            taken[i].append(time.perf_counter() - at)
    return min(taken[0]), min(taken[1]), statistics.median(a / b for a, b in zip(*taken, strict=True))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(rows: list[Row]) -> str:
    width = max(len(row.case) for row in rows)
    lines = [f"{'case':<{width}}  {'call':<13}  {'before':>10}  {'after':>10}  speed-up"]
    for row in rows:
        if row.gate != "pass":
            lines.append(f"{row.case:<{width}}  {row.call:<13}  the losses differ: no speed is told")
            continue
        before, after = (f"{1e3 * value:.3f} ms" for value in (row.before_s, row.after_s))
        lines.append(f"{row.case:<{width}}  {row.call:<13}  {before:>10}  {after:>10}  {row.speedup:.2f}×")
    return "\n".join(lines)


def main(
    cases: Sequence[str] = (),
    *,
    quick: bool = False,
    json: str | os.PathLike | None = None,
    threads: int | None = None,
    limit: float | None = None,
) -> int:
    """Measures the cases whose library is installed, on the CPU; what is not is named.

    Args:
        cases: parts of the names of cases, in any letters (``nflows``, ``realnvp``); all of them when empty.
        quick, json, threads: as for `genkernels.benchmarks.main`.
        limit: seconds after which no other case is begun; those left out are named.

    Returns:
        0; 1 where a case fails its gate or there was none; 130 where Ctrl-C ended it: the cases before that are shown
        and written.
    """
    chosen = find(cases)
    check_threads(threads, "bench: threads")
    if limit is not None and not limit > 0:
        raise UsageError(f"bench: limit must be more than 0 seconds, got {limit}")
    if json is not None:
        refuse_unwritable(json, f"bench: json {str(json)!r}")
    rows: list[Row] = []
    began, interrupted = time.monotonic(), False
    with cpu_threads(threads):
        here = {"device": device_name("cpu"), "threads": torch.get_num_threads(), "versions": versions(PACKAGES)}
        here |= {"device_type": "cpu", "commit": commit(), "quick": quick}
        here |= {"date": datetime.now(timezone.utc).isoformat()}
        try:
            for case, make in chosen.items():
                if limit and rows and time.monotonic() - began > limit:
                    print(f"{case}: left out, the {limit:g} s being over")
                    continue
                torch.manual_seed(0)
                try:
                    made = make()
                except ModuleNotFoundError as error:
                    print(f"{case}: left out, {error.name} is not installed (extra bench)")
                    continue
                rows += compare(case, made, 0.1 if quick else 2.0)[1]
        except KeyboardInterrupt:
            interrupted = True
    if rows:
        print(table(rows))
    if json is not None and (rows or not interrupted):
        write_json(json, {"machine": here, "rows": [asdict(row) for row in rows]}, indent=1)
    if interrupted:
        return 130
    return 0 if rows and all(row.gate == "pass" for row in rows) else 1


def find(parts: Sequence[str]) -> dict[str, Callable[[], Made]]:
    """The cases whose names hold one of these parts, in any letters; all of them where there is none."""
    found: set[str] = set()
    for part in parts:
        fitting = {case for case in CASES if part.lower() in case.lower()}
        if not fitting:
            raise UsageError(f"bench swap: {part!r} is part of no case's name{nearest(part, CASES)}")
        found |= fitting
    return {case: make for case, make in CASES.items() if case in found or not parts}


def factory(name: str) -> Made:
    """What a user's ``MODULE:FUNCTION`` gives, checked."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise UsageError(f"swap: FACTORY must be MODULE:FUNCTION, got {name!r}")
    try:
        make = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        raise UsageError(f"swap: {name}: no module named {error.name!r} can be imported from here") from error
    except AttributeError as error:
        raise UsageError(f"swap: module {module} must have a function {function}, it has none") from error
    if not callable(make):
        raise UsageError(f"swap: {name} must be a function, got {type(make).__name__}")
    made = _call(f"{name}()", make)
    parts = made if isinstance(made, tuple) else (made,)
    fits = 2 <= len(parts) <= 3 and isinstance(parts[0], nn.Module) and all(callable(part) for part in parts[1:])
    if not fits:
        got = ", ".join(type(part).__name__ for part in parts)
        raise UsageError(
            f"swap: {name}() must give (model, loss) or (model, loss, sample), functions of the model, got ({got})"
        )
    return (*parts, None)[:3]


def _call(what: str, function: Callable, *arguments) -> Any:
    """What a user's function gives; what it raises is told in a sentence."""
    try:
        return function(*arguments)
    except Exception as error:
        raise UsageError(f"swap: {what} raised {type(error).__name__}: {error} (--debug shows where)") from error


def _try(name: str, made: Made) -> None:
    """Calls all that a user's factory gave once, on copies, so that a fault of theirs is told as theirs."""
    model, loss, sample = made
    try:
        swap_(copy.deepcopy(model))
    except TypeError as refusal:  # of a model that is compiled or scripted
        raise UsageError(f"swap: {name}: {str(refusal).removeprefix('swap_: ')}") from refusal
    value = _call(f"{name}'s loss", loss, copy.deepcopy(model))
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        got = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        got += " without a graph" if isinstance(value, Tensor) and not value.requires_grad else ""
        raise UsageError(f"swap: {name}'s loss must give one number that backward() can be called on, got {got}")
    if sample is not None:
        with torch.no_grad():
            _call(f"{name}'s sample", sample, copy.deepcopy(model))


def show(name: str, seconds: float = 1.0) -> int:
    """``genkernels swap MODULE:FUNCTION``: the report and the measured speed-up."""
    made = factory(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _try(name, made)
        report, rows = compare(name, made, seconds)
    print(report)
    if report.swapped:
        print()
        print(table(rows))
    return 0 if all(row.gate == "pass" for row in rows) else 1
