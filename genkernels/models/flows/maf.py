"""MAF and IAF: stacks of autoregressive affine transforms (Papamakarios et al. 2017; Kingma et al. 2016)."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from genkernels.models.flows.base import FlowModel, arguments
from genkernels.models.flows.nets import Flatten
from genkernels.nn import MADE, ActNorm, AutoregressiveTransform, FlowSequential, InverseAutoregressiveTransform

ORDERS = ("alternate", "natural", "reversed", "random")
_PRESETS = {
    "digits": {"image_shape": (1, 8, 8), "data_levels": 17, "transforms": 5, "hidden": 128, "logit": 0.01},
    "photos32": {"image_shape": (3, 32, 32), "transforms": 5, "hidden": 1024, "logit": 0.05},
    "cifar10": {"image_shape": (3, 32, 32), "transforms": 10, "hidden": 2048, "logit": 0.05},
    "points": {"features": 2, "transforms": 8, "hidden": 64},
}


class MAF(FlowModel):
    """Masked autoregressive flow: a density costs one pass a transform; a sample costs its inverse, a blocked
    triangular solve.

    Args:
        image_shape: ``(C, H, W)``, flattened. features: D, for points; one of the two.
        transforms: autoregressive transforms, an ActNorm in front of each. hidden: width of their MADE. hidden_layers:
            of it.
            With `residual`: residual blocks of two layers each, after a first layer.
        order: of the features: ``alternate`` (forwards, backwards, …), ``natural``, ``reversed`` or ``random``, another
            in each transform.
        scale_map: of the transforms, as for `AutoregressiveTransform`; the bounded ``tanh`` keeps densities and samples
            far from the data finite.
        logit: above 0: images are taken from [0, 1] to the real line by ``logit(α + (1 - 2α)x)`` with this α.
        data_levels: grey levels of the images, None for continuous data. Images only.
        num_classes: condition every MADE on a class y. class_features: size of its embedding.
        method: of the inverse: ``blocked``, ``jacobi`` or ``sequential``.

    Example:
        >>> import torch, genkernels as gk
        >>> model = gk.models.MAF(features=4, transforms=2, hidden=16)
        >>> model.log_prob(torch.zeros(3, 4)).shape
        torch.Size([3])

    Source: Papamakarios et al., "Masked autoregressive flow for density estimation", 2017 (5 or 10 transforms, MADE of
    2 layers of 1024 units on CIFAR-10, Adam at 1e-4, exponential scales, batch normalisation where ActNorm stands
    here).
    """

    presets: ClassVar = _PRESETS
    _transform: ClassVar[type[nn.Module]] = AutoregressiveTransform

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int] | None = None,
        features: int | None = None,
        transforms: int = 5,
        hidden: int = 512,
        hidden_layers: int = 2,
        order: str = "alternate",
        residual: bool = False,
        scale_map: str = "tanh",
        logit: float = 0.0,
        data_levels: int | None = 256,
        num_classes: int | None = None,
        class_features: int = 16,
        method: str = "blocked",
    ):
        start = self._setup(arguments(locals()), image_shape, features, data_levels, num_classes, class_features, logit)
        if transforms < 0:
            raise ValueError(f"{type(self).__name__}: transforms must be at least 0, got {transforms}")
        if order not in ORDERS:
            raise ValueError(f"{type(self).__name__}: order must be one of {', '.join(ORDERS)}, got {order!r}")
        chain: list[nn.Module] = [*start, Flatten(self.shape)] if image_shape is not None else []
        widths = (hidden,) * (1 + 2 * hidden_layers if residual else hidden_layers)
        for i in range(transforms):
            turn = ("natural", "reversed")[i % 2] if order == "alternate" else order
            made = MADE(self.dim, widths, residual=residual, order=turn, context_features=self.context_features)
            chain += [ActNorm(self.dim), self._transform(made, scale_map=scale_map, method=method)]
        self.flows.append(FlowSequential(*chain, ActNorm(self.dim)))
        self._finish([(self.dim,)])


class IAF(MAF):
    """Inverse autoregressive flow: a sample costs one pass a transform; the density of given data costs the solve.

    As `MAF`, each transform the other way round. As the posterior of a VAE it is cheap on both sides, because what it
    rates it has drawn itself; as a model of data its likelihood needs `method`'s inverse, whose gradient is that of the
    implicit function.

    Args: as for `MAF`.

    Source: Kingma et al., "Improved variational inference with inverse autoregressive flow", 2016.
    """

    _transform = InverseAutoregressiveTransform
