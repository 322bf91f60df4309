"""Variational models small enough that a step takes milliseconds, and one whose likelihood is known."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genkernels import models
from genkernels.models.vae.posteriors import POSTERIORS, posterior

#: constructor arguments by kind of data; images are of 8×8 pixels with 17 grey levels.
POINTS = {"shape": (2,), "latent": 2, "width": 8}
IMAGES = {"shape": (1, 8, 8), "grey_levels": 17, "latent": 3, "width": 4}
NAMES = ("vae", "iwae")
FLOWS = tuple(name for name in POSTERIORS if name != "gaussian")
EVERY = [(name, posterior) for name in NAMES for posterior in POSTERIORS]


def tiny(name: str, data: str = "points", seed: int = 0, **changes) -> models.Model:
    torch.manual_seed(seed)
    sizes = dict(POINTS if data == "points" else IMAGES)
    if name == "iwae":
        sizes["importance"] = 4
    if data == "mlp":
        sizes["network"] = "mlp"
    return models.build(name, **{**sizes, **changes})


class Linear(nn.Module):
    """A decoder whose mean is W z + b and whose scale is one number."""

    def __init__(self, weight: Tensor, bias: Tensor, log_scale: float):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.log_scale = nn.Parameter(torch.tensor(log_scale, dtype=weight.dtype))

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        mean = z @ self.weight.T + self.bias
        return torch.cat([mean, self.log_scale.expand_as(mean)], 1)

    def covariance(self) -> Tensor:
        return self.weight @ self.weight.T + torch.exp(2 * self.log_scale) * torch.eye(len(self.bias)).to(self.bias)

    def log_prob(self, x: Tensor) -> Tensor:
        """ln p(x), known."""
        return torch.distributions.MultivariateNormal(self.bias, self.covariance()).log_prob(x)

    def sample(self, n: int) -> Tensor:
        return torch.distributions.MultivariateNormal(self.bias, self.covariance()).sample((n,)).detach()


def linear_gaussian(name: str = "vae", features: int = 5, latent: int = 3, orthogonal: bool = True, **changes):
    """A model of points, fp64, whose p(x) is a Gaussian; with orthogonal columns p(z|x) has independent latents."""
    model = tiny(name, shape=(features,), latent=latent, **changes)
    torch.manual_seed(7)
    weight = torch.randn(features, latent, dtype=torch.float64)
    if orthogonal:
        weight = torch.linalg.qr(weight).Q * torch.tensor([1.5, 1.0, 0.5], dtype=torch.float64)[:latent]
    model.decoder = Linear(weight, torch.randn(features, dtype=torch.float64), -0.5)
    model.encoder.trunk = nn.Identity()  # the posterior's mean is linear in x
    kind, flows = model.hparams["posterior"], model.hparams["flows"]
    model.posterior = posterior(type(model).__name__, kind, features, latent, flows, 8)
    return model.double()


@torch.no_grad()
def set_to_the_posterior(model) -> None:
    """Gives a Gaussian posterior the mean and scale of the true one, whose covariance is diagonal here."""
    decoder, head = model.decoder, model.posterior.head
    precision = torch.exp(-2 * decoder.log_scale)
    variance = 1 / (1 + precision * decoder.weight.square().sum(0))
    gain = variance[:, None] * precision * decoder.weight.T
    head.weight.zero_()
    head.weight[: model.latent] = gain
    head.bias[: model.latent] = -gain @ decoder.bias
    head.bias[model.latent :] = 0.5 * variance.log()
