"""Variational autoencoders with levels of latents on grids of growing resolution; PixelVAE, whose last level is a
PixelCNN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from genkernels import losses
from genkernels._words import UsageError, nearest
from genkernels.losses import Estimator
from genkernels.models._model import Preset
from genkernels.models.vae.base import Terms, VariationalModel
from genkernels.models.vae.grids import BottomUp, Drawn, Residual, TopDown, rising
from genkernels.models.vae.likelihoods import Likelihood
from genkernels.models.vae.likelihoods import likelihood as likelihood_of
from genkernels.models.vae.pixelcnn import PixelCNNLikelihood
from genkernels.nn._modes import in_mode

#: Nats without which the top level, which the lower ones can do without, falls out of use.
_FREE_BITS = 4.0
_SIZES = {
    "digits": {"shape": (1, 8, 8), "grey_levels": 17, "strides": (8, 2), "latent": (16, 2), "width": 32},
    "photos32": {"shape": (3, 32, 32), "strides": (32, 8), "latent": (32, 8), "width": 48},
    "photos64": {"shape": (3, 64, 64), "strides": (64, 8), "latent": (32, 8), "width": 48},
}


class HierarchicalVAE(VariationalModel):
    r"""Levels of latents, drawn from the top down in encoding as in sampling:

    .. math:: \ln p(x) \ge E \ln p(x|z_1) - \sum_l E\,KL\bigl(q(z_l \mid x, z_{>l})\,\|\,p(z_l \mid z_{>l})\bigr)

    The top level's prior is N(0, 1); each other level's is autoregressive over its 2-D grid, row by row, given the
    levels above. The divergence of a cell, given the cells before it, is taken in closed form.

    Args:
        shape: ``(C, H, W)``.
        strides: pixels a side of a latent's cell, one a level, top first: (64, 8) of 64×64 images are grids of 1×1 and
            8×8. Each divides the one before it, H and W.
        latent: channels of each level. width: channels of the networks.
        autoregressive: whether a grid's cells see those before them in the prior. prior_layers: masked convolutions of
            such a prior, after the first.
        likelihood: as for `VAE`.
        importance: k, the draws of the bound that is maximised. chunk, estimator: as for `IWAE`; ``dreg``, ``stl`` and
            ``piwae`` cannot be had, the levels' densities hanging on one another.
        kl_warmup: steps over which the divergences' weight rises linearly to 1; 0: none. One draw only.
        free_bits: nats that each level's divergence, its mean over the batch, may have for nothing. One draw only.
        grey_levels: how many values a pixel can take, None for images of real numbers.
        num_classes: give the top of decoder and posterior the class y.

    Attributes:
        names: of the levels, ``1x1``, ``8x8``, top first: of their divergences (``kl_1x1``), and for `sample`.

    Example:
        >>> import torch, genkernels as gk
        >>> model = gk.models.HierarchicalVAE.from_preset("digits", width=8)
        >>> model.names, model.sample(2, resample="4x4").shape
        (('1x1', '4x4'), torch.Size([2, 1, 8, 8]))

    Source: Sønderby et al., "Ladder variational autoencoders", 2016 (top-down posteriors); Gulrajani et al.,
    "PixelVAE", 2017 (autoregressive priors of latents); Child, "Very deep VAEs", 2021.
    """

    takes = ("images",)
    presets: ClassVar = {name: Preset({**sizes, "free_bits": _FREE_BITS}) for name, sizes in _SIZES.items()}

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        strides: tuple[int, ...] = (8, 2),
        latent: tuple[int, ...] = (16, 2),
        width: int = 32,
        autoregressive: bool = True,
        prior_layers: int = 1,
        likelihood: str | None = None,
        importance: int = 1,
        chunk: int | None = None,
        estimator: str = "iwae",
        kl_warmup: int = 0,
        free_bits: float = 0.0,
        grey_levels: int | None = 256,
        num_classes: int | None = None,
    ):
        name = type(self).__name__
        rated = likelihood_of(name, likelihood, shape, grey_levels)
        sizes = {"strides": strides, "latent": latent, "width": width}
        prior = {"autoregressive": autoregressive, "prior_layers": prior_layers}
        data = {"shape": shape, "grey_levels": grey_levels, "num_classes": num_classes}
        super().__init__(*_parts(name, rated, **sizes, **prior, **data), rated, latent=0, **data)
        self._settle(importance, chunk, estimator, kl_warmup, free_bits)

    def _settle(self, importance: int, chunk: int | None, estimator: str, kl_warmup: int, free_bits: float) -> None:
        who = type(self).__name__
        self._check_draws(importance, chunk)
        chosen = Estimator.parse(estimator)
        chosen.check_k(who, importance)
        if chosen.name in ("dreg", "stl", "piwae", "vimco"):
            raise ValueError(
                f"{who}: estimator must be iwae, miwae or ciwae, for each level's density hangs on the levels above, "
                f"and dreg's generalised form (Bauer and Mnih, 2021) is not offered, got {estimator}"
            )
        if free_bits < 0:
            raise ValueError(f"{who}: free_bits must be at least 0, got {free_bits}")
        if importance > 1 and (kl_warmup or free_bits):
            raise ValueError(
                f"{who}: kl_warmup and free_bits must be 0 where importance is not 1, got {kl_warmup} and {free_bits:g}"
            )
        self.importance, self.chunk, self.estimator = importance, chunk, estimator
        self.kl_warmup, self.free_bits = kl_warmup, free_bits
        self.names = tuple(f"{height}x{width}" for height, width in self.posterior.grids)
        self.latent = sum(c * h * w for c, (h, w) in zip(self.posterior.channels, self.posterior.grids, strict=True))

    # --- the bound ------------------------------------------------------------------------------------------------

    def losses(self, player: str, x: Tensor, y: Tensor, step: int) -> dict[str, Tensor]:
        """``loss``: what is minimised, in nats or bits/dim. In nats: ``bound`` and its terms, ``reconstruction``,
        ``kl``, and each level's share of it. Of k draws also ``effective_draws`` and ``largest_weight``, %."""
        weight = min(1.0, (step + 1) / self.kl_warmup) if self.kl_warmup else 1.0
        return self._shown_terms(x, y, None, weight)

    def loss(self, x: Tensor, y: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """What training minimises once the warm-up is over."""
        return self._shown_terms(x, y, generator, 1.0)["loss"]

    def _shown_terms(self, x: Tensor, y: Tensor | None, generator: torch.Generator | None, weight: float):
        terms = self._terms_of(*self._prepared(x, y, generator), None, self.chunk, generator, self.estimator)
        each = {name: kl.mean() for name, kl in terms.shares.items()}
        found = {"kl": terms.kl, "reconstruction": -terms.log_likelihood}
        if self.importance == 1:
            paid = sum(kl.clamp(min=self.free_bits) if self.free_bits else kl for kl in each.values())
            loss = (weight * paid - terms.log_likelihood.mean()) * self._scale()
        else:
            loss = self.cost(terms.bound).mean()
            found |= {"effective_draws": terms.effective_draws, "largest_weight": 100 * terms.largest_weight}
        means = {name: term.detach().mean() for name, term in ({"bound": terms.bound} | found).items()}
        return {"loss": loss, **means, **{name: kl.detach() for name, kl in each.items()}}

    def _terms_of(self, target, y, importance, chunk, generator, estimator: str = "iwae") -> Terms:
        k = self.importance if importance is None else importance
        self._check_draws(k, chunk)
        if k == 1:
            drawn, log_likelihood = self._draws(target, y, self._encoded(target), 1, generator)
            shares = dict(zip(self._shares(), drawn.kl, strict=True))
            kl = sum(drawn.kl)
            return Terms(log_likelihood.squeeze(1) - kl, kl, log_likelihood.squeeze(1), shares=shares)

        draws = self._log_weight(target, y)
        options = {"k": k, "chunk": chunk, "estimator": estimator, "generator": generator}
        found = losses.importance_loss(tuple(self._encoded(target)), draws, **options)
        log_likelihood, *each = draws.means()
        shares = dict(zip(self._shares(), each, strict=True))
        return Terms(found.bound, sum(each), log_likelihood, found.effective_sample_size, found.largest_weight, shares)

    def _weighed(self, target: Tensor, y: Tensor | None, encoded, size: int, generator, stopped: bool):
        drawn, log_likelihood = self._draws(target, y, encoded, size, generator)
        rows = log_likelihood.shape
        ratio = (sum(drawn.log_prior) - sum(drawn.log_posterior)).view(rows)
        terms = (log_likelihood, *(kl.view(rows) for kl in drawn.kl))
        return log_likelihood + ratio, tuple(z.unflatten(0, rows) for z in drawn.latents), terms

    def _shares(self) -> tuple[str, ...]:
        return tuple(f"kl_{name}" for name in self.names)

    def _encoded(self, target: Tensor) -> list[Tensor]:
        return self.encoder(target.to(self._like.dtype))

    def _draws(
        self, target: Tensor, y: Tensor | None, encoded: Sequence[Tensor], k: int, generator: torch.Generator | None
    ) -> tuple[Drawn, Tensor]:
        """k draws of each example's latents, an example's one after the other, and ``log p(x|z)``, ``[N, k]``."""
        count = len(target) * k
        if k > 1:
            encoded = [h.repeat_interleave(k, 0) for h in encoded]
            y = None if y is None else y.repeat_interleave(k, 0)
        drawn = self.posterior(count, self._noises(count, generator), y, encoded)
        outputs = self.decoder(drawn.features).unflatten(0, (len(target), k))
        return drawn, self.likelihood.log_prob(outputs, target)

    def _noises(self, count: int, generator: torch.Generator | None) -> list[Tensor]:
        """Standard normal, a tensor a level; one draw, so that a level more leaves those above as they are."""
        return self.as_levels(self._noise(count, 1, generator).squeeze(1))

    def as_levels(self, flat: Tensor) -> list[Tensor]:
        """All latents of an example in a row, ``[N, latent]``, as those of each level, ``[N, channels, h, w]``, top
        first."""
        shapes = [(c, *grid) for c, grid in zip(self.posterior.channels, self.posterior.grids, strict=True)]
        parts = flat.split([math.prod(shape) for shape in shapes], 1)
        return [part.view(len(flat), *shape) for part, shape in zip(parts, shapes, strict=True)]

    @torch.no_grad()
    def begin(self, x: Tensor, y: Tensor) -> None:
        """As `VariationalModel.begin`, of binary data alone: here every level's posterior begins at the prior, whatever
        the data are, and does not stand in for the bias."""
        if self.likelihood.kind == "bernoulli":
            super().begin(x, y)

    # --- latents, samples, pictures -------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, x: Tensor, y: Tensor | None = None, generator: torch.Generator | None = None) -> list[Tensor]:
        """A draw of the latents of examples from their posteriors, ``[N, channels, h, w]`` a level, top first; in
        evaluation mode and without a graph."""
        target, labels = self._prepared(x, y, generator)
        with in_mode(self, training=False):
            noises = self._noises(len(target), generator)
            return self.posterior(len(target), noises, labels, self._encoded(target)).latents

    @torch.no_grad()
    def log_prior(self, latents: Sequence[Tensor], y: Tensor | None = None) -> list[Tensor]:
        """log p(z_l | z_>l) of given latents, ``[N]`` nats a level, top first."""
        self._check_latents(latents)
        count = len(latents[0])
        with in_mode(self, training=False):
            return self.posterior(count, latents, self._labels(y, count), held=latents).log_prior

    @torch.no_grad()
    def sample(
        self,
        n: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        y: Tensor | int | None = None,
        mean: bool | None = None,
        resample: str | None = None,
    ) -> Tensor:
        """Latents from the prior, level by level, through the decoder; in evaluation mode and without a graph.

        Args:
            n, generator, y: as for `VAE.sample`. temperature: standard deviation of every level's noise.
            mean: E[x|z] instead of a draw from p(x|z); None: the mean, but for a decoder whose pixels see one another,
                where only a draw looks like anything.
            resample: the levels that are drawn anew for each of the n samples, ``8x8+pixelcnn``, while those above are
                drawn once, the same for all; None: all levels.

        Returns:
            ``[n, C, H, W]``, floats in [0, 1] where the images have grey levels.

        Raises:
            UsageError: `resample` names no level, or levels that are not the lowest ones.
        """
        self._check_sample(n, temperature, generator)
        labels = self._drawn_labels(y, n, generator)
        held_levels = len(self.names) - self._resampled(resample)
        with in_mode(self, training=False):
            held: list[Tensor | None] = [None] * len(self.names)
            if resample is not None and n:
                one = None if labels is None else labels[:1]
                latents = self.posterior(1, [temperature * e for e in self._noises(1, generator)], one).latents
                held[:held_levels] = [z.expand(n, -1, -1, -1) for z in latents[:held_levels]]
            noises = [temperature * each for each in self._noises(n, generator)]
            drawn = self.posterior(n, noises, labels, held=held)
            return self._shown(self.decoder(drawn.features), mean, generator)

    @torch.no_grad()
    def resample(
        self,
        x: Tensor,
        levels: str,
        y: Tensor | None = None,
        generator: torch.Generator | None = None,
        mean: bool | None = None,
    ) -> Tensor:
        """Examples with their lowest levels drawn anew from the prior, those above held at a draw of the posterior:
        ``[N, C, H, W]``, as `sample`, whose `resample` is `levels`."""
        drawn_anew = self._resampled(levels)
        latents = self.encode(x, y, generator)
        labels = self._labels(y, len(x))
        with in_mode(self, training=False):
            held = [*latents[: len(latents) - drawn_anew], *[None] * drawn_anew]
            drawn = self.posterior(len(x), self._noises(len(x), generator), labels, held=held)
            return self._shown(self.decoder(drawn.features), mean, generator)

    @torch.no_grad()
    def reconstruct(
        self, x: Tensor, y: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Examples as the encoder sees them, and what the decoder makes of the latents that their posteriors give
        without noise; both ``[N, C, H, W]``, images as floats in [0, 1]."""
        target, labels = self._prepared(x, y, generator)
        with in_mode(self, training=False):
            still = [torch.zeros_like(each) for each in self._noises(len(target), generator)]
            drawn = self.posterior(len(target), still, labels, self._encoded(target))
            return self.likelihood.shown(target), self._shown(self.decoder(drawn.features), None, generator)

    def pictures(self, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """``reconstructions``: each image beside its reconstruction. ``resampled-LEVELS``: four times beside each image
        of the first few, the levels below drawn anew."""
        sheets = {"reconstructions": torch.cat(self.reconstruct(x, y, generator), 3)}
        few, few_y = x[:8], y[:8]
        for first in range(1, len(self._all_names())):
            levels = "+".join(self._all_names()[first:])
            seen = self.reconstruct(few, few_y, generator)[0]
            drawn = [self.resample(few, levels, few_y, generator) for _ in range(4)]
            sheets[f"resampled-{levels}"] = torch.cat([seen, *drawn], 3)
        return sheets

    def report(self, x: Tensor, y: Tensor) -> list[str]:
        return []

    # --- helpers --------------------------------------------------------------------------------------------------

    def _all_names(self) -> tuple[str, ...]:
        """Levels that can be drawn anew, top first."""
        return self.names

    def _resampled(self, resample: str | None) -> int:
        """How many levels of latents, from below, a word means."""
        names = self._all_names()
        if resample is None:
            return len(self.names)
        wanted = resample.split("+") if isinstance(resample, str) else [resample]
        who = f"{type(self).__name__}: resample"
        for each in wanted:
            if each not in names:
                hint = nearest(str(each), names, listed=True)
                raise UsageError(f"{who} must name levels of {', '.join(names)}, joined by +, got {each!r}{hint}")
        if sorted(wanted) != sorted(names[len(names) - len(wanted) :]):
            lowest = "+".join(names[len(names) - len(wanted) :])
            raise UsageError(
                f"{who} must name the lowest levels, as {lowest}, for they hang on those above, got {resample}"
            )
        return len(wanted) - (len(names) - len(self.names))

    def _shown(self, outputs: Tensor, mean: bool | None, generator: torch.Generator | None) -> Tensor:
        if mean is None:
            mean = self.likelihood.kind != PixelCNNLikelihood.kind
        return self.likelihood.mean(outputs) if mean else self.likelihood.draw(outputs, generator)

    def _check_latents(self, latents: Sequence[Tensor]) -> None:
        expected = [[c, *grid] for c, grid in zip(self.posterior.channels, self.posterior.grids, strict=True)]
        got = [list(z.shape[1:]) for z in latents]
        if got != expected or len({len(z) for z in latents}) != 1:
            raise ValueError(
                f"{type(self).__name__}: latents must be [N, ...] of {expected}, top first, got "
                f"{[list(z.shape) for z in latents]}"
            )


class PixelVAE(HierarchicalVAE):
    r"""Levels of latents whose decoder is a PixelCNN: what is far apart hangs together by the latents, what is near by
    the pixels themselves.

    .. math:: p(x) = \int p(z) \prod_i p(x_i \mid x_{<i}, f(z))\,dz

    Args:
        shape, strides, latent, width, autoregressive, prior_layers: as for `HierarchicalVAE`.
        importance, chunk, estimator, kl_warmup, free_bits, grey_levels, num_classes: as for `HierarchicalVAE`; the
            names of the levels end with ``pixelcnn``, the lowest.
        pixel_width, pixel_layers: of the PixelCNN. receptive: how many pixels to either side, and rows above, a pixel
            sees: 3 of its first layer and one more of each other; None: what the layers give. Few leave more to the
            latents, a lossy code of the image (Chen et al. 2017).
        head, mixtures: as for `GatedPixelCNN`.

    Samples take none of the naive loop's passes, one of a prior for each cell and one of the PixelCNN for each pixel:
    the cells are drawn in waves, the pixels by `genkernels.ops.autoregressive_sampling`. Beside that loop (``genkernels
    bench autoregressive_sampling``, the same images) one photograph of 32×32 comes 370 times as fast, on one core that
    had others' work too; one of 64×64, by the same case at that preset, whose loop takes more than a minute, 1,900.
    Sixteen digits come 19 times as fast: of their 64 pixels it could be no more than 64 times, were a single pass all
    that there is to do, and one pass of levels, decoder and PixelCNN takes half of what they take.

    Example:
        >>> import torch, genkernels as gk
        >>> model = gk.models.PixelVAE.from_preset("digits", width=8, pixel_width=8)
        >>> model.sample(2, resample="pixelcnn").shape
        torch.Size([2, 1, 8, 8])

    Source: Gulrajani et al., "PixelVAE: a latent variable model for natural images", 2017; Chen et al., "Variational
    lossy autoencoder", 2017.
    """

    presets: ClassVar = {
        name: Preset({**_SIZES[name], "free_bits": _FREE_BITS, **pixels})
        for name, pixels in (
            ("digits", {"pixel_width": 24, "pixel_layers": 1}),
            ("photos32", {"pixel_width": 32, "pixel_layers": 2, "head": "logistic_mixture"}),
            ("photos64", {"pixel_width": 32, "pixel_layers": 2, "head": "logistic_mixture"}),
        )
    }

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        strides: tuple[int, ...] = (8, 2),
        latent: tuple[int, ...] = (16, 2),
        width: int = 32,
        autoregressive: bool = True,
        prior_layers: int = 1,
        pixel_width: int = 24,
        pixel_layers: int = 2,
        receptive: int | None = None,
        head: str = "categorical",
        mixtures: int = 5,
        importance: int = 1,
        chunk: int | None = None,
        estimator: str = "iwae",
        kl_warmup: int = 0,
        free_bits: float = 0.0,
        grey_levels: int = 256,
        num_classes: int | None = None,
    ):
        name = type(self).__name__
        first, layers = _reach(name, receptive, pixel_layers)
        network = {"width": pixel_width, "layers": layers, "first_kernel": first, "head": head, "mixtures": mixtures}
        rated = PixelCNNLikelihood(name, shape, grey_levels, features=width, **network)
        sizes = {"strides": strides, "latent": latent, "width": width}
        prior = {"autoregressive": autoregressive, "prior_layers": prior_layers}
        data = {"shape": shape, "grey_levels": grey_levels, "num_classes": num_classes}
        VariationalModel.__init__(self, *_parts(name, rated, **sizes, **prior, **data), rated, latent=0, **data)
        self._settle(importance, chunk, estimator, kl_warmup, free_bits)

    def _all_names(self) -> tuple[str, ...]:
        return (*self.names, PixelCNNLikelihood.kind)


def _reach(name: str, receptive: int | None, layers: int) -> tuple[int, int]:
    """The first kernel and the number of further 3×3 layers of a network that sees `receptive` pixels around."""
    if receptive is None:
        return 7, layers
    if receptive < 1:
        raise ValueError(f"{name}: receptive must be at least 1 pixel, got {receptive}")
    first = min(3, receptive)
    return 2 * first + 1, min(layers, receptive - first)


def _parts(
    name: str,
    rated: Likelihood,
    *,
    shape,
    strides,
    latent,
    width,
    autoregressive,
    prior_layers,
    grey_levels,
    num_classes,
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Encoder, levels and decoder of a model of these sizes."""
    grids = _grids(name, shape, strides)
    if len(latent) != len(strides):
        raise ValueError(f"{name}: latent must have one number of channels a level, {len(strides)}, got {latent}")
    if width < 1 or not all(latent):
        raise ValueError(f"{name}: width and latent must be at least 1, got {width} and {latent}")
    encoder = BottomUp(shape[0], width, shape[1:], grids)
    top_down = TopDown(grids, latent, width, prior_layers, autoregressive, num_classes)
    last: list[nn.Module] = [nn.SiLU(), nn.Conv2d(width, rated.outputs, 3, padding=1)]
    if isinstance(rated, PixelCNNLikelihood):
        # else the first steps of Adam drive the features up a hundredfold, and the gates are shut or open for good
        last.append(nn.GroupNorm(1, rated.outputs))
    return encoder, top_down, nn.Sequential(rising(width, width, strides[-1]), Residual(width), *last)


def _grids(name: str, shape: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    if len(shape) != 3:
        raise ValueError(f"{name}: shape must be (C, H, W), its latents lie on grids, got {tuple(shape)}")
    if not strides or not all(strides):
        raise ValueError(f"{name}: strides must be pixels a side of a cell, one of each level, got {tuple(strides)}")
    for above, below in zip(strides[:-1], strides[1:], strict=True):
        if above % below or above == below:
            raise ValueError(f"{name}: strides must each divide the one before, got {tuple(strides)}")
    for stride in strides:
        if shape[1] % stride or shape[2] % stride:
            raise ValueError(
                f"{name}: strides must divide the image's height and width, {shape[1]} and {shape[2]}, got {stride}"
            )
    return [(shape[1] // stride, shape[2] // stride) for stride in strides]
