r"""Discretised logistic mixture in plain PyTorch: the definition, the oracle and the fallback.

.. math::
    \mathrm{nll}_n = -\sum_\mathrm{pixels} \log \sum_k \pi_k \prod_c P_{ck},\qquad
    P_{ck} = \sigma\!\left(\frac{x_c + \delta - m_{ck}}{e^{s_{ck}}}\right) -
             \sigma\!\left(\frac{x_c - \delta - m_{ck}}{e^{s_{ck}}}\right),\qquad \delta = \frac1{L - 1}

with :math:`\pi` the softmax of the logits, :math:`s \ge -7`, the lowest level taking the whole left tail and the
highest the whole right one, and, for three channels, :math:`m_1 = \mu_1 + \tanh(c_0) x_0`, :math:`m_2 = \mu_2 +
\tanh(c_1) x_0 + \tanh(c_2) x_1` (Salimans et al., "PixelCNN++", 2017).

Shapes: ``x [N, C, *spatial]``, C = 1 or 3, at the levels ``2 * i / (L - 1) - 1``; params ``[N, 3*K, *spatial]`` for C =
1: K logits, K means, K log-scales; ``[N, 10*K, *spatial]`` for C = 3: K logits, then for each channel K means, K
log-scales, K coefficients. nll is ``[N]``, nats, fp32 or wider; half parameters are computed in fp32.

x counts as its nearest level, the ends beyond them; the gradient by x is that of the formula above at that level (0
beyond the ends).

All is computed in units of a level, with :math:`i` the level, :math:`M = (m + 1)(L - 1)/2` and :math:`w = 2 e^{-s}/(L -
1)`: the edges :math:`a = (i + ½ - M) w` and :math:`b = (i - ½ - M) w` are then rounded once, alike from both sides, so
that the bins add up to 1, and

.. math:: \sigma(a) - \sigma(b) = \sigma(a)\,\sigma(-b)\,(1 - e^{-w})

subtracts nothing: there is no threshold below which a density stands in for the probability.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from genkernels.reference import _draw

#: Log-scales below count as this, with a gradient of 0.
LOWEST_LOG_SCALE = -7.0


def mixtures_of(parameters: int, channels: int) -> int:
    """K, from the number of parameters a pixel."""
    return parameters // (3 if channels == 1 else 10)


class _Parts(NamedTuple):
    """``[N, C, K, *spatial]`` each, but for the logits ``[N, K, *spatial]`` and x ``[N, C, 1, *spatial]``."""

    logits: Tensor
    log_scales: Tensor  #: clamped
    live: Tensor  #: bool: not clamped
    tanh: Tensor | None  #: of the coefficients
    x: Tensor  #: at its level
    width: Tensor  #: of a bin, in scales
    upper: Tensor
    lower: Tensor
    lowest: Tensor  #: bool
    highest: Tensor


def _parts(params: Tensor, x: Tensor, levels: int) -> _Parts:
    work = torch.promote_types(params.dtype, torch.float32)
    channels = x.shape[1]
    mixtures = mixtures_of(params.shape[1], channels)
    params, half = params.to(work), 0.5 * (levels - 1)
    logits = params[:, :mixtures]
    rows = params[:, mixtures:].unflatten(1, (channels, -1, mixtures))
    position = ((x.to(work) + 1) * half).clamp(0, levels - 1)
    level = (position + (position.round() - position).detach()).unsqueeze(2)
    at = level / half - 1
    means, log_scales, tanh = rows[:, :, 0], rows[:, :, 1], None
    if channels == 3:
        tanh = rows[:, :, 2].tanh()
        second = means[:, 1] + tanh[:, 0] * at[:, 0]
        third = means[:, 2] + tanh[:, 1] * at[:, 0] + tanh[:, 2] * at[:, 1]
        means = torch.stack([means[:, 0], second, third], 1)
    clamped = log_scales.clamp(min=LOWEST_LOG_SCALE)
    width = (-clamped).exp() / half
    centre = (means + 1) * half
    upper, lower = (level + 0.5 - centre) * width, (level - 0.5 - centre) * width
    return _Parts(
        logits, clamped, log_scales >= LOWEST_LOG_SCALE, tanh, at, width, upper, lower, level <= 0, level >= levels - 1
    )


def _shrink(width: Tensor) -> tuple[Tensor, Tensor]:
    """(1 - e^-w) / w, and the w that was taken: a width of 0 has no quotient."""
    width = width.clamp(min=torch.finfo(width.dtype).tiny ** 0.5)
    return -torch.expm1(-width) / width, width


def _log_probability(p: _Parts, levels: int) -> Tensor:
    """``[N, K, *spatial]``: log of the channels' joint probability under each component."""
    above, below = F.logsigmoid(p.upper), F.logsigmoid(-p.lower)
    log_width = _shrink(p.width)[0].log() - p.log_scales - math.log(0.5 * (levels - 1))
    inner = above + below + log_width
    return torch.where(p.lowest, above, torch.where(p.highest, below, inner)).sum(1)


