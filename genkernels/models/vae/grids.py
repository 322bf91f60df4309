r"""Levels of latents on grids of growing resolution, drawn from the top down, when encoding as when sampling.

.. math:: q(z_{1:L}|x) = \prod_l q(z_l \mid x, z_{>l}),\qquad p(z_{1:L}) = \prod_l \prod_i p(z_{l,i} \mid z_{l,<i},
    z_{>l})

Level L, the top one, has the prior N(0, 1); each other is autoregressive over the cells i of its grid in raster order,
given the levels above, which reach it as features d. One pass over the levels, `TopDown.forward`, serves all: where a
level's latents come from, posterior, prior or a caller, is said level by level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkernels.models.vae import grid_draws
from genkernels.nn import MaskedConv2d

#: Log-scales of the prior stay within this of 0, softly.
BOUND = 5.0


class GridPrior(nn.Module):
    r"""A Gaussian of a grid of latents in which every cell sees the cells before it, in raster order, and features of
    the same grid.

    .. math:: p(z \mid d) = \prod_i N\bigl(z_i;\ \mu(z_{<i}, d),\ e^{2 s(z_{<i}, d)}\bigr)

    Args:
        channels: of z. width: of d and of the hidden layers. layers: masked 3×3 convolutions after the first.
        autoregressive: False: no cell sees another.

    Shapes: z ``[N, channels, h, w]``, d ``[N, width, h, w]``.
    """

    def __init__(self, channels: int, width: int, layers: int = 1, autoregressive: bool = True):
        super().__init__()
        self.channels, self.autoregressive = channels, autoregressive
        if not autoregressive:
            self.last = nn.Conv2d(width, 2 * channels, 1)
        else:
            self.first = MaskedConv2d("A", channels, width, 3, activation="relu")
            self.layers = nn.ModuleList(MaskedConv2d("B", width, width, 3, activation="relu") for _ in range(layers))
            self.last = MaskedConv2d("B", width, 2 * channels, 1)
            self.above = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(layers + 1))
        nn.init.zeros_(self.last.weight)  # N(0, 1) at first
        nn.init.zeros_(self.last.bias)

    def forward(self, z: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-scale of every cell, each like z."""
        if not self.autoregressive:
            return self._bounded(self.last(d))
        conditions = self.conditions(d)
        return self.given(z, conditions)

    def conditions(self, d: Tensor) -> list[Tensor]:
        """What d adds to each masked layer."""
        return [layer(d) for layer in self.above]

    def given(self, z: Tensor, conditions: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        h = self.first(z, conditions[0])
        for layer, condition in zip(self.layers, conditions[1:], strict=True):
            h = layer(h, condition, h)
        return self._bounded(self.last(h))

    def draw(self, noise: Tensor, d: Tensor) -> Tensor:
        """z ``= mean + exp(log_scale) * noise``, cell by cell in raster order where cells see others: by the columns
        that each one needs (`genkernels.models.vae.grid_draws`), or one pass a cell where a layer is not as written
        here, or ``use_backend("reference")`` asks for it."""
        if not self.autoregressive:
            mean, log_scale = self._bounded(self.last(d))
            return mean + log_scale.exp() * noise
        conditions = self.conditions(d)
        if grid_draws.in_waves([self.first, *self.layers, self.last]):
            return grid_draws.draw(noise, conditions, self.first, self.layers, self.last, self._bounded)
        z = torch.zeros_like(noise)
        height, width = noise.shape[2:]
        for row in range(height):
            for column in range(width):
                mean, log_scale = self.given(z, conditions)
                cell = (..., row, column)
                z[cell] = mean[cell] + log_scale[cell].exp() * noise[cell]
        return z

    @staticmethod
    def _bounded(parameters: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = parameters.chunk(2, 1)
        return mean, BOUND * torch.tanh(log_scale / BOUND)


class Drawn(NamedTuple):
    """Latents of every level, top first, and what they cost; nats ``[N]``, fp32 or wider."""

    latents: list[Tensor]  # [N, channels, h, w] each
    features: Tensor  # [N, width, h, w] of the last level's grid, for the decoder
    log_prior: list[Tensor]  # log p(z_l | z_>l)
    log_posterior: list[Tensor | None]  # log q(z_l | x, z_>l), None where the level is not the posterior's
    kl: list[Tensor | None]  # KL(q || p) of each cell given the cells before it, summed: E of their difference


class Level(nn.Module):
    """One level: its prior, None for N(0, 1), its posterior, and how its latents enter the features."""

    def __init__(self, channels: int, width: int, top: bool, prior_layers: int, autoregressive: bool):
        super().__init__()
        self.prior = None if top else GridPrior(channels, width, prior_layers, autoregressive)
        self.posterior = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, 2 * channels, 1)
        )
        nn.init.zeros_(self.posterior[-1].weight)
        nn.init.zeros_(self.posterior[-1].bias)
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.after = Residual(width)


