"""R3GAN: a relativistic loss, a penalty at the examples and one at the samples, and networks of one kind of block."""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from genkernels.models.gan.backbones import halvings, networks
from genkernels.models.gan.base import AdversarialModel, presets
from genkernels.nn import FilteredDownsample, FilteredUpsample
from genkernels.nn._rectified import LeakyReLU

#: Slope of the LeakyReLU, channels within a block as a multiple of those outside.
SLOPE, EXPANSION = 0.2, 2
_SIZES = {
    "ring2d": {"shape": (2,), "latent": 16, "width": 128, "gamma": 0.1},
    "digits": {"shape": (1, 8, 8), "grey_levels": 17, "latent": 64, "width": 32, "cardinality": 4, "blocks": 1},
    "photos32": {"shape": (3, 32, 32), "latent": 64, "width": 64, "cardinality": 8, "blocks": 1},
    "cifar10": {"shape": (3, 32, 32), "latent": 64, "width": 768, "cardinality": 96, "blocks": 2, "gamma": 0.05},
}


class R3GAN(AdversarialModel):
    r"""Critic and generator compare each sample with an example, and the critic's gradient is held near 0 at both:

    .. math:: \mathrm{softplus}(D(G(z)) - D(x)) + \frac{\gamma}{2}(\|\nabla D(x)\|^2 + \|\nabla D(G(z))\|^2),\qquad
        \mathrm{softplus}(D(x) - D(G(z)))

    The networks have neither normalisation nor tanh: blocks of a 1×1, a grouped 3×3 and a 1×1 convolution, the last
    zero at the start, between them biases and LeakyReLU; up and down the resolution is changed through the filter
    [1, 3, 3, 1] (`genkernels.nn.FilteredUpsample`). Those of points are fully connected.

    Args:
        shape: ``(C, H, W)`` or ``(D,)``.
        gamma: γ, the weight of both penalties.
        latent: size of z. width: channels of all blocks, a multiple of half the cardinality; units of a hidden layer of
            networks of points. depth: hidden layers of the latter.
        cardinality: groups of a block's 3×3 convolution. blocks: in each resolution.
        n_critic: steps of the critic to one of the generator.
        augment: probability of each change of `genkernels.nn.Augment`, which examples and samples go through on their
            way to the critic, for few images. Images only.
        grey_levels: how many values a pixel can take, None for images of real numbers. Images only.
        num_classes: give both networks the class y. class_features: size of the generator's embedding of it.

    Example:
        >>> import genkernels as gk
        >>> gk.models.R3GAN.from_preset("ring2d", width=8).sample(3).shape
        torch.Size([3, 2])

    Source: Huang et al., "The GAN is dead; long live the GAN! A modern GAN baseline", 2024, arXiv 2501.05441. The
    preset ``cifar10`` has its sizes, γ and step size (batches of 512), without the schedules by which γ, the step size
    and β₂ change over a run, and without augmentation; all presets have Adam at 2e-4 with β = (0, 0.9), where that run
    begins.
    """

    presets: ClassVar = presets(_SIZES, lr=2e-4, points_lr=1e-3, betas=(0.0, 0.9))

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        gamma: float = 1.0,
        latent: int = 64,
        width: int = 64,
        depth: int = 3,
        cardinality: int = 8,
        blocks: int = 1,
        n_critic: int = 1,
        augment: float = 0.0,
        grey_levels: int | None = 256,
        num_classes: int | None = None,
        class_features: int = 16,
    ):
        if gamma < 0:
            raise ValueError(f"R3GAN: gamma must be at least 0, got {gamma}")
        if len(shape) == 3 and (cardinality < 1 or EXPANSION * width % cardinality):
            raise ValueError(
                f"R3GAN: cardinality must divide the {EXPANSION * width} channels within a block of width {width}, got "
                f"{cardinality}"
            )
        for label, value in (("blocks", blocks), ("latent", latent)):
            if value < 1:
                raise ValueError(f"R3GAN: {label} must be at least 1, got {value}")
        data = {"shape": shape, "grey_levels": grey_levels, "num_classes": num_classes}
        sizes = {"latent": latent, "width": width, "depth": depth, "class_features": class_features}
        of_images = partial(_generator, cardinality, blocks), partial(_critic, cardinality, blocks)
        both = networks("R3GAN", of_images, **data, **sizes)
        super().__init__(
            *both, latent=latent, loss="relativistic", n_critic=n_critic, r1=gamma, r2=gamma, augment=augment, **data
        )


