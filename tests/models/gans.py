"""Adversarial models small enough that a step takes milliseconds, and batches for them."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from genkernels import data, models

#: name: constructor arguments by kind of data; those of images are of 8×8 pixels with 17 grey levels.
POINTS = {"shape": (2,), "latent": 3, "width": 16, "depth": 2}
IMAGES = {"shape": (1, 8, 8), "grey_levels": 17, "latent": 4, "width": 4}
NAMES = ("gan", "wgan", "wgangp", "sngan", "r3gan", "bigan")
EVERY = [(name, data) for name in NAMES for data in ("points", "images")]


def tiny(name: str, data: str = "points", seed: int = 0, **changes) -> models.Model:
    torch.manual_seed(seed)
    sizes = dict(POINTS if data == "points" else IMAGES)
    if name == "r3gan":
        sizes["cardinality"] = 2
    return models.build(name, **{**sizes, **changes})


def batch(data: str = "points", n: int = 6, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=g)
    if data == "points":
        return torch.randn(n, 2, generator=g), y
    return torch.randint(17, (n, 1, 8, 8), generator=g).to(torch.uint8), y


def near(a: torch.Tensor, b: torch.Tensor, rel: float) -> bool:
    """Whether two scalars are the same, to this relative accuracy."""
    return math.isclose(a.item(), b.item(), rel_tol=rel)


def small(name: str, train: int = 500, held_out: int = 100) -> data.DataBundle:
    """The first examples of a data set, so that an evaluation takes no time."""
    bundle = data.load(name)
    parts = {"train": bundle.take("train", train), "test": bundle.take("test", held_out)}
    return replace(bundle, **{part: data.TensorPairs(*pair) for part, pair in parts.items()})


def gradients(module: torch.nn.Module) -> list[bool]:
    """Whether each parameter has one."""
    return [p.grad is not None for p in module.parameters()]


def parts(model, player: str):
    """The module that a player moves."""
    return model.players()[player].module
