r"""Batch normalisation and leaky ReLU in plain PyTorch: the definition, the oracle and the fallback.

.. math:: y = \phi(\gamma_c\,\hat x + \beta_c),\qquad \hat x = \frac{x - \mu_c}{\sqrt{v_c + \varepsilon}},\qquad
    \phi(a) = a \text{ for } a > 0,\ s\,a \text{ else}

with the mean :math:`\mu_c` and the (biased) variance :math:`v_c` of a channel over samples and places (Ioffe & Szegedy,
"Batch normalization: accelerating deep network training by reducing internal covariate shift", 2015). For a gradient g
of y, :math:`g' = g\,\phi'(\gamma\hat x + \beta)` and n numbers a channel,

.. math:: \nabla_\beta = \sum g',\qquad \nabla_\gamma = \sum g'\hat x,\qquad
    \nabla_x = \frac{\gamma}{\sqrt{v + \varepsilon}}\Bigl(g' - \tfrac1n\nabla_\beta - \tfrac1n\hat x\nabla_\gamma\Bigr)

Shapes: ``x [N, C, ...]``, y like x; :math:`\gamma, \beta, \mu, v` ``[C]``, fp32 (fp64 for fp64). Half numbers are
computed in fp32 and rounded once. Saved for backward: x, :math:`\gamma`, :math:`\beta`, :math:`\mu`, v, but neither y
nor what stands before the leaky ReLU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _axes(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _per_channel(value: Tensor, like: Tensor) -> Tensor:
    """``[C]`` as ``[C, 1, ...]``, to go with `like`."""
    return value.reshape(-1, *[1] * (like.dim() - 2))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(mean, variance)`` of each channel, in fp32 at least; 0 where there are no samples."""
    if not x.numel():
        nothing = x.new_zeros(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
        return nothing, nothing.clone()
    variance, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), _axes(x), correction=0)
    return mean, variance


def batch_norm_leaky_relu(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, negative_slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, mean, variance)``; of weight and bias None are 1 and 0."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean, variance = moments(x.detach())
    if not x.numel():
        return x.clone(memory_format=torch.contiguous_format), mean, variance
    y = F.batch_norm(wide, None, None, weight, bias, training=True, eps=eps)
    return F.leaky_relu(y, negative_slope).to(x.dtype), mean, variance


def batch_norm_leaky_relu_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(grad_x, grad_weight, grad_bias)``, the latter ``[C]`` whether there are weights or not."""
    work = torch.promote_types(x.dtype, torch.float32)
    inverse = _per_channel((variance + eps).rsqrt(), x)
    normal = (x.to(work) - _per_channel(mean, x)) * inverse
    before = normal if weight is None else normal * _per_channel(weight, x)
    if bias is not None:
        before = before + _per_channel(bias, x)
    grad = grad.to(work)
    grad = torch.where(before > 0, grad, negative_slope * grad)
    by_bias, by_weight = grad.sum(_axes(x)), (grad * normal).sum(_axes(x))
    n = max(1, x.numel() // max(1, x.shape[1]))
    by_x = inverse * (grad - _per_channel(by_bias, x) / n - normal * (_per_channel(by_weight, x) / n))
    if weight is not None:
        by_x = by_x * _per_channel(weight, x)
    return by_x.to(x.dtype), by_weight, by_bias
