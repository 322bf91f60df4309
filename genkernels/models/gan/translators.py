"""CycleGAN's networks: from image to image, and a critic that scores overlapping patches."""

from __future__ import annotations

from torch import Tensor, nn

from genkernels.models.gan.backbones import halvings
from genkernels.nn._rectified import LeakyReLU, ReLU
from genkernels.nn.fused_sequential import FusedSequential


def translator(shape: tuple[int, ...], width: int, blocks: int) -> nn.Sequential:
    """A 7×7 convolution, two halvings (fewer of small images), residual blocks, as many doublings, 7×7 and tanh.

    Args:
        shape: ``(C, H, W)`` of both images. width: channels at full resolution, doubled at each halving.
        blocks: residual blocks.

    Source: Johnson et al., "Perceptual losses for real-time style transfer and super-resolution", 2016, as Zhu et al.
    2017 have it.
    """
    count = min(2, halvings(shape))
    widths = [width * 2**i for i in range(count + 1)]
    pairs = list(zip(widths[:-1], widths[1:], strict=True))
    layers: list[nn.Module] = _normalised(_seven(shape[0], width), width)
    for before, after in pairs:
        layers += _normalised(nn.Conv2d(before, after, 3, stride=2, padding=1), after)
    layers += [Block(widths[-1]) for _ in range(blocks)]
    for before, after in reversed(pairs):
        layers += _normalised(nn.ConvTranspose2d(after, before, 3, stride=2, padding=1, output_padding=1), before)
    return _begun(FusedSequential(*layers, _seven(width, shape[0]), nn.Tanh()))


def patch_critic(shape: tuple[int, ...], width: int) -> nn.Sequential:
    """Scores ``[N, 1, h, w]``, each of a patch, of 70×70 pixels where the image can be halved three times: 4×4
    convolutions, LeakyReLU, no normalisation in the first.

    Args:
        shape: ``(C, H, W)``. width: channels of the first layer, doubled at each halving.

    Source: Isola et al., "Image-to-image translation with conditional adversarial networks", 2017.
    """
    count = min(3, halvings(shape))
    widths = [shape[0], *(width * 2**i for i in range(count))]
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        norm = [nn.InstanceNorm2d(after)] if i else []
        layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), *norm, LeakyReLU(0.2)]
    last = width * 2**count
    layers += [nn.Conv2d(widths[-1], last, 4, padding=1), nn.InstanceNorm2d(last), LeakyReLU(0.2)]
    return _begun(FusedSequential(*layers, nn.Conv2d(last, 1, 4, padding=1)))


class Block(nn.Module):
    """x + two 3×3 convolutions at the edge of which the image is reflected, each normalised."""

    def __init__(self, width: int):
        super().__init__()

        def convolution() -> nn.Module:
            return nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect")

        self.residual = FusedSequential(*_normalised(convolution(), width), convolution(), nn.InstanceNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.residual(x)


def _seven(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 7, padding=3, padding_mode="reflect")


def _normalised(layer: nn.Module, width: int) -> list[nn.Module]:
    return [layer, nn.InstanceNorm2d(width), ReLU()]


def _begun(net: nn.Sequential) -> nn.Sequential:
    """Normal weights of standard deviation 0.02, biases 0."""
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, 0.0, 0.02)
            nn.init.zeros_(layer.bias)
    return net
