"""Samples as a function of (weights, count, temperature, seed), whatever the global generators hold; and sheets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from genkernels._seeds import derive_seed
from genkernels._words import UsageError
from genkernels.ops import checks
from genkernels.pictures import class_rows, draw, samples, save, why_not
from genkernels.training.average import applied
from genkernels.training.judge import device_of, evaluating

if TYPE_CHECKING:
    from genkernels.data import DataBundle
    from genkernels.models import Model


def sample(
    model: Model,
    n: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    label: int | Sequence[int] | None = None,
    batch_size: int = 256,
    options: dict[str, Any] | None = None,
) -> Tensor:
    """Draws n samples in evaluation mode and fp32, in batches of fixed size, so that memory does not grow with n.

    Args:
        model: has ``sample(n, temperature, generator, y)``. n: how many.
        temperature: of the prior. seed: of the draws.
        label: the class of every sample, or one for each; None takes each in turn where the model has classes.
        batch_size: samples at once.
        options: further keyword arguments of ``model.sample``.

    Returns:
        ``[n, C, H, W]`` in [0, 1] or ``[n, D]``, on the CPU. A UsageError where the label is none of the model's.
    """
    checks.integer("sample", "n", n, 0)
    checks.integer("sample", "batch_size", batch_size, 1)
    classes, labels, parts = model.num_classes if model.samples_by_class else None, None, []
    if label is not None and not model.samples_by_class:
        raise UsageError(f"{type(model).__name__} draws from p(x), of which no class can be chosen")
    if label is not None and not classes:
        raise UsageError("the model has no classes to choose from: it was not trained with --class-conditional")
    if bad := [] if label is None else [k for k in torch.tensor(label).reshape(-1).tolist() if not 0 <= k < classes]:
        raise UsageError(f"label must be in 0 to {classes - 1}, got {bad[0]}")
    with drawing(model, seed) as (device, generator):
        if classes:
            labels = torch.arange(n) % classes if label is None else torch.tensor(label).expand(n)
            labels = labels.to(device)
        for first in range(0, max(n, 1), batch_size):  # none, too, has the shape of samples
            count = min(batch_size, n - first)
            given = {**(options or {}), **({} if labels is None else {"y": labels[first : first + count]})}
            parts.append(model.sample(count, temperature=temperature, generator=generator, **given).cpu())
    return torch.cat(parts)


@contextlib.contextmanager
def drawing(model: Model, seed: int) -> Iterator[tuple[torch.device, torch.Generator]]:
    """`evaluating`, with a generator on the model's device."""
    device = device_of(model)
    with evaluating(model, seed):
        yield device, torch.Generator(device).manual_seed(seed)


def unusable(samples: Tensor) -> int:
    """How many samples hold a NaN or an infinity: the inverse of a flow can overflow, far from the data."""
    return int((~samples.isfinite().flatten(1).all(1)).sum())


class Sheets:
    """Draws samples of a run's averaged weights, and whatever other pictures the model has, where they are due."""

    def __init__(self, session) -> None:
        self.session = session
        self._missing = why_not(points=not session.bundle.form.is_image) if session.run else None
        if self._missing:
            session.report.note(f"no sample sheets: {self._missing}")

    def draw(self, due) -> None:
        s = self.session
        if not (due.draw or s.judge.stopped_early) or due.interrupted:
            return
        if s.run and s.fabric.is_global_zero and not self._missing:
            with applied(s.averages):
                self._draw(due.step)
        s.fabric.barrier()

    def _draw(self, step: int) -> None:
        s, seed, count = self.session, derive_seed(self.session.config.seed, "sheet"), self.session.config.samples
        x, y = s.bundle.take("test", count)
        sheets = {}
        title = {"model": type(s.model).__name__, "data": s.bundle.name, "step": step}
        if getattr(s.model, "has_prior", True):
            title["temperature"] = s.config.temperature
            rows = class_rows(s.model.num_classes, count) if s.model.samples_by_class else []
            drawn = sample(s.model, len(rows) or count, temperature=title["temperature"], seed=seed, label=rows or None)
            if broken := unusable(drawn):
                s.report.note(f"step {step}: {broken} of {len(drawn)} samples are not finite")
            if broken < len(drawn):
                sheets["samples"] = shown(drawn, title, f"temperature {title['temperature']:g}", s.bundle, (x, y), rows)
        with drawing(s.model, seed) as (device, generator):
            pictures = s.model.pictures(x.to(device), y.to(device), generator)
        sheets |= {name: draw(picture) for name, picture in pictures.items()}
        for name, pixels in sheets.items():
            path = s.run.samples / f"step-{step:08d}{'' if name == 'samples' else f'-{name}'}.png"
            save(path, pixels, {"shows": name, **title})
            s.report.picture(step, name, pixels)


def shown(
    drawn, facts: dict, how: str, bundle: DataBundle | None, real: tuple[Tensor, Tensor] | None, rows=(), classes=None
):
    """The sheet of samples under a title that tells its facts, and a note that tells how they were drawn; `rows` as
    `class_rows` gave them, `real` examples as ``bundle.take`` gives them, `classes` by name."""
    x, y = real or (None, None)
    if real and bundle.form.is_image:
        x = x / (bundle.form.grey_levels - 1)
    title = f"{facts['model']} on {facts['data']}, step {facts['step']:,}"
    words = {"labels": rows, "classes": classes or (bundle and bundle.classes), "real_labels": y}
    return samples(drawn, x, title=title, note=how, **words)
