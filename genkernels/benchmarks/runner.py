"""The one runner: draws a case's inputs, holds every provider against the gate, then lets them take turns under the
clock."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from genkernels._config import check_threads
from genkernels._files import refuse_unwritable, write_json
from genkernels._machine import cpu_threads, keep_freed_memory
from genkernels._words import UsageError, nearest
from genkernels.backends import use_backend
from genkernels.benchmarks import cases as catalogue
from genkernels.benchmarks import machine, peers, providers, report, training_step
from genkernels.benchmarks.cases import Case
from genkernels.benchmarks.measure import Inputs, Standard, differentiates, named, quantiles, rotation
from genkernels.benchmarks.providers import Problem, Provider, Session, Unavailable, first_line
from genkernels.benchmarks.results import Results, Row
from genkernels.benchmarks.training_step import StepCase

_DTYPES = {"fp32": "float32", "fp64": "float64", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}


@dataclass(frozen=True)
class Effort:
    """How long to measure: seconds for each provider of a row, and the fewest samples of each."""

    seconds: float
    samples: int


FULL, QUICK = Effort(0.6, 20), Effort(0.1, 7)
#: A provider that took this many times its seconds leaves early, with no fewer than `_FEWEST` samples.
_PATIENCE, _FEWEST = 3.0, 3


def main(
    cases: Sequence[str] = (),
    *,
    json: str | os.PathLike | None = None,
    plot: str | os.PathLike | None = None,
    quick: bool = False,
    device: str | torch.device | None = None,
    dtypes: Sequence[str | torch.dtype] | None = None,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    limit: float | None = None,
) -> int:
    """Measures, prints the table, and writes the JSON file and the picture where asked.

    Args:
        cases: operators (``affine_coupling``) or variants (``affine_coupling/exp``); all of them when empty. Or
            ``training_step`` and models (``glow``, ``maf/points``), all of them when none is named.
        json: file for the numbers. plot: file for the picture (``.png``, ``.svg`` or ``.pdf``).
        quick: a few small rows, measured briefly.
        device: ``"cpu"`` or ``"cuda"``; a GPU when there is one.
        dtypes: only rows of these, ``"float32"``, ``"bf16"``, ….
        providers: only these: ``reference``, ``compiled``, a backend, a peer. The gate holds all the same.
        threads: CPU threads; torch's own choice by default.
        limit: seconds after which no other row is begun; measuring is shorter to match, and the rows left out are
            named.

    Returns:
        0; 1 where one of our own backends fails its gate, or where nothing could be measured; 130 where Ctrl-C ended it
        after a case: the cases before that are shown and written.

    Raises:
        ValueError: an argument is unknown or a file could not be written, said before anything is measured.
    """
    place = _device(device)
    if whole_steps := bool(cases) and cases[0].split("/", 1)[0] == training_step.NAME:
        rows = _of_dtypes(training_step.find(cases, quick=quick), dtypes)
    else:
        rows = _of_dtypes(catalogue.find(cases, device=place.type, quick=quick), dtypes)
    chosen = _providers(place.type, providers, whole_steps)
    if json is not None:
        refuse_unwritable(json, f"bench: json {str(json)!r}")
    if plot is not None:
        report.check_plot(plot)
    if limit is not None and not limit > 0:
        raise UsageError(f"bench: limit must be more than 0 seconds, got {limit}")
    check_threads(threads, "bench: threads")
    on_device = torch.cuda.device(place) if place.type == "cuda" else contextlib.nullcontext()
    with cpu_threads(threads), on_device, _whole_fp32(place):
        results = measure(rows, chosen, place, _effort(len(rows), quick, limit), quick=quick, limit=limit)
    report.show(results)
    if json is not None:
        write_json(json, results.to_json(), indent=1)
    if plot is not None:
        report.write_plot(results, plot)
    if results.interrupted:
        return 130
    return 1 if results.ours_fail or not results.rows else 0


def measure(
    cases: Sequence[Case | StepCase],
    chosen: Sequence[Provider],
    device: torch.device,
    effort: Effort,
    quick: bool = False,
    limit: float | None = None,
) -> Results:
    """Every provider on every case; after `limit` seconds, on those begun by then: every third case comes first, so
    that they are of all kinds."""
    kept = keep_freed_memory()
    began = time.monotonic()
    ceilings = machine.Ceilings(device)
    dtypes = list(dict.fromkeys(case.dtype for case in cases))
    seconds = min(0.4, 2 * effort.seconds)
    ceilings.measure(dtypes, seconds)
    results, left_out, rows_of = Results({}), {}, {}
    whole_steps = bool(cases) and isinstance(cases[0], StepCase)
    budget = training_step.Budget(limit, len(cases), chosen) if limit and whole_steps else None
    order = sorted(range(len(cases)), key=lambda index: index % 3) if limit else range(len(cases))
    try:
        for count, index in enumerate(order):
            if limit and rows_of and time.monotonic() - began > limit:
                break
            case = cases[index]
            _progress(f"[{count + 1}/{len(cases)}] {case.title}")
            if budget:
                began_case = time.monotonic()
                offered = budget.chosen(began_case - began)
                rows_of[index], skipped = run_case(case, offered, device, effort)
                budget.done(time.monotonic() - began_case)
                skipped += [(p.name, f"left out, the {limit:g} s being short") for p in chosen if p not in offered]
            else:
                rows_of[index], skipped = run_case(case, chosen, device, effort)
            for provider, reason in skipped:
                left_out.setdefault(provider, {}).setdefault(reason, []).append(case.name)
    except KeyboardInterrupt:
        if not rows_of:
            raise
        results.interrupted = True  # what has been measured is kept
    finally:
        _progress("")
        for provider in chosen:
            if isinstance(provider, peers.Peer):
                provider.close()
    results.rows = [row for index in sorted(rows_of) for row in rows_of[index]]
    ceilings.measure(dtypes, seconds)
    for row in results.rows:
        if row.median_s and row.gate != "none" and (row.bytes or row.flops):  # they are the operator's
            row.share_of_peak = ceilings.share(row.bytes, row.flops, row.dtype, row.median_s)
    results.machine = {**machine.describe(device, ceilings, quick), "keeps_freed_memory": kept}
    results.notes = _summary(left_out, len(rows_of))
    if late := [case.title for index, case in enumerate(cases) if index not in rows_of]:
        why = "the run being stopped by hand" if results.interrupted else f"the {limit:g} s being over"
        results.notes.append(f"{len(late)} of {len(cases)} cases, {why}: {'; '.join(late)}")
    return results


def _summary(left_out: dict[str, dict[str, list[str]]], cases: int) -> list[str]:
    """One sentence a provider: why it was left out, and where if not everywhere."""
    sentences = []
    for provider, reasons in left_out.items():
        parts = []
        for reason, names in reasons.items():
            shown = ", ".join(dict.fromkeys(names))
            parts.append(reason if len(names) == cases or len(shown) > 200 else f"{reason} ({shown})")
        sentences.append(f"{provider} {'; '.join(parts)}")
    return sentences


def run_case(
    case: Case | StepCase, chosen: Sequence[Provider], device: torch.device, effort: Effort
) -> tuple[list[Row], list[tuple[str, str]]]:
    """One case: its rows, and the providers left out with their reasons."""
    problem = training_step.draw(case, device) if isinstance(case, StepCase) else draw(case, device)
    rows, skipped, sessions = [], [], {}
    for provider in chosen:
        if isinstance(provider, peers.Peer) and provider.name not in peers.of(case):
            continue
        gated = getattr(provider, "gated", True)
        if not gated and case.yardstick is None:
            continue
        row = Row(
            case.name,
            list(case.shape),
            case.dtype_name,
            case.direction,
            provider.name,
            "pass" if gated else "none",
            bytes=case.bytes,
            flops=case.flops,
            ours=provider.ours,
        )
        try:
            session = provider.open(problem)
            row.fault = session.check()
            row.parted = getattr(session, "parted", "")
        except Unavailable as reason:
            skipped.append((provider.name, str(reason)))
            continue
        except Exception as error:
            row.fault = f"raised {type(error).__name__}: {first_line(error)}"
        rows.append(row)
        if row.fault:
            row.gate = "fail"
        else:
            sessions[row.provider] = session
    by_provider = {row.provider: row for row in rows}
    try:
        same = training_step.twins(sessions)
        samples, lost = take_turns(sessions, effort)
        for name, other in same.items():
            if name in samples and other in samples:
                samples[name] = samples[other] = samples[name] + samples[other]
                by_provider[name].same_as = other
        for name, seconds in samples.items():
            row = by_provider[name]
            row.median_s, row.q20_s, row.q80_s = quantiles(seconds)
            try:
                row.peak_bytes = sessions[name].peak_bytes()
            except Unavailable as reason:
                lost[name] = str(reason)
        rows = [row for row in rows if row.provider not in lost]
        skipped += lost.items()
    finally:
        for session in sessions.values():
            session.close()
        problem.close()
        del problem, sessions
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows, skipped


def draw(case: Case, device: torch.device) -> Problem:
    """The case's inputs (the same in every run), the gradients of its outputs, and the standard for the gate."""
    rng = torch.Generator(device).manual_seed(zlib.crc32(case.title.encode()))
    drawn = case.inputs(rng)
    inputs = Inputs(tuple(drawn.values()), constants=tuple(i for i, name in enumerate(drawn) if name in case.constants))
    with use_backend("reference"):
        if differentiates(case.direction):
            with torch.no_grad():
                outputs = case.op(*inputs.args)
            outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
            inputs.cotangents = tuple(
                torch.randn(o.shape, generator=rng, device=device, dtype=torch.float32).to(o.dtype) for o in outputs
            )
        standard = Standard.of(case, case.op, inputs, named(drawn, case.constants))
    sets = rotation(inputs.nbytes, machine.cache_bytes(device), machine.spare_bytes(device))
    return Problem(case, inputs, standard, sets)


