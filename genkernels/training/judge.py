"""How good a model is on held-out examples: in its own figures of merit, the first of which decides what is best."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from genkernels._seeds import derive_seed, fixed_seed
from genkernels.data.batches import fetch
from genkernels.nn._modes import in_mode
from genkernels.ops import checks
from genkernels.training.average import applied

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from genkernels.models import Estimate, Model


def evaluate(
    model: Model,
    dataset: Dataset,
    *,
    batch_size: int = 64,
    seed: int = 0,
    options: dict[str, Any] | None = None,
    stop: Callable[[], bool] = lambda: False,
    fabric: Fabric | None = None,
) -> dict[str, Estimate] | None:
    """The model's figures of merit over a data set, every example once, in fp32 and in evaluation mode.

    The noise is a function of `seed`, whatever the global generators hold, and they are left as they were.

    Equivalent to::

        model.evaluate(DataLoader(dataset, batch_size), **options)

    Args:
        model: a `genkernels.models.Model`. dataset: gives ``(x, y)``.
        batch_size: examples at once. seed: of the noise. options: keyword arguments of ``model.evaluate``.
        stop: asked before each batch; True abandons the evaluation.
        fabric: shares the batches out over its processes, and pools what they find.

    Returns:
        Estimates by name, or None where `stop` said so. A ValueError where there are no examples or no estimates, or
        no batch can be so small.
    """
    checks.integer("evaluate", "batch_size", batch_size, 1)
    if not len(dataset):
        raise ValueError("evaluate: at least 1 example must be seen, got 0")
    device = device_of(model)
    rank, world_size = (fabric.global_rank, fabric.world_size) if fabric else (0, 1)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(rank * batch_size, len(dataset), world_size * batch_size):
            if stop():
                raise _Abandoned
            x, y = fetch(dataset, list(range(first, min(first + batch_size, len(dataset)))))
            yield x.to(device), y.to(device)

    with evaluating(model, derive_seed(seed, "evaluate", rank)):
        try:
            estimates = model.evaluate(batches(), **(options or {}))
        except _Abandoned:
            return None
    if not estimates:
        raise ValueError(f"{type(model).__name__}.evaluate must give at least 1 estimate, got none")
    return _pooled(estimates, fabric.all_gather) if world_size > 1 else estimates


def report(model: Model, dataset: Dataset, *, batch_size: int = 64, seed: int = 0) -> list[str]:
    """What a model has to say beside its estimates, on the first batch of a data set, under the conditions of
    `evaluate`."""
    checks.integer("report", "batch_size", batch_size, 1)
    x, y = fetch(dataset, list(range(min(batch_size, len(dataset)))))
    device = device_of(model)
    with evaluating(model, derive_seed(seed, "evaluate", 0)), in_mode(model, training=False):
        return model.report(x.to(device), y.to(device))


class _Abandoned(Exception):
    """Leaves a model's `evaluate` from within the batches that it asks for."""


def _pooled(estimates: dict[str, Estimate], gather: Callable[[Tensor], Tensor]) -> dict[str, Estimate]:
    """Estimates over all processes' examples from those that each made of its own."""
    figures = [[e.value, e.standard_error, e.examples] for e in estimates.values()]
    columns = gather(torch.tensor(figures, dtype=torch.float64)).transpose(0, 1).tolist()
    pooled = {}
    for (name, e), column in zip(estimates.items(), columns, strict=True):
        parts = [replace(e, value=v, standard_error=error, examples=int(n)) for v, error, n in column]
        pooled[name] = type(e).pooled(parts)
    return pooled


@contextlib.contextmanager
def evaluating(model: Model, seed: int) -> Iterator[None]:
    """Evaluation mode, no graph, the weights' own precision also in the midst of a mixed-precision run, and random
    numbers from `seed`; model and generators are left as they were."""
    exact = torch.autocast(device_of(model).type, enabled=False)
    with in_mode(model, training=False), torch.no_grad(), fixed_seed(seed), exact:
        yield


def device_of(model: Model) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


class Judge:
    """Evaluates a run's averaged weights on held-out examples, and knows which were the best.

    The same few examples under the same noise judge every step of the run, so that differences between steps are
    sharper than either value. The result at the end is over all examples.

    Attributes:
        evaluations: every ``[step, value, ...]``, a value for each estimate.
        best: ``[step, value]`` of the first estimate, or None. stale: evaluations since then.
        held_out: estimates over all held-out examples at the end of a run.
    """

    def __init__(self, session, state: dict, stopped_early: bool) -> None:
        self.session = session
        self.evaluations: list[list] = [list(row) for row in state.get("evaluations", [])]
        self.best, self.stale = state.get("best"), state.get("stale", 0)
        self.held_out: dict[str, Estimate] = {}
        self.stopped_early = stopped_early

    def evaluate(self, due) -> None:
        """Evaluates where it is due, keeps the best weights, and decides on stopping early."""
        if not due.evaluate or due.interrupted:
            return
        s, everything = self.session, self.session.bundle.test
        count = min(s.config.eval_examples or len(everything), len(everything))
        few = Subset(everything, [i * len(everything) // count for i in range(count)])  # evenly spread
        with applied(s.averages):
            estimates = whole = self._measure(few if count < len(everything) else everything)
            if estimates is not None:
                first = next(iter(estimates.values()))
                better = math.isfinite(first.value) and (self.best is None or first.better_than(self.best[1]))
                self.best, self.stale = ([due.step, first.value], 0) if better else (self.best, self.stale + 1)
                self.stopped_early = 0 < s.config.patience <= self.stale and due.step != s.total
                final = self.stopped_early or due.step == s.total
                if final and count < len(everything):
                    whole = self._measure(everything)
        due.interrupted = whole is None
        if estimates is None:
            return
        self.evaluations.append([due.step, *(e.value for e in estimates.values())])
        if better:
            s.keeper.save_best(due.step)
        due.stop = due.stop or self.stopped_early
        self.held_out = whole if final and whole else {}
        part = f" ({count:,} of {len(everything):,})" if count < len(everything) else ""
        s.report.evaluated(due.step, estimates, part, better, self.best)
        if self.stopped_early:
            s.report.note(f"stopping early: no new best in {self.stale} evaluations")

    def catch_up(self) -> None:
        """Evaluates what earlier calls left: Ctrl-C came at a step that was to be evaluated, or a kill before the
        results."""
        s, due = self.session, self.session.due(self.session.start)
        if not s.start or not due or not due.evaluate:
            return
        if s.start not in {row[0] for row in self.evaluations}:
            self.evaluate(due)
        elif s.start == s.total:
            with applied(s.averages):
                whole = self._measure(s.bundle.test)
            self.held_out, due.interrupted = whole or {}, whole is None
        s.interrupted = due.interrupted and s.start == s.total

    def _measure(self, dataset: Dataset) -> dict[str, Estimate] | None:
        s, c = self.session, self.session.config
        stop = {"stop": s.interrupt.__bool__} if s.fabric.world_size == 1 else {}  # several must stop together
        size = c.eval_batch_size or c.batch_size
        return evaluate(s.model, dataset, batch_size=size, seed=c.seed, fabric=s.fabric, **stop)
