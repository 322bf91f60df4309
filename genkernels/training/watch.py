"""The losses of a run: kept on the device between two looks, watched for NaN; and how long its steps take."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from genkernels._loss_file import RESERVED
from genkernels._words import UsageError
from genkernels.data.batches import fetch, not_finite
from genkernels.training.checkpoint import TrainingError, list_checkpoints, step_of


class Watch:
    """Takes the terms of every step in, without waiting for the device, and looks at them now and then.

    A NaN is found at the next look, a few steps late, and is still dated to the step in which it arose. Checkpoints are
    only written right after a look.
    """

    def __init__(self, session) -> None:
        self.session = session
        self.record = LossRecord(session.config.log_every, session.fabric.device)
        self.clock = StepClock(session.fabric.device)

    def add(self, player: str, terms: dict[str, Tensor], grad_norm: Tensor | None) -> None:
        """The terms of one player's move in the step at hand."""
        terms = terms if grad_norm is None else {**terms, "grad_norm": grad_norm}  # not known without clipping
        self.record.add({self.session.column(player, term): value for term, value in terms.items()})

    def tick(self) -> None:
        """A step is done."""
        self.record.close()
        self.clock.tick()

    def rate(self, last: int = 0) -> float | None:
        """Examples a second over all processes, from the median step."""
        return self.clock.rate(self.session.config.batch_size * self.session.fabric.world_size, last=last)

    def look(self, due) -> None:
        """Reads, reports and checks the terms since the last look, the one place where a GPU is waited for; a
        TrainingError where a loss or a gradient norm is not a finite number."""
        s, first = self.session, due.step - len(self.record)
        rows = self.record.read(s.fabric.all_reduce if s.fabric.world_size > 1 else None)
        # Under 16-mixed an infinite gradient is no fault: the step is skipped and the loss scale halved.
        kinds = {"loss": "loss"} if s.config.precision == "16-mixed" else {"loss": "loss", "grad_norm": "gradient norm"}
        watched = {s.column(p, term): (p, what) for p in s.players for term, what in kinds.items()}
        bad = first_bad(rows, watched)
        s.report.rows(first, rows[: bad[0] + 1] if bad else rows, self.clock.read(), lambda: self.rate(last=100))
        if bad is not None:
            (i, name), (player, what) = bad, watched[bad[1]]
            beside = "" if what == "loss" else f" (the loss was {rows[i][s.column(player, 'loss')]:.6g})"
            what += f" of {player}" if len(s.players) > 1 else ""
            step = first + i
            self._refuse(f"the {what} became {rows[i][name]} in step {step}{beside}{self._bad_example(step)}", step)

    def check_weights(self, due) -> None:
        """Refuses to evaluate, draw or save a model that is broken. Waits for the device once."""
        if not weights_are_finite(self.session.model):
            self._refuse(f"the weights are no longer finite after step {due.step}", due.step - 1)

    def _refuse(self, sentence: str, step: int) -> None:
        """A checkpoint is good if a finite step followed it: the weights of one that was written just before the broken
        `step` are what broke it, whatever the settings."""
        run = self.session.run
        found = [path for path in list_checkpoints(run.checkpoints) if step_of(path)] if run else []
        bad = [path.name for path in found if step_of(path) >= step]
        if good := found[len(bad) :]:
            way = f"remove {' and '.join(bad)}, which ends the same way, and go on" if bad else "go on"
            advice = f"the last good checkpoint is {good[0]}: {way} from it with --resume and a smaller --lr or --clip"
        else:
            none = f"{bad[0]} ends the same way" if bad else "no checkpoint was written before it"
            advice = f"{none}: start again with a smaller --lr or --clip"
        raise TrainingError(f"{sentence}; {advice}")

    def _bad_example(self, step: int) -> str:
        """Names an example of that step that is not finite: its batch follows from the seed and the step."""
        for rank in range(self.session.fabric.world_size):
            indices = self.session.order(rank).batch(step)
            x, _ = fetch(self.session.bundle.train, indices)
            if (at := not_finite(x)) is not None:
                return f" (training example {indices[at]} holds a value that is not finite)"
        return ""


