"""GAN with either of its two generator losses, and what holds a critic to slopes of at most 1: WGAN by clipping its
weights, WGAN-GP by a penalty."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from genkernels import losses
from genkernels._words import nearest
from genkernels.models.gan.backbones import conv_critic, conv_generator, networks
from genkernels.models.gan.base import AdversarialModel, presets

#: Sizes of the networks, for the models that have DCGAN's.
SIZES: dict[str, dict[str, Any]] = {
    "ring2d": {"shape": (2,), "latent": 16, "width": 128},
    "digits": {"shape": (1, 8, 8), "grey_levels": 17, "latent": 64, "width": 64},
    "photos32": {"shape": (3, 32, 32), "latent": 128, "width": 32},
    "cifar10": {"shape": (3, 32, 32), "latent": 128, "width": 64},
}


class GAN(AdversarialModel):
    r"""The original: the critic's score is the log-odds of an example to be real.

    The critic minimises :math:`\mathrm{softplus}(-D(x)) + \mathrm{softplus}(D(G(z)))`, the generator
    :math:`\mathrm{softplus}(-D(G(z)))` (``logistic``, the non-saturating loss) or
    :math:`-\mathrm{softplus}(D(G(z)))` (``saturating``, which is ln(1 − p) and whose gradient vanishes where the critic
    is sure).

    Args:
        shape: ``(C, H, W)`` or ``(D,)``.
        loss: ``logistic`` or ``saturating``.
        latent: size of z. width: channels of the convolutional networks at full resolution, units of a hidden layer of
            those of points. depth: hidden layers of the latter.
        n_critic: steps of the critic to one of the generator.
        r1: weight of the penalty on the critic's gradient at the examples (Mescheder et al. 2018), 0: none.
        augment: probability of each change of `genkernels.nn.Augment`, which examples and samples go through on their
            way to the critic, for few images. adaptive: that probability is the first one of
            `genkernels.nn.AdaptiveAugment`. Images only.
        grey_levels: how many values a pixel can take, None for images of real numbers. Images only.
        num_classes: give both networks the class y. class_features: size of the generator's embedding of it.

    Example:
        >>> import genkernels as gk
        >>> model = gk.models.GAN.from_preset("ring2d", width=8)
        >>> model.sample(3).shape
        torch.Size([3, 2])

    Source: Goodfellow et al., "Generative adversarial nets", 2014; the networks and Adam at 2e-4 with β₁ = 0.5 are
    those of Radford et al., "Unsupervised representation learning with deep convolutional generative adversarial
    networks", 2016, without batch normalisation in the critic.
    """

    presets: ClassVar = presets(SIZES, lr=2e-4, betas=(0.5, 0.999))

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        loss: str = "logistic",
        latent: int = 64,
        width: int = 64,
        depth: int = 3,
        n_critic: int = 1,
        r1: float = 0.0,
        augment: float = 0.0,
        adaptive: bool = False,
        grey_levels: int | None = 256,
        num_classes: int | None = None,
        class_features: int = 16,
    ):
        kinds = ("logistic", "saturating")
        if loss not in kinds:
            raise ValueError(
                f"GAN: loss must be one of {', '.join(kinds)}, got {loss!r}{nearest(loss, kinds, listed=True)}"
            )
        if r1 < 0:
            raise ValueError(f"GAN: r1 must be at least 0, got {r1}")
        data = {"shape": shape, "grey_levels": grey_levels, "num_classes": num_classes}
        sizes = {"latent": latent, "width": width, "depth": depth, "class_features": class_features}
        both = networks("GAN", (conv_generator, conv_critic), **data, **sizes)
        super().__init__(
            *both, latent=latent, loss=loss, n_critic=n_critic, r1=r1, augment=augment, adaptive=adaptive, **data
        )


class WGAN(AdversarialModel):
    r"""The critic maximises :math:`E\,D(x) - E\,D(G(z))`, the generator :math:`E\,D(G(z))`, while every weight of the
    critic stays in [−clip, clip], so that its slopes are bounded.

    Weights are clipped before the critic is used, in each player's step.

    Args:
        clip: the largest size of a weight, above 0. n_critic: steps of the critic to one of the generator.
        shape, latent, width, depth, augment, grey_levels, num_classes, class_features: as for `GAN`.

    Example:
        >>> import genkernels as gk
        >>> gk.models.WGAN.from_preset("ring2d", width=8).sample(3).shape
        torch.Size([3, 2])

    Source: Arjovsky et al., "Wasserstein GAN", 2017: clip = 0.01, five steps of the critic, RMSprop at 5e-5, which is
    Adam without a first moment but for the correction of its first steps: the presets have β = (0, 0.99).
    """

    presets: ClassVar = presets(SIZES, lr=5e-5, betas=(0.0, 0.99))

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        clip: float = 0.01,
        latent: int = 64,
        width: int = 64,
        depth: int = 3,
        n_critic: int = 5,
        augment: float = 0.0,
        grey_levels: int | None = 256,
        num_classes: int | None = None,
        class_features: int = 16,
    ):
        if clip <= 0:
            raise ValueError(f"WGAN: clip must be above 0, got {clip}")
        data = {"shape": shape, "grey_levels": grey_levels, "num_classes": num_classes}
        sizes = {"latent": latent, "width": width, "depth": depth, "class_features": class_features}
        both = networks("WGAN", (conv_generator, conv_critic), **data, **sizes)
        super().__init__(*both, latent=latent, loss="wasserstein", n_critic=n_critic, augment=augment, **data)
        self.clip = clip

    def losses(self, player: str, x: Tensor, y: Tensor, step: int) -> dict[str, Tensor]:
        with torch.no_grad():
            for parameter in self.critic.parameters():
                parameter.clamp_(-self.clip, self.clip)
        return super().losses(player, x, y, step)


class WGANGP(AdversarialModel):
    r"""WGAN whose critic is held to slopes of 1 between examples and samples, by a penalty instead of clipping:

    .. math:: E\,D(G(z)) - E\,D(x) + \lambda\,E\,(\|\nabla D(\hat x)\| - 1)^2,\quad \hat x = u x + (1 - u) G(z)

    Args:
        penalty: λ. one_sided: only slopes above 1 are penalised.
        every: the penalty is taken in one of so many steps, times their number.
        n_critic: steps of the critic to one of the generator.
        shape, latent, width, depth, augment, grey_levels, num_classes, class_features: as for `GAN`.

    Example:
        >>> import genkernels as gk
        >>> gk.models.WGANGP.from_preset("ring2d", width=8).sample(3).shape
        torch.Size([3, 2])

    Source: Gulrajani et al., "Improved training of Wasserstein GANs", 2017: λ = 10, five steps of the critic, Adam at
    1e-4 with β = (0, 0.9). The preset ``ring2d`` has λ = 0.1, as the authors' program for points in the plane,
    and a step size of 1e-3.
    """

    presets: ClassVar = presets(
        {**SIZES, "ring2d": {**SIZES["ring2d"], "penalty": 0.1}}, lr=1e-4, points_lr=1e-3, betas=(0.0, 0.9)
    )

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        penalty: float = 10.0,
        one_sided: bool = False,
        every: int = 1,
        latent: int = 64,
        width: int = 64,
        depth: int = 3,
        n_critic: int = 5,
        augment: float = 0.0,
        grey_levels: int | None = 256,
        num_classes: int | None = None,
        class_features: int = 16,
    ):
        if penalty < 0:
            raise ValueError(f"WGANGP: penalty must be at least 0, got {penalty}")
        if every < 1:
            raise ValueError(f"WGANGP: every must be at least 1, got {every}")
        data = {"shape": shape, "grey_levels": grey_levels, "num_classes": num_classes}
        sizes = {"latent": latent, "width": width, "depth": depth, "class_features": class_features}
        both = networks("WGANGP", (conv_generator, conv_critic), **data, **sizes)
        super().__init__(*both, latent=latent, loss="wasserstein", n_critic=n_critic, augment=augment, **data)
        self.penalty, self.one_sided, self.every = penalty, one_sided, every

    def critic_terms(self, real: Tensor, fake: Tensor, y: Tensor | None, step: int) -> dict[str, Tensor]:
        terms = super().critic_terms(real, fake, y, step)
        penalty = losses.gradient_penalty(
            self.critic, real, fake, one_sided=self.one_sided, every=self.every, step=step, y=y
        )
        return {**terms, "loss": terms["loss"] + self.penalty * penalty, "penalty": penalty.detach()}
