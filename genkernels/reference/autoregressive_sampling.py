r"""Sampling from a causal network pixel by pixel, in plain PyTorch and without any cache: the definition, the oracle
and the fallback.

.. math:: x_{i,c} \sim p(x_{i,c} \mid x_{<i},\, x_{i,<c})

Pixels i in raster order, data channels c in theirs. For every draw the whole network (`Stage` after `Stage`) runs over
the whole image, and the parameters of that one pixel are read off its last plane (van den Oord et al. 2016a, 2016b;
Salimans et al. 2017). The draws invert cumulative distributions at given uniform noise, so whoever computes the same
parameters draws the same image.

Shapes: noise ``[N, C, H, W]`` (categorical) or ``[N, 1 + C, H, W]`` (logistic mixture, C = 1 or 3); last plane ``[N, C
* levels, H, W]``, or ``[N, K * 3, H, W]`` (C = 1), ``[N, K * 10, H, W]`` (C = 3); image int64 ``[N, C, H, W]`` of level
  indices.

The kernels keep the activations of every stage and compute one column of each at a pixel: a whole sample for about the
price of one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from genkernels._options import Head
from genkernels.reference import _draw
from genkernels.reference._stages import Stage, level_values, network_output, unflatten

__all__ = ["Head", "Stage", "autoregressive_sampling", "network_output"]


def autoregressive_sampling(
    image: Tensor,
    state: Tensor,
    noise: Tensor,
    known: Tensor | None,
    tensors: Sequence[Tensor],
    plan: Sequence[int],
    head: int,
    levels: int,
    temperature: float,
    begin: int,
    end: int,
) -> None:
    """Draws rows `begin` to `end` into `image` int64 ``[N, C, H, W]``; rows above are drawn, known pixels hold their
    values.

    Args:
        state: the kernels' caches between calls; the definition has none. tensors, plan: the stages, from
            `_stages.flatten`.
        noise: of the stages' dtype. known: bool ``[N, C, H, W]``, True where a pixel keeps its value, or None.
    """
    stages = unflatten(tensors, plan)
    draw_rows(lambda x: network_output(stages, x), image, noise, known, head, levels, temperature, begin, end)


def draw_rows(
    network: Callable[[Tensor], Tensor],
    image: Tensor,
    noise: Tensor,
    known: Tensor | None,
    head: int,
    levels: int,
    temperature: float,
    begin: int,
    end: int,
) -> None:
    """The loop of `autoregressive_sampling` around any `network` from an image in [−1, 1] to the head's parameters."""
    channels = image.shape[1]
    with torch.no_grad():
        x = level_values(image, levels, noise.dtype)
        for i in range(begin, end):
            for j in range(image.shape[3]):
                if head == Head.CATEGORICAL:
                    for c in range(channels):
                        logits = network(x)[:, c * levels : (c + 1) * levels, i, j]
                        drawn = _draw.categorical(logits, noise[:, c, i, j], temperature)
                        _write(image, x, drawn, known, levels, (slice(None), c, i, j))
                else:
                    params = network(x)[:, :, i, j]
                    fixed = None if known is None else torch.where(known, image, -1)[:, :, i, j]
                    drawn = _draw.logistic_mixture(params, noise[:, :, i, j], levels, temperature, fixed)
                    _write(image, x, drawn, known, levels, (slice(None), slice(None), i, j))


def _write(image: Tensor, x: Tensor, drawn: Tensor, known: Tensor | None, levels: int, at: tuple) -> None:
    """Into the image and into plane 0, unless known."""
    if known is not None:
        drawn = torch.where(known[at], image[at], drawn)
    image[at] = drawn
    x[at] = level_values(drawn, levels, x.dtype)
