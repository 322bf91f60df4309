"""BiGAN: a generator and an encoder learn to be each other's inverse from a critic of pairs (Donahue 2017)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from genkernels import losses
from genkernels.models._model import Estimate
from genkernels.models.gan.backbones import Critic, conv_critic, conv_generator, networks, point_critic
from genkernels.models.gan.base import PROJECTIONS, AdversarialModel, presets
from genkernels.nn._modes import call_frozen, in_mode
from genkernels.nn._rectified import LeakyReLU

_SIZES = {
    "ring2d": {"shape": (2,), "latent": 2, "width": 128},
    "digits": {"shape": (1, 8, 8), "grey_levels": 17, "latent": 32, "width": 64},
    "photos32": {"shape": (3, 32, 32), "latent": 64, "width": 32},
    "cifar10": {"shape": (3, 32, 32), "latent": 64, "width": 64},
}


class BiGAN(AdversarialModel):
    r"""The critic tells pairs (x, E(x)) of an example and its code from pairs (G(z), z) of a sample and its latents:

    .. math:: \mathrm{softplus}(-D(x, E(x))) + \mathrm{softplus}(D(G(z), z)),

    and generator and encoder minimise the same with the signs of the scores exchanged. Where the critic cannot tell
    them apart, E is the inverse of G.

    Args:
        shape: ``(C, H, W)`` or ``(D,)``.
        latent: size of z. width: channels of the convolutional networks at full resolution, units of a hidden layer of
            the others. depth: hidden layers of networks of points.
        n_critic: steps of the critic to one of generator and encoder.
        grey_levels: how many values a pixel can take, None for images of real numbers. Images only.
        num_classes: give generator and critic the class y. class_features: size of the generator's embedding of it.

    Example:
        >>> import torch, genkernels as gk
        >>> model = gk.models.BiGAN.from_preset("ring2d", width=8)
        >>> model.encode(torch.randn(3, 2)).shape, model.sample(3).shape
        (torch.Size([3, 2]), torch.Size([3, 2]))

    Source: Donahue et al., "Adversarial feature learning", 2017: Adam at 2e-4 with β₁ = 0.5; Dumoulin et al.,
    "Adversarially learned inference", 2017, the same of the same year, whose 64 latents of CIFAR-10 the preset
    ``cifar10`` has, with the networks of `GAN`.
    """

    presets: ClassVar = presets(_SIZES, lr=2e-4, betas=(0.5, 0.999))

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        latent: int = 32,
        width: int = 64,
        depth: int = 3,
        n_critic: int = 1,
        grey_levels: int | None = 256,
        num_classes: int | None = None,
        class_features: int = 16,
    ):
        data = {"shape": shape, "grey_levels": grey_levels, "num_classes": num_classes}
        sizes = {"latent": latent, "width": width, "depth": depth, "class_features": class_features}
        decoder, critic = networks("BiGAN", (conv_generator, conv_critic), **data, **sizes)
        trunk, features = point_critic(shape, width, depth) if len(shape) == 1 else conv_critic(shape, width)
        encoder = nn.Sequential(trunk, nn.Linear(features, latent))
        joint = JointCritic(critic.trunk, features, latent, width, num_classes)
        super().__init__(TwoWay(decoder, encoder), joint, latent=latent, loss="logistic", n_critic=n_critic, **data)

    def losses(self, player: str, x: Tensor, y: Tensor, step: int) -> dict[str, Tensor]:
        labels, real = self._labels(y, len(x)), self._scaled(x)
        z = self._latents(len(real))
        if player == "critic":
            with torch.no_grad():
                code, fake = self.generator.encoder(real), self.generator(z, labels)
            real_scores, fake_scores = self.critic(*_paired(real, code, fake, z, labels)).chunk(2)
            means = {"real_score": real_scores.detach().mean(), "fake_score": fake_scores.detach().mean()}
            return {"loss": losses.critic_loss(real_scores, fake_scores, kind=self.loss_kind), **means}
        code, fake = self.generator.encoder(real), self.generator(z, labels)
        real_scores, fake_scores = call_frozen(self.critic, *_paired(real, code, fake, z, labels)).chunk(2)
        # each pair is to be taken for one of the other kind
        return {"loss": losses.critic_loss(fake_scores, real_scores, kind=self.loss_kind)}

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """The codes E(x) of examples, ``[N, latent]``, in evaluation mode and without a graph."""
        with in_mode(self, training=False):
            return self.generator.encoder(self._scaled(x))

    @torch.no_grad()
    def reconstruct(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """G(E(x)), as `sample` gives its samples: ``[N, *shape]``."""
        codes = self.encode(x)
        with in_mode(self, training=False):
            return self._shown(self.generator(codes, self._labels(y, len(x))))

    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]], projections: int = PROJECTIONS) -> dict[str, Estimate]:
        """As for other adversarial models, and the reconstruction error: the mean square of x − G(E(x)) over the values
        of an example, images in [0, 1]."""
        batches = list(batches)
        errors = [
            (self._shown(self._scaled(x)) - self.reconstruct(x, y)).square().flatten(1).mean(1) for x, y in batches
        ]
        error = Estimate.of("reconstruction", "", torch.cat(errors) if errors else torch.empty(0))
        return {**super().evaluate(batches, projections), "reconstruction": error}

    def pictures(self, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """``reconstructions``: each image beside G(E(x)); none of points."""
        if len(self.shape) == 1:
            return {}
        return {"reconstructions": torch.cat([self._shown(self._scaled(x)), self.reconstruct(x, y)], 3)}


def _paired(real: Tensor, code: Tensor, fake: Tensor, z: Tensor, y: Tensor | None) -> tuple[Tensor | None, ...]:
    """The pairs of examples and those of samples as one batch of the critic's."""
    return torch.cat([real, fake]), torch.cat([code, z]), None if y is None else torch.cat([y, y])


class TwoWay(nn.Module):
    """A generator, which it is called as, and an encoder: one player."""

    def __init__(self, decoder: nn.Module, encoder: nn.Module):
        super().__init__()
        self.decoder, self.encoder = decoder, encoder

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        return self.decoder(z, y)


class JointCritic(nn.Module):
    """One score for a pair of a datum and a latent vector.

    Args:
        trunk: data to features ``[N, features]``. features: how many.
        latent: size of z. width: units of the hidden layers.
        num_classes: None where labels play no part.

    Shapes: x ``[N, *shape]``, z ``[N, latent]``, y ``[N]`` or None, to ``[N, 1]``.
    """

    def __init__(self, trunk: nn.Module, features: int, latent: int, width: int, num_classes: int | None = None):
        super().__init__()
        self.trunk = trunk
        self.code = nn.Sequential(nn.Linear(latent, width), LeakyReLU(0.2))
        joint = nn.Sequential(nn.Linear(features + width, 2 * width), LeakyReLU(0.2))
        self.joint = Critic(joint, 2 * width, num_classes)

    def forward(self, x: Tensor, z: Tensor, y: Tensor | None = None) -> Tensor:
        return self.joint(torch.cat([self.trunk(x), self.code(z)], 1), y)
