"""What every flow model shares: dequantisation, levels, prior, likelihood, sampling, presets."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from genkernels.models._model import LikelihoodModel, arguments, extents
from genkernels.nn import ActNorm, Dequantize, Logit, Prior

__all__ = ["FlowModel", "arguments", "level_sizes"]


class FlowModel(LikelihoodModel):
    r"""A multi-scale flow: images are dequantised, then each level is a `FlowSequential`, and `Split` takes latents out
    between levels.

    .. math:: \log p(x) = \log p_Z(f(x)) + \log|\det \partial f/\partial x|

    Subclasses call `_setup`, fill ``flows`` (one `FlowSequential` a level) and ``splits`` (one less) and call
    `_finish`.

    Attributes:
        data_levels: grey levels of the data, None for continuous data. The others: as for `LikelihoodModel`.
    """

    def _setup(
        self,
        hparams: dict[str, Any],
        image_shape: tuple[int, int, int] | None,
        features: int | None,
        data_levels: int | None,
        num_classes: int | None,
        class_features: int,
        logit: float,
    ) -> list[nn.Module]:
        """Checks and keeps what all models take; gives the layers that the first level begins with."""
        name = type(self).__name__
        if (image_shape is None) == (features is None):
            raise ValueError(
                f"{name}: exactly one of image_shape and features must be given, got {image_shape} and {features}"
            )
        if image_shape is not None:
            shape = hparams["image_shape"] = extents(name, "image_shape", image_shape, "(C, H, W)")
        else:
            shape, data_levels = (features,), None
        self._begin(hparams, shape, num_classes)
        self.data_levels = data_levels
        self.dequantize = Dequantize(data_levels) if data_levels is not None else None
        self.classes = nn.Embedding(num_classes, class_features) if num_classes else None
        self.context_features = class_features if num_classes else 0
        self.flows = nn.ModuleList()
        self.splits = nn.ModuleList()
        return [Logit(logit)] if logit and data_levels is not None else []

    def _finish(self, latent_shapes: list[tuple[int, ...]], prior: str = "normal", learned: bool = False) -> None:
        self.latent_shapes = latent_shapes
        self.noise = Prior(latent_shapes[0][0])
        self.prior = Prior(latent_shapes[-1][0], prior, learned, self.num_classes)
        self._actnorms = [layer for layer in self.modules() if isinstance(layer, ActNorm)]

    # --- the map --------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[tuple[Tensor, ...], Tensor]:
        """Continuous data (images: dequantised, in [0, 1)) to ``(latents, ldj)``; the last latent is the top one."""
        context = self._context(self._labels(y, x.shape[0]))
        latents, log_dets = [], []
        for flow, split in zip_longest(self.flows, self.splits):
            x, log_det = flow(x, context)
            log_dets.append(log_det)
            if split is not None:
                x, latent, log_det = split(x)
                latents.append(latent)
                log_dets.append(log_det)
        return (*latents, x), torch.stack(log_dets).sum(0)

    def inverse(self, latents: tuple[Tensor, ...], y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(x, ldj)`` from latents, the inverse of `forward`."""
        *rest, x = latents
        context = self._context(self._labels(y, x.shape[0]))
        log_dets = []
        for i in reversed(range(len(self.flows))):
            if i < len(self.splits):
                x, log_det = self.splits[i].inverse(x, rest[i])
                log_dets.append(log_det)
            x, log_det = self.flows[i].inverse(x, context)
            log_dets.append(log_det)
        return x, torch.stack(log_dets).sum(0)

    def encode(
        self, x: Tensor, y: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Data to ``(latents, ldj)``, dequantisation included."""
        x = self._checked(x)
        if self.training and len(x) and not all(layer.ready for layer in self._actnorms):
            self.initialize(x, y, generator)
        if self.dequantize is None:
            return self.forward(x.to(self._like.dtype), y)
        x, log_det = self.dequantize(x, generator=generator)
        latents, ldj = self.forward(x, y)
        return latents, ldj + log_det

    @torch.no_grad()
    def initialize(self, x: Tensor, y: Tensor | None = None, generator: torch.Generator | None = None) -> None:
        """Sets the ActNorms from data, on a pass of its own; the first `log_prob` in training mode calls it.

        The pass sees the batch drawn anew with replacement. On the batch itself every ActNorm bias would start with a
        gradient of exactly zero in exact arithmetic, rounding noise in fact, and Adam's first step turns noise into
        steps of full length.
        """
        device = x.device if generator is None else generator.device
        rows = torch.randint(len(x), (len(x),), device=device, generator=generator).to(x.device)
        x, y = x[rows], None if y is None else y[rows.to(y.device)]
        x = x.to(self._like.dtype) if self.dequantize is None else self.dequantize(x, generator=generator)[0]
        self.forward(x, y)

    def decode(self, latents: tuple[Tensor, ...], y: Tensor | None = None) -> Tensor:
        """Latents to data: images as floats in [0, 1] at exact grey levels, or points."""
        x, _ = self.inverse(latents, y)
        return x if self.dequantize is None else self.dequantize.inverse(x)[0]

    # --- likelihood -----------------------------------------------------------------------------------------------

    def log_prob(self, x: Tensor, y: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Log-density ``[N]``, nats.

        For images it is that of the uniformly dequantised image, in units where a grey level has width 1: a stochastic
            lower
        bound of the log-probability of the integer image.

        Args:
            x: ``[N, C, H, W]`` uint8 level indices or floats in [0, 1]; or ``[N, D]``.
            y: ``[N]`` class indices, where the model has classes.
            generator: of the dequantisation noise.

        Raises:
            ValueError: a shape, a grey level (on the CPU) or a missing y. TypeError: integers other than uint8.
        """
        self._check_shape(x)
        labels = self._labels(y, x.shape[0])
        latents, ldj = self.encode(x, labels, generator)
        terms = [self.noise.log_prob(z) for z in latents[:-1]]
        return torch.stack([ldj, *terms, self.prior.log_prob(latents[-1], labels)]).sum(0)

    # --- sampling -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self, n: int, temperature: float = 1.0, generator: torch.Generator | None = None, y: Tensor | int | None = None
    ) -> Tensor:
        r"""Draws from the model; no graph is kept and the training mode stays as it is.

        Args:
            n: how many; 0 gives an empty tensor.
            temperature: multiplies the prior's standard deviation (Kingma & Dhariwal 2018). For flows of constant
                determinant (additive coupling) that samples :math:`p(x)^{1/T^2}` up to normalisation exactly; for
                others it is a heuristic.
            generator: of everything random, on any device; the same state gives the same sample.
            y: class indices ``[n]``, or one for all; None draws them evenly where the model has classes.

        Returns:
            ``[n, C, H, W]``, floats in [0, 1] at exact levels ``k/(data_levels - 1)``, or ``[n, D]``.
        """
        self._check_sample(n, temperature, generator)
        labels, like = self._drawn_labels(y, n, generator), self._like
        latents = []
        for i, shape in enumerate(self.latent_shapes):
            top = i == len(self.latent_shapes) - 1
            source, given = (self.prior, labels) if top else (self.noise, None)
            latents.append(source.sample((n, *shape), temperature, generator, given, like))
        return self.decode(tuple(latents), labels)

    # --- helpers --------------------------------------------------------------------------------------------------

    def _context(self, labels: Tensor | None) -> Tensor | None:
        return None if labels is None else self.classes(labels)

    def _checked(self, x: Tensor) -> Tensor:
        self._check_shape(x)
        if self.dequantize is None and not x.is_floating_point():
            raise TypeError(
                f"{type(self).__name__}: x must be floating point, the data being continuous (data_levels=None), "
                f"got {x.dtype}"
            )
        return x


def level_sizes(model: str, image_shape: tuple[int, int, int], levels: int) -> list[tuple[int, int, int]]:
    """``(C, H, W)`` behind the squeeze of each level, half of the channels leaving after each but the last.

    Raises:
        ValueError: height or width is no multiple of 2 to the number of levels.
    """
    channels, height, width = image_shape
    if levels < 1 or height % 2**levels or width % 2**levels:
        raise ValueError(
            f"{model}: height and width must be multiples of 2^levels = {2 ** max(levels, 1)}, got "
            f"{height}x{width} with levels={levels}"
        )
    sizes = []
    for level in range(levels):
        channels, height, width = channels * 4, height // 2, width // 2
        sizes.append((channels, height, width))
        if level < levels - 1:
            channels //= 2
    return sizes
