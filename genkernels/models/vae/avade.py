"""AV-ADE: a variational autoencoder whose Gaussian lies in a flow's feature space, trained by likelihood and against a
critic (Lucas 2019); and the four models that leave parts of it out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from genkernels import losses, metrics
from genkernels._words import nearest
from genkernels.models._model import Estimate, Player, Preset
from genkernels.models.flows.nets import ConvNet
from genkernels.models.gan.backbones import Critic, conv_critic
from genkernels.models.gan.base import PROJECTIONS, scaled, shown
from genkernels.models.vae.base import VariationalModel
from genkernels.models.vae.likelihoods import Gaussian
from genkernels.models.vae.networks import networks
from genkernels.models.vae.posteriors import GaussianPosterior
from genkernels.nn import AffineCoupling, FlowSequential, InvertibleConv1x1, Squeeze
from genkernels.nn._modes import call_frozen
from genkernels.nn.dequantize import normal

#: What each variant has: a likelihood, a critic, a flow.
VARIANTS = {
    "vae": (True, False, False),
    "gan": (False, True, False),
    "v-ade": (True, False, True),
    "av-gde": (True, True, False),
    "av-ade": (True, True, True),
}
_TRAINING = {"clip": 0.0, "lr": 2e-4, "betas": (0.5, 0.999), "warmup": 0}


class AVADE(VariationalModel):
    r"""A decoder gives independent Gaussians of features y = f(x) of a flow f, and so dependent pixels that are not
    Gaussian; what trains it is the bound of a variational autoencoder, by change of variables,

    .. math:: \ln p(x) \ge E_{q(z|x)} \ln p_y(f(x)|z) - KL\bigl(q(z|x)\,\|\,p(z)\bigr) + \ln\left|\det \frac{\partial
        f(x)}{\partial x}\right|,

    which covers the data, and a critic of samples :math:`x = f^{-1}(y)`, which keeps them to what looks like data.

    Args:
        shape: ``(C, H, W)``, H and W even; of images with grey levels, which are dequantised.
        variant: ``av-ade``; ``v-ade`` without the critic; ``av-gde`` without the flow; ``vae`` without either; ``gan``:
            the critic alone, whose samples are the decoder's means.
        quality: weight of the critic's term beside the bound in bits/dim.
        r1: weight of the penalty on the critic's gradient at the examples.
        latent: size of z. width: channels of encoder, decoder and critic at full resolution.
        steps: invertible 1×1 convolution and affine coupling of the flow, so many times, behind one squeeze. hidden:
            width of the couplings' networks.
        grey_levels: how many values a pixel can take.
        num_classes: give encoder, decoder and critic the class y. class_features: size of its embeddings.

    Example:
        >>> import torch, genkernels as gk
        >>> model = gk.models.AVADE.from_preset("digits", width=8)
        >>> sorted(model.losses("model", torch.zeros(2, 1, 8, 8, dtype=torch.uint8), None, 0))
        ['bound', 'kl', 'loss', 'quality', 'reconstruction']

    Source: Lucas et al., "Adaptive density estimation for generative models", 2019: there with deeper networks, batch
    normalisation, flows of several scales, and inverse autoregressive posteriors.
    """

    takes = ("images",)
    presets: ClassVar = {
        "digits": Preset(
            {"shape": (1, 8, 8), "grey_levels": 17, "latent": 32, "width": 32, "steps": 4, "hidden": 32}, _TRAINING
        ),
        "photos32": Preset({"shape": (3, 32, 32), "latent": 64, "width": 32, "steps": 4, "hidden": 48}, _TRAINING),
    }

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        variant: str = "av-ade",
        quality: float = 1.0,
        r1: float = 0.1,
        latent: int = 64,
        width: int = 32,
        steps: int = 4,
        hidden: int = 48,
        grey_levels: int = 256,
        num_classes: int | None = None,
        class_features: int = 16,
    ):
        if variant not in VARIANTS:
            hint = nearest(variant, VARIANTS, listed=True)
            raise ValueError(f"AVADE: variant must be one of {', '.join(VARIANTS)}, got {variant!r}{hint}")
        if len(shape) != 3 or shape[1] % 2 or shape[2] % 2:
            raise ValueError(f"AVADE: shape must be (C, H, W), H and W even, got {shape}")
        for label, value in (("quality", quality), ("r1", r1)):
            if value < 0:
                raise ValueError(f"AVADE: {label} must be at least 0, got {value}")
        for label, value in (("steps", steps), ("hidden", hidden)):
            if value < 1:
                raise ValueError(f"AVADE: {label} must be at least 1, got {value}")
        likelihood, adversary, flow = VARIANTS[variant]
        rated = FeatureGaussian("AVADE", shape, grey_levels, feature_flow(shape[0], steps, hidden) if flow else None)
        sizes = {"shape": shape, "latent": latent, "network": "conv", "width": width, "depth": 1}
        labels = {"num_classes": num_classes, "class_features": class_features}
        encoder, decoder = networks("AVADE", outputs=rated.outputs, **sizes, **labels)
        posterior = GaussianPosterior(encoder.features, latent)
        data = {"shape": shape, "grey_levels": grey_levels, "num_classes": num_classes}
        super().__init__(encoder, posterior, decoder, rated, latent=latent, **data)
        self.critic = Critic(*conv_critic(shape, width), num_classes) if adversary else None
        self.variant, self.quality, self.r1, self.by_likelihood = variant, quality, r1, likelihood

    # --- training -------------------------------------------------------------------------------------------------

    def players(self) -> dict[str, Player]:
        """``critic``, where there is one, then ``model``, the rest of it; whose weights are averaged."""
        if self.critic is None:
            return {"model": Player(self)}
        parts = [self.decoder, self.likelihood]
        parts += [self.encoder, self.posterior] if self.by_likelihood else []
        return {"critic": Player(self.critic, averaged=False), "model": Player(nn.ModuleList(parts))}

    def losses(self, player: str, x: Tensor, y: Tensor, step: int) -> dict[str, Tensor]:
        """Of ``model``: ``bound``, in nats, and its terms ``kl`` and ``reconstruction`` (−E ln p(x|z), the flow's
        log-determinant in it); ``quality``, the critic's opinion; ``loss``: the bound in bits/dim plus `quality` times
        that, or that alone. Of ``critic``: those of `genkernels.losses.critic_step`."""
        target, labels = self._prepared(x, y, None)
        if player == "critic":
            with torch.no_grad():
                fake = self._fakes(len(target), labels)
            real = target.to(fake.dtype)
            terms = losses.critic_step(self.critic, real, fake, loss="logistic", r1=self.r1, y=labels, terms=True)
            return {name: term for name, term in terms.items() if name != "r2" and (self.r1 or name != "r1")}
        found: dict[str, Tensor] = {}
        loss = torch.zeros((), device=target.device)
        if self.by_likelihood:
            terms = self._terms_of(target, labels, 1, None, None)
            loss = loss + self.cost(terms.bound).mean()
            found = {"bound": terms.bound, "kl": terms.kl, "reconstruction": -terms.log_likelihood}
        if self.critic is not None:
            scores = call_frozen(self.critic, self._fakes(len(target), labels), labels)
            quality = losses.generator_loss(scores, kind="logistic")
            loss = loss + (self.quality if self.by_likelihood else 1.0) * quality
            found["quality"] = quality
        return {"loss": loss, **{name: term.detach().mean() for name, term in found.items()}}

    def loss(self, x: Tensor, y: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """The negative bound in bits/dim, what likelihood alone would minimise."""
        return self.cost(self._terms_of(*self._prepared(x, y, generator), 1, None, generator).bound).mean()

    def _fakes(self, count: int, y: Tensor | None) -> Tensor:
        """Samples in [-1, 1], with a graph where one is recorded: draws, or means where no likelihood says how far
        draws should stray."""
        outputs = self.decoder(self._noise(count, 1, None).squeeze(1), y)
        return self.likelihood.images(outputs, None if self.by_likelihood else 0.0)

    # --- judgement, samples ---------------------------------------------------------------------------------------

    def evaluate(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        importance: int | None = None,
        chunk: int | None = None,
        projections: int = PROJECTIONS,
    ) -> dict[str, Estimate]:
        """As for `VAE`, but for ``gan``, whose encoder nobody trained, and the sliced Wasserstein distance between the
        examples and as many samples.

        Args:
            batches, importance, chunk: as for `VAE`. projections: random directions.
        """
        batches = list(batches)
        found = super().evaluate(batches, importance, chunk) if self.by_likelihood else {}
        distance, count = math.nan, sum(len(x) for x, _ in batches)
        if count:
            real = torch.cat([self.exact(x) for x, _ in batches])
            labels = torch.cat([y for _, y in batches]) if self.num_classes else None
            distance = metrics.sliced_wasserstein(self.sample(count, y=labels), real, projections)
        return {**found, "sliced_wasserstein": Estimate("sliced_wasserstein", "", distance, math.nan, count)}

    @torch.no_grad()
    def sample(
        self,
        n: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        y: Tensor | int | None = None,
        mean: bool | None = None,
    ) -> Tensor:
        """As for `VAE`, by default draws, as the critic sees them, and of ``gan`` means."""
        return super().sample(n, temperature, generator, y, not self.by_likelihood if mean is None else mean)

    def pictures(self, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return super().pictures(x, y, generator) if self.by_likelihood else {}

    def report(self, x: Tensor, y: Tensor) -> list[str]:
        return super().report(x, y) if self.by_likelihood else []

    def extra_repr(self) -> str:
        return f"variant={self.variant}, quality={self.quality:g}, r1={self.r1:g}"

    def exact(self, x: Tensor) -> Tensor:
        """Examples as `sample` gives them: their levels as floats in [0, 1], without noise."""
        self._check_shape(x)
        return shown(scaled(self, x))


class FeatureGaussian(Gaussian):
    """Independent Gaussians of the features that a flow makes of a dequantised image, and so a density of the image.

    Args:
        flow: ``(y, log_det) = flow(x)``, y of x's shape ``[N, C, H, W]``, with ``flow.inverse(y)``; None: y = x.
    """

    kind = "flow"

    def __init__(self, model: str, shape: tuple[int, ...], grey_levels: int, flow: nn.Module | None):
        super().__init__(model, shape, grey_levels)
        self.flow = flow

    def start(self, x: Tensor, each_pixel: bool) -> None:
        return None  # features, which the flow has yet to learn

    def log_prob(self, outputs: Tensor, target: Tensor) -> Tensor:
        if self.flow is None:
            return super().log_prob(outputs, target)
        features, log_det = self.flow(target.to(outputs.dtype))
        return super().log_prob(outputs, features) + log_det.unsqueeze(1)

    def images(self, outputs: Tensor, noise: float | Tensor | None = None) -> Tensor:
        """Images in [-1, 1) whose features are the means plus `noise` times the scales; None: normal noise of torch's
        own generator."""
        mean, log_scale = self._split(outputs, 1)
        if noise is None:
            noise = normal(mean.shape, mean.dtype, mean.device, None)
        features = mean + log_scale.exp() * noise
        return features if self.flow is None else self.flow.inverse(features)

    def mean(self, outputs: Tensor) -> Tensor:
        """The image whose features are the means."""
        return self._levels(self.images(outputs, 0.0))

    def draw(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean = self._split(outputs, 1)[0]
        return self._levels(self.images(outputs, normal(mean.shape, mean.dtype, mean.device, generator)))


class SqueezedFlow(nn.Module):
    """A flow of squeezed images, ``[N, 4C, H/2, W/2]``, and back: features have the image's shape."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.squeeze, self.flow = Squeeze(), FlowSequential(*layers)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = self.flow(self.squeeze(x)[0])
        return self.squeeze.inverse(y)[0], log_det

    def inverse(self, y: Tensor) -> Tensor:
        return self.squeeze.inverse(self.flow.inverse(self.squeeze(y)[0])[0])[0]


def feature_flow(channels: int, steps: int, hidden: int) -> SqueezedFlow:
    """`steps` times an invertible 1×1 convolution and an affine coupling, near a rotation at the start."""
    inner, layers = 4 * channels, []
    for _ in range(steps):
        layers += [InvertibleConv1x1(inner), AffineCoupling(ConvNet(inner // 2, inner, hidden))]
    return SqueezedFlow(*layers)
