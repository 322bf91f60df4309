"""The networks of adversarial models: fully connected ones for points, convolutional ones for images of any size.

A critic has no batch normalisation, which would tie the samples of a batch together: a sample would have no gradient of
its own for a penalty to hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from genkernels.nn._rectified import LeakyReLU, ReLU
from genkernels.nn.fused_sequential import FusedSequential

#: Sides at which convolutional generators begin, and below which critics do not halve an image.
SMALLEST = 4


class Generator(nn.Module):
    """Latents to data: ``trunk`` of [z, embedding of y].

    Args:
        trunk: builds the network from the size of its input. latent: size of z.
        num_classes: None where labels play no part. class_features: size of the embedding.

    Shapes: z ``[N, latent]``, y ``[N]`` or None, to ``[N, *shape]``.
    """

    def __init__(
        self, trunk: Callable[[int], nn.Module], latent: int, num_classes: int | None = None, class_features: int = 16
    ):
        super().__init__()
        self.trunk = trunk(latent + (class_features if num_classes else 0))
        self.classes = nn.Embedding(num_classes, class_features) if num_classes else None

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        return self.trunk(z if self.classes is None else torch.cat([z, self.classes(y)], 1))


class Critic(nn.Module):
    """One score a datum: an affine function of the trunk's features and, where there are classes, the product of these
    with an embedding of the class (Miyato & Koyama, "cGANs with projection discriminator", 2018).

    Args:
        trunk: data to features ``[N, features]``. features: how many.
        num_classes: None where labels play no part.

    Shapes: x ``[N, *shape]``, y ``[N]`` or None, to ``[N, 1]``.
    """

    def __init__(self, trunk: nn.Module, features: int, num_classes: int | None = None):
        super().__init__()
        self.trunk, self.score = trunk, nn.Linear(features, 1)
        self.classes = nn.Embedding(num_classes, features) if num_classes else None

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        features = self.trunk(x)
        score = self.score(features)
        if self.classes is None:
            return score
        return score + (self.classes(y) * features).sum(1, keepdim=True)


def networks(
    name: str,
    of_images: tuple[Callable, Callable],
    *,
    shape: tuple[int, ...],
    grey_levels: int | None,
    num_classes: int | None,
    class_features: int,
    latent: int,
    width: int,
    depth: int,
    critic_width: int | None = None,
) -> tuple[Generator, Critic]:
    """A generator and a critic: fully connected ones of points, and those of `of_images`.

    Args:
        name: of the model, for errors.
        of_images: ``generator(shape, width, bounded, inputs)``, and ``critic(shape, width)`` which also gives the
            number of its features; ``conv_generator`` and ``conv_critic``.
        critic_width: of the critic, None: `width`. Others: as for `GAN`.

    Raises:
        ValueError: a size is 0.
    """
    critic_width = width if critic_width is None else critic_width
    least = {"width": width, "critic_width": critic_width, "depth": depth, "class_features": class_features}
    for label, value in least.items():
        if value < 1:
            raise ValueError(f"{name}: {label} must be at least 1, got {value}")
    generator, critic = of_images
    if len(shape) == 1:
        trunk, scored = partial(point_generator, shape, width, depth), point_critic(shape, critic_width, depth)
    else:
        trunk, scored = partial(generator, shape, width, grey_levels is not None), critic(shape, critic_width)
    return Generator(trunk, latent, num_classes, class_features), Critic(*scored, num_classes)


def halvings(shape: tuple[int, ...]) -> int:
    """How often height and width can be halved before one is odd or smaller than `SMALLEST`."""
    _, height, width = shape
    count = 0
    while height % 2 == width % 2 == 0 and min(height, width) // 2 >= SMALLEST:
        height, width, count = height // 2, width // 2, count + 1
    return count


def mlp(sizes: list[int], activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Linear layers of these sizes, with the activation between them."""
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        layers += [*([activation()] if i else []), nn.Linear(before, after)]
    return nn.Sequential(*layers)


def point_generator(shape: tuple[int, ...], width: int, depth: int, inputs: int) -> nn.Sequential:
    """`depth` hidden layers of `width` units with ReLU."""
    return mlp([inputs, *[width] * depth, shape[0]], ReLU)


def point_critic(shape: tuple[int, ...], width: int, depth: int) -> tuple[nn.Sequential, int]:
    """`depth` hidden layers of `width` units with LeakyReLU, and the number of features that it gives."""
    hidden = mlp([shape[0], *[width] * depth], _leaky)
    return nn.Sequential(*hidden, _leaky()), width


def _leaky() -> nn.Module:
    return LeakyReLU(0.2)


