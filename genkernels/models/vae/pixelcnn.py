r"""A decoder whose pixels see one another: :math:`p(x|z) = \prod_i p(x_i \mid x_{<i}, f(z))` by a gated PixelCNN."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genkernels.models.autoregressive.gated import GatedPixelCNN
from genkernels.models.vae.likelihoods import Likelihood
from genkernels.nn._values import level_indices


class ConditionalPixelCNN(GatedPixelCNN):
    """A gated PixelCNN every layer of which also sees features of the image's size, in the place of labels.

    Args:
        features: channels of y ``[N, features, H, W]``. The others: as for `GatedPixelCNN`; how far a pixel sees is
            ``first_kernel // 2`` and ``kernel_size // 2`` a layer.
    """

    presets = {}

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        features: int,
        grey_levels: int = 256,
        width: int = 32,
        layers: int = 2,
        kernel_size: int = 3,
        first_kernel: int = 7,
        head: str = "categorical",
        mixtures: int = 5,
    ):
        super().__init__(
            shape=shape,
            grey_levels=grey_levels,
            width=width,
            layers=layers,
            kernel_size=kernel_size,
            first_kernel=first_kernel,
            head=head,
            mixtures=mixtures,
        )
        self.features = features
        for block in self.blocks:
            block.vertical_classes = nn.Conv2d(features, 2 * width, 1, bias=False)
            block.horizontal_classes = nn.Conv2d(features, 2 * width, 1, bias=False)

    def _labels(self, y: Tensor | None, count: int) -> Tensor:
        expected = [count, self.features, *self.shape[1:]]
        if not isinstance(y, Tensor) or list(y.shape) != expected:
            got = list(y.shape) if isinstance(y, Tensor) else repr(y)
            raise ValueError(f"{type(self).__name__}: y must be features [N, F, H, W] = {expected}, got {got}")
        return y

    def _drawn_labels(self, y: Tensor | None, n: int, generator: torch.Generator | None) -> Tensor:
        return self._labels(y, n)


class PixelCNNLikelihood(Likelihood):
    """p(x | z) by `ConditionalPixelCNN`, of which a decoder gives the features; samples by the cached sampler.

    Args:
        features: channels that the decoder gives. width, layers, kernel_size, first_kernel, head, mixtures: of the
            network.
    """

    kind = "pixelcnn"
    unit = "bits/dim"

    def __init__(self, model: str, shape: tuple[int, ...], grey_levels: int | None, *, features: int, **sizes):
        super().__init__(model, shape, grey_levels)
        if len(shape) != 3 or grey_levels is None:
            what = f"points of shape {shape}" if len(shape) != 3 else "grey_levels=None"
            self._refuse("images with grey levels", what)
        self.outputs = features
        self.network = ConditionalPixelCNN(shape=shape, features=features, grey_levels=grey_levels, **sizes)

    def target(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        index = level_indices(self.model, x, self.grey_levels, "its probability has no gradient")
        return index.to(torch.float32) * (2 / (self.grey_levels - 1)) - 1

    def shown(self, target: Tensor) -> Tensor:
        return (target + 1) / 2

    def log_prob(self, outputs: Tensor, target: Tensor) -> Tensor:
        count, samples = outputs.shape[:2]
        target = target.unsqueeze(1).expand(-1, samples, *self.shape).flatten(0, 1)
        return self.network.log_prob((target + 1) / 2, outputs.flatten(0, 1)).view(count, samples)

    def mean(self, outputs: Tensor) -> Tensor:
        """Of E x, which would take many draws, one draw at temperature 0: each pixel's likeliest level in turn."""
        return self.network.sample(len(outputs), temperature=0.0, y=outputs)

    def draw(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.network.sample(len(outputs), generator=generator, y=outputs)
