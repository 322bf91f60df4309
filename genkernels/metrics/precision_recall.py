"""Precision and recall of samples: how many look real, and how much of what is real they cover."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from genkernels.metrics._sets import MOST_VALUES, all_finite, flattened
from genkernels.ops import checks

WHO = "precision_recall"


class PrecisionRecall(NamedTuple):
    """Shares from 0 to 1 of two sets.

    Attributes:
        precision: of the samples, those that lie among real examples.
        recall: of the real examples, those that lie among samples.
    """

    precision: float
    recall: float


@torch.no_grad()
def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> PrecisionRecall:
    """Which of two sets lies within the other, each being the union of balls around its points.

    A point's ball reaches to its k-th nearest neighbour in its own set; on its edge counts as within.

    Equivalent to::

        def within(points, centres):
            radii = torch.cdist(centres, centres).kthvalue(k + 1).values
            return (torch.cdist(points, centres) <= radii).any(1).double().mean()

        within(fake, real), within(real, fake)

    Args:
        real: ``[N, ...]``, features, images or points. fake: ``[M, ...]`` on the same scale. Equal sizes are best:
            balls shrink as a set grows.
        k: 1 or more, below N and M. Points that more than k others equal have balls of radius 0.

    Returns:
        `PrecisionRecall`, NaN where a value is not finite. The distances are differences in fp64, taken in blocks.

    Raises:
        TypeError: a set is no tensor of numbers, or only one holds integers. ValueError: one has at most k examples,
            the shapes differ, or k is out of range.

    Source: Kynkäänniemi et al., "Improved precision and recall metric for assessing generative models", 2019.
    """
    checks.integer(WHO, "k", k, 1)
    real, fake = (x.double() for x in flattened(WHO, {"real": real, "fake": fake}, least=k + 1))
    if not all_finite(real, fake):
        return PrecisionRecall(math.nan, math.nan)
    return PrecisionRecall(_share_within(fake, real, k), _share_within(real, fake, k))


def _share_within(points: Tensor, centres: Tensor, k: int) -> float:
    """The share of `points` that lie in a ball around one of the `centres`."""
    step = max(1, MOST_VALUES // len(centres))
    # each centre's own distance, 0, is the first
    radii = torch.cat([_distances(some, centres).kthvalue(k + 1).values for some in centres.split(step)])
    return sum((_distances(some, centres) <= radii).any(1).sum().item() for some in points.split(step)) / len(points)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # by differences: ‖x‖² − 2 x·y + ‖y‖² leaves equal points apart
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
