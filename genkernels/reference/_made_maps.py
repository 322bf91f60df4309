r"""What an autoregressive transform does with one feature, given its parameters: an affine map, or a spline.

A map is of x ``[N, d]`` and params ``[N, P, d]``, d features, and gives values and logarithms of its slope, ``[N, d]``
each. Its inverse gives log-slopes of its own, those of :math:`f^{-1}`. ``backward`` is the step of the transposed
solve: from the gradients by x and by the inverse's log-slopes, at x, that by z, λ, and :math:`\lambda\,\partial
f/\partial p + g_\ell\,\partial\log f'/\partial p`, the gradients by params with the sign turned.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from genkernels.reference.affine_coupling import log_scale, log_scale_slope
from genkernels.reference.rational_quadratic_spline import rational_quadratic_spline, rational_quadratic_spline_backward


class Affine(NamedTuple):
    r""":math:`z = x\,\sigma(s) + t`; P = 2, s first."""

    scale_map: int
    constant: float

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        s, t = params.unbind(1)
        ell = log_scale(s, *self)
        return x * torch.exp(ell) + t, ell

    def inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        s, t = params.unbind(1)
        ell = log_scale(s, *self)
        return (z - t) * torch.exp(-ell), -ell

    def backward(self, grad_x: Tensor | None, grad_ldj: Tensor, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Without a gradient by x, which may be infinite, x multiplies nothing."""
        s, _ = params.unbind(1)
        ell, slope = log_scale(s, *self), log_scale_slope(s, *self)
        by_log, found = grad_ldj.expand_as(s), torch.zeros_like(s)
        if grad_x is not None:
            by_log, found = grad_x * x + by_log, grad_x * torch.exp(-ell)
        return found, torch.stack([by_log * slope, found], 1)


class Splines(NamedTuple):
    """`genkernels.reference.rational_quadratic_spline`, P numbers side by side."""

    parametrization: int
    bound: float
    logit_scale: float
    floor: float

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return self._apply(x, params, False)

    def inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return self._apply(z, params, True)

    def backward(self, grad_x: Tensor | None, grad_ldj: Tensor, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        given = None if grad_x is None else grad_x.flatten()
        found, by_params = rational_quadratic_spline_backward(
            given, grad_ldj.expand_as(x).flatten(), x.flatten(), _by_number(params), *self, True
        )
        return found.view_as(x), -by_params.unflatten(0, x.shape).movedim(2, 1)

    def _apply(self, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        value, ell = rational_quadratic_spline(x.flatten(), _by_number(params), *self, inverse)
        return value.view_as(x), ell.view_as(x)


Elementwise = Affine | Splines


def _by_number(params: Tensor) -> Tensor:
    """``[N, P, d]`` to ``[N * d, P]``, each number a row, so that it has a log-slope of its own."""
    return params.movedim(1, 2).flatten(0, 1)