class TopDown(nn.Module):
    """The levels, top first, and the features that pass from one to the next.

    Args:
        grids: ``(h, w)`` of each level, top first; each a multiple of the one before, alike in both directions.
        channels: of each level's latents. width: of the features. prior_layers, autoregressive: of `GridPrior`.
        num_classes: whose embedding the features begin with.
    """

    def __init__(
        self,
        grids: Sequence[tuple[int, int]],
        channels: Sequence[int],
        width: int,
        prior_layers: int,
        autoregressive: bool,
        num_classes: int | None,
    ):
        super().__init__()
        self.grids, self.channels, self.width = list(grids), list(channels), width
        self.start = nn.Parameter(torch.zeros(width))
        self.classes = nn.Embedding(num_classes, width) if num_classes else None
        self.levels = nn.ModuleList(
            Level(each, width, i == 0, prior_layers, autoregressive) for i, each in enumerate(channels)
        )
        ratios = [below[0] // above[0] for above, below in zip(grids[:-1], grids[1:], strict=True)]
        self.between = nn.ModuleList(rising(width, width, ratio) for ratio in ratios)

    def forward(
        self,
        count: int,
        noise: Sequence[Tensor],
        y: Tensor | None = None,
        encoded: Sequence[Tensor] | None = None,
        held: Sequence[Tensor | None] | None = None,
    ) -> Drawn:
        """One pass from the top down.

        Args:
            count: N. noise: standard normal, ``[N, channels, h, w]`` a level. y: ``[N]`` classes.
            encoded: features of the data at each level's grid, ``[N, width, h, w]``; with them latents come from the
                posterior, without from the prior.
            held: latents that are taken as they are, None a level that is drawn.
        """
        d = self.start.view(1, -1, 1, 1).expand(count, -1, *self.grids[0])
        if self.classes is not None:
            d = d + self.classes(y)[:, :, None, None]
        latents, priors, posteriors, divergences = [], [], [], []
        for i, level in enumerate(self.levels):
            if i:
                d = self.between[i - 1](d)
            z, log_q, q = None if held is None else held[i], None, None
            if z is None and encoded is not None:
                q = level.posterior(torch.cat([encoded[i], d], 1)).chunk(2, 1)
                z = q[0] + q[1].exp() * noise[i]
                log_q = log_normal(z, *q)
            if z is None:
                z = noise[i] if level.prior is None else level.prior.draw(noise[i], d)
            p = (torch.zeros_like(z), torch.zeros_like(z)) if level.prior is None else level.prior(z, d)
            latents.append(z)
            priors.append(log_normal(z, *p))
            posteriors.append(log_q)
            divergences.append(None if q is None else divergence(q, p))
            d = level.after(d + level.enter(z))
        return Drawn(latents, d, priors, posteriors, divergences)


class BottomUp(nn.Module):
    """Features of the data at every level's grid.

    Args:
        inputs: channels of the data. width: of the features.
        size: ``(H, W)`` of the data. grids: as for `TopDown`, top first.
    """

    def __init__(self, inputs: int, width: int, size: tuple[int, int], grids: Sequence[tuple[int, int]]):
        super().__init__()
        self.first = nn.Conv2d(inputs, width, 3, padding=1)
        sides = [size[0], *[height for height, _ in reversed(grids)]]
        self.stages = nn.ModuleList(
            nn.Sequential(falling(width, before // after), Residual(width))
            for before, after in zip(sides[:-1], sides[1:], strict=True)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """``[N, width, h, w]`` a level, top first."""
        h, found = self.first(x), []
        for stage in self.stages:
            h = stage(h)
            found.append(h)
        return found[::-1]


class Residual(nn.Module):
    """x plus two 3×3 convolutions of it, SiLU before each; the last begins as 0."""

    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))


def falling(width: int, ratio: int) -> nn.Sequential:
    """To a grid `ratio` times coarser: halved step by step where that leads there, else at once."""
    layers: list[nn.Module] = []
    for step in _steps(ratio):
        layers += [nn.SiLU(), nn.Conv2d(width, width, 4, 2, 1) if step == 2 else nn.Conv2d(width, width, step, step)]
    return nn.Sequential(*layers)


def rising(width: int, outputs: int, ratio: int) -> nn.Sequential:
    """To a grid `ratio` times finer, likewise; the last convolution gives `outputs` channels."""
    layers: list[nn.Module] = []
    steps = _steps(ratio)
    for i, step in enumerate(steps):
        channels = outputs if i + 1 == len(steps) else width
        sizes = (4, 2, 1) if step == 2 else (step, step)
        layers += [nn.SiLU(), nn.ConvTranspose2d(width, channels, *sizes)]
    return nn.Sequential(*layers)


def _steps(ratio: int) -> list[int]:
    if ratio == 1:
        return []
    return [2] * int(math.log2(ratio)) if ratio & (ratio - 1) == 0 else [ratio]


def log_normal(z: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log N(z; mean, exp(log_scale)) summed over all but the first dimension, ``[N]``."""
    wide = torch.promote_types(z.dtype, torch.float32)
    z, mean, log_scale = z.to(wide), mean.to(wide), log_scale.to(wide)
    each = -0.5 * ((z - mean) * torch.exp(-log_scale)).square() - log_scale - 0.5 * math.log(2 * math.pi)
    return each.flatten(1).sum(1)


def divergence(q: tuple[Tensor, Tensor], p: tuple[Tensor, Tensor]) -> Tensor:
    """KL(q || p) of Gaussians by mean and log-scale, summed over all but the first dimension, ``[N]``."""
    wide = torch.promote_types(q[0].dtype, torch.float32)
    (m, s), (n, t) = ([each.to(wide) for each in pair] for pair in (q, p))
    each = 0.5 * (((m - n) * torch.exp(-t)).square() + torch.expm1(2 * (s - t))) - (s - t)
    return each.flatten(1).sum(1)
