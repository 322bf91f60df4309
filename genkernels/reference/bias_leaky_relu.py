r"""Leaky ReLU with bias, gain and clamp in plain PyTorch: the definition, the oracle and the fallback.

.. math:: y = \mathrm{clamp}\bigl(\gamma\,\phi(x + b),\ \pm m\bigr),\qquad \phi(a) = a \text{ for } a > 0,\ s\,a
    \text{ else}

(Karras et al., "Analyzing and improving the image quality of StyleGAN", 2020). With s ≥ 0 and γ > 0 the sign of y is
that of x + b, and so y alone says what it was multiplied by: γ where y > 0, γs elsewhere, 0 where :math:`|y| \ge m`.
Where a half y underflows to 0 it counts as not above it, whatever the sign of x + b.
That is all that is saved for backward. Backward is linear in the gradient, and its own backward is itself.

Shapes: ``x [N, C, ...]``, y like x; ``b [C]``, fp32 (fp64 for fp64). Half numbers are computed in fp32 and rounded
once; m is rounded to x's dtype.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _per_channel(bias: Tensor, like: Tensor) -> Tensor:
    """``[C]`` as ``[C, 1, ...]``, to go with `like`."""
    return bias.reshape(-1, *[1] * (like.dim() - 2))


def bias_leaky_relu(x: Tensor, bias: Tensor | None, negative_slope: float, gain: float, clamp: float) -> Tensor:
    """y; a clamp of infinity is none."""
    a = x.to(torch.promote_types(x.dtype, torch.float32))
    if bias is not None:
        a = a + _per_channel(bias, x)
    y = gain * F.leaky_relu(a, negative_slope)
    if y.dtype != x.dtype and gain < 1:  # what underflows has the slope that 0 has
        lost = (a > 0) & (y.to(x.dtype) == 0)
        y = torch.where(lost, y.detach() + gain * negative_slope * (a - a.detach()), y)
    if clamp < math.inf:
        limit = torch.full((), clamp, dtype=x.dtype, device=x.device).to(y.dtype)
        y = torch.where(y.abs() >= limit, limit.copysign(y.detach()), y)
    return y.to(x.dtype)


def bias_leaky_relu_backward(
    grad: Tensor, y: Tensor, with_bias: bool, negative_slope: float, gain: float, clamp: float
) -> tuple[Tensor, Tensor]:
    """``(grad_x, grad_bias)``, the latter ``[C]``, or ``[0]`` where it is not asked for."""
    work = torch.promote_types(y.dtype, torch.float32)
    above, below = (torch.full((), value, dtype=work, device=y.device) for value in (gain, gain * negative_slope))
    slope = torch.where(y > 0, above, below)
    if clamp < math.inf:
        slope = torch.where(y.abs() >= torch.full((), clamp, dtype=y.dtype, device=y.device), 0, slope)
    by_x = grad.to(work) * slope
    by_bias = by_x.transpose(0, 1).reshape(y.shape[1], y.numel() // max(1, y.shape[1])).sum(1) if with_bias else None
    return by_x.to(y.dtype), by_x.new_empty(0) if by_bias is None else by_bias
