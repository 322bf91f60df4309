"""SN-GAN: a critic whose layers have spectral norm 1 (Miyato 2018)."""

from __future__ import annotations

from typing import ClassVar

from genkernels.models.gan.backbones import networks, residual_critic, residual_generator
from genkernels.models.gan.base import AdversarialModel, presets
from genkernels.nn import spectral_norm_

_SIZES = {
    "ring2d": {"shape": (2,), "latent": 16, "width": 128},
    "digits": {"shape": (1, 8, 8), "grey_levels": 17, "latent": 64, "width": 64},
    "photos32": {"shape": (3, 32, 32), "latent": 128, "width": 64},
    "cifar10": {"shape": (3, 32, 32), "latent": 128, "width": 256, "critic_width": 128},
}


class SNGAN(AdversarialModel):
    r"""Every weight of the critic is divided by its spectral norm, which bounds its slopes at the cost of one power
    iteration a step; both minimise the hinge loss, :math:`\max(0, 1 - D(x)) + \max(0, 1 + D(G(z)))` and
    :math:`-D(G(z))`.

    With classes the critic has a projection of them, of spectral norm 1 as well.

    Args:
        shape: ``(C, H, W)`` or ``(D,)``.
        latent: size of z. width: channels of the generator's blocks, units of a hidden layer of networks of points.
            critic_width: those of the critic, None: the same. depth: hidden layers of networks of points.
        n_critic: steps of the critic to one of the generator.
        augment: probability of each change of `genkernels.nn.Augment`, which examples and samples go through on their
            way to the critic, for few images. adaptive: that probability is the first one of
            `genkernels.nn.AdaptiveAugment`. Images only.
        grey_levels: how many values a pixel can take, None for images of real numbers. Images only.
        num_classes: give both networks the class y. class_features: size of the generator's embedding of it.

    Example:
        >>> import genkernels as gk
        >>> gk.models.SNGAN.from_preset("ring2d", width=8).sample(3).shape
        torch.Size([3, 2])

    Source: Miyato et al., "Spectral normalization for generative adversarial networks", 2018: the residual networks of
    CIFAR-10, which are the preset ``cifar10``, five steps of the critic, Adam at 2e-4 with β = (0, 0.9); Miyato and
    Koyama, "cGANs with projection discriminator", 2018, which has the class in the generator's batch normalisation and
    not beside z.
    """

    presets: ClassVar = presets(_SIZES, lr=2e-4, points_lr=1e-3, betas=(0.0, 0.9))

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        latent: int = 64,
        width: int = 64,
        critic_width: int | None = None,
        depth: int = 3,
        n_critic: int = 5,
        augment: float = 0.0,
        adaptive: bool = False,
        grey_levels: int | None = 256,
        num_classes: int | None = None,
        class_features: int = 16,
    ):
        data = {"shape": shape, "grey_levels": grey_levels, "num_classes": num_classes}
        sizes = {"latent": latent, "width": width, "critic_width": critic_width, "depth": depth}
        blocks = residual_generator, residual_critic
        generator, critic = networks("SNGAN", blocks, **data, **sizes, class_features=class_features)
        spectral_norm_(critic)
        if critic.classes is not None:
            spectral_norm_(critic.classes)
        super().__init__(
            generator,
            critic,
            latent=latent,
            loss="hinge",
            n_critic=n_critic,
            augment=augment,
            adaptive=adaptive,
            **data,
        )
