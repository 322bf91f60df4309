"""What variational models share: bounds on log p(x) and how they are estimated, samples, reconstructions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from genkernels import losses
from genkernels._words import UsageError
from genkernels.models._model import Estimate, Model
from genkernels.models.vae.likelihoods import Likelihood
from genkernels.models.vae.posteriors import GaussianPosterior, Parameters
from genkernels.nn._modes import in_mode
from genkernels.nn.dequantize import normal

#: Held-out images are binarised by draws from this seed, the same whatever else an evaluation draws.
BINARISED = 2016
#: Decoder passes at once in an evaluation, where it is not told how many.
ROWS = 8192


class Terms(NamedTuple):
    """A bound and what it is made of, ``[N]`` each, nats; the draws' weights where there was more than one; `shares`:
    parts of the divergence by name, of models that have such."""

    bound: Tensor
    kl: Tensor
    log_likelihood: Tensor
    effective_draws: Tensor | None = None
    largest_weight: Tensor | None = None
    shares: dict[str, Tensor] | None = None


class Draws:
    """What `genkernels.losses.importance_loss` calls for log-weights, and the sums of their terms over all draws of a
    first pass.

    Args:
        model: ``model._weighed(*data, parameters, size, generator, stopped)`` gives log p(x, z) − log q(z|x)
            ``[N, size]``, the latents, and the terms to be averaged, ``[N, size]`` each; ``model._log_weight(*data)``
            makes this.
        data: tensors, or None.
    """

    #: It draws by `genkernels.nn.dequantize.normal` alone, which takes what a compiled pass has for a generator, and
    #: reads no tensors but the model's and its `data`.
    takes_stream = True

    def __init__(self, model: VariationalModel, *data: Tensor | None):
        self.model, self.data = model, data
        self.count, self.sums, self.counting = 0, [], True

    def __call__(self, parameters: Sequence[Tensor], size: int, generator: torch.Generator, stopped: bool):
        log_w, latents, terms = self.model._weighed(*self.data, parameters, size, generator, stopped)
        if self.counting:
            found = [term.detach().sum(1) for term in terms]
            self.sums = [a + b for a, b in zip(self.sums, found, strict=True)] if self.sums else found
            self.count += size
        return log_w, latents

    def means(self) -> list[Tensor]:
        """Of each term, ``[N]``; what is drawn again, going back, is not counted."""
        self.counting = False
        return [total / self.count for total in self.sums]

    def counted(self, means: list[Tensor]) -> None:
        """Takes the means of another that did the drawing."""
        self.count, self.sums = 1, means


class VariationalModel(Model):
    r"""A model with latents, :math:`p(x, z) = p(x|z)\,N(z; 0, 1)`, whose posterior an encoder approximates by q(z|x).

    Of importance weights :math:`w_i = p(x, z_i)/q(z_i|x)` of k draws from q,

    .. math:: F_k(x) = E\left[\ln \frac1k \sum_{i=1}^k w_i\right] \le F_{k+1}(x) \le \ln p(x),\qquad
        F_1(x) = E \ln p(x|z) - KL(q(z|x)\,\|\,N(0, 1)).

    Args:
        encoder: ``h = encoder(x, y)``, x a target of `likelihood`. decoder: ``decoder(z, y)`` gives the outputs that
            `likelihood` rates, z ``[M, latent]``. y is None where the model has no classes.
        posterior: `genkernels.models.vae.posteriors`. likelihood: `genkernels.models.vae.likelihoods`.
        latent: size of z. importance: k, of a bound that is not told another.
        shape, grey_levels, num_classes: as for `Model`.

    A class of one's own says in `losses` what it minimises; its parts may be any of this shape.

    Example:
        >>> import torch, genkernels as gk
        >>> from genkernels.models.vae import likelihoods, posteriors
        >>> class Net(torch.nn.Linear):
        ...     def forward(self, x, y=None):
        ...         return super().forward(x)
        >>> q = posteriors.IAFPosterior(features=8, latent=2, flows=1, width=16)
        >>> rated = likelihoods.Gaussian("Mine", (4,), None)
        >>> model = gk.models.VariationalModel(Net(4, 8), q, Net(2, rated.outputs), rated, latent=2, shape=(4,))
        >>> model.log_bound(torch.randn(3, 4), importance=10).shape
        torch.Size([3])
    """

    def __init__(
        self,
        encoder: nn.Module,
        posterior: GaussianPosterior,
        decoder: nn.Module,
        likelihood: Likelihood,
        *,
        latent: int,
        shape: tuple[int, ...],
        importance: int = 1,
        grey_levels: int | None = None,
        num_classes: int | None = None,
    ):
        super().__init__(shape, grey_levels, num_classes)
        self._check_draws(importance, None)
        self.encoder, self.posterior, self.decoder, self.likelihood = encoder, posterior, decoder, likelihood
        self.latent, self.importance = latent, importance

    # --- the bound ------------------------------------------------------------------------------------------------

    @property
    def measure(self) -> str:
        """What `cost` is called: ``bits_per_dim`` where the likelihood is one of the image's own grey levels, else
        ``nats``."""
        return {"bits/dim": "bits_per_dim", "nats": "nats"}[self.unit]

    @property
    def unit(self) -> str:
        return self.likelihood.unit

    def cost(self, bound: Tensor) -> Tensor:
        """A bound as it is judged: its negative, in `unit`."""
        return bound * -self._scale()

    def log_bound(
        self,
        x: Tensor,
        y: Tensor | None = None,
        importance: int | None = None,
        chunk: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        r"""An unbiased estimate of :math:`F_k` for each example, ``[N]`` nats, with a graph where one is recorded.

        With one draw the divergence is taken exactly where the posterior has it.

        Args:
            x: ``[N, C, H, W]`` uint8 level indices or floats in [0, 1]; or ``[N, D]``. y: ``[N]``, where the model has
                classes.
            importance: k, None: the model's own. chunk: draws that pass through the decoder at once, at most k; None:
                all of them.
            generator: of everything drawn.

        Raises:
            ValueError: a shape or a value (on the CPU). UsageError: k or `chunk`.
        """
        return self._terms_of(*self._prepared(x, y, generator), importance, chunk, generator).bound

    def log_likelihood(self, target: Tensor, z: Tensor, y: Tensor | None = None) -> Tensor:
        """log p(x|z) of each target under each of its draws z ``[N, K, latent]``, ``[N, K]`` nats."""
        draws = z.shape[1]
        labels = None if y is None else y.repeat_interleave(draws, 0)
        outputs = self.decoder(z.flatten(0, 1), labels)
        return self.likelihood.log_prob(outputs.unflatten(0, (len(z), draws)), target)

    def posterior_of(self, target: Tensor, y: Tensor | None = None) -> Parameters:
        """The parameters of q(z|x)."""
        return self.posterior(self.encoder(target.to(self._like.dtype), y))

    def _prepared(self, x: Tensor, y: Tensor | None, generator: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
        self._check_shape(x)
        return self.likelihood.target(x.to(self._like.device), generator), self._labels(y, len(x))

    def _terms_of(
        self,
        target: Tensor,
        y: Tensor | None,
        importance: int | None,
        chunk: int | None,
        generator: torch.Generator | None,
        estimator: str = "iwae",
    ) -> Terms:
        k = self.importance if importance is None else importance
        self._check_draws(k, chunk)
        parameters = self.posterior_of(target, y)
        exact = self.posterior.kl(parameters).sum(1) if self.posterior.has_kl else None
        if k == 1 and estimator == "iwae":
            z, ratio = self.posterior.draw(parameters, self._noise(len(target), 1, generator))
            log_likelihood, kl = self.log_likelihood(target, z, y).squeeze(1), -ratio.squeeze(1)
            kl = kl if exact is None else exact
            return Terms(log_likelihood - kl, kl, log_likelihood)

        draws = self._log_weight(target, y)
        options = {"k": k, "chunk": chunk, "estimator": estimator, "generator": generator}
        found = losses.importance_loss(parameters, draws, **options)
        log_likelihood, ratio = draws.means()
        kl = -ratio if exact is None else exact.detach()
        return Terms(found.bound, kl, log_likelihood, found.effective_sample_size, found.largest_weight)

    def _log_weight(self, target: Tensor, y: Tensor | None) -> Draws:
        """What draws latents of these targets and rates them."""
        return Draws(self, target, y)

    def _weighed(self, target: Tensor, y: Tensor | None, parameters, size: int, generator, stopped: bool):
        """See `Draws`."""
        noise = self._noise(len(target), size, generator)
        z, ratio = self.posterior.draw(parameters, noise, stopped)
        log_likelihood = self.log_likelihood(target, z, y)
        return log_likelihood + ratio, self.posterior.ways(z, ratio), (log_likelihood, ratio)

    def _noise(self, count: int, draws: int, generator: torch.Generator | None) -> Tensor:
        return normal((count, draws, self.latent), self._like.dtype, self._like.device, generator)

    def _scale(self) -> float:
        return 1 / (self.dim * math.log(2)) if self.unit == "bits/dim" else 1.0

    @torch.no_grad()
    def begin(self, x: Tensor, y: Tensor) -> None:
        """Sets the decoder's last bias so that it begins at the mean of binary data (as Burda et al. 2016): from 0 the
        first thousand steps go into little else. At other images' mean and spread, a channel's: a decoder that knows
        of neither learns them through z, which the posterior makes ever larger, until the loss, the divergence among
        it, jumps up. Points, whose spread a few steps learn, begin as they are."""
        self._check_shape(x)
        layers = [m for m in self.decoder.modules() if isinstance(m, nn.Linear | nn.Conv2d) and m.bias is not None]
        if not layers:
            return
        bias, outputs = layers[-1].bias, self.likelihood.outputs
        pixels = self.dim // self.shape[0]
        if bias.numel() not in (outputs, outputs * pixels):
            return
        start = self.likelihood.start(x.to(self._like.device), each_pixel=bias.numel() != outputs)
        if start is not None:
            bias.copy_(start.expand(-1, *self.shape[1:]).flatten() if bias.numel() != outputs else start.flatten())

    # --- judgement, samples, pictures -----------------------------------------------------------------------------

    def evaluate(
        self, batches: Iterable[tuple[Tensor, Tensor]], importance: int | None = None, chunk: int | None = None
    ) -> dict[str, Estimate]:
        """The negative bound, in nats or bits/dim, and its terms in nats; in evaluation mode, without a graph. Images
        are binarised by draws of their own, so that every evaluation is of the same data.

        Args:
            batches: ``(x, y)``. importance: k, None: the model's own. chunk: draws that pass through the decoder at
                once, at most k; None: as many as make a few thousand rows.

        Returns:
            The bound first. ``kl``: of q from the prior. ``reconstruction``: −E log p(x|z). Each level's ``kl_…`` of
            models with levels. With k > 1 also
            ``effective_draws``, 1 / Σ w̃², of the k, and ``largest_weight``, % of all: where one draw has most of the
            weight, the estimate is still far below ln p(x).
        """
        k = self.importance if importance is None else importance
        self._check_draws(k, chunk)
        binarised = torch.Generator().manual_seed(BINARISED)
        found: list[tuple[Tensor, ...]] = []
        with in_mode(self, training=False), torch.no_grad():
            for x, y in batches:
                size = chunk or min(k, max(1, ROWS // max(len(x), 1)))
                terms = self._terms_of(*self._prepared(x, y, binarised), importance, size, None)
                row = [self.cost(terms.bound), terms.kl, -terms.log_likelihood]
                row += (terms.shares or {}).values()
                if k > 1:
                    row += [terms.effective_draws, 100 * terms.largest_weight]
                found.append(tuple(row))
        names = [(self.measure, self.unit), ("kl", "nats"), ("reconstruction", "nats")]
        names += [(name, "nats") for name in self._shares()]
        names += [("effective_draws", f"of {k}"), ("largest_weight", "%")] if k > 1 else []
        columns = [torch.cat(column) for column in zip(*found, strict=True)] or [torch.empty(0)] * len(names)
        return {
            name: Estimate.of(name, unit, column, lower_is_better=name != "effective_draws")
            for (name, unit), column in zip(names, columns, strict=True)
        }

    @torch.no_grad()
    def sample(
        self,
        n: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        y: Tensor | int | None = None,
        mean: bool | None = None,
    ) -> Tensor:
        """Latents from the prior through the decoder, in evaluation mode and without a graph.

        Args:
            n: how many; 0 gives an empty tensor.
            temperature: standard deviation of z.
            generator: of everything random, on any device.
            y: class indices ``[n]``, or one for all; None draws them evenly where the model has classes.
            mean: E[x|z] instead of a draw from p(x|z), whose pixels are independent; None: of images, whose noise would
                hide what was learnt, and not of points.

        Returns:
            ``[n, *shape]``: images as floats in [0, 1], points and images without grey levels as they come.
        """
        self._check_sample(n, temperature, generator)
        labels = self._drawn_labels(y, n, generator)
        with in_mode(self, training=False):
            z = temperature * self._noise(n, 1, generator).squeeze(1)
            outputs = self.decoder(z, labels)
            if len(self.shape) == 3 if mean is None else mean:
                return self.likelihood.mean(outputs)
            return self.likelihood.draw(outputs, generator)

    @torch.no_grad()
    def reconstruct(
        self, x: Tensor, y: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Examples as they are rated, binarised ones as drawn, and E[x|z] at the latents that their posteriors give
        without noise; both ``[N, *shape]``, images as floats in [0, 1]."""
        target, labels = self._prepared(x, y, generator)
        with in_mode(self, training=False):
            z = self.posterior.mean(self.posterior_of(target, labels))
            return self.likelihood.shown(target), self.likelihood.mean(self.decoder(z, labels))

    def pictures(self, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """``reconstructions``: each image, as it is rated, beside the decoder's mean; none of points."""
        if len(self.shape) == 1:
            return {}
        return {"reconstructions": torch.cat(self.reconstruct(x, y, generator), 3)}

    def report(self, x: Tensor, y: Tensor) -> list[str]:
        """How many latents the encoder uses: whose mean varies between the examples by more than a hundredth (Burda et
        al. 2016)."""
        with torch.no_grad():
            target, labels = self._prepared(x, y, torch.Generator().manual_seed(BINARISED))
            means = self.posterior.mean(self.posterior_of(target, labels))
        active = int((means.double().var(0, unbiased=False) > 0.01).sum())
        return [f"{active} of {self.latent} latents are active, on {len(x)} examples"]

    # --- helpers --------------------------------------------------------------------------------------------------

    def _shares(self) -> tuple[str, ...]:
        """Names of the parts of the divergence that `_terms_of` gives."""
        return ()

    def _check_draws(self, importance: int, chunk: int | None) -> None:
        name = type(self).__name__
        if isinstance(importance, bool) or not isinstance(importance, int) or importance < 1:
            what = "importance, the number of draws, must be an integer of at least 1"
            raise UsageError(f"{name}: {what}, got {importance!r}")
        if chunk is not None and (
            isinstance(chunk, bool) or not isinstance(chunk, int) or not 1 <= chunk <= importance
        ):
            what = f"chunk must be an integer from 1 to importance, {importance}"
            raise UsageError(f"{name}: {what}, got {chunk!r}")
