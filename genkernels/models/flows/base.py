"""What every flow model shares: dequantisation, scales, prior, likelihood, sampling."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from itertools import zip_longest

import torch
from torch import Tensor, nn

from genkernels.models._model import LikelihoodModel
from genkernels.nn import ActNorm, Dequantize, Logit, Prior
from genkernels.nn._draws import drawing_from
from genkernels.nn._log_det import no_log_det
from genkernels.nn._seen import enclosing_ddp, unwrapped
from genkernels.nn._values import refuse_gradient


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
        self.split_priors = nn.ModuleList(Prior(channels) for channels, *_ in self.latent_shapes[:-1])
        self.prior = prior
        self._actnorms = self._find_actnorms()

    # --- the map --------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[tuple[Tensor, ...], Tensor]:
        """Continuous data (images: dequantised, in [0, 1)) to ``(latents, ldj)``; the last latent is the top one."""
        self._check_shape(x)
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
        self._check_latents(latents)
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
        if self.dequantize is not None:
            refuse_gradient(x, f"{type(self).__name__}: x is rounded to grey levels", "model(x) takes it as it is")
        if self.training and len(x) and not all(layer.ready for layer in self._actnorms):
            self._actnorms = self._find_actnorms()  # they may have been exchanged
            waiting = [layer for layer in self._actnorms if not layer.ready]
            if waiting and not self._start(x, y, generator, waiting):
                for layer in waiting:
                    layer.eval()  # this batch is not to start them by itself
                try:
                    return self._encode(x, y, generator)
                finally:
                    for layer in waiting:
                        layer.train()
        return self._encode(x, y, generator)

    def _encode(self, x: Tensor, y: Tensor | None, generator: torch.Generator | None):
        if self.dequantize is None:
            return self.forward(x.to(self._like.dtype), y)
        x, log_det = self.dequantize(x, generator=generator)
        latents, ldj = self.forward(x, y)
        return latents, ldj + log_det

    def initialize(
        self,
        x: Tensor,
        y: Tensor | None = None,
        generator: torch.Generator | None = None,
        group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        """Sets the ActNorms from data, on a pass of its own, whatever they were before; the first `log_prob` in
        training mode does so where they have not been set.

        The pass sees the batch drawn anew with replacement. On the batch itself every ActNorm bias would start with a
        gradient of exactly zero in exact arithmetic, rounding noise in fact, and Adam's first step turns noise into
        steps of full length.

        Take many more examples than a datum has channels. Directions in which the batch does not vary are scaled up
        again by each step of a `Glow`: 3 points in 2 dimensions start 32 steps at 1e17 nats (median of 12 seeds; 9
        points: 3), where gradients overflow and a reversible flow, whose inverse is rounding alone, refuses to give
        any.

        Args:
            x, y, generator: as for `log_prob`. group: ranks of ``torch.distributed`` that call this together and whose
                batches count as one; None: this process alone.

        Raises:
            ValueError: x holds fewer than two different examples, or values that are not finite; y is wrong.
        """
        x = self._checked(x)
        y = self._labels(y, len(x))
        self._actnorms = self._find_actnorms()
        if group is None and not _varies(x):
            raise ValueError(
                f"{type(self).__name__}: the start needs at least two different examples, all finite, got x "
                f"{list(x.shape)} without"
            )
        for layer in self._actnorms:
            layer.reset()
        self._start(x, y, generator, self._actnorms, group)

    @torch.no_grad()
    def _start(self, x, y, generator, layers: list[ActNorm], group=None) -> bool:
        """Lets `layers` start from x; False, and a warning, where x is nothing to start from."""
        if not (torch.compiler.is_compiling() or _shared(group) or _varies(x)):
            warnings.warn(
                f"{type(self).__name__}: a batch {list(x.shape)} of equal or not finite examples does not count as the "
                "data-dependent start of its ActNorms: the next batch is looked at",
                stacklevel=4,
            )
            return False
        device = x.device if generator is None else generator.device
        rows = torch.randint(len(x), (len(x),), device=device, generator=generator).to(x.device)
        if torch.compiler.is_compiling() or _shared(group) or _varies(x[rows]):  # of few examples it may be one alone
            x, y = x[rows], None if y is None else y[rows.to(y.device)]
        x = x.to(self._like.dtype) if self.dequantize is None else self.dequantize(x, generator=generator)[0]
        # the sequences too, by themselves: in training they let their layers start on a pass of its own, after which
        # the rest of the model sees the same bits whatever the mode was
        modes = [(module, module.training) for module in (*layers, *self.flows)]
        for module, _ in modes:
            module.training = True
        for layer in layers:
            layer.ranks = None if group is None and enclosing_ddp() else (group,)
        try:
            self.forward(x, y)
        finally:
            for module, mode in modes:
                module.training = mode
            for layer in layers:
                layer.ranks = None
        return True

    def decode(self, latents: tuple[Tensor, ...], y: Tensor | None = None) -> Tensor:
        """Latents to data: images as floats in [0, 1] at exact grey levels, or points.

        Raises:
            RuntimeError: a leaf among the latents of an image asks for a gradient, which the rounding makes 0. Images
                carry no graph.
        """
        self._check_latents(latents)
        for z in latents if self.dequantize is not None else ():
            if z.is_leaf:
                why = f"{type(self).__name__}: decode rounds to grey levels"
                refuse_gradient(z, why, "inverse(latents) gives the image before that, in [0, 1)")
        with no_log_det():
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
            generator: of the dequantisation noise, and of log-determinants that are estimated.

        Raises:
            ValueError: a shape, a grey level (on the CPU) or a missing y. TypeError: integers other than uint8.
        """
        self._check_shape(x)
        labels = self._labels(y, x.shape[0])
        with drawing_from(generator):
            latents, ldj = self.encode(x, labels, generator)
        return self.density(latents, ldj, labels)

    def density(self, latents: tuple[Tensor, ...], ldj: Tensor, y: Tensor | None = None) -> Tensor:
        """`log_prob` of the data that `encode` has taken to these latents, with this log-determinant."""
        terms = [prior.log_prob(z) for prior, z in zip(self.split_priors, latents[:-1], strict=True)]
        return torch.stack([ldj, *terms, self.prior.log_prob(latents[-1], y)]).sum(0)

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
        latents = [
            prior.sample((n, *shape), temperature, generator, None, like)
            for prior, shape in zip(self.split_priors, split_shapes, strict=True)
        ]
        latents.append(self.prior.sample((n, *last_shape), temperature, generator, labels, like))
        return self.decode(tuple(latents), labels)

    # --- helpers --------------------------------------------------------------------------------------------------

    def _find_actnorms(self) -> list[ActNorm]:
        return [layer for layer in self.modules() if isinstance(layer, ActNorm)]

    def _check_latents(self, latents: tuple[Tensor, ...]) -> None:
        if not isinstance(latents, tuple | list) or not all(isinstance(z, Tensor) for z in latents):
            raise TypeError(f"{type(self).__name__}: latents must be a tuple of tensors, got {type(latents).__name__}")
        shapes = [tuple(z.shape[1:]) for z in latents]
        if shapes != [tuple(shape) for shape in self.latent_shapes] or len({len(z) for z in latents}) != 1:
            expected = ", ".join(str(["N", *shape]).replace("'", "") for shape in self.latent_shapes)
            got = ", ".join(str(list(z.shape)) for z in latents)
            raise ValueError(f"{type(self).__name__}: latents must be a tuple of shapes {expected}, got {got}")

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


def _varies(x: Tensor) -> bool:
    """Whether a batch is something to start from: finite, and not one example over and over. Without data, on "meta",
    nothing speaks against it, and the layers start nothing."""
    x = unwrapped(x)
    if x is None:
        return True
    finite = not x.is_floating_point() or bool(torch.isfinite(x).all())
    return finite and bool((x != x[:1]).any())


def _shared(group) -> bool:
    """Whether several ranks decide together, so that none may step aside by itself."""
    return group is not None or enclosing_ddp() is not None


def class_context(num_classes: int | None, class_features: int) -> tuple[nn.Embedding | None, int]:
    """What gives a flow its context where there are classes, and the context's size, 0 where there are none."""
    if num_classes and class_features < 1:
        raise ValueError(f"class_features must be at least 1 where there are classes, got {class_features}")
    return (nn.Embedding(num_classes, class_features), class_features) if num_classes else (None, 0)


def logit_layers(logit: float) -> list[nn.Module]:
    """What a model of images begins with where ``logit`` is above 0."""
    return [Logit(logit)] if logit else []


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
