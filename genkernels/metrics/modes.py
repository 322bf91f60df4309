"""How many clusters of a data set its samples reach, and how many samples lie between them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from genkernels.ops import checks

WHO = "modes"


class Modes(NamedTuple):
    """What `modes` counts.

    Attributes:
        count: clusters there are. found: those that samples reach.
        share: of the samples, those within a cluster, 0 to 1.
    """

    count: int
    found: int
    share: float


@torch.no_grad()
def modes(x: Tensor, real: Tensor, labels: Tensor, *, radius: float = 3.0) -> Modes | None:
    """Which clusters of labelled examples a set of samples reaches.

    A sample lies in the cluster whose centre is nearest if it is within `radius` standard deviations of it, and a
    cluster is found if it holds a tenth of what it would hold were the samples spread evenly over all.

    Args:
        x: samples ``[N, D]``. real: examples ``[M, D]``. labels: ``[M]`` integers, which cluster an example is of; its
            mean is the centre, and the root of the mean variance of its coordinates the standard deviation.
        radius: in standard deviations; of a round Gaussian in the plane 98.9 % are within 3.

    Returns:
        What was found; None where the examples are not in clusters: of fewer than two labels, or with two centres
        nearer to each other than four standard deviations.

    Raises:
        TypeError, ValueError: the tensors are not of these shapes.
    """
    checks.tensors(WHO, {"x": x, "real": real})
    if x.dim() != 2 or real.dim() != 2 or x.shape[1] != real.shape[1] or labels.shape != real.shape[:1]:
        raise ValueError(
            f"{WHO}: x, real and labels must be [N, D], [M, D] and [M], got {list(x.shape)}, {list(real.shape)} and "
            f"{list(labels.shape)}"
        )
    x, real = x.double(), real.double()
    groups = [real[labels == label] for label in labels.unique()]
    if len(groups) < 2:
        return None
    centres = torch.stack([group.mean(0) for group in groups])
    spread = torch.stack([group.var(0, correction=0).mean().sqrt() for group in groups])
    if not torch.pdist(centres).min() >= 4 * spread.max():
        return None
    away, nearest = torch.cdist(x, centres).min(1)
    within = nearest[away <= radius * spread[nearest]]
    held = within.bincount(minlength=len(groups))
    found = int((held >= max(1.0, 0.1 * len(x) / len(groups))).sum())
    return Modes(len(groups), found, len(within) / max(1, len(x)))
