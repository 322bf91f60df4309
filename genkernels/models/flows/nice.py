"""NICE: additive couplings and one diagonal scale (Dinh, Krueger & Bengio 2015)."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from genkernels.models.flows.base import FlowModel, arguments
from genkernels.models.flows.nets import MLP, Flatten
from genkernels.nn import ActNorm, AffineCoupling, EvenOdd, FlowSequential


class NICE(FlowModel):
    """NICE for images (as vectors) and points: its determinant is constant, so sampling at a temperature is exact.

    The paper's diagonal scale is an `ActNorm` here: a bias beside the scale, and a data-dependent start. Even and odd
    features take turns in passing, as in the paper.

    Args:
        image_shape: ``(C, H, W)`` with an even number of values. features: D, even, for points; one of the two.
        couplings: how many. layers, hidden: hidden layers of each coupling's network, and their units.
        prior: ``logistic`` or ``normal``.
        logit: above 0: images are taken from [0, 1] to the real line by ``logit(α + (1 - 2α)x)`` with this α; the
            determinant is then no longer constant.
        data_levels: grey levels of the images, None for continuous data. Images only.
        num_classes: condition the prior and the networks on a class y. class_features: size of its embedding.
        reversible: train in memory that does not grow with `couplings`.

    Source: Dinh et al., "NICE: Non-linear independent components estimation", 2015. The preset ``cifar10`` has the
    paper's sizes (4 couplings, 4 hidden layers of 2000 units, logistic prior), without its ZCA whitening of the data.
    """

    presets: ClassVar = {
        "digits": {"image_shape": (1, 8, 8), "data_levels": 17, "couplings": 4, "layers": 2, "hidden": 64},
        "photos32": {"image_shape": (3, 32, 32), "couplings": 4, "layers": 4, "hidden": 512},
        "cifar10": {"image_shape": (3, 32, 32), "couplings": 4, "layers": 4, "hidden": 2000},
        "points": {"features": 2, "couplings": 8, "layers": 2, "hidden": 64, "prior": "normal"},
    }

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int] | None = None,
        features: int | None = None,
        couplings: int = 4,
        layers: int = 5,
        hidden: int = 1000,
        prior: str = "logistic",
        logit: float = 0.0,
        data_levels: int | None = 256,
        num_classes: int | None = None,
        class_features: int = 16,
        reversible: bool = False,
    ):
        start = self._setup(arguments(locals()), image_shape, features, data_levels, num_classes, class_features, logit)
        if self.dim % 2:
            raise ValueError(f"NICE: the number of values must be even for the channel split, got {self.dim}")
        half = self.dim // 2
        chain: list[nn.Module] = [*start, Flatten(self.shape)] if image_shape is not None else []
        chain.append(EvenOdd())
        for i in range(couplings):
            net = MLP(half, half, hidden, layers, self.context_features)
            chain.append(AffineCoupling(net, additive=True, flip=i % 2 == 1))
        self.flows.append(FlowSequential(*chain, ActNorm(self.dim), reversible=reversible))
        self._finish([(self.dim,)], prior)
