"""The Fréchet distance of two sets, each taken for a Gaussian."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from genkernels.metrics._sets import all_finite, flattened, rows
from genkernels.ops import checks

WHO = "frechet_distance"


@torch.no_grad()
def frechet_distance(
    x: Tensor, y: Tensor, features: Callable[[Tensor], Tensor] | None = None, *, batch_size: int = 256
) -> float:
    r"""The squared 2-Wasserstein distance of the Gaussians with the means and covariances of two sets.

    .. math:: d^2 = \|\mu_x - \mu_y\|^2 + \mathrm{tr}\,\Sigma_x + \mathrm{tr}\,\Sigma_y
        - 2\,\mathrm{tr}\big(\Sigma_x^{1/2} \Sigma_y \Sigma_x^{1/2}\big)^{1/2}

    In fp64, by symmetric eigen-decompositions, so that singular covariances do no harm: with
    :math:`\Sigma_x = A A^\top` and :math:`\Sigma_y = B B^\top` the last trace is the sum of the singular values of
    :math:`A^\top B`, which loses no digits to a root of rounding errors.

    Args:
        x: ``[N, D]`` features, or whatever `features` takes. y: ``[M, D]``, the same.
        features: makes features ``[n, D]`` of a batch of x; ``genkernels.metrics.digit_features()`` for digits. A
            module is called in the mode that it is in. Without it x and y are taken as they are, images as rows of
            pixels.
        batch_size: of the calls of `features`.

    Returns:
        In squared units of the features; NaN where one is not finite. Two sets of one distribution are apart, by
        D (D + 5) / 4 · (1/N + 1/M) if the features are white: compare at equal sizes. A warning says where N or M is
        not above D.

    Raises:
        TypeError: a set is no tensor of numbers, or only one holds integers. ValueError: one has less than two
            examples, the shapes differ, or `features` gives something else than a row an example.

    Source: Dowson and Landau, "The Fréchet distance between multivariate normal distributions", 1982; Heusel et al.,
    "GANs trained by a two time-scale update rule", 2017 (on Inception features: FID).
    """
    if features is not None:
        checks.integer(WHO, "batch_size", batch_size, 1)
        flattened(WHO, {"x": x, "y": y}, least=2)
        x, y = (rows(WHO, "features", features, of, batch_size) for of in (x, y))
    x, y = (of.double() for of in flattened(WHO, {"x": x, "y": y}, least=2))
    if not all_finite(x, y):
        return math.nan
    n, d = min(len(x), len(y)), x.shape[1]
    if n <= d:
        warnings.warn(
            f"{WHO}: there should be more than {d} examples for as many features, got {n}: their covariance is "
            "singular, and the distance too large",
            stacklevel=3,  # behind no_grad
        )
    apart = (x.mean(0) - y.mean(0)).square().sum()
    a, b = _factor(x), _factor(y)
    distance = apart + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a.T @ b).sum()
    return max(distance.item(), 0.0)  # below 0 by rounding alone


def _factor(x: Tensor) -> Tensor:
    """A ``[D, D]`` of the covariance ``A Aᵀ``, its columns orthogonal; directions in which nothing varies are 0."""
    centred = x - x.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / (len(x) - 1))
    rounding = len(values) * torch.finfo(values.dtype).eps * values[-1]
    return vectors * torch.where(values > rounding, values, 0.0).sqrt()
