"""The variational autoencoder: a bound by one draw, its divergence in closed form."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from genkernels.models._model import Preset
from genkernels.models.vae.base import VariationalModel
from genkernels.models.vae.likelihoods import likelihood as likelihood_of
from genkernels.models.vae.networks import networks
from genkernels.models.vae.posteriors import posterior as posterior_of

_SIZES = {
    "points": {"shape": (2,), "latent": 2, "width": 64, "depth": 2},
    "digits": {"shape": (1, 8, 8), "grey_levels": 17, "latent": 16, "network": "mlp", "width": 200, "depth": 2},
    "photos32": {"shape": (3, 32, 32), "latent": 64, "width": 32},
    # Burda et al. 2016, one stochastic layer
    "mnist": {
        "shape": (1, 28, 28),
        "likelihood": "bernoulli",
        "latent": 50,
        "network": "mlp",
        "width": 200,
        "depth": 2,
    },
}
#: Adam moves by the gradient's sign more than by its size, which is hundreds of nats at first: nothing is clipped.
_TRAINING = {"clip": 0.0}
#: Burda et al.: batches of 20, steps of 0.001 from the first on; theirs fall in eight stairs to 0.0001.
_BURDA = {"batch_size": 20, "warmup": 0, "ema": 0.0, "schedule": "cosine", **_TRAINING}
#: From the 4,096 features of a photograph one of Adam's steps moves a log-scale of the posterior by whole units. One
#: batch whose divergence shoots up led to the next: unclipped, three of four runs were at infinity within 400 steps.
#: These are clipped as `TrainConfig` has it.
_OWN = {"mnist": _BURDA, "photos32": {}}
PRESETS = {name: Preset(sizes, _OWN.get(name, _TRAINING)) for name, sizes in _SIZES.items()}


class VAE(VariationalModel):
    r"""Variational autoencoder: maximises :math:`F_1 = E \ln p(x|z) - KL(q(z|x)\,\|\,p(z))`, with one draw an example.

    The divergence of the factored Gaussian is taken in closed form, that of posteriors with flows from the draw.

    Args:
        shape: ``(C, H, W)`` or ``(D,)``.
        likelihood: of the decoder: ``bernoulli`` (images, binarised anew in each step), ``gaussian`` (points, and
            images, dequantised) or ``logistic`` (images of 1 or 3 channels, at their grey levels); None: ``logistic``
            where the data allow it, else ``gaussian``.
        posterior: ``gaussian``, ``planar``, ``radial`` or ``iaf``. flows: how many, of the last three; 0 of them is
            ``gaussian``.
        latent: size of z.
        network: ``mlp``, hidden layers with tanh, or ``conv``, which halves an image and doubles it again; None:
            ``conv`` for images. width: units of a hidden layer, channels at full resolution; also the units of the
            networks of ``iaf``. depth: hidden layers of ``mlp``.
        kl_warmup: steps over which the divergence's weight rises linearly to 1; 0: none.
        free_bits: nats that each latent's divergence, its mean over the batch, may have for nothing, so that latents do
            not fall out of use early in training; with flows, whose divergence is not known latent by latent, `latent`
            times that of them all.
        grey_levels: how many values a pixel can take, None for images of real numbers. Images only.
        num_classes: give encoder and decoder the class y. class_features: size of its embeddings.

    Example:
        >>> import torch, genkernels as gk
        >>> model = gk.models.VAE(shape=(4,), latent=2, width=8)
        >>> model.loss(torch.randn(3, 4)).shape, model.log_bound(torch.randn(3, 4), importance=50).shape
        (torch.Size([]), torch.Size([3]))

    Source: Kingma and Welling, "Auto-encoding variational Bayes", 2014; Rezende et al., "Stochastic backpropagation and
    approximate inference in deep generative models", 2014. Warm-up: Sønderby et al., "Ladder variational autoencoders",
    2016. Free bits: Kingma et al., "Improving variational inference with inverse autoregressive flow", 2016. The preset
    ``mnist`` is the network of Burda et al., "Importance weighted autoencoders", 2016, one stochastic layer, with its
    batches of 20 and Adam at 0.001; the paper lets that fall in eight stairs to 0.0001 within 3,280 passes (here it
    falls along a cosine to 0 within the run), and has Adam's ε at 1e-4.
    """

    presets: ClassVar = PRESETS

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        likelihood: str | None = None,
        posterior: str = "gaussian",
        flows: int = 4,
        latent: int = 32,
        network: str | None = None,
        width: int = 64,
        depth: int = 2,
        kl_warmup: int = 0,
        free_bits: float = 0.0,
        grey_levels: int | None = 256,
        num_classes: int | None = None,
        class_features: int = 16,
    ):
        if free_bits < 0:
            raise ValueError(f"VAE: free_bits must be at least 0, got {free_bits}")
        super().__init__(
            *parts("VAE", **sizes_of(locals())),
            latent=latent,
            shape=shape,
            grey_levels=grey_levels,
            num_classes=num_classes,
        )
        self.kl_warmup, self.free_bits = kl_warmup, free_bits

    def losses(self, player: str, x: Tensor, y: Tensor, step: int) -> dict[str, Tensor]:
        """``loss``: what is minimised, in nats or bits/dim. In nats: ``bound``, F₁ itself, and its terms ``kl`` and
        ``reconstruction``, −E ln p(x|z)."""
        weight = min(1.0, (step + 1) / self.kl_warmup) if self.kl_warmup else 1.0
        return self._minimised(x, y, None, weight)

    def loss(self, x: Tensor, y: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """What training minimises once the warm-up is over."""
        return self._minimised(x, y, generator, 1.0)["loss"]

    def _minimised(self, x: Tensor, y: Tensor | None, generator: torch.Generator | None, weight: float):
        target, labels = self._prepared(x, y, generator)
        parameters = self.posterior_of(target, labels)
        z, ratio = self.posterior.draw(parameters, self._noise(len(target), 1, generator))
        reconstruction = -self.log_likelihood(target, z, labels).mean()
        if self.posterior.has_kl:
            each = self.posterior.kl(parameters).mean(0)  # of each latent
            kl, paid = each.sum(), each.clamp(min=self.free_bits).sum()
        else:
            kl = -ratio.mean()
            paid = kl.clamp(min=self.free_bits * self.latent)
        loss = (reconstruction + weight * (paid if self.free_bits else kl)) * self._scale()
        kl, reconstruction = kl.detach(), reconstruction.detach()
        return {"loss": loss, "bound": -kl - reconstruction, "kl": kl, "reconstruction": reconstruction}


def parts(name: str, *, shape, likelihood, posterior, flows, latent, network, width, depth, **data):
    """Encoder, posterior, decoder and likelihood of a model of these sizes, as `VAE` has them; data: ``grey_levels``,
    ``num_classes``, ``class_features``."""
    rated = likelihood_of(name, likelihood, shape, data.pop("grey_levels"))
    sizes = {"shape": shape, "latent": latent, "network": network, "width": width, "depth": depth}
    encoder, decoder = networks(name, outputs=rated.outputs, **sizes, **data)
    # last: with 0 flows all weights are those of the plain model of the same seed
    return encoder, posterior_of(name, posterior, encoder.features, latent, flows, width), decoder, rated


def sizes_of(arguments: dict) -> dict:
    """Those of a constructor's arguments that `parts` takes."""
    names = "shape likelihood posterior flows latent network width depth grey_levels num_classes class_features"
    return {name: arguments[name] for name in names.split()}