def check_terms(model: torch.nn.Module, player: str, terms: dict[str, Tensor]) -> None:
    """Refuses, as a UsageError, what a model's ``losses`` gave where it cannot be minimised or shown."""
    where = f"{type(model).__name__}.losses({player!r})"
    if not isinstance(terms, dict) or not isinstance(terms.get("loss"), Tensor):
        got = ", ".join(terms) or "an empty one" if isinstance(terms, dict) else type(terms).__name__
        raise UsageError(f"{where} must give a dict with the tensor 'loss', got {got}")
    for name, value in terms.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            raise UsageError(f"{where}: each term must be a single number, got {name} of shape {list(value.shape)}")
        if name in RESERVED:
            raise UsageError(f"{where}: a term must not be called {' or '.join(RESERVED)}, got {name}")


class LossRecord:
    """Each term of a step is written into a small buffer on the device, one by name; reading them is the only wait.
    At most `size` steps lie between two looks."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._size, self._device, self._count = size, device, 0
        self._buffers: dict[str, Tensor] = {}
        self._names: list[list[str]] = [[]]  # of the terms that each step had

    def add(self, terms: dict[str, Tensor | float]) -> None:
        """Terms of the step at hand."""
        for name, value in terms.items():
            if name not in self._buffers:
                self._buffers[name] = torch.zeros(self._size, dtype=torch.float64, device=self._device)
            cell = self._buffers[name][self._count]
            if isinstance(value, Tensor):
                cell.copy_(value.detach().squeeze(), non_blocking=True)
            else:
                cell.fill_(value)
            self._names[-1].append(name)

    def close(self) -> None:
        """The step at hand is done."""
        self._count += 1
        self._names.append([])

    def __len__(self) -> int:
        """Steps since the last look."""
        return self._count

    @property
    def full(self) -> bool:
        return self._count == self._size

    def read(self, average: Callable[[Tensor], Tensor] | None = None) -> list[dict[str, float]]:
        """The terms of each step since the last call, by name; `average` takes the mean over processes."""
        count, names = self._count, self._names
        self._count, self._names = 0, [[]]
        if not count:
            return []
        table = torch.stack([buffer[:count] for buffer in self._buffers.values()])
        columns = dict(zip(self._buffers, (average(table) if average else table).tolist(), strict=True))
        return [{name: columns[name][i] for name in names[i]} for i in range(count)]


def first_bad(rows: list[dict[str, float]], columns: Iterable[str]) -> tuple[int, str] | None:
    """``(index, column)`` of the first value in one of the columns that is not a finite number."""
    bad = ((i, name) for i, row in enumerate(rows) for name in columns if not math.isfinite(row.get(name, 0.0)))
    return next(bad, None)


def weights_are_finite(model: torch.nn.Module) -> bool:
    """Whether every parameter and buffer is free of NaN and infinity; waits for the device once."""
    tensors = [t.detach() for t in (*model.parameters(), *model.buffers()) if t.is_floating_point() and t.numel()]
    return not tensors or bool(torch.stack([t.isfinite().all() for t in tensors]).all())


class StepClock:
    """Seconds between the ends of successive steps.

    On a GPU an event is recorded after each step and the events are read when the losses are, so no step waits. The
    time of an evaluation, a sheet or a checkpoint is left out: `restart` after it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._marks = device, []
        self.seconds: list[float] = []

    def restart(self) -> None:
        self.read()
        self._marks = []
        self.tick()

    def tick(self) -> None:
        if self.device.type != "cuda":
            self._marks.append(time.perf_counter())
        else:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record(torch.cuda.current_stream(self.device))

    def read(self) -> list[float]:
        """Seconds of the steps since the last call. Waits for the device."""
        marks, self._marks = self._marks, self._marks[-1:]
        if self.device.type == "cuda" and marks:
            marks[-1].synchronize()
        pairs = zip(marks, marks[1:], strict=False)
        new = [a.elapsed_time(b) / 1e3 if self.device.type == "cuda" else b - a for a, b in pairs]
        self.seconds.extend(new)
        return new

    def rate(self, images: int, *, warmup: int = 5, last: int = 0) -> float | None:
        """Images a second, of `images` a step, from the median of the newest `last` steps (0: of all), without the
        first `warmup` where there are more than twice as many."""
        newest = self.seconds[warmup if len(self.seconds) > 2 * warmup else 0 :][-last:]
        return images / max(statistics.median(newest), 1e-9) if newest else None
