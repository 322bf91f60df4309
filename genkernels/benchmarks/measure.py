"""How one provider is held against the reference, timed and weighed. Peers run this same file in their own processes.

**The gate.** Truth is the reference in fp64 on the very same (dtype-rounded) inputs and output gradients. For every
output
and every gradient, two errors are taken: ``‖value − truth‖ / ‖truth‖`` and ``max|value − truth| / max|truth|``, the
second because one wrong element in millions is lost in the first. Each must be at most

    2 × the same-dtype reference's own error  +  FLOOR × eps(fp32; fp64 for an fp64 value)

The floor, `FLOOR` for our own backends, is for values that the reference happens to get almost exactly. Baselines that
are not ours (the compiled reference, peers) get `WIDE_FLOOR`: they must compute the same function, but may add up a
long sum with less care. A NaN or infinity where the truth is finite never passes; shapes must agree; our own
backends must also return the reference's dtypes, and they run once more with ``torch.empty`` filled with NaN, so that
an output element nobody wrote is seen.

Integers (drawn categories) must equal the same-dtype reference's, all of them: fp64 may fall on the other side of a
boundary. On a GPU, where the reference's exponentials and logarithms round by themselves, one in 1 / `APART` may.

**Time.** A turn is one untimed call, then a few timed ones, each on the next of several input sets (see `rotation`). On
a GPU by CUDA events, else by the host's clock. Calls shorter than `SHORTEST` are timed several at once;
calls longer than `LONG` without the untimed one, each a turn of its own, and their peak memory is not taken.

**Peak memory.** The most that one call holds at once beyond what was allocated when it began: outputs, gradients and
temporaries, not the inputs. On a GPU from ``torch.cuda.max_memory_allocated``; on a CPU by replaying the allocations
and frees that torch's profiler records in one separate, untimed call (scratch that C++ takes outside torch's allocator
is unseen).
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 4.0
WIDE_FLOOR = 64.0
APART = 1e-4  # of a GPU's drawn integers
SHORTEST = 1e-4  # seconds: one timed sample lasts at least this long
LONG = 1.0  # seconds: from here on a call is its own warm-up
TURN = 0.02  # seconds: about what one provider takes before the next has its turn


def differentiates(direction: str) -> bool:
    return "+backward" in direction


@dataclass
class Inputs:
    """One input set: the operator's arguments and the gradients of its outputs (empty where nothing is
    differentiated); `constants`: the places of arguments that are not differentiated, whatever they hold."""

    args: tuple[Tensor, ...]
    cotangents: tuple[Tensor, ...] = ()
    constants: tuple[int, ...] = ()

    def map(self, f: Callable[[Tensor], Tensor]) -> Inputs:
        return Inputs(tuple(map(f, self.args)), tuple(map(f, self.cotangents)), self.constants)

    def leaves(self) -> tuple[Tensor, ...]:
        return tuple(a for i, a in enumerate(self.args) if a.is_floating_point() and i not in self.constants)

    def fresh(self, direction: str) -> Inputs:
        """A copy in memory of its own, whose floating-point arguments require gradients where the direction needs
        it."""
        new = self.map(lambda t: t.detach().clone())
        for leaf in new.leaves() if differentiates(direction) else ():
            leaf.requires_grad_()
        return new

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.args, *self.cotangents))


def as_tuple(result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def call(op: Callable, inputs: Inputs, direction: str) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """One call of a case: ``(outputs, gradients)``. This is what the clock runs over."""
    if not differentiates(direction):
        with torch.set_grad_enabled(direction == "step"):
            return as_tuple(op(*inputs.args)), ()
    outputs = as_tuple(op(*inputs.args))
    pairs = [(o, g) for o, g in zip(outputs, inputs.cotangents, strict=True) if o.requires_grad]
    gradients = torch.autograd.grad([o for o, _ in pairs], inputs.leaves(), [g for _, g in pairs], allow_unused=True)
    return outputs, gradients


def values(op: Callable, inputs: Inputs, direction: str) -> list[Tensor]:
    """Outputs and gradients in one list, a missing gradient as zeros: what the gate compares."""
    outputs, gradients = call(op, inputs, direction)
    filled = (torch.zeros_like(x) if g is None else g for x, g in zip(inputs.leaves(), gradients, strict=False))
    return [t.detach() for t in (*outputs, *filled)]


# --- the gate -----------------------------------------------------------------------------------------------------


def errors(value: Tensor, truth: Tensor) -> tuple[float, float]:
    """Relative error in the 2-norm and in the largest element; infinite where a finite truth is met by NaN or
    infinity."""
    value, truth = value.double(), truth.double()
    if truth.numel() == 0:
        return 0.0, 0.0
    same = (value == truth) | (value.isnan() & truth.isnan())
    gap = torch.where(same, 0.0, value - truth)
    finite = torch.where(truth.isfinite(), truth, 0.0)
    pair = []
    for measure in (torch.linalg.vector_norm, lambda t: t.abs().max()):
        error, scale = float(measure(gap)), float(measure(finite))
        pair.append(math.inf if math.isnan(error) else error / (scale or 1.0))
    return pair[0], pair[1]


@dataclass
class Standard:
    """What every provider of a case is held against; plain values and tensors, so that it travels to peers by file."""

    names: Sequence[str]
    truth: Sequence[Tensor]  # fp64
    reference_errors: Sequence[tuple[float, float]]
    dtypes: Sequence[torch.dtype]
    seconds: float = 0.0  # that the reference took

    @classmethod
    def of(cls, case, op: Callable, inputs: Inputs, names: Sequence[str]) -> Standard:
        """From `op` being the reference: run in fp64 for the truth, in the case's dtypes for its own error."""
        began = time.perf_counter()
        own = values(op, inputs.fresh(case.direction), case.direction)
        seconds = time.perf_counter() - began
        truth = own
        if any(o.is_floating_point() for o in own):
            in_fp64 = inputs.map(lambda t: t.double() if t.is_floating_point() else t)
            truth = values(op, in_fp64.fresh(case.direction), case.direction)
            truth = [t if o.is_floating_point() else o for o, t in zip(own, truth, strict=True)]
        return cls(
            names=(*case.outputs, *(f"gradient of {n}" for n in names))[: len(own)],
            truth=truth,
            reference_errors=[errors(o, t) for o, t in zip(own, truth, strict=True)],
            dtypes=[o.dtype for o in own],
            seconds=seconds,
        )

    def fault(self, produced: Sequence[Tensor], *, floor: float = FLOOR, same_dtypes: bool = True) -> str:
        """The first thing wrong with a provider's values, in a sentence; empty where they pass."""
        if len(produced) != len(self.truth):
            return f"{len(self.truth)} outputs and gradients are wanted, got {len(produced)}"
        for name, value, truth, own, dtype in zip(
            self.names, produced, self.truth, self.reference_errors, self.dtypes, strict=True
        ):
            if value.shape != truth.shape:
                return f"{name}: shape {list(truth.shape)} is wanted, got {list(value.shape)}"
            if same_dtypes and value.dtype != dtype:
                return f"{name}: {dtype} is wanted, got {value.dtype}"
            if not dtype.is_floating_point:
                wrong = int((value != truth).sum())
                if wrong > (int(APART * truth.numel()) if truth.is_cuda else 0):
                    return f"{name}: {wrong} of {truth.numel()} integers differ from the reference's"
                continue
            # halves are computed in fp32 and rounded once: the reference's own error already has that rounding
            eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
            for kind, error, base in zip(("", "largest "), errors(value, truth), own, strict=True):
                allowed = 2 * base + floor * eps
                if not error <= allowed:
                    return f"{name}: {kind}error {error:.1e}, allowed {allowed:.1e}"
        return ""


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """``torch.empty`` gives NaN inside the block: an element that a kernel leaves unwritten shows."""
    was, warn, fill = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was, warn_only=warn)
            torch.utils.deterministic.fill_uninitialized_memory = fill


