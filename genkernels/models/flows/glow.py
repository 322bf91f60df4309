"""Glow: ActNorm, invertible 1×1 convolution and affine coupling, repeated (Kingma & Dhariwal 2018)."""

from __future__ import annotations

from typing import ClassVar

from genkernels.models._model import Preset
from genkernels.models.flows.base import FlowModel, class_context, logit_layers, scale_sizes
from genkernels.models.flows.nets import MLP, ConvNet
from genkernels.nn import ActNorm, AffineCoupling, FlowSequential, InvertibleConv1x1, Prior, Split, Squeeze


class Glow(FlowModel):
    """Glow for images, and its form of one scale on fully connected networks for points.

    Args:
        shape: ``(C, H, W)``, height and width multiples of 2^scales; or ``(D,)``, D even.
        scales: half of the channels leaves as latents after each but the last. Images only.
        steps: ActNorm, 1×1 convolution and coupling, so many times a scale. hidden: width of the coupling networks.
        scale_map: of the couplings; ``sigmoid`` as in the paper's code. additive: shifts only.
        lu: the 1×1 convolutions in PLU form.
        logit: above 0: images are taken from [0, 1] to the real line by ``logit(α + (1 - 2α)x)`` with this α, as in
            RealNVP; it helps where many pixels are black or white.
        learned_prior: mean and scale of the top latents, and those of each split given what stays, are learned.
        grey_levels: how many values a pixel can take, None for images of real numbers. Images only.
        num_classes: condition the top prior and the coupling networks on a class y. class_features: size of its
            embedding.
        reversible: train in memory that does not grow with `steps`.

    Example:
        >>> import torch, genkernels as gk
        >>> model = gk.models.Glow.from_preset("digits")
        >>> model.log_prob(torch.randint(17, (2, 1, 8, 8)).to(torch.uint8)).shape
        torch.Size([2])

    Source: Kingma & Dhariwal, "Glow: Generative flow with invertible 1x1 convolutions", 2018; CIFAR-10: 3.35
    bits/dim at the size of the preset ``cifar10``, which trains as theirs: Adam at 1e-3, batches of 512.
    """

    presets: ClassVar = {
        "digits": Preset({"shape": (1, 8, 8), "grey_levels": 17, "scales": 2, "steps": 8, "hidden": 32, "logit": 0.01}),
        "photos32": Preset({"shape": (3, 32, 32), "scales": 3, "steps": 8, "hidden": 64}),
        # the paper's code: Adam at 1e-3, as here, on 64 images on each of 8 GPUs
        "cifar10": Preset({"shape": (3, 32, 32), "scales": 3, "steps": 32, "hidden": 512}, {"batch_size": 512}),
        "points": Preset({"shape": (2,), "steps": 8, "hidden": 64}),
    }

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        scales: int = 3,
        steps: int = 32,
        hidden: int = 512,
        scale_map: str = "sigmoid",
        additive: bool = False,
        lu: bool = True,
        logit: float = 0.0,
        learned_prior: bool = True,
        grey_levels: int | None = 256,
        num_classes: int | None = None,
        class_features: int = 16,
        reversible: bool = False,
    ):
        classes, context = class_context(num_classes, class_features)

        def chain(channels, network, *options):
            """`steps` times ActNorm, 1×1 convolution and coupling."""
            layers = []
            for _ in range(steps):
                net = network(channels // 2, channels // 2 if additive else channels, hidden, *options, context)
                coupling = AffineCoupling(net, scale_map=scale_map, additive=additive)
                layers += [ActNorm(channels), InvertibleConv1x1(channels, lu=lu), coupling]
            return layers

        flows, splits = [], []
        if len(shape) == 1:
            if shape[0] % 2:
                raise ValueError(f"Glow: shape must be even for the channel split, got {shape}")
            flows.append(FlowSequential(*chain(shape[0], MLP, 2), reversible=reversible))
            latent_shapes = [shape]
        else:
            sizes = scale_sizes("Glow", shape, scales, scales)
            start = logit_layers(logit)
            for i, (channels, _, _) in enumerate(sizes):
                flows.append(FlowSequential(*start, Squeeze(), *chain(channels, ConvNet), reversible=reversible))
                start = []
                if i < scales - 1:
                    splits.append(Split(channels, learned=learned_prior))
            latent_shapes = [(channels // 2, height, width) for channels, height, width in sizes[:-1]] + sizes[-1:]
        super().__init__(
            flows,
            splits,
            Prior(latent_shapes[-1][0], learned=learned_prior, num_classes=num_classes),
            latent_shapes=latent_shapes,
            shape=shape,
            grey_levels=grey_levels,
            num_classes=num_classes,
            classes=classes,
        )