def conv_generator(shape: tuple[int, ...], width: int, bounded: bool, inputs: int) -> nn.Sequential:
    """DCGAN's: from a small grid up by transposed 4×4 convolutions with batch normalisation and ReLU.

    Args:
        shape: ``(C, H, W)`` of the image.
        width: channels at full resolution, twice as many at each halving and eight times as many at most.
        bounded: ends in tanh. inputs: size of the latent vector.

    Source: Radford et al., "Unsupervised representation learning with deep convolutional generative adversarial
    networks", 2016.
    """
    count = halvings(shape)
    widths = [width * 2 ** min(i, 3) for i in reversed(range(count + 1))]
    layers: list[nn.Module] = [*_unfold(inputs, widths[0], shape, count), nn.BatchNorm2d(widths[0]), ReLU()]
    for before, after in zip(widths[:-1], widths[1:], strict=True):
        up = nn.ConvTranspose2d(before, after, 4, stride=2, padding=1, bias=False)
        layers += [up, nn.BatchNorm2d(after), ReLU()]
    return FusedSequential(*layers, nn.Conv2d(width, shape[0], 3, padding=1), *_end(bounded))


def conv_critic(shape: tuple[int, ...], width: int) -> tuple[nn.Sequential, int]:
    """DCGAN's without its batch normalisation: a 3×3 convolution, then down by 4×4 ones, LeakyReLU after each.

    Args:
        shape: ``(C, H, W)``. width: channels at full resolution, doubled as in `conv_generator`.

    Returns:
        The network and the number of features that it gives.
    """
    count = halvings(shape)
    widths = [width * 2 ** min(i, 3) for i in range(count + 1)]
    layers: list[nn.Module] = [nn.Conv2d(shape[0], width, 3, padding=1), _leaky()]
    for before, after in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), _leaky()]
    return nn.Sequential(*layers, nn.Flatten()), widths[-1] * math.prod(shape[1:]) // 4**count


def _unfold(inputs: int, channels: int, shape: tuple[int, ...], count: int) -> list[nn.Module]:
    """A vector to the small grid that `count` doublings bring to the shape."""
    size = (channels, shape[1] >> count, shape[2] >> count)
    return [nn.Linear(inputs, math.prod(size)), nn.Unflatten(1, size)]


def _end(bounded: bool) -> list[nn.Module]:
    return [nn.Tanh()] if bounded else []


# --- SN-GAN's residual networks -----------------------------------------------------------------------------------


def residual_generator(shape: tuple[int, ...], width: int, bounded: bool, inputs: int) -> nn.Sequential:
    """SN-GAN's: blocks that double the image, all of `width` channels; arguments as for `conv_generator`."""
    count = halvings(shape)
    blocks = [UpBlock(width) for _ in range(count)]
    last = nn.Conv2d(width, shape[0], 3, padding=1)
    layers = [*_unfold(inputs, width, shape, count), *blocks, nn.BatchNorm2d(width), ReLU(), last]
    return FusedSequential(*layers, *_end(bounded))


def residual_critic(shape: tuple[int, ...], width: int) -> tuple[nn.Sequential, int]:
    """SN-GAN's: blocks that halve the image down to twice `SMALLEST`, two that do not, the sum over all places.

    Args:
        shape: ``(C, H, W)``. width: channels of all blocks.

    Returns:
        The network and the number of features that it gives.
    """
    count = halvings(shape)
    downs = max(count - 1, min(count, 1))
    first = CriticBlock(shape[0], width, halves=downs > 0, active=False)
    blocks = [CriticBlock(width, width, halves=i < downs - 1) for i in range(max(downs, 1) + 1)]
    return nn.Sequential(first, *blocks, ReLU(), SumOverPlaces()), width


class UpBlock(nn.Module):
    """Twice the height and width: batch normalisation, ReLU, up-sampling, 3×3, the same without up-sampling; beside it
    up-sampling and 1×1."""

    def __init__(self, width: int):
        super().__init__()
        self.residual = FusedSequential(
            nn.BatchNorm2d(width),
            ReLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )
        # a 1×1 convolution of what is copied four times is the copy of the convolution
        self.shortcut = nn.Sequential(nn.Conv2d(width, width, 1), nn.Upsample(scale_factor=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.residual(x)


class CriticBlock(nn.Module):
    """ReLU, 3×3, ReLU, 3×3, and average pooling where it halves; beside it 1×1 and the same pooling, where channels or
    sizes differ.

    Args:
        inputs, outputs: channels. halves: height and width.
        active: begins with a ReLU; the first block of a critic, which sees the image, does not.
    """

    def __init__(self, inputs: int, outputs: int, halves: bool, active: bool = True):
        super().__init__()
        pool = [nn.AvgPool2d(2)] if halves else []
        self.residual = nn.Sequential(
            *([ReLU()] if active else []),
            nn.Conv2d(inputs, outputs, 3, padding=1),
            ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            *pool,
        )
        # the mean of four places goes through a 1×1 convolution as well before as behind it, for a quarter
        changed = halves or inputs != outputs
        self.shortcut = nn.Sequential(*pool, nn.Conv2d(inputs, outputs, 1)) if changed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.residual(x)


class SumOverPlaces(nn.Module):
    """``[N, C, H, W]`` to ``[N, C]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum((2, 3))
