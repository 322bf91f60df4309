"""Stand-ins: a model and data sets small enough that a run of twenty steps takes a fraction of a second."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.utils.data import Dataset

from genkernels.data import DataBundle, Form
from genkernels.models import LikelihoodModel


class Tiny(LikelihoodModel):
    """An affine Gaussian with dequantisation noise, a data-dependent start and a buffer: all that a resume must bring
    back."""

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        grey_levels: int | None = None,
        num_classes: int | None = None,
        width: int = 8,
        poison_at: int | None = None,
    ):
        super().__init__(shape, grey_levels, num_classes)
        self.poison_at, self.calls = poison_at, 0
        size = math.prod(self.shape)
        self.net = nn.Sequential(nn.Linear(size, width), nn.Tanh(), nn.Linear(width, 2 * size))
        self.shift = nn.Parameter(torch.zeros(size))
        self.classes = nn.Embedding(num_classes, size) if num_classes else None
        self.register_buffer("initialised", torch.tensor(False))
        self.register_buffer("running", torch.zeros(size))

    def log_prob(self, x, y=None):
        x = x.to(self.shift.dtype)
        if self.grey_levels:
            x = (x + torch.rand_like(x)) / self.grey_levels
        x = x.flatten(1)
        if self.training:
            with torch.no_grad():
                self.shift.copy_(torch.where(self.initialised, self.shift, x.mean(0)))
                self.initialised.fill_(True)
                self.running.lerp_(x.mean(0), 0.1)
        centre = self.shift if self.classes is None else self.shift + self.classes(y)
        scale, shift = self.net(torch.zeros_like(x)).chunk(2, 1)
        z = (x - centre - shift) * scale.exp()
        value = (-0.5 * z * z - 0.5 * math.log(2 * math.pi) + scale).sum(1)
        return value - (x.shape[1] * math.log(self.grey_levels) if self.grey_levels else 0)

    def bits_per_dim(self, x, y=None):
        return -self.log_prob(x, y) / (math.prod(self.shape) * math.log(2))

    def loss(self, x, y=None):
        self.calls += 1
        value = (self.bits_per_dim(x, y) if self.grey_levels else -self.log_prob(x, y)).mean()
        return value * math.nan if self.calls == self.poison_at else value

    def sample(self, n, temperature=1.0, generator=None, y=None):
        z = temperature * torch.randn(n, math.prod(self.shape), generator=generator, device=self.shift.device)
        scale, shift = self.net(torch.zeros_like(z)).chunk(2, 1)
        x = z * (-scale).exp() + self.shift + shift + (0 if y is None else self.classes(y))
        if self.grey_levels:
            x = (x * self.grey_levels).floor().clamp(0, self.grey_levels - 1) / (self.grey_levels - 1)
        return x.view(n, *self.shape)


class Pairs(Dataset):
    def __init__(self, x, y=None):
        self.x, self.y = x, torch.zeros(len(x), dtype=torch.long) if y is None else y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], int(self.y[i])


def images(n=50, held_out=13, levels=5, shape=(1, 4, 4), classes=3) -> DataBundle:
    g = torch.Generator().manual_seed(1)
    x = torch.randint(0, levels, (n + held_out, *shape), generator=g).to(torch.uint8)
    y = torch.randint(0, classes, (n + held_out,), generator=g)
    return DataBundle("tiny", Pairs(x[:n], y[:n]), Pairs(x[n:], y[n:]), Form(shape, levels, classes), "noise")


def points(n=50, held_out=13) -> DataBundle:
    x = torch.randn(n + held_out, 2, generator=torch.Generator().manual_seed(2))
    return DataBundle("points", Pairs(x[:n]), Pairs(x[n:]), Form((2,)), "a Gaussian")


def model_for(bundle, seed=0, **extra) -> Tiny:
    torch.manual_seed(seed)
    return Tiny(shape=bundle.form.shape, grey_levels=bundle.form.grey_levels, **extra)
