"""RealNVP: affine couplings on checkerboards and channels, at several scales (Dinh, Sohl-Dickstein & Bengio 2017)."""

from __future__ import annotations

from typing import ClassVar

from genkernels.models._model import Preset
from genkernels.models.flows.base import FlowModel, class_context, logit_layers, scale_sizes
from genkernels.models.flows.nets import MLP, ResidualNet
from genkernels.nn import ActNorm, AffineCoupling, FlowSequential, Prior, Split, Squeeze


class RealNVP(FlowModel):
    """RealNVP's multi-scale scheme for images, and plain alternating couplings for points.

    Each scale but the last: three couplings on alternating checkerboards, a squeeze, three on alternating channels with
    twice the hidden channels; then half of the channels leaves as latents. The last scale: four checkerboard couplings.
    An `ActNorm` behind each coupling takes the place of the paper's batch normalisation, so that samples of a batch
    stay independent.

    Args:
        shape: ``(C, H, W)``, height and width multiples of 2^(scales - 1); or ``(D,)``, D even.
        scales: how many. Images only.
        blocks: residual blocks of each coupling's network (images). hidden: their channels at the first scale (units
            for points).
        couplings: how many, for points.
        scale_map: of the couplings; ``tanh``: the log-scale is a tanh, as in the paper.
        logit: images are taken from [0, 1] to the real line by ``logit(α + (1 - 2α)x)``; 0 leaves them.
        grey_levels: how many values a pixel can take, None for images of real numbers. Images only.
        num_classes: condition the top prior and the networks on a class y. class_features: size of its embedding.
        reversible: train in memory that does not grow with the number of couplings.

    Source: Dinh et al., "Density estimation using Real NVP", 2017; CIFAR-10: 3.49 bits/dim at the size of the preset
    ``cifar10`` (one downscaling, 8 residual blocks of 64 channels).
    """

    presets: ClassVar = {
        "digits": Preset(
            {"shape": (1, 8, 8), "grey_levels": 17, "scales": 2, "blocks": 1, "hidden": 16, "logit": 0.01}
        ),
        "photos32": Preset({"shape": (3, 32, 32), "scales": 2, "blocks": 2, "hidden": 32}),
        # the paper, section 4.1: Adam with its default settings, batches of 64, as here
        "cifar10": Preset({"shape": (3, 32, 32), "scales": 2, "blocks": 8, "hidden": 64}),
        "points": Preset({"shape": (2,), "couplings": 8, "hidden": 64}),
    }

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        scales: int = 2,
        blocks: int = 8,
        hidden: int = 64,
        couplings: int = 8,
        scale_map: str = "tanh",
        logit: float = 0.05,
        grey_levels: int | None = 256,
        num_classes: int | None = None,
        class_features: int = 16,
        reversible: bool = False,
    ):
        classes, context = class_context(num_classes, class_features)

        def couple(channels, split, count, width):
            """`count` couplings that take turns, each with its ActNorm."""
            seen, out = (channels, 2 * channels) if split == "checkerboard" else (channels // 2, channels)
            layers = []
            for i in range(count):
                net = ResidualNet(seen, out, width, blocks, context)
                layers += [AffineCoupling(net, split, scale_map, flip=i % 2 == 1), ActNorm(channels)]
            return layers

        flows, splits, latent_shapes = [], [], []
        if len(shape) == 1:
            (features,) = shape
            if features % 2:
                raise ValueError(f"RealNVP: shape must be even for the channel split, got {shape}")
            layers = []
            for i in range(couplings):
                net = MLP(features // 2, features, hidden, 2, context)
                layers += [AffineCoupling(net, scale_map=scale_map, flip=i % 2 == 1), ActNorm(features)]
            flows.append(FlowSequential(*layers, reversible=reversible))
            latent_shapes.append(shape)
        else:
            start = logit_layers(logit)
            channels, height, width = shape
            for squeezed, height, width in scale_sizes("RealNVP", shape, scales, scales - 1):
                layers = [*start, *couple(channels, "checkerboard", 3, hidden), Squeeze()]
                layers += couple(squeezed, "channel", 3, 2 * hidden)
                flows.append(FlowSequential(*layers, reversible=reversible))
                splits.append(Split(squeezed, learned=False))
                start, channels, hidden = [], squeezed // 2, 2 * hidden
                latent_shapes.append((channels, height, width))
            layers = [*start, *couple(channels, "checkerboard", 4, hidden)]
            flows.append(FlowSequential(*layers, reversible=reversible))
            latent_shapes.append((channels, height, width))
        super().__init__(
            flows,
            splits,
            Prior(latent_shapes[-1][0], num_classes=num_classes),
            latent_shapes=latent_shapes,
            shape=shape,
            grey_levels=grey_levels,
            num_classes=num_classes,
            classes=classes,
        )
