"""Samples as a function of (weights, count, temperature, seed), whatever the global generators hold."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from genkernels._seeds import fixed_seed
from genkernels._words import UsageError
from genkernels.training.evaluate import no_autocast


def sample(
    model: nn.Module,
    n: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    label: int | None = None,
    num_classes: int | None = None,
    batch_size: int = 256,
) -> Tensor:
    """Draws n samples in evaluation mode and fp32, in batches of fixed size, so that memory does not grow with n.

    Args:
        model: has ``sample(n, temperature, generator, y)``.
        n: how many.
        temperature: of the prior.
        seed: of the draws.
        label: the class of every sample; None takes each class in turn where the model is class-conditional.
        num_classes: how many classes the model was trained with; None where it is not class-conditional.
        batch_size: samples at once.

    Returns:
        ``[n, C, H, W]`` in [0, 1] or ``[n, D]``, on the CPU.

    Raises:
        UsageError: a label for a model without classes, or out of range.
    """
    if label is not None and num_classes is None:
        raise UsageError("the model has no classes to choose from: it was not trained with --class-conditional")
    if label is not None and not 0 <= label < num_classes:
        raise UsageError(f"label must be in 0 to {num_classes - 1}, got {label}")
    with _drawing(model, seed) as (device, generator):
        labels = None
        if num_classes is not None:
            labels = (
                torch.arange(n, device=device) % num_classes
                if label is None
                else torch.full((n,), label, device=device)
            )
        parts = []
        for first in range(0, n, batch_size):
            count = min(batch_size, n - first)
            given = {} if labels is None else {"y": labels[first : first + count]}
            parts.append(model.sample(count, temperature=temperature, generator=generator, **given).cpu())
    return torch.cat(parts)


#: What `known_region` knows: the part of an image that is kept.
REGIONS = ("top-half", "top-quarter", "left-half")


def known_region(region: str, shape: tuple[int, int, int]) -> Tensor:
    """``[H, W]`` bool, True where `region` of an image ``(C, H, W)`` is kept.

    Raises:
        UsageError: the region is unknown, or all of so small an image.
    """
    _, height, width = shape
    if region not in REGIONS:
        raise UsageError(f"region must be one of {', '.join(REGIONS)}, got {region!r}")
    rows = {"top-half": height // 2, "top-quarter": height // 4}.get(region, height)
    columns = width // 2 if region == "left-half" else width
    known = torch.zeros(height, width, dtype=torch.bool)
    known[:rows, :columns] = True
    if not known.any():
        raise UsageError(f"region {region} of an image of {height}x{width} pixels is empty")
    return known


def inpaint(
    model: nn.Module,
    x: Tensor,
    known: Tensor,
    *,
    y: Tensor | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
) -> Tensor:
    """Draws what is unknown of images, in evaluation mode and fp32; known values stay bit for bit.

    Args:
        model: has ``inpaint(x, known, temperature, generator, y)``: a model of the PixelCNN family.
        x: ``[N, C, H, W]`` uint8. known: bool, broadcastable to it. y: ``[N]`` classes, for a class-conditional model.
        temperature, seed, batch_size: as for `sample`.

    Returns:
        As `x`, on the CPU.

    Raises:
        UsageError: the model cannot do it.
    """
    if not hasattr(model, "inpaint"):
        raise UsageError(
            f"{type(model).__name__} cannot in-paint: only the PixelCNN family draws some pixels given others"
        )
    with _drawing(model, seed) as (device, generator):
        parts = []
        for first in range(0, len(x), batch_size):
            part = slice(first, first + batch_size)
            given = {} if y is None else {"y": y[part].to(device)}
            drawn = model.inpaint(x[part].to(device), known, temperature=temperature, generator=generator, **given)
            parts.append(drawn.cpu())
    return torch.cat(parts)


@contextlib.contextmanager
def _drawing(model: nn.Module, seed: int) -> Iterator[tuple[torch.device, torch.Generator]]:
    """Evaluation mode, no graph, no autocast and a generator on the model's device; leaves the model as it was."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), fixed_seed(seed), no_autocast(device):
            yield device, torch.Generator(device).manual_seed(seed)
    finally:
        model.train(was_training)


def unusable(samples: Tensor) -> int:
    """How many samples hold a NaN or an infinity: the inverse of a flow that has hardly been trained can overflow."""
    return int((~samples.isfinite().flatten(1).all(1)).sum())
