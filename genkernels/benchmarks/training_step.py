"""``genkernels bench training_step [MODEL …]``: whole training steps of whole models.

A step is what training does: the loss, its backward pass, the gradients clipped to norm 1, Adam. Of a model of several
players it is the shortest round in which each has moved: as many of the critic's steps as its generator waits for, and
one of the generator. Models stand at their presets, on synthetic data of the presets' form (grey levels, or points),
dropout off so that all providers can be held against the same numbers. ``bfloat16`` rows are training's bf16-mixed:
fp32 weights and data, the loss under autocast.

The providers:

- ``reference``: eager PyTorch, no kernel of ours (``use_backend("reference")``);
- ``compiled``: ``torch.compile`` of the reference's loss, one graph, a player's;
- ``fused``: the model as it is, our kernels where they are faster;
- ``fused compiled``: its loss inside ``torch.compile``, one graph, a player's;
- a peer's model, where one computes the same function (`genkernels.benchmarks.peers.training_step`).

**The gate.** Every provider trains for `GATE_STEPS` steps from the same weights on the same batches with the same noise
(Adam at the step sizes of a run's warm-up), and each of its losses is held against the reference's in fp32:

- fp32 rows: ``|loss − reference| ≤ TOLERANCE · max(1, |reference|)``, the first as well as the last;
- bf16 rows: ``|loss − reference| ≤ 2 · E + TOLERANCE · max(1, |reference|)``, E being the largest distance over these
  steps that the reference itself has when it is run in bf16.

Of a model of several players these are as many rounds as hold `GATE_STEPS` of training's steps, and the tolerance is
`PLAYERS_TOLERANCE`: what rounding tells apart parts faster where two answer one another. In some models it parts within
these steps (``bigan`` at photos32 by loss 47 and ``cyclegan`` by loss 10 when the reference starts from weights that
were moved by one rounding). So a provider whose fp32 losses leave the reference's after the first round runs all steps
again in fp64, from the same weights on the same batches, beside the reference in fp64: ``|loss − reference| ≤
DOUBLE_TOLERANCE · max(1, |reference|)``, and its row says at which loss it parted.

A provider that fails shows no speed. The time is then that of the steps that follow, on the last of the batches.

**The same.** Where nothing is won by a kernel the fused step is torch's own. It is said to be the same as the
reference's, and both rows have the samples of both, where all losses and weights of the gate's steps are equal to the
bit and the step after them has torch do the same operations on the same shapes in the same order. By themselves two
copies of one model differ by up to 3 % for as long as they live: by where their memory lies. What it takes to choose
the path, some Python calls before the first operation, is not told apart there.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from genkernels._words import UsageError, near_names
from genkernels.backends import use_backend, why_missing
from genkernels.benchmarks.cases import WHOLE_STEPS
from genkernels.benchmarks.measure import Inputs, Work
from genkernels.benchmarks.providers import Unavailable, first_line
from genkernels.models import MODELS, Model

NAME = WHOLE_STEPS
PRESETS = ("digits", "points", "photos32", "two_photos32")
GATE_STEPS, QUICK_GATE_STEPS = 30, 3
TOLERANCE, PLAYERS_TOLERANCE, DOUBLE_TOLERANCE = 1e-4, 1e-3, 1e-9
LR, WARMUP, CLIP = 1e-3, 100, 1.0  # as `genkernels train` begins a long run
#: Examples a step: training's own number, less where an image has thousands of values.
BATCHES = {"digits": 64, "points": 64, "photos32": 8, "two_photos32": 1}
#: Rows whose reference would run for hours, and why: nothing could be held against it.
NO_REFERENCE = {("iaf", "photos32"): "the reference's density takes D = 3,072 passes of each network"}
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class StepCase:
    """One model at one preset in one precision; a row group of the table, as `genkernels.benchmarks.cases.Case` is."""

    model: str
    preset: str
    dtype: torch.dtype
    gate_steps: int = GATE_STEPS
    direction: str = "step"
    bytes: int = 0  # a step is no one kernel: it has no share of the machine's peak
    flops: int = 0
    yardstick = None
    operator = NAME

    @property
    def name(self) -> str:
        return f"{NAME}/{self.model}/{self.preset}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def title(self) -> str:
        return "  ".join((self.name, "×".join(map(str, self.shape)), self.dtype_name, self.direction))

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        with torch.device("meta"):
            return (BATCHES[self.preset], *self.make().shape)

    def make(self) -> Model:
        return MODELS[self.model].from_preset(self.preset)


def cases(quick: bool = False) -> list[StepCase]:
    """Every model at every preset that has a row; with `quick` the smallest of each model, in fp32."""
    presets = {model: [p for p in PRESETS if p in MODELS[model].presets] for model in MODELS}
    every = [(m, p) for m, names in presets.items() for p in names if (m, p) not in NO_REFERENCE]
    if quick:
        first = {m: p for m, p in reversed(every) if p != "photos32"}
        return [StepCase(m, first[m], torch.float32, QUICK_GATE_STEPS) for m in presets if m in first]
    return [StepCase(m, p, dtype) for dtype in DTYPES for m, p in every]


def find(names: Iterable[str], quick: bool = False) -> list[StepCase]:
    """The cases that the command line names: ``training_step glow maf/points`` or ``training_step/glow``; all of them
    where it names no model.

    Raises:
        UsageError: there is no such model or preset; names the nearest.
    """
    wanted = [name.removeprefix(f"{NAME}/") for name in names if name != NAME]
    every = cases(quick)
    if quick and any("/" in name for name in wanted):  # a preset asked for by name is not left out for being large
        every = [StepCase(c.model, c.preset, c.dtype, QUICK_GATE_STEPS) for c in cases() if c.dtype == torch.float32]
    wanted_cases = []
    for name in wanted or dict.fromkeys(case.model for case in every):
        chosen = [case for case in every if name in (case.model, f"{case.model}/{case.preset}")]
        if not chosen:
            options = [*MODELS, *(f"{case.model}/{case.preset}" for case in every)]
            near = near_names(name, options, count=3) or list(MODELS)
            reason = NO_REFERENCE.get(tuple(name.split("/", 1)), "")
            got = f"got {name!r}{': ' + reason if reason else ''}"
            raise UsageError(
                f"bench: {NAME}'s MODEL must be a model, or a model and a preset, {got}; nearest: {', '.join(near)}"
            )
        wanted_cases += [case for case in chosen if case not in wanted_cases]
    return wanted_cases


# --- one step -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Move:
    """One player's part of a step: the loss of a batch, and what moves on it."""

    loss: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter]
    lr: float = LR


