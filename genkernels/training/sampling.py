"""Samples as a function of (weights, count, temperature, seed), whatever the global generators hold."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genkernels.training.errors import UsageError
from genkernels.training.evaluate import no_autocast
from genkernels.training.order import fixed_seed


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
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator(device).manual_seed(seed)
    labels = None
    if num_classes is not None:
        labels = (
            torch.arange(n, device=device) % num_classes if label is None else torch.full((n,), label, device=device)
        )
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), fixed_seed(seed), no_autocast(device):
            parts = []
            for first in range(0, n, batch_size):
                count = min(batch_size, n - first)
                given = {} if labels is None else {"y": labels[first : first + count]}
                parts.append(model.sample(count, temperature=temperature, generator=generator, **given).cpu())
    finally:
        model.train(was_training)
    return torch.cat(parts)


def unusable(samples: Tensor) -> int:
    """How many samples hold a NaN or an infinity: the inverse of a flow that has hardly been trained can overflow."""
    return int((~samples.isfinite().flatten(1).all(1)).sum())
