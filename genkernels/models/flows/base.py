"""What every flow model shares: dequantisation, scales, prior, likelihood, sampling."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

import torch
from torch import Tensor, nn

from genkernels.models._model import LikelihoodModel
from genkernels.nn import ActNorm, Dequantize, Logit, Prior


class FlowModel(LikelihoodModel):
    r"""A flow over one or more scales: images are dequantised, then each scale is a `FlowSequential`, and a `Split`
    takes latents out between two of them.

    .. math:: \log p(x) = \log p_Z(f(x)) + \log|\det \partial f/\partial x|

    Args:
        flows: ``z, ldj = flow(x, context)``, one a scale, each with an ``inverse``. splits: between them, one less.
        prior: of the last latents; those of the splits are standard normal.
        latent_shapes: of each split's latents, then of the last.
        shape, grey_levels, num_classes: as for `Model`; only images with grey levels are dequantised.
        classes: gives the flows their context, ``[N, class_features]``, from class indices; where there are classes.
    """

    def __init__(
        self,
        flows: Iterable[nn.Module],
        splits: Iterable[nn.Module],
        prior: Prior,
        *,
        latent_shapes: Sequence[tuple[int, ...]],
        shape: tuple[int, ...],
        grey_levels: int | None = None,
        num_classes: int | None = None,
        classes: nn.Module | None = None,
    ):
        super().__init__(shape, grey_levels, num_classes)
        self.latent_shapes = list(latent_shapes)
        self.dequantize = Dequantize(grey_levels) if grey_levels is not None else None
        # in this order: an optimiser's state numbers the parameters in the order in which they are registered
        self.classes = classes
        self.flows, self.splits = nn.ModuleList(flows), nn.ModuleList(splits)
        self.split_prior, self.prior = Prior(self.latent_shapes[0][0]), prior
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
        lower bound of the log-probability of the integer image.

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
        terms = [self.split_prior.log_prob(z) for z in latents[:-1]]
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
                determinant (additive coupling) and a normal prior that samples :math:`p(x)^{1/T^2}` up to normalisation
                exactly; for others it is a heuristic.
            generator: of everything random, on any device; the same state gives the same sample.
            y: class indices ``[n]``, or one for all; None draws them evenly where the model has classes.

        Returns:
            ``[n, C, H, W]``, floats in [0, 1] at exact levels ``k/(grey_levels - 1)``, or ``[n, D]``.
        """
        self._check_sample(n, temperature, generator)
        labels, like = self._drawn_labels(y, n, generator), self._like
        *split_shapes, last_shape = self.latent_shapes
        latents = [self.split_prior.sample((n, *shape), temperature, generator, None, like) for shape in split_shapes]
        latents.append(self.prior.sample((n, *last_shape), temperature, generator, labels, like))
        return self.decode(tuple(latents), labels)

    # --- helpers --------------------------------------------------------------------------------------------------

    def _context(self, labels: Tensor | None) -> Tensor | None:
        return None if labels is None else self.classes(labels)

    def _checked(self, x: Tensor) -> Tensor:
        self._check_shape(x)
        if self.dequantize is None and not x.is_floating_point():
            raise TypeError(
                f"{type(self).__name__}: x must be floating point, the data being continuous (grey_levels=None), "
                f"got {x.dtype}"
            )
        return x


def class_context(num_classes: int | None, class_features: int) -> tuple[nn.Embedding | None, int]:
    """What gives a flow its context where there are classes, and the context's size, 0 where there are none."""
    return (nn.Embedding(num_classes, class_features), class_features) if num_classes else (None, 0)


def logit_layers(logit: float, grey_levels: int | None) -> list[nn.Module]:
    """What a model of images begins with where ``logit`` is above 0; images without grey levels lie anywhere."""
    return [Logit(logit)] if logit and grey_levels is not None else []


def scale_sizes(model: str, shape: tuple[int, int, int], scales: int, squeezes: int) -> list[tuple[int, int, int]]:
    """``(C, H, W)`` behind the squeeze of each scale, half of the channels leaving after each but the last.

    Args:
        model: for the error. shape: of the image. scales: of the model. squeezes: how many of them hold one.

    Raises:
        ValueError: height or width cannot be halved so often.
    """
    channels, height, width = shape
    if scales < 1:
        raise ValueError(f"{model}: scales must be at least 1, got {scales}")
    if height % 2**squeezes or width % 2**squeezes:
        raise ValueError(
            f"{model}: height and width must be multiples of {2**squeezes} for scales={scales}, got {height}x{width}"
        )
    sizes = []
    for _ in range(squeezes):
        channels, height, width = channels * 4, height // 2, width // 2
        sizes.append((channels, height, width))
        channels //= 2
    return sizes