def _generator(
    cardinality: int, blocks: int, shape: tuple[int, ...], width: int, bounded: bool, inputs: int
) -> nn.Sequential:
    """From a learned grid up; `bounded` plays no part."""
    count = halvings(shape)
    grid = shape[1] >> count, shape[2] >> count
    stage = partial(_stage, width, cardinality, blocks, (count + 1) * blocks)
    layers: list[nn.Module] = [Basis(inputs, width, grid), *stage()]
    for _ in range(count):
        layers += [FilteredUpsample(), *stage()]
    return nn.Sequential(*layers, _scaled(nn.Conv2d(width, shape[0], 1, bias=False)))


def _critic(cardinality: int, blocks: int, shape: tuple[int, ...], width: int) -> tuple[nn.Sequential, int]:
    """Down to a small grid, which one weight a place and channel sums up."""
    count = halvings(shape)
    grid = shape[1] >> count, shape[2] >> count
    stage = partial(_stage, width, cardinality, blocks, (count + 1) * blocks)
    layers: list[nn.Module] = [_scaled(nn.Conv2d(shape[0], width, 1, bias=False)), *stage()]
    for _ in range(count):
        layers += [FilteredDownsample(), *stage()]
    return nn.Sequential(*layers, _scaled(nn.Conv2d(width, width, grid, groups=width, bias=False)), nn.Flatten()), width


def _stage(width: int, cardinality: int, blocks: int, in_all: int) -> list[nn.Module]:
    return [Block(width, cardinality, in_all) for _ in range(blocks)]


class Block(nn.Module):
    """x + g(x), g zero at the start.

    Args:
        width: channels of x. cardinality: groups of the 3×3 convolution. in_all: blocks of the whole network, so many
            that the start of each is scaled for their sum.

    Source: Zhang et al., "Fixup initialization", 2019.
    """

    def __init__(self, width: int, cardinality: int, in_all: int):
        super().__init__()
        inner, gain = EXPANSION * width, math.sqrt(2 / (1 + SLOPE**2)) * in_all**-0.25
        self.residual = nn.Sequential(
            _scaled(nn.Conv2d(width, inner, 1), gain),
            LeakyReLU(SLOPE),
            _scaled(nn.Conv2d(inner, inner, 3, padding=1, groups=cardinality), gain),
            LeakyReLU(SLOPE),
            _scaled(nn.Conv2d(inner, width, 1, bias=False), 0.0),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.residual(x)


class Basis(nn.Module):
    """A learned grid whose channels the latent vector weighs: ``[N, inputs]`` to ``[N, channels, *grid]``."""

    def __init__(self, inputs: int, channels: int, grid: tuple[int, int]):
        super().__init__()
        self.grid = nn.Parameter(torch.randn(channels, *grid))
        self.weigh = _scaled(nn.Linear(inputs, channels, bias=False))

    def forward(self, z: Tensor) -> Tensor:
        return self.weigh(z)[:, :, None, None] * self.grid


def _scaled(layer: nn.Linear | nn.Conv2d, gain: float = 1.0) -> nn.Linear | nn.Conv2d:
    """Normal weights of standard deviation gain / √inputs, biases 0."""
    with torch.no_grad():
        layer.weight.normal_(0.0, gain / math.sqrt(layer.weight[0].numel()))
        if layer.bias is not None:
            layer.bias.zero_()
    return layer
