"""NICE: additive couplings and one diagonal scale (Dinh, Krueger & Bengio 2015)."""

from __future__ import annotations

import math
from typing import ClassVar

from genkernels.models._model import Preset
from genkernels.models.flows.base import FlowModel, class_context, logit_layers
from genkernels.models.flows.nets import MLP, Flatten
from genkernels.nn import ActNorm, AffineCoupling, EvenOdd, FlowSequential, Prior


class NICE(FlowModel):
    """NICE for images (as vectors) and points: its determinant is constant, so that sampling at a temperature is exact
    with a normal prior.

    The paper's diagonal scale is an `ActNorm` here: a bias beside the scale, and a data-dependent start. Even and odd
    features take turns in passing, as in the paper.

    Args:
        shape: ``(C, H, W)`` or ``(D,)``, of an even number of values.
        couplings: how many. layers, hidden: hidden layers of each coupling's network, and their units.
        prior: ``logistic`` or ``normal``.
        logit: above 0: images are taken from [0, 1] to the real line by ``logit(α + (1 - 2α)x)`` with this α; the
            determinant is then no longer constant.
        grey_levels: how many values a pixel can take, None for images of real numbers. Images only.
        num_classes: condition the prior and the networks on a class y. class_features: size of its embedding.
        reversible: train in memory that does not grow with `couplings`.

    Source: Dinh et al., "NICE: Non-linear independent components estimation", 2015. The preset ``cifar10`` has the
    paper's sizes (4 couplings, 4 hidden layers of 2000 units, logistic prior) and its optimiser (Adam at 1e-3, β 0.9
    and 0.99), without its ZCA whitening of the data.
    """

    presets: ClassVar = {
        "digits": Preset({"shape": (1, 8, 8), "grey_levels": 17, "couplings": 4, "layers": 2, "hidden": 64}),
        "photos32": Preset({"shape": (3, 32, 32), "couplings": 4, "layers": 4, "hidden": 512}),
        # the paper, section 5.1: Adam at 1e-3 with "β2 = 0.01", in the notation of Adam's first version one minus ours
        "cifar10": Preset({"shape": (3, 32, 32), "couplings": 4, "layers": 4, "hidden": 2000}, {"betas": (0.9, 0.99)}),
        "points": Preset({"shape": (2,), "couplings": 8, "layers": 2, "hidden": 64, "prior": "normal"}),
    }

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        couplings: int = 4,
        layers: int = 5,
        hidden: int = 1000,
        prior: str = "logistic",
        logit: float = 0.0,
        grey_levels: int | None = 256,
        num_classes: int | None = None,
        class_features: int = 16,
        reversible: bool = False,
    ):
        dim = math.prod(shape)
        if layers < 1:
            raise ValueError(f"NICE: layers must be at least 1, got {layers}")
        if dim % 2:
            raise ValueError(f"NICE: the number of values must be even for the channel split, got {dim}")
        classes, context = class_context(num_classes, class_features)
        chain = [*logit_layers(logit), Flatten(shape)] if len(shape) == 3 else []
        chain.append(EvenOdd())
        for i in range(couplings):
            net = MLP(dim // 2, dim // 2, hidden, layers, context)
            chain.append(AffineCoupling(net, additive=True, flip=i % 2 == 1))
        super().__init__(
            [FlowSequential(*chain, ActNorm(dim), reversible=reversible)],
            [],
            Prior(dim, prior, num_classes=num_classes),
            latent_shapes=[(dim,)],
            shape=shape,
            grey_levels=grey_levels,
            num_classes=num_classes,
            classes=classes,
        )