def _per_sample(t: Tensor) -> Tensor:
    return t.reshape(t.shape[0], math.prod(t.shape[1:])).sum(1)


def logistic_mixture_nll(params: Tensor, x: Tensor, levels: int = 256) -> Tensor:
    """Negative log-likelihood ``[N]``."""
    p = _parts(params, x, levels)
    return -_per_sample(torch.logsumexp(p.logits.log_softmax(1) + _log_probability(p, levels), 1))


def logistic_mixture_nll_backward(grad: Tensor, params: Tensor, x: Tensor, levels: int = 256) -> Tensor:
    r"""The gradient by params, from the gradient ``[N]`` of the nll.

    With the posterior :math:`\gamma_k \propto \pi_k \prod_c P_{ck}` every gradient is :math:`-g\gamma_k` times that of
    :math:`\log P_{ck}`: by the mean :math:`e^{-s}(\sigma(b) - \sigma(-a))`, by the log-scale
    :math:`b\,\sigma(b) - a\,\sigma(-a) - w/(e^w - 1)`; by the logits it is :math:`-g(\gamma_k - \pi_k)`.
    """
    p = _parts(params, x, levels)
    posterior = (p.logits.log_softmax(1) + _log_probability(p, levels)).softmax(1)
    g = -grad.to(posterior.dtype).reshape(-1, *[1] * (x.dim() - 1))
    g_logits = g * (posterior - p.logits.softmax(1))
    above = torch.where(p.highest, 0, torch.sigmoid(-p.upper))
    below = torch.where(p.lowest, 0, torch.sigmoid(p.lower))
    shrink, width = _shrink(p.width)
    inner = torch.where(p.lowest | p.highest, 0, (-width).exp() / shrink)
    weight = (g * posterior).unsqueeze(1)
    g_means = weight * ((-p.log_scales).exp() * (below - above))
    g_log_scales = torch.where(p.live, weight * (p.lower * below - p.upper * above - inner), 0)
    rows = [g_means, g_log_scales]
    if p.tanh is not None:
        shifted = [g_means[:, 1] * p.x[:, 0], g_means[:, 2] * p.x[:, 0], g_means[:, 2] * p.x[:, 1]]
        rows.append(torch.stack(shifted, 1) * (1 - p.tanh**2))
    return torch.cat([g_logits, torch.stack(rows, 2).flatten(1, 3)], 1).to(params.dtype)


def logistic_mixture_sample(params: Tensor, noise: Tensor, levels: int = 256, temperature: float = 1.0) -> Tensor:
    """Level indices ``[N, C, *spatial]`` int64 drawn from uniform noise ``[N, 1 + C, *spatial]``: see ``_draw``."""
    work = torch.promote_types(params.dtype, torch.float32)
    params, noise = (t.to(work).movedim(1, -1) for t in (params, noise))
    with torch.no_grad():
        return _draw.logistic_mixture(params, noise, levels, temperature).movedim(-1, 1).contiguous()