def take_turns(sessions: dict[str, Session], effort: Effort) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Samples of every session, taken in rounds in which each has one turn, so that all see the same machine.

    Returns:
        The samples, and why a provider was lost on the way (a peer's process may die).
    """
    samples: dict[str, list[float]] = {name: [] for name in sessions}
    spent = dict.fromkeys(sessions, 0.0)
    lost: dict[str, str] = {}
    active = list(sessions)

    def attempt(name: str, action: str):
        try:
            return getattr(sessions[name], action)()
        except Unavailable as reason:
            lost[name] = str(reason)
            active.remove(name)
            del samples[name]

    for name in list(active):
        attempt(name, "warm_up")
    while active:
        for name in list(active):
            began = time.perf_counter()
            if (seconds := attempt(name, "turn")) is None:
                continue
            samples[name] += seconds
            spent[name] += time.perf_counter() - began
            if spent[name] > _PATIENCE * effort.seconds and len(samples[name]) >= _FEWEST:
                active.remove(name)
        enough = all(len(samples[name]) >= effort.samples for name in active)
        if enough and sum(spent.values()) >= effort.seconds * len(samples):
            break
    return samples, lost


# --- arguments ----------------------------------------------------------------------------------------------------


def _device(device) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        place = SimpleNamespace(type=None)
    if place.type == "cpu" or (place.type == "cuda" and torch.cuda.is_available()):
        return place
    options = "cpu or cuda" if torch.cuda.is_available() else "cpu (no CUDA device is available)"
    raise UsageError(f"bench: device must be {options}, got {str(device)!r}")


def _of_dtypes(cases: list[Case], dtypes) -> list[Case]:
    if dtypes is None:
        return cases
    names = {_DTYPES.get(name, name) for name in (str(dtype).removeprefix("torch.") for dtype in dtypes)}
    chosen = [case for case in cases if case.dtype_name in names]
    if not chosen:
        options = ", ".join(dict.fromkeys(case.dtype_name for case in cases))
        raise UsageError(f"bench: dtypes must be among those of the cases ({options}), got {', '.join(sorted(names))}")
    return chosen


def _providers(device: str, wanted: Sequence[str] | None, whole_steps: bool) -> list[Provider]:
    here = training_step.local() if whole_steps else providers.local(device)
    offered: list[Provider] = [*here, *(peers.Peer(name) for name in peers.PACKAGES)]
    if wanted is None:
        return offered
    names = [provider.name for provider in offered]
    for name in wanted:
        if name not in names:
            hint = nearest(name, names, listed=True)
            raise UsageError(f"bench: providers must be among {', '.join(names)} on {device}, got {name!r}{hint}")
    return [provider for provider in offered if provider.name in wanted]


def _effort(rows: int, quick: bool, limit: float | None) -> Effort:
    """Half of the time goes to what is compiled and checked, the rest to some five providers a row."""
    if quick or limit is None:
        return QUICK if quick else FULL
    seconds = min(FULL.seconds, max(QUICK.seconds, limit / max(rows, 1) / 10))
    return Effort(seconds, QUICK.samples if seconds < FULL.seconds else FULL.samples)


@contextlib.contextmanager
def _whole_fp32(device: torch.device) -> Iterator[None]:
    """No TF32 on a GPU, which cuDNN's convolutions take unless told: a fp32 row is fp32 for every provider, whatever
    kernel torch picks, and the integers that the definition draws are those of fp32."""
    before = torch.backends.cudnn.allow_tf32
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)
