r"""The importance-weighted bound and the Gaussian terms under it, in plain PyTorch: the definition, the oracle and the
fallback.

.. math:: F_n = \log\frac1K\sum_k e^{\ell_{nk}},\qquad \tilde w_{nk} = \frac{e^{\ell_{nk}}}{\sum_j e^{\ell_{nj}}}
    = \frac{\partial F_n}{\partial\ell_{nk}}

with the log-weights :math:`\ell = \ln p(x, z) - \ln q(z|x)` (Burda et al., "Importance weighted autoencoders", 2016),
and, for a Gaussian q,

.. math:: z_{nkd} = \mu_{nd} + e^{s_{nd}} \varepsilon_{nkd},\qquad
    r_{nk} = \sum_d \tfrac12\varepsilon_{nkd}^2 + s_{nd} - \tfrac12 z_{nkd}^2
    = \ln\mathcal N(z_{nk}; 0, 1) - \ln\mathcal N(z_{nk}; \mu_n, e^{s_n}),

without the prior :math:`r_{nk} = \sum_d \tfrac12\varepsilon^2_{nkd} + s_{nd} + \tfrac12\ln 2\pi`. *Stopped*,
:math:`\mu` and s inside :math:`\ln q` are constants, and ε there is :math:`(z - \mu)/e^s`: the same values, another
gradient.

Shapes: ℓ and r ``[N, K]``, F ``[N]``, ε and z ``[N, K, D]``, μ and s ``[N, D]``. F, weights and r are of fp32 (fp64 for
fp64), z like ε. Saved for backward: the weights; ε, μ and s, from which z is found again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def _work(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def importance_bound(log_w: Tensor) -> tuple[Tensor, Tensor]:
    """``(bound, weights)``. A row of −∞ has the bound −∞ and weights of 0; with +∞, or NaN, its weights are NaN."""
    log_w = _work(log_w)
    peak = log_w.detach().amax(1, keepdim=True)
    nothing = peak == -math.inf
    share = (log_w - peak.masked_fill(nothing, 0)).exp()
    total = share.sum(1, keepdim=True).masked_fill(nothing, 1)
    bound = total.log() + peak - math.log(log_w.shape[1])
    return bound.masked_fill(peak == math.inf, math.inf)[:, 0], share / total


def importance_bound_backward(
    grad_bound: Tensor | None, grad_weights: Tensor | None, weights: Tensor, like: Tensor
) -> Tensor:
    """The gradient by ``log_w``, in the dtype of `like`."""
    slope = 0.0 if grad_bound is None else grad_bound[:, None]
    if grad_weights is not None:
        slope = slope + grad_weights - (grad_weights * weights).sum(1, keepdim=True)
    return (slope * weights).to(like.dtype)


def _drawn(noise: Tensor, mean: Tensor, log_scale: Tensor, stopped: bool) -> tuple[Tensor, Tensor, Tensor]:
    """z, the scale, and the noise as ln q sees it, all in the dtype that is computed in."""
    noise, scale = _work(noise), _work(log_scale).exp()[:, None]
    z = _work(mean)[:, None] + scale * noise
    if stopped and z.requires_grad:
        noise = noise.detach() + (z - z.detach()) / scale.detach()
    return z, scale, noise


def gaussian_reparameterize(
    noise: Tensor, mean: Tensor, log_scale: Tensor, prior: bool, stopped: bool
) -> tuple[Tensor, Tensor]:
    """``(z, log_ratio)``."""
    z, _, standard = _drawn(noise, mean, log_scale, stopped)
    log_scale = _work(log_scale.detach() if stopped else log_scale)[:, None]
    terms = standard.square() / 2 + log_scale
    terms = terms - z.square() / 2 if prior else terms + HALF_LOG_2PI
    # a view, so that the ratio does not hang on the z that is handed out: what weighs the gradient of either weighs it
    # once
    return z.to(noise.dtype).view_as(z), terms.sum(2)


def gaussian_reparameterize_backward(
    grad_z: Tensor | None,
    grad_ratio: Tensor | None,
    noise: Tensor,
    mean: Tensor,
    log_scale: Tensor,
    prior: bool,
    stopped: bool,
) -> tuple[Tensor, Tensor]:
    """``(grad_mean, grad_log_scale)``."""
    z, scale, standard = _drawn(noise, mean, log_scale, stopped)
    by_z = torch.zeros_like(z) if grad_z is None else grad_z.to(z.dtype)
    by_log_scale = torch.zeros_like(z)
    by_mean = by_z
    if grad_ratio is not None:
        ratio = grad_ratio[:, :, None]
        if prior:
            by_mean = by_z = by_z - ratio * z
        if stopped:
            by_mean = by_mean + ratio * standard / scale.detach()
            by_log_scale = ratio * standard * noise * (scale / scale.detach())
        else:
            by_log_scale = ratio
    by_log_scale = by_log_scale + by_z * scale * noise
    return by_mean.sum(1).to(mean.dtype), by_log_scale.sum(1).to(log_scale.dtype)
