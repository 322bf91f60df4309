"""Glow: ActNorm, invertible 1×1 convolution and affine coupling, repeated (Kingma & Dhariwal 2018)."""

from __future__ import annotations

from typing import ClassVar

from genkernels.models.flows.base import FlowModel, arguments, level_sizes
from genkernels.models.flows.nets import MLP, ConvNet
from genkernels.nn import ActNorm, AffineCoupling, FlowSequential, InvertibleConv1x1, Split, Squeeze


class Glow(FlowModel):
    """Glow for images, and its one-level form on fully connected networks for points.

    Args:
        image_shape: ``(C, H, W)``, height and width multiples of 2^levels. features: D, even, for points; one of the
            two.
        levels: scales; half of the channels leaves as latents after each but the last. Images only.
        steps: ActNorm, 1×1 convolution and coupling, so many times a level. hidden: width of the coupling networks.
        scale_map: of the couplings; ``sigmoid`` as in the paper's code. additive: shifts only.
        lu: the 1×1 convolutions in PLU form.
        logit: above 0: images are taken from [0, 1] to the real line by ``logit(α + (1 - 2α)x)`` with this α, as in
            RealNVP; it helps where many pixels are black or white.
        learned_prior: mean and scale of the top latents, and those of each split given what is kept, are learned.
        data_levels: grey levels of the images, None for continuous data. Images only.
        num_classes: condition the top prior and the coupling networks on a class y. class_features: size of its
            embedding.
        reversible: train in memory that does not grow with `steps`.

    Example:
        >>> import torch, genkernels as gk
        >>> model = gk.models.Glow.from_preset("digits")
        >>> model.log_prob(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).shape
        torch.Size([2])

    Source: Kingma & Dhariwal, "Glow: Generative flow with invertible 1x1 convolutions", 2018. The paper trains with
    Adam at learning rate 1e-3; CIFAR-10: 3.35 bits/dim at the size of the preset ``cifar10``.
    """

    presets: ClassVar = {
        "digits": {"image_shape": (1, 8, 8), "data_levels": 17, "levels": 2, "steps": 8, "hidden": 32, "logit": 0.01},
        "photos32": {"image_shape": (3, 32, 32), "levels": 3, "steps": 8, "hidden": 64},
        "cifar10": {"image_shape": (3, 32, 32), "levels": 3, "steps": 32, "hidden": 512},
        "points": {"features": 2, "steps": 8, "hidden": 64},
    }

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int] | None = None,
        features: int | None = None,
        levels: int = 3,
        steps: int = 32,
        hidden: int = 512,
        scale_map: str = "sigmoid",
        additive: bool = False,
        lu: bool = True,
        logit: float = 0.0,
        learned_prior: bool = True,
        data_levels: int | None = 256,
        num_classes: int | None = None,
        class_features: int = 16,
        reversible: bool = False,
    ):
        start = self._setup(arguments(locals()), image_shape, features, data_levels, num_classes, class_features, logit)

        def step(channels, net):
            coupling = AffineCoupling(net, scale_map=scale_map, additive=additive)
            return ActNorm(channels), InvertibleConv1x1(channels, lu=lu), coupling

        context = self.context_features
        if image_shape is None:
            if features % 2:
                raise ValueError(f"Glow: features must be even for the channel split, got {features}")
            width = features // 2 if additive else features
            layers = [step(features, MLP(features // 2, width, hidden, 2, context)) for _ in range(steps)]
            self.flows.append(FlowSequential(*sum(layers, ()), reversible=reversible))
            self._finish([(features,)], learned=learned_prior)
            return

        sizes = level_sizes("Glow", self.shape, levels)
        for i, (channels, _, _) in enumerate(sizes):
            width = channels // 2 if additive else channels
            layers = [step(channels, ConvNet(channels // 2, width, hidden, context)) for _ in range(steps)]
            self.flows.append(FlowSequential(*start, Squeeze(), *sum(layers, ()), reversible=reversible))
            start = []
            if i < levels - 1:
                self.splits.append(Split(channels, learned=learned_prior))
        taken = [(channels // 2, height, width) for channels, height, width in sizes[:-1]]
        self._finish([*taken, sizes[-1]], learned=learned_prior)
