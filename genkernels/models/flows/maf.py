"""MAF and IAF: stacks of autoregressive affine transforms (Papamakarios et al. 2017; Kingma et al. 2016)."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import nn

from genkernels.models._model import Preset
from genkernels.models.flows.base import FlowModel, class_context, logit_layers
from genkernels.models.flows.nets import Flatten
from genkernels.nn import MADE, ActNorm, AutoregressiveTransform, FlowSequential, InverseAutoregressiveTransform, Prior

ORDERS = ("alternate", "natural", "reversed", "random")
_SIZES = {
    "digits": {"shape": (1, 8, 8), "grey_levels": 17, "transforms": 5, "hidden": 128, "logit": 0.01},
    "photos32": {"shape": (3, 32, 32), "transforms": 5, "hidden": 1024, "logit": 0.05},
    "cifar10": {"shape": (3, 32, 32), "transforms": 10, "hidden": 2048, "logit": 0.05},
    "points": {"shape": (2,), "transforms": 8, "hidden": 64},
}
# the paper, section 4, and its code: batches of 100, Adam at 1e-4 for its flows
_TRAINING = {"cifar10": {"lr": 1e-4, "batch_size": 100}}


class MAF(FlowModel):
    """Masked autoregressive flow: a density costs one pass a transform; a sample costs its inverse, a blocked
    triangular solve.

    Args:
        shape: ``(C, H, W)``, flattened, or ``(D,)``.
        transforms: autoregressive transforms, an ActNorm in front of each. hidden: width of their MADE. hidden_layers:
            of it.
        residual: `hidden_layers` are residual blocks of two layers each, after a first layer.
        order: of the features: ``alternate`` (forwards, backwards, …), ``natural``, ``reversed`` or ``random``, another
            in each transform.
        scale_map: of the transforms, as for `AutoregressiveTransform`; the bounded ``tanh`` keeps densities and samples
            far from the data finite.
        logit: above 0: images are taken from [0, 1] to the real line by ``logit(α + (1 - 2α)x)`` with this α.
        grey_levels: how many values a pixel can take, None for images of real numbers. Images only.
        num_classes: condition every MADE on a class y. class_features: size of its embedding.
        method: of the inverse: ``blocked``, ``jacobi`` or ``sequential``.

    Example:
        >>> import torch, genkernels as gk
        >>> model = gk.models.MAF(shape=(4,), transforms=2, hidden=16)
        >>> model.log_prob(torch.randn(3, 4)).shape
        torch.Size([3])

    Source: Papamakarios et al., "Masked autoregressive flow for density estimation", 2017 (5 or 10 transforms, MADE of
    2 layers of 1024 or 2048 units on CIFAR-10, exponential scales, batch normalisation where ActNorm stands here). The
    preset ``cifar10`` trains as theirs: Adam at 1e-4, batches of 100.
    """

    presets: ClassVar = {name: Preset(sizes, _TRAINING.get(name, {})) for name, sizes in _SIZES.items()}
    _transform: ClassVar[type[nn.Module]] = AutoregressiveTransform

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        transforms: int = 5,
        hidden: int = 512,
        hidden_layers: int = 2,
        order: str = "alternate",
        residual: bool = False,
        scale_map: str = "tanh",
        logit: float = 0.0,
        grey_levels: int | None = 256,
        num_classes: int | None = None,
        class_features: int = 16,
        method: str = "blocked",
    ):
        if order not in ORDERS:
            raise ValueError(f"{type(self).__name__}: order must be one of {', '.join(ORDERS)}, got {order!r}")
        classes, context = class_context(num_classes, class_features)
        dim = math.prod(shape)
        layers = [*logit_layers(logit), Flatten(shape)] if len(shape) == 3 else []
        widths = (hidden,) * (1 + 2 * hidden_layers if residual else hidden_layers)
        for i in range(transforms):
            turn = ("natural", "reversed")[i % 2] if order == "alternate" else order
            made = MADE(dim, widths, residual=residual, order=turn, context_features=context)
            layers += [ActNorm(dim), self._transform(made, scale_map=scale_map, method=method)]
        super().__init__(
            [FlowSequential(*layers, ActNorm(dim))],
            [],
            Prior(dim, num_classes=num_classes),
            latent_shapes=[(dim,)],
            shape=shape,
            grey_levels=grey_levels,
            num_classes=num_classes,
            classes=classes,
        )


class IAF(MAF):
    """Inverse autoregressive flow: a sample costs one pass a transform; the density of given data costs the solve.

    As `MAF`, each transform the other way round. As the posterior of a VAE it is cheap on both sides, because what it
    rates it has drawn itself; as a model of data its likelihood needs `method`'s inverse, whose gradient is that of the
    implicit function.

    Args: as for `MAF`.

    Source: Kingma et al., "Improved variational inference with inverse autoregressive flow", 2016.
    """

    # as a model of data it has no paper whose training could be taken over
    presets: ClassVar = {name: Preset(sizes) for name, sizes in _SIZES.items()}
    _transform = InverseAutoregressiveTransform
