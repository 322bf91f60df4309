"""Small networks of the plane, which a figure trains while one waits."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

PENALTY_WEIGHT = 10.0


def perceptron(features: int, outputs: int, width: int) -> nn.Sequential:
    """Two hidden layers of `width` leaky units."""
    from torch import nn

    hidden = [nn.Linear(features, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2)]
    return nn.Sequential(*hidden, nn.Linear(width, outputs))


def wasserstein_loss(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """What a critic of WGAN-GP minimises."""
    from genkernels import losses

    penalty = losses.gradient_penalty(critic, real, fake)
    return losses.critic_loss(critic(real), critic(fake), "wasserstein") + PENALTY_WEIGHT * penalty
