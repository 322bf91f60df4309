"""Two models as a newcomer writes them, each in no more than forty lines: two players; three terms and a warm-up."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import softplus

from genkernels import models
from genkernels.models import Estimate, Model, Player


def register() -> None:
    """Makes them models of the package, in a process of a test's own."""
    models.MODELS["toygan"], models.MODELS["toyvae"] = ToyGAN, ToyVAE


class ToyGAN(Model):
    """A generator and a critic of points."""

    def __init__(self, *, shape: tuple[int, ...] = (2,), width: int = 8) -> None:
        super().__init__(shape)
        (features,) = shape
        hidden = nn.BatchNorm1d(width), nn.Tanh()
        self.generator = nn.Sequential(nn.Linear(3, width), *hidden, nn.Linear(width, features))
        self.critic = nn.Sequential(nn.Linear(features, width), nn.Tanh(), nn.Linear(width, 1))

    def players(self):
        return {"critic": Player(self.critic, averaged=False, lr=2.0), "generator": Player(self.generator, every=3)}

    def losses(self, player, x, y, step):
        fake = self.generator(torch.randn(len(x), 3, device=x.device))
        if player == "generator":
            return {"loss": softplus(-self.critic(fake)).mean()}
        real, made = self.critic(x), self.critic(fake)
        return {"loss": (softplus(-real) + softplus(made)).mean(), "gap": (real - made).mean()}

    def evaluate(self, batches, draws: int = 100):
        x, fake = torch.cat([x for x, _ in batches]), self.generator(torch.randn(draws, 3))
        won = (self.critic(x).mean() > self.critic(fake).mean()).double().item()
        distance = (x.mean(0) - fake.mean(0)).norm().item()
        far = Estimate("distance", "", distance, float("nan"), len(x))
        return {"distance": far, "critic_wins": Estimate("critic_wins", "", won, float("nan"), len(x), False)}

    def sample(self, n, temperature=1.0, generator=None, y=None, shift: float = 0.0):
        return shift + self.generator(temperature * torch.randn(n, 3, generator=generator))


class ToyVAE(Model):
    """An encoder and a decoder of images, with a KL term that sets in over the first ten steps."""

    def __init__(self, *, shape: tuple[int, ...] = (1, 4, 4), grey_levels: int = 5, width: int = 2) -> None:
        super().__init__(shape, grey_levels)
        self.top, size = grey_levels - 1, self.dim
        self.encoder, self.decoder = nn.Linear(size, 2 * width), nn.Linear(width, size)

    def terms(self, x):
        mean, log_scale = self.encoder(x.flatten(1) / self.top).chunk(2, 1)
        error = self.decoder(mean + log_scale.exp() * torch.randn_like(mean)) - x.flatten(1) / self.top
        kl = (0.5 * (mean * mean + (2 * log_scale).exp() - 1) - log_scale).sum(1)
        return 50 * error.square().sum(1), kl

    def losses(self, player, x, y, step):
        error, kl = (term.mean() for term in self.terms(x))
        weight = min(1.0, step / 10)
        return {"reconstruction": error, "kl": kl, "loss": error + weight * kl, "kl_weight": weight}

    def evaluate(self, batches):
        values = [-sum(self.terms(x)) for x, _ in batches]
        return {"elbo": Estimate.of("elbo", "nats", torch.cat(values), lower_is_better=False)}

    def sample(self, n, temperature=1.0, generator=None, y=None):
        z = temperature * torch.randn(n, self.decoder.in_features, generator=generator)
        return self.decoder(z).clamp(0, 1).view(n, *self.shape)

    def pictures(self, x, y, generator=None):
        return {"reconstructions": self.decoder(self.encoder(x.flatten(1) / self.top).chunk(2, 1)[0]).view(x.shape)}
