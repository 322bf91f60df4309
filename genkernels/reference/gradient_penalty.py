r"""A critic's gradient penalty in plain PyTorch: points between pairs, and the penalty of a norm. The definition, the
oracle and the fallback.

.. math:: \hat x_n = f_n + u_n (r_n - f_n),\qquad p_n = (\lVert g_n\rVert - t)^2,\qquad
    \frac{\partial p_n}{\partial g_n} = 2\,\frac{\lVert g_n\rVert - t}{\lVert g_n\rVert}\,g_n

with g the critic's gradient at :math:`\hat x` (Gulrajani et al., "Improved training of Wasserstein GANs", 2017). One
sided, :math:`\max(\lVert g_n\rVert - t, 0)` takes the place of the difference. For t = 0 it is
:math:`\lVert g_n\rVert^2`, with the gradient :math:`2 g_n`: R1 and R2 (Mescheder et al., 2018).

Shapes: r, f and g ``[N, ...]``, u, the penalty and the norm ``[N]``. Points are computed in fp32 (fp64 for fp64) and
rounded once. Squares are added up in fp64, where those of any fp32 number have room, and so are the norm and its
product with g: no norm over- or underflows that g's dtype could hold. In the direction :math:`g / \lVert g\rVert` a
norm below `SMALLEST` counts as 0, and the direction of 0 is 0: gradients of every order are finite there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: The norm that has a direction: the smallest normal number of fp32.
SMALLEST = 2.0**-126


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """``[N]`` as ``[N, 1, ...]``, to go with `like`."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def interpolate_pairs(real: Tensor, fake: Tensor, u: Tensor) -> Tensor:
    """Points between the pairs, like real; u is of fp32 (fp64 for fp64)."""
    return (fake + _per_sample(u, fake) * (real.to(u.dtype) - fake)).to(real.dtype)


def interpolate_pairs_backward(grad: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """``(grad_real, grad_fake)``: u · g and g − u · g."""
    by_real = _per_sample(u, grad) * grad
    return by_real.to(grad.dtype), (grad - by_real).to(grad.dtype)


def gradient_penalty(gradient: Tensor, target: float, one_sided: bool) -> tuple[Tensor, Tensor]:
    """``(penalty, norm)``: fp32 (fp64 for fp64), and fp64; what is kept for backward is the norm."""
    squares = gradient.double().square()
    square = squares.reshape(gradient.shape[0], math.prod(gradient.shape[1:])).sum(1)
    nothing = square < SMALLEST**2
    norm = torch.where(nothing, 0, torch.where(nothing, 1, square).sqrt())
    penalty = square if target == 0 else _excess(norm, target, one_sided).square()
    return penalty.to(torch.promote_types(gradient.dtype, torch.float32)), norm


def gradient_penalty_backward(
    grad: Tensor | None, grad_norm: Tensor | None, gradient: Tensor, norm: Tensor, target: float, one_sided: bool
) -> Tensor:
    """The gradient by `gradient`, of what `gradient_penalty` gave: g times a number a sample."""
    nothing = norm == 0
    inverse = torch.where(nothing, 0, 1 / torch.where(nothing, 1, norm))
    factor = torch.zeros_like(norm) if grad_norm is None else grad_norm * inverse
    if grad is not None:
        slope = 2.0 if target == 0 else 2 * _excess(norm, target, one_sided) * inverse
        factor = factor + slope * grad
    return (_per_sample(factor, gradient) * gradient).to(gradient.dtype)


def _excess(norm: Tensor, target: float, one_sided: bool) -> Tensor:
    """How far the norm is from its target; one-sided, how far beyond."""
    return (norm - target).clamp(min=0) if one_sided else norm - target
