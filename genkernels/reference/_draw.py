"""Draws of pixels from the parameters that a network gave for them, from uniform noise; ``csrc/common/draw.h`` has the
same rule.

Each draw inverts a cumulative distribution, so the same noise gives the same integers whoever computes the parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor


def categorical(logits: Tensor, u: Tensor, temperature: float = 1.0) -> Tensor:
    """The category whose share of the cumulative distribution of ``softmax(logits / temperature)`` holds u.

    Args:
        logits: ``[..., K]``. u: ``[...]`` in [0, 1). temperature: 0 takes the first of the largest logits.

    Returns:
        ``[...]`` int64. Weights are computed in the logits' dtype, their sums in fp64; NaN among the logits gives 0.
    """
    if temperature == 0:
        return logits.argmax(-1).masked_fill(logits.isnan().any(-1), 0)
    weights = ((logits - logits.amax(-1, keepdim=True)) / temperature).exp()
    below = weights.double().cumsum(-1)
    level = u.double().unsqueeze(-1) * below[..., -1:]
    return (below[..., :-1] <= level).sum(-1)


def logistic_mixture(
    params: Tensor, noise: Tensor, levels: int, temperature: float = 1.0, fixed: Tensor | None = None
) -> Tensor:
    """One draw a pixel from a discretised logistic mixture.

    A draw of the logistic density rounded to the nearest level, the ends taking the tails, is a draw of the discretised
    one, and it is the rounded value that shifts the means of later channels.

    Args:
        params: ``[..., K * 3]`` (1 channel) or ``[..., K * 10]`` (3 channels): mixture logits, then for each channel
            means, log-scales and, for 3 channels, coefficients, K each.
        noise: ``[..., 1 + C]`` uniform in [0, 1): the mixture's, then each channel's.
        levels: of the data. temperature: divides the mixture's logits and multiplies the logistic noise.
        fixed: ``[..., C]``, level indices of channels that are known, −1 where one is to be drawn; later channels see
            the known values.

    Returns:
        ``[..., C]`` int64 level indices.
    """
    channels = noise.shape[-1] - 1
    mixtures = params.shape[-1] // (3 if channels == 1 else 10)
    chosen = categorical(params[..., :mixtures], noise[..., 0], temperature)
    rows = params[..., mixtures:].unflatten(-1, (channels, -1, mixtures))  # [..., C, 2 or 3, K]
    rows = rows.gather(-1, chosen[..., None, None, None].expand(*rows.shape[:-1], 1)).squeeze(-1)
    edge = 2.0**-53 if params.dtype == torch.float64 else 2.0**-24
    u = noise[..., 1:].to(params.dtype).clamp(edge, 1 - edge)
    spread = rows[..., 1].clamp(min=-7).exp() * temperature * (u.log() - (-u).log1p())
    drawn: list[Tensor] = []
    values: list[Tensor] = []
    for c in range(channels):
        mean = rows[..., c, 0]
        if c == 1:
            mean = mean + rows[..., 0, 2].tanh() * values[0]
        if c == 2:
            mean = mean + rows[..., 1, 2].tanh() * values[0] + rows[..., 2, 2].tanh() * values[1]
        value = (mean + spread[..., c]).clamp(-1, 1)
        level = ((value + 1) * (0.5 * (levels - 1)) + 0.5).floor()
        if fixed is not None:
            level = torch.where(fixed[..., c] >= 0, fixed[..., c].to(level.dtype), level)
        drawn.append(level.nan_to_num(0.0).long())
        values.append(2 * level / (levels - 1) - 1)
    return torch.stack(drawn, -1)