class Trainer:
    """A model in training as one provider does it."""

    def __init__(self, moves: Sequence[Move], dtype: torch.dtype, device: torch.device):
        """`moves`: of one step, in their order; those of one player share their list of parameters."""
        self.moves = list(moves)
        self.optimizers = {
            id(move.parameters): torch.optim.Adam(move.parameters, lr=move.lr, fused=True) for move in self.moves
        }
        half = dtype.itemsize < 4
        self.precision = functools.partial(torch.autocast, device.type, dtype) if half else nullcontext

    def step(self, x: Tensor) -> Tensor:
        """The losses of all moves, ``[moves]``."""
        return torch.stack([self._move(move, x) for move in self.moves])

    def _move(self, move: Move, x: Tensor) -> Tensor:
        optimizer = self.optimizers[id(move.parameters)]
        with self.precision():
            loss = move.loss(x)
        loss.backward()
        nn.utils.clip_grad_norm_(move.parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def run(self, batches: Sequence[Tensor]) -> list[float]:
        """The losses of a run's first steps, one move after the other; each step draws its noise from a seed of its
        own."""
        losses = []
        for i, x in enumerate(batches):
            for move in self.moves:
                for group in self.optimizers[id(move.parameters)].param_groups:
                    group["lr"] = move.lr * min(1.0, (i + 1) / WARMUP)
            torch.manual_seed(i)
            losses.append(self.step(x))
        return torch.cat(losses).double().tolist() if losses else []


def moves_of(model: Model, compiled: Callable[[Callable], Callable] = lambda loss: loss) -> list[Move]:
    """A step of a model of the library; `compiled` makes another function of each loss."""
    if hasattr(model, "loss"):
        return [Move(compiled(model.loss), trained(model))]
    players = model.players()
    parameters = {name: trained(player.module) for name, player in players.items()}
    losses = {name: compiled(functools.partial(_player_loss, model, name)) for name in players}
    return [
        Move(losses[name], parameters[name], LR * player.lr)
        for step in range(period(model))
        for name, player in players.items()
        if step % player.every == 0
    ]


def period(model: Model) -> int:
    """Steps of training in which each player has moved."""
    return math.lcm(*(player.every for player in model.players().values()))


def _player_loss(model: Model, name: str, x: Tensor) -> Tensor:
    return model.losses(name, x, None, 0)["loss"]


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def batches_of(case: StepCase, model: Model, device: torch.device) -> list[Tensor]:
    """Synthetic batches, the same in every run: grey levels that vary smoothly over an image, or points on a ring."""
    rng = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    count = BATCHES[case.preset]
    drawn = []
    for _ in range(case.gate_steps):
        if len(model.shape) == 1:
            angle = 2 * math.pi * torch.rand(count, 1, generator=rng)
            ring = torch.cat([angle.cos(), angle.sin()], dim=1).repeat(1, -(-model.dim // 2))[:, : model.dim]
            drawn.append(ring + 0.1 * torch.randn(count, model.dim, generator=rng))
            continue
        levels = grey_levels(model)
        channels, height, width = model.shape
        coarse = torch.rand(count, channels, max(height // 4, 2), max(width // 4, 2), generator=rng)
        smooth = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
        noisy = smooth + 0.05 * torch.randn(smooth.shape, generator=rng)
        drawn.append((noisy.clamp(0, 1) * (levels - 1)).round().to(torch.uint8))
    return [x.to(device) for x in drawn]


def grey_levels(model: Model) -> int:
    return model.grey_levels if hasattr(model, "grey_levels") else model.data_levels


# --- the gate -----------------------------------------------------------------------------------------------------


def fault_of(
    losses: Sequence[float], truth: Sequence[float], own_error: float, steps: str = "step", tolerance: float = TOLERANCE
) -> str:
    """The first loss that is too far from the reference's, in a sentence; empty where all are near enough.

    Args:
        own_error: the reference's own largest distance from `truth` in this precision, 0 in fp32.
    """
    for i, (loss, wanted) in enumerate(zip(losses, truth, strict=True)):
        allowed = 2 * own_error + tolerance * max(1.0, abs(wanted))
        if not abs(loss - wanted) <= allowed:  # also NaN
            return f"{steps} {i + 1}: loss {loss:.6g}, the reference's {wanted:.6g}, allowed distance {allowed:.1e}"
    return ""


@dataclass
class StepProblem:
    """A case, ready: the model that every provider starts from, the batches, and the reference's losses."""

    case: StepCase
    model: Model
    batches: list[Tensor]
    truth: list[float]  # the reference's losses in fp32
    own_error: float
    tolerance: float = TOLERANCE
    _folder: TemporaryDirectory | None = None

    @functools.cached_property
    def double(self) -> StepProblem:
        """The same start in fp64, and the reference's losses from there."""
        model = copy.deepcopy(self.model).double()
        batches = [x.double() if x.is_floating_point() else x for x in self.batches]
        with use_backend("reference"), torch.random.fork_rng():
            truth = Trainer(moves_of(copy.deepcopy(model)), torch.float64, batches[0].device).run(batches)
        return StepProblem(self.case, model, batches, truth, 0.0, DOUBLE_TOLERANCE)

    def file(self) -> Path:
        """All that a peer's process needs, written once."""
        if self._folder is None:
            self._folder = TemporaryDirectory()
            contents = {
                "operator": NAME,
                "settings": {"model": self.case.model, "preset": self.case.preset, "dtype": self.case.dtype_name},
                "direction": self.case.direction,
                "state": self.model.state_dict(),
                "batches": self.batches,
                "truth": self.truth,
                "own_error": self.own_error,
                "threads": torch.get_num_threads(),
            }
            torch.save(contents, Path(self._folder.name) / "problem.pt")
        return Path(self._folder.name) / "problem.pt"

    def close(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()


def draw(case: StepCase, device: torch.device) -> StepProblem:
    """The model with seeded weights, its data-dependent start done, and the reference's run from there."""
    torch.compiler.reset()  # cases share code objects, and dynamo gives up after a few variants of one
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(case.name.encode()))
        model = case.make().to(device).train()
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
        batches, several = batches_of(case, model, device), len(model.players()) > 1
        if several:
            batches = batches[: math.ceil(len(batches) / period(model))]
        with use_backend("reference"):
            flow = getattr(model, "flow", model)  # that of a hybrid
            if hasattr(flow, "initialize"):
                flow.initialize(batches[0])
            if hasattr(model, "begin"):
                model.begin(torch.cat(batches), None)
            truth, *rest = (
                Trainer(moves_of(twin), dtype, device).run(batches)
                for dtype in dict.fromkeys((torch.float32, case.dtype))
                for twin in [copy.deepcopy(model)]
            )
    own = max((abs(a - b) for losses in rest for a, b in zip(losses, truth, strict=True)), default=0.0)
    return StepProblem(case, model, batches, truth, own, PLAYERS_TOLERANCE if several else TOLERANCE)


# --- providers ----------------------------------------------------------------------------------------------------


@dataclass
class StepProvider:
    """One way to run a model's step in this process."""

    name: str
    backend: str
    compiled: bool
    ours: bool
    seconds: float = 0.0  # that it took to compile and to pass the gate, in all cases together

    def open(self, problem: StepProblem) -> StepSession:
        device = problem.batches[0].device
        if self.compiled and device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
            raise Unavailable("needs a C++ compiler (g++) on the CPU, and none was found")
        if self.backend == "auto":
            kernels = ("cpu",) if device.type == "cpu" else ("triton", "cuda")
            reasons = [why_missing(name) for name in kernels]
            if all(reasons):
                raise Unavailable(f"has no kernels here: {reasons[0]}")
        return StepSession(problem, self)


class StepSession:
    """A provider at work on one case."""

    def __init__(self, problem: StepProblem, provider: StepProvider):
        self.problem, self.provider = problem, provider
        self.work: Work | None = None
        self.losses: list[float] = []
        self.parted = ""  # where its fp32 losses left the reference's by rounding
        self.model, self.trainer = self._start(problem, problem.case.dtype)

    def _start(self, problem: StepProblem, dtype: torch.dtype) -> tuple[Model, Trainer]:
        model = copy.deepcopy(problem.model)
        moves = moves_of(model, _compiled) if self.provider.compiled else moves_of(model)
        return model, Trainer(moves, dtype, problem.batches[0].device)

    def check(self) -> str:
        problem = self.problem
        self.losses = self._run(self.trainer, problem)
        fault = fault_of(self.losses, problem.truth, problem.own_error, tolerance=problem.tolerance)
        moves = len(self.trainer.moves)
        if moves == 1 or not fault or problem.case.dtype != torch.float32:
            return fault
        if fault_of(self.losses[:moves], problem.truth[:moves], 0.0, tolerance=problem.tolerance):
            return fault
        _, trainer = self._start(problem.double, torch.float64)
        losses = self._run(trainer, problem.double)
        if wrong := fault_of(losses, problem.double.truth, 0.0, tolerance=DOUBLE_TOLERANCE):
            return f"{fault}; in fp64, {wrong}"
        self.parted = fault
        return ""

    def _run(self, trainer: Trainer, problem: StepProblem) -> list[float]:
        began = time.monotonic()
        try:
            with use_backend(self.provider.backend), torch.random.fork_rng():
                return trainer.run(problem.batches)
        except Exception as error:
            if not self.provider.compiled:
                raise
            raise Unavailable(f"torch.compile failed: {type(error).__name__}: {first_line(error)}") from None
        finally:
            self.provider.seconds += time.monotonic() - began

    def operations(self) -> list[tuple]:
        """What its next step has torch do, as the profiler sees it, in front of which every path runs as it does
        unseen."""
        with use_backend(self.provider.backend), torch.random.fork_rng():
            torch.manual_seed(0)
            with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
                self.trainer.step(self.problem.batches[-1])
        events = sorted(seen.profiler.kineto_results.events(), key=lambda e: (e.start_ns(), -e.end_ns()))
        return [(e.name(), e.shapes(), e.dtypes()) for e in events]

    def warm_up(self) -> float:
        self.work = Work(self.trainer.step, [Inputs((self.problem.batches[-1],))], "step")
        with use_backend(self.provider.backend):
            return self.work.warm_up()

    def turn(self) -> list[float]:
        with use_backend(self.provider.backend):
            return self.work.turn()

    def peak_bytes(self) -> int | None:
        with use_backend(self.provider.backend):
            return self.work.peak_bytes()

    def close(self) -> None:
        self.work = self.trainer = self.model = None


def twins(sessions: Mapping[str, object]) -> dict[str, str]:
    """Eager providers past the gate that do the very same as one before them, by the name of that one."""
    eager = {n: s for n, s in sessions.items() if isinstance(s, StepSession) and not s.provider.compiled}
    pairs = [(a, b) for a, b in itertools.combinations(eager, 2) if _same_bits(eager[a], eager[b])]
    seen = {name: eager[name].operations() for name in dict.fromkeys(itertools.chain.from_iterable(pairs))}
    found: dict[str, str] = {}
    for first, second in pairs:
        if seen[first] == seen[second]:
            found.setdefault(second, first)
    return found


def _same_bits(one: StepSession, other: StepSession) -> bool:
    tensors = ([*s.model.parameters(), *s.model.buffers()] for s in (one, other))
    return one.losses == other.losses and all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


def _compiled(loss: Callable) -> Callable:
    # eager's random numbers: the gate compares losses that depend on them
    return torch.compile(loss, fullgraph=True, dynamic=False, options={"fallback_random": True})


def local() -> list[StepProvider]:
    """The providers of this process, baselines first."""
    return [
        StepProvider("reference", "reference", compiled=False, ours=True),
        StepProvider("compiled", "reference", compiled=True, ours=False),
        StepProvider("fused", "auto", compiled=False, ours=True),
        StepProvider("fused compiled", "auto", compiled=True, ours=True),
    ]


class Budget:
    """Which providers a case is given, so that within a limit every case has its rows.

    Compiling a model takes longer than all else. A case is compiled while what is left of the limit also holds the
    eager providers of all cases to come, by what the cases so far took.
    """

    def __init__(self, limit: float, cases: int, offered: Sequence):
        self.limit, self.waiting, self.offered = limit, cases, offered
        self._eager: list[float] = []
        self._compiling: list[float] = []
        self._before = 0.0

    def chosen(self, elapsed: float) -> list:
        """The providers of the next case, `elapsed` seconds after the start."""
        self._before = self._compiled_seconds()
        eager = self.waiting * sum(self._eager) / max(len(self._eager), 1)
        fits = self.limit - elapsed >= eager + max(self._compiling, default=0.0)
        return [p for p in self.offered if fits or not getattr(p, "compiled", False)]

    def done(self, seconds: float) -> None:
        """The case took so long in all."""
        compiling = self._compiled_seconds() - self._before
        self.waiting -= 1
        self._eager.append(seconds - compiling)
        if compiling:
            self._compiling.append(compiling)

    def _compiled_seconds(self) -> float:
        return sum(p.seconds for p in self.offered if getattr(p, "compiled", False))
