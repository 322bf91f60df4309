"""Neural spline flows: couplings by rational-quadratic splines (Durkan et al. 2019)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from genkernels.models._model import Preset
from genkernels.models.flows.base import FlowModel, class_context, logit_layers
from genkernels.models.flows.nets import MLP, Flatten, Shuffle
from genkernels.nn import ActNorm, FlowSequential, Prior, SplineCoupling


class NSF(FlowModel):
    """Neural spline flow: couplings that send each feature of one half through a spline of its own, read off the other.

    An ActNorm, which brings the data to where the splines are, then couplings that take turns, the first half moved by
    the second and so on, features being shuffled behind every second one where there are more than two.

    Args:
        shape: ``(D,)``, D at least 2, or ``(C, H, W)``, flattened.
        couplings: how many. hidden: width of their networks. hidden_layers: of each.
        bins: K, of each spline. bound: the splines reach from −bound to bound; beyond, a coupling is the identity.
        parametrization: of the splines: ``nflows`` or ``zuko``, as for `genkernels.ops.rational_quadratic_spline`.
        logit: above 0: images are taken from [0, 1] to the real line by ``logit(α + (1 - 2α)x)`` with this α.
        grey_levels: how many values a pixel can take, None for images of real numbers. Images only.
        num_classes: condition every network on a class y. class_features: size of its embedding.

    Example:
        >>> import torch, genkernels as gk
        >>> model = gk.models.NSF(shape=(4,), couplings=2, hidden=16)
        >>> model.log_prob(torch.randn(3, 4)).shape
        torch.Size([3])

    Source: Durkan et al., "Neural spline flows", 2019 (8 bins, bound 3 for points, couplings with residual networks and
    linear layers of LU form between them, where a fixed permutation stands here).
    """

    presets: ClassVar = {
        "digits": Preset({"shape": (1, 8, 8), "grey_levels": 17, "couplings": 6, "hidden": 64, "logit": 0.01}),
        "photos32": Preset({"shape": (3, 32, 32), "couplings": 4, "hidden": 64, "logit": 0.05}),
        "cifar10": Preset({"shape": (3, 32, 32), "couplings": 8, "hidden": 256, "logit": 0.05}),
        "points": Preset({"shape": (2,), "couplings": 6, "hidden": 64}),
    }

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        couplings: int = 8,
        hidden: int = 128,
        hidden_layers: int = 2,
        bins: int = 8,
        bound: float = 5.0,
        parametrization: str = "nflows",
        logit: float = 0.0,
        grey_levels: int | None = 256,
        num_classes: int | None = None,
        class_features: int = 16,
    ):
        classes, context = class_context(num_classes, class_features)
        dim = math.prod(shape)
        if dim < 2:
            raise ValueError(f"NSF: shape must have at least 2 features, one half of which passes, got {shape}")
        if parametrization not in ("nflows", "zuko"):
            raise ValueError(f"NSF: parametrization must be one of nflows, zuko, got {parametrization!r}")
        if bins < 1 or hidden_layers < 1:
            raise ValueError(f"NSF: bins and hidden_layers must be at least 1, got {bins} and {hidden_layers}")
        layers = [*logit_layers(logit), Flatten(shape)] if len(shape) == 3 else []
        layers.append(ActNorm(dim))
        numbers = 3 * bins - 1
        for i in range(couplings):
            flip = i % 2 == 1
            passing, moved = (dim // 2, dim - dim // 2) if flip else (dim - dim // 2, dim // 2)
            net = MLP(passing, moved * numbers, hidden, hidden_layers, context)
            if parametrization == "nflows":  # slopes of 1: the identity at the start
                with torch.no_grad():
                    net.last.bias.view(moved, numbers)[:, 2 * bins :].fill_(math.log(math.expm1(1 - 1e-3)))
            layers.append(SplineCoupling(net, parametrization, bound, flip=flip))
            if flip and dim > 2:
                layers.append(Shuffle(dim))
        super().__init__(
            [FlowSequential(*layers)],
            [],
            Prior(dim, num_classes=num_classes),
            latent_shapes=[(dim,)],
            shape=shape,
            grey_levels=grey_levels,
            num_classes=num_classes,
            classes=classes,
        )
