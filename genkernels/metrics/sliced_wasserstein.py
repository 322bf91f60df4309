"""The sliced Wasserstein distance: what moving one set onto the other costs, along random directions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genkernels.metrics._sets import MOST_VALUES, all_finite, flattened
from genkernels.nn.dequantize import normal
from genkernels.ops import checks

WHO = "sliced_wasserstein"


@torch.no_grad()
def sliced_wasserstein(
    x: Tensor, y: Tensor, projections: int = 512, generator: torch.Generator | None = None, *, order: float = 2.0
) -> float:
    r"""The mean Wasserstein distance of two sets seen along random directions.

    .. math:: SW_p = \Big(\frac1P \sum_\theta \int_0^1 \big|F_{\theta x}^{-1}(q) - F_{\theta y}^{-1}(q)\big|^p dq
        \Big)^{1/p}

    Along each direction it is exact, by sorting, for sets of different sizes too. Two sets of N examples of one
    distribution are some N^(−1/2) apart.

    Equivalent, for sets of one size, to::

        directions = torch.nn.functional.normalize(torch.randn(projections, D, dtype=torch.float64))
        gaps = (directions @ x.double().T).sort().values - (directions @ y.double().T).sort().values
        gaps.abs().pow(order).mean() ** (1 / order)

    Args:
        x: ``[N, ...]``, images or points; integers count as they are. y: ``[M, ...]`` on the same scale.
        projections: how many directions, uniform on the sphere; the error falls as its root.
        generator: of the directions; torch's default where it is None. The same one gives the same directions to sets
            of any size.
        order: p, 1 or more.

    Returns:
        In the units of x: for sets of one point each, ‖x − y‖ / √D on average (order 2). NaN where a value is not
        finite.

    Raises:
        TypeError: x or y is no tensor of numbers, or only one holds integers. ValueError: a set is empty, the shapes
            differ, or an option is out of range.

    Source: Rabin et al., "Wasserstein barycenter and its application to texture mixing", 2011.
    """
    x, y = flattened(WHO, {"x": x, "y": y})
    checks.integer(WHO, "projections", projections, 1)
    if not isinstance(order, int | float) or not 1 <= order < math.inf:
        raise ValueError(f"{WHO}: order must be a number of at least 1, got {order!r}")
    if not all_finite(x, y):
        return math.nan
    directions = normal((projections, x.shape[1]), torch.float64, x.device, generator)
    directions /= directions.norm(dim=1, keepdim=True)
    of_x, of_y, share = _common_quantiles(len(x), len(y), x.device)
    largest = total = torch.zeros((), dtype=torch.float64, device=x.device)
    for some in directions.split(max(1, MOST_VALUES // (len(x) + len(y)))):
        gaps = (_sorted_along(some, x)[:, of_x] - _sorted_along(some, y)[:, of_y]).abs_()
        before, largest = largest, torch.maximum(largest, gaps.amax())
        # as shares of the largest gap so far, whose powers do not leave the range of fp64
        unit = torch.where(largest > 0, largest, 1.0)
        total = total * (before / unit) ** order + (gaps.div_(unit).pow_(order) @ share).sum()
    return (largest * (total / projections) ** (1 / order)).item()


def _sorted_along(directions: Tensor, x: Tensor) -> Tensor:
    """``[P, N]``: where the examples lie along each direction, in order."""
    blocks = x.split(max(1, MOST_VALUES // x.shape[1]))
    return torch.cat([directions @ block.double().T for block in blocks], dim=1).sort(dim=1).values


def _common_quantiles(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The intervals of [0, 1] on which the quantile functions of n and of m values are both constant: the place of each
    one's value there, int64, and the interval's length, fp64."""
    ends = torch.cat([torch.arange(n, device=device) * m, torch.arange(m, device=device) * n])
    begin = ends.unique()  # in units of 1 / (n m), exact
    length = begin.diff(append=begin.new_tensor([n * m]))
    return begin // m, begin // n, length.double() / (n * m)
