"""What a training run is told: one flat, frozen record that goes into ``config.json`` as it is."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, fields, replace

from genkernels._words import UsageError, nearest

PRECISIONS = ("32", "bf16-mixed", "16-mixed")
ACCELERATORS = ("auto", "cpu", "gpu")
STRATEGIES = ("auto", "ddp")
SCHEDULES = ("constant", "cosine", "linear")
LONGEST = 10**12  # steps
MOST_THREADS, MOST_WORKERS = 1024, 256  # what no machine gains by

#: What a resumed run may be told anew. The rest (seed, batch size, …) fixes which examples and noise a step sees.
CHANGEABLE = frozenset(
    "max_steps epochs lr warmup schedule clip precision accelerator devices strategy workers log_every eval_every "
    "sample_every checkpoint_every patience samples temperature eval_examples eval_batch_size backend threads "
    "tensorboard".split()
)


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Adam with the papers' step size (NICE, RealNVP and Glow all use 1e-3), averaged weights, clipped
    gradients. Each field is an option of ``genkernels train``, with the words below as its help.

    Attributes:
        max_steps: steps in all, counted from step 0 also after a resume (None: 2,000 on the command line, where
            `epochs` is not given either).
        epochs: passes over the data, in place of `max_steps`.
        batch_size: examples a step *on each device*.
        lr: Adam's step size, times each player's own factor; it rises linearly over the first `warmup` steps and then
            follows `schedule`.
        warmup: steps of linear warm-up (None: a tenth of the run, 100 at most; deep flows diverge without).
        schedule: ``constant``, ``cosine`` down to 0 at the last step, or ``linear``: constant for half of the run, then
            straight down to 0.
        betas: Adam's moments.
        weight_decay: decoupled (AdamW); 0 is plain Adam.
        clip: largest gradient norm of each player; 0 does not clip.
        ema: decay of the averaged weights that evaluation and samples use; 0 keeps none.
        precision: ``32``, ``bf16-mixed`` or ``16-mixed`` (automatic mixed precision). Evaluation and sampling are
            always fp32.
        accelerator: ``auto``, ``cpu`` or ``gpu``.
        devices: how many processes train, each on a device of its own.
        strategy: ``auto`` (``ddp`` where there are several devices) or ``ddp``.
        workers: processes that load data beside the training process; 0 loads in it.
        seed: weights apart, the run is a function of it: data order, dequantisation noise, samples.
        log_every: steps between two looks at the losses (None: 1 on the CPU; 20 on a GPU, where a look waits for the
            device).
        eval_every: steps between evaluations on the held-out examples (None: ten times a run; 0: only at the end).
        sample_every: steps between sample sheets (None: as `eval_every`; 0: only at the end).
        checkpoint_every: steps between checkpoints (None: at every evaluation, and every five minutes; 0: only at the
            end).
        patience: stop after this many evaluations without a new best; 0 never stops early.
        samples: pictures on a sample sheet, or points of a plot (None: 64 pictures, 2,000 points).
        temperature: of the samples.
        eval_examples: held-out images that an evaluation during the run looks at, evenly spread; they choose the best
            weights, the result at the end is over all (None: 512, or all points; 0: all).
        eval_batch_size: examples at once in evaluation (None: `batch_size`).
        backend: ``auto``, ``reference``, ``cpu``, ``triton`` or ``cuda``; None leaves the choice in force alone.
        threads: CPU threads (None: torch's choice). Beside a busy process one fewer than there are cores is often
            faster, and so is one alone for a small model.
        tensorboard: whether event files for TensorBoard are written.
    """

    max_steps: int | None = None
    epochs: float | None = None
    batch_size: int = 64
    lr: float = 1e-3
    warmup: int | None = None
    schedule: str = "constant"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.999
    precision: str = "32"
    accelerator: str = "auto"
    devices: int = 1
    strategy: str = "auto"
    workers: int = 0
    seed: int = 0
    log_every: int | None = None
    eval_every: int | None = None
    sample_every: int | None = None
    checkpoint_every: int | None = None
    patience: int = 0
    samples: int | None = None
    temperature: float = 1.0
    eval_examples: int | None = None
    eval_batch_size: int | None = None
    backend: str | None = None
    threads: int | None = None
    tensorboard: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))  # JSON gives a list back
        if self.max_steps is not None and self.epochs is not None:
            raise UsageError(f"only one of max_steps={self.max_steps} and epochs={self.epochs:g} can be given")
        _integers(self, 1, "batch_size", "devices")
        _integers(self, 1, "max_steps", "log_every", "eval_batch_size", "samples", "threads", optional=True)
        _integers(self, 0, "workers", "patience")
        _integers(self, 0, "warmup", "eval_examples", "eval_every", "sample_every", "checkpoint_every", optional=True)
        for name, most in (("threads", MOST_THREADS), ("workers", MOST_WORKERS)):
            _require(self, name, (getattr(self, name) or 0) <= most, f"at most {most:,}")
        if not isinstance(self.seed, int) or not -(2**63) <= self.seed < 2**63:
            raise UsageError(f"seed must be an integer of 64 bits, got {self.seed!r}")
        _require(self, "epochs", self.epochs is None or _finite(self.epochs) and self.epochs > 0, "positive")
        _require(self, "lr", _finite(self.lr) and self.lr > 0, "positive")
        _require(self, "clip", _finite(self.clip) and self.clip >= 0, "0 (no clipping) or positive")
        _require(self, "ema", _finite(self.ema) and 0 <= self.ema < 1, "in [0, 1)")
        _require(self, "temperature", _finite(self.temperature) and self.temperature >= 0, "0 or positive")
        _require(self, "weight_decay", _finite(self.weight_decay) and self.weight_decay >= 0, "0 or positive")
        _require(self, "betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                value = getattr(self, name)
                raise UsageError(
                    f"{name} must be one of {', '.join(allowed)}, got {value!r}{nearest(value, allowed, listed=True)}"
                )

    def to_dict(self) -> dict:
        return {**asdict(self), "betas": list(self.betas)}

    @classmethod
    def from_dict(cls, values: dict) -> TrainConfig:
        """Rebuilds a configuration.

        Raises:
            UsageError: a setting is unknown, or a value is not allowed.
        """
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise UsageError(f"unknown training setting {key!r}{nearest(key, known)}")
        return cls(**values)

    def changed(self, **values) -> TrainConfig:
        return replace(self, **values)

    @property
    def world_size(self) -> int:
        """How many processes will train."""
        return self.devices * int(os.environ.get("NNODES", "1") or 1)

    def total_steps(self, examples: int, world_size: int = 1) -> int:
        """Steps of the whole run: `max_steps`, or what `epochs` passes over `examples` take.

        Raises:
            UsageError: neither was given, or too much.
        """
        if self.max_steps is None and self.epochs is None:
            raise UsageError("one of max_steps and epochs must be given, got neither")
        steps = self.max_steps or self.epochs * examples / (self.batch_size * world_size)
        if steps > LONGEST:
            raise UsageError(f"a run must be of at most {LONGEST:,} steps, got {steps}")
        return max(1, math.ceil(steps))

    def pauses(self, done: int, total: int, held_out: int) -> dict[str, float]:
        """How many evaluations, sheets and checkpoints come after `done` of `total` steps, where nothing is left open
        but `checkpoint_every`. The last evaluation is followed, if of fewer, by one of all `held_out` examples."""

        def count(every: int) -> int:
            return (total // every - done // every + bool(total % every) if every else 1) if done < total else 0

        evaluations = count(self.eval_every)
        saves = evaluations if self.checkpoint_every is None else count(self.checkpoint_every)
        few = min(self.eval_examples or held_out, held_out)
        whole = held_out / few if evaluations and few < held_out else 0
        return {"evaluate": evaluations + whole, "draw": count(self.sample_every), "save": saves}

    def lr_at(self, step: int, total: int) -> float:
        """The step size of `step` in a run of `total` steps. A pure function, so that a resumed run needs no scheduler
        state."""
        warmup = min(100, total // 10) if self.warmup is None else self.warmup
        if step < warmup:
            return self.lr * (step + 1) / warmup
        if self.schedule == "cosine":
            progress = (step - warmup) / max(1, total - warmup)
            return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        if self.schedule == "linear":
            return self.lr * min(1.0, 2 * max(0, total - step) / total)
        return self.lr


_CHOICES = {"precision": PRECISIONS, "accelerator": ACCELERATORS, "strategy": STRATEGIES, "schedule": SCHEDULES}


def check_threads(count: int | None, called: str = "--threads") -> None:
    """A UsageError where that is no number of CPU threads; None is torch's choice."""
    if count is not None and not 1 <= count <= MOST_THREADS:
        bound = "at least 1" if count < 1 else f"at most {MOST_THREADS:,}"
        raise UsageError(f"{called} must be {bound}, got {count}")


def _finite(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require(config: TrainConfig, name: str, holds: bool, what: str) -> None:
    if not holds:
        raise UsageError(f"{name} must be {what}, got {getattr(config, name)!r}")


def _integers(config: TrainConfig, least: int, *names: str, optional: bool = False) -> None:
    for name in names:
        value = getattr(config, name)
        if value is None and optional:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UsageError(f"{name} must be an integer of at least {least}, got {value!r}")
