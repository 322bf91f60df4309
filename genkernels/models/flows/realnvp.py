"""RealNVP: affine couplings on checkerboards and channels, at several scales (Dinh, Sohl-Dickstein & Bengio 2017)."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from genkernels.models.flows.base import FlowModel, arguments, level_sizes
from genkernels.models.flows.nets import MLP, ResidualNet
from genkernels.nn import ActNorm, AffineCoupling, FlowSequential, Split, Squeeze


class RealNVP(FlowModel):
    """RealNVP's multi-scale scheme for images, and plain alternating couplings for points.

    Each scale but the last: three couplings on alternating checkerboards, a squeeze, three on alternating channels with
    twice the hidden channels; then half of the channels leaves as latents. The last scale: four checkerboard couplings.
    An `ActNorm` behind each coupling takes the place of the paper's batch normalisation, so that samples of a batch
    stay independent.

    Args:
        image_shape: ``(C, H, W)``, height and width multiples of 2^(levels - 1). features: D, even, for points; one of
            the two.
        levels: scales. Images only.
        blocks: residual blocks of each coupling's network (images). hidden: their channels at the first scale (units
            for points).
        couplings: how many, for points.
        scale_map: of the couplings; ``tanh``: the log-scale is a tanh, as in the paper.
        logit: images are taken from [0, 1] to the real line by ``logit(α + (1 - 2α)x)``; 0 leaves them.
        data_levels: grey levels of the images, None for continuous data. Images only.
        num_classes: condition the top prior and the networks on a class y. class_features: size of its embedding.
        reversible: train in memory that does not grow with the number of couplings.

    Source: Dinh et al., "Density estimation using Real NVP", 2017; CIFAR-10: 3.49 bits/dim at the size of the preset
    ``cifar10`` (one downscaling, 8 residual blocks of 64 channels).
    """

    presets: ClassVar = {
        "digits": {"image_shape": (1, 8, 8), "data_levels": 17, "levels": 2, "blocks": 1, "hidden": 16, "logit": 0.01},
        "photos32": {"image_shape": (3, 32, 32), "levels": 2, "blocks": 2, "hidden": 32},
        "cifar10": {"image_shape": (3, 32, 32), "levels": 2, "blocks": 8, "hidden": 64},
        "points": {"features": 2, "couplings": 8, "hidden": 64},
    }

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int] | None = None,
        features: int | None = None,
        levels: int = 2,
        blocks: int = 8,
        hidden: int = 64,
        couplings: int = 8,
        scale_map: str = "tanh",
        logit: float = 0.05,
        data_levels: int | None = 256,
        num_classes: int | None = None,
        class_features: int = 16,
        reversible: bool = False,
    ):
        start = self._setup(arguments(locals()), image_shape, features, data_levels, num_classes, class_features, logit)
        context = self.context_features
        if image_shape is None:
            if features % 2:
                raise ValueError(f"RealNVP: features must be even for the channel split, got {features}")
            chain: list[nn.Module] = []
            for i in range(couplings):
                net = MLP(features // 2, features, hidden, 2, context)
                chain += [AffineCoupling(net, scale_map=scale_map, flip=i % 2 == 1), ActNorm(features)]
            self.flows.append(FlowSequential(*chain, reversible=reversible))
            self._finish([(features,)])
            return

        def couple(channels, split, count, width):
            """`count` couplings that take turns, each with its ActNorm."""
            seen, out = (channels, 2 * channels) if split == "checkerboard" else (channels // 2, channels)
            found: list[nn.Module] = []
            for i in range(count):
                net = ResidualNet(seen, out, width, blocks, context)
                found += [AffineCoupling(net, split, scale_map, flip=i % 2 == 1), ActNorm(channels)]
            return found

        if levels < 1:
            raise ValueError(f"RealNVP: levels must be at least 1, got {levels}")
        sizes = level_sizes("RealNVP", self.shape, levels - 1) if levels > 1 else []
        channels, height, width = self.shape
        latents = []
        for squeezed, h, w in sizes:
            chain = [*start, *couple(channels, "checkerboard", 3, hidden), Squeeze()]
            chain += couple(squeezed, "channel", 3, 2 * hidden)
            self.flows.append(FlowSequential(*chain, reversible=reversible))
            self.splits.append(Split(squeezed, learned=False))
            channels, height, width = squeezed // 2, h, w
            latents.append((channels, height, width))
            start, hidden = [], 2 * hidden
        self.flows.append(FlowSequential(*start, *couple(channels, "checkerboard", 4, hidden), reversible=reversible))
        self._finish([*latents, (channels, height, width)])