# --- time and memory ----------------------------------------------------------------------------------------------


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """``(median, 20 % quantile, 80 % quantile)``, linear between neighbours."""
    ranked = sorted(samples)

    def at(q: float) -> float:
        place = q * (len(ranked) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ranked) - 1)
        return ranked[low] + (place - low) * (ranked[high] - ranked[low])

    return at(0.5), at(0.2), at(0.8)


def rotation(set_bytes: int, cache_bytes: int, most_bytes: int) -> int:
    """How many input sets to rotate among so that no call finds its inputs in the cache.

    Twice the last-level cache in all. At most `most_bytes` of memory and 64 sets: a call so small that 64 sets fit in
    the cache is one whose inputs would be cached in real use as well.
    """
    wanted = math.ceil(2 * cache_bytes / max(set_bytes, 1))
    return max(1, min(wanted, most_bytes // max(set_bytes, 1), 64))


class Work:
    """One provider's op, ready to be timed on rotating input sets."""

    def __init__(self, op: Callable, sets: Sequence[Inputs], direction: str):
        self.op, self.sets, self.direction = op, sets, direction
        self.device = sets[0].args[0].device
        self.next = 0
        self.inner = self.calls = 1
        self.long = False

    def once(self):
        inputs = self.sets[self.next]
        self.next = (self.next + 1) % len(self.sets)
        return call(self.op, inputs, self.direction)

    def warm_up(self) -> float:
        """Calls until lazy set-up is over, settles how many calls make a turn, and gives the seconds of one call."""
        began = time.perf_counter()
        self.once()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if (each := time.perf_counter() - began) > LONG:
            # once more where the first call may have been setting up, unless even that takes the whole run's patience
            self.long = each > 4 * LONG or min(self._turn()) > LONG
            if self.long:
                return each
        for _ in range(2):
            self.once()
            if time.perf_counter() - began > 2.0:
                break
        each = min(self.turn())
        self.inner = max(1, math.ceil(SHORTEST / each))
        self.calls = max(1, min(10, round(TURN / (each * self.inner))))
        return each

    def turn(self) -> list[float]:
        """Seconds a call, for each of this turn's samples; one call goes before them untimed, unless calls are long."""
        if not self.long:
            self.once()
        return self._turn()

    def _turn(self) -> list[float]:
        return self._turn_on_gpu() if self.device.type == "cuda" else self._turn_on_cpu()

    def _turn_on_cpu(self) -> list[float]:
        seconds = []
        for _ in range(self.calls):
            began = time.perf_counter()
            for _ in range(self.inner):
                self.once()
            seconds.append((time.perf_counter() - began) / self.inner)
        return seconds

    def _turn_on_gpu(self) -> list[float]:
        marks = []
        for _ in range(self.calls):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(self.inner):
                self.once()
            end.record()
            marks.append((begin, end))
        torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) / 1e3 / self.inner for begin, end in marks]

    def peak_bytes(self) -> int | None:
        if self.long:
            return None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            held = self.once()
            torch.cuda.synchronize(self.device)
            del held
            return torch.cuda.max_memory_allocated(self.device) - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            held = self.once()
        del held
        return _replayed_peak(profile)


def _replayed_peak(profile) -> int:
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    most = now = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def named(inputs: Mapping[str, Tensor], constants: Sequence[str] = ()) -> list[str]:
    """The names of the inputs that are differentiated."""
    return [name for name, tensor in inputs.items() if tensor.is_floating_point() and name not in constants]
