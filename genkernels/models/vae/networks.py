"""Encoders and decoders: fully connected for points and for images as the papers have them, convolutional for images.

Without batch normalisation: a bound is one example's, and its draws are not to see one another's statistics.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from genkernels._words import nearest
from genkernels.models.gan.backbones import Generator, conv_critic, halvings, mlp
from genkernels.nn._rectified import LeakyReLU

NETWORKS = ("mlp", "conv")


class Encoder(nn.Module):
    """Data to features: those of ``trunk``, and an embedding of the class beside them.

    Args:
        trunk: data to ``[N, features]``. features: how many.
        num_classes: None where labels play no part. class_features: size of the embedding.

    Attributes:
        features: how many it gives.

    Shapes: x ``[N, *shape]``, y ``[N]`` or None, to ``[N, features]``.
    """

    def __init__(self, trunk: nn.Module, features: int, num_classes: int | None = None, class_features: int = 16):
        super().__init__()
        self.trunk, self.features = trunk, features + (class_features if num_classes else 0)
        self.classes = nn.Embedding(num_classes, class_features) if num_classes else None

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.trunk(x)
        return h if self.classes is None else torch.cat([h, self.classes(y)], 1)


#: Latents to the outputs that a likelihood reads, ``decoder(z, y)``: the class beside the latents.
Decoder = Generator


def networks(
    name: str,
    *,
    shape: tuple[int, ...],
    outputs: int,
    network: str | None,
    latent: int,
    width: int,
    depth: int,
    num_classes: int | None,
    class_features: int,
) -> tuple[Encoder, Decoder]:
    """An encoder and a decoder.

    Args:
        name: of the model, for errors.
        outputs: channels of what the decoder gives for an image, features of what it gives for a point.
        network: ``mlp``, ``conv`` or None: ``mlp`` for points, ``conv`` for images. Others: as for `VAE`.

    Raises:
        ValueError: a size is 0, there is no such network, or it takes images and the data are points.
    """
    least = {"latent": latent, "width": width, "depth": depth, "class_features": class_features}
    for label, value in least.items():
        if value < 1:
            raise ValueError(f"{name}: {label} must be at least 1, got {value}")
    network = network or ("mlp" if len(shape) == 1 else "conv")
    if network not in NETWORKS:
        hint = nearest(network, NETWORKS, listed=True)
        raise ValueError(f"{name}: network must be one of {', '.join(NETWORKS)}, got {network!r}{hint}")
    if network == "mlp":
        encoder, decoder = tanh_encoder(shape, width, depth), partial(tanh_decoder, shape, outputs, width, depth)
    elif len(shape) == 1:
        raise ValueError(f"{name}: network conv needs images, got points of shape {shape}")
    else:
        # a critic's trunk without its score: a 3×3 convolution, then 4×4 ones that halve
        encoder, decoder = conv_critic(shape, width), partial(conv_decoder, shape, outputs, width)
    return Encoder(*encoder, num_classes, class_features), Decoder(decoder, latent, num_classes, class_features)


def tanh_encoder(shape: tuple[int, ...], width: int, depth: int) -> tuple[nn.Sequential, int]:
    """`depth` hidden layers of `width` units with tanh, and the number of features that it gives."""
    layers = mlp([math.prod(shape), *[width] * depth], nn.Tanh)
    return _glorot(nn.Sequential(nn.Flatten(), *layers, nn.Tanh())), width


def tanh_decoder(shape: tuple[int, ...], outputs: int, width: int, depth: int, inputs: int) -> nn.Sequential:
    """The same the other way, to ``[N, outputs, *spatial]``."""
    size = (outputs, *shape[1:])
    layers = mlp([inputs, *[width] * depth, math.prod(size)], nn.Tanh)
    return _glorot(nn.Sequential(*layers, nn.Unflatten(1, size)))


def conv_decoder(shape: tuple[int, ...], outputs: int, width: int, inputs: int) -> nn.Sequential:
    """From a small grid up by transposed 4×4 convolutions, LeakyReLU after each, and a 3×3 one.

    Args:
        shape: ``(C, H, W)``. outputs: channels of the result. inputs: size of the latent vector.
        width: channels at full resolution, twice as many at each halving and eight times as many at most.
    """
    count = halvings(shape)
    widths = [width * 2 ** min(i, 3) for i in reversed(range(count + 1))]
    size = (widths[0], shape[1] >> count, shape[2] >> count)
    layers: list[nn.Module] = [nn.Linear(inputs, math.prod(size)), nn.Unflatten(1, size), LeakyReLU(0.2)]
    for before, after in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(width, outputs, 3, padding=1))


def _glorot(network: nn.Sequential) -> nn.Sequential:
    """Weights as the IWAE paper begins: Glorot and Bengio's, biases 0."""
    for layer in network:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return network
