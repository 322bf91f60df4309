r"""The 2-D sets `moons`, `checkerboard`, `eight_gaussians`, `spirals`, `rings`: drawn here, by formula.

Each is centred and scaled by constants of its density, never by the sample: E x = 0 and E‖x‖² = 2 (so the
mean variance of a coordinate is 1), the same scale in both directions. Training and held-out points come from
different random streams. The shapes follow those usual in the field, as in FFJORD (Grathwohl et al. 2019).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from genkernels.data.bundle import DataBundle, TensorPairs, make_bundle
from genkernels.data.split import derived_seed

TRAIN, TEST = 20_000, 5_000

Drawn = tuple[Tensor, Tensor]  # points [n, 2] float64, labels [n] int64


def moons(n: int, generator: Generator) -> Drawn:
    """Two half circles of radius 1 that reach into each other, noise 0.08; label: which one."""
    noise = 0.08
    label = _labels(n, 2, generator)
    angle = math.pi * _uniform(n, generator)
    sign = 1.0 - 2.0 * label
    # Around the centre (1/2, 1/4): the upper moon starts at (−1/2, −1/4), the lower is its mirror image in
    # the point.
    points = sign[:, None] * torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], dim=1)
    points = points + noise * _normal(n, generator)
    # E‖(cos a − 1/2, sin a − 1/4)‖² = 1 + 1/4 + 1/16 − (1/2)·(2/π)
    return _scaled(points, 1.3125 - 1.0 / math.pi + 2.0 * noise**2), label


def checkerboard(n: int, generator: Generator) -> Drawn:
    """The 8 dark squares of a 4×4 board, uniform: density 1/6, entropy ln 6 nats; no labels."""
    column = _labels(n, 4, generator)
    row = 2 * _labels(n, 2, generator) + column % 2
    corner = torch.stack([column, row], dim=1).double()
    unit = torch.rand(n, 2, generator=generator, dtype=torch.float64)
    points = (corner + unit) / 2.0 - 1.0  # on [−1, 1]²; each coordinate is uniform, variance 1/3
    return _scaled(points, 2.0 / 3.0), torch.zeros(n, dtype=torch.int64)


def eight_gaussians(n: int, generator: Generator) -> Drawn:
    """Eight round Gaussians on a circle of radius 1, each of standard deviation 1/8; label: which one."""
    noise = 0.125
    label = _labels(n, 8, generator)
    angle = label.double() * (math.pi / 4.0)
    points = torch.stack([angle.cos(), angle.sin()], dim=1) + noise * _normal(n, generator)
    return _scaled(points, 1.0 + 2.0 * noise**2), label


def spirals(n: int, generator: Generator) -> Drawn:
    """Two arms of one and a half turns, radius angle / 3π, noise 0.02; label: which arm."""
    noise = 0.02
    label = _labels(n, 2, generator)
    radius = _uniform(n, generator).sqrt()
    angle = 3.0 * math.pi * radius
    sign = 1.0 - 2.0 * label
    points = (sign * radius)[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    return _scaled(points + noise * _normal(n, generator), 0.5 + 2.0 * noise**2), label


def rings(n: int, generator: Generator) -> Drawn:
    """Four circles of radius 1/4, 1/2, 3/4 and 1, equally likely, noise 0.03; label: which, from inside."""
    noise = 0.03
    label = _labels(n, 4, generator)
    angle = 2.0 * math.pi * _uniform(n, generator)
    points = ((label + 1) / 4.0)[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    return _scaled(points + noise * _normal(n, generator), 15.0 / 32.0 + 2.0 * noise**2), label


# name: how to draw it, number of labels, what it looks like
SETS: dict[str, tuple[Callable[[int, Generator], Drawn], int | None, str]] = {
    "moons": (moons, 2, "two interleaved half circles"),
    "checkerboard": (checkerboard, None, "the dark squares of a 4x4 board"),
    "eight_gaussians": (eight_gaussians, 8, "eight Gaussians on a circle"),
    "spirals": (spirals, 2, "two spiral arms"),
    "rings": (rings, 4, "four concentric rings"),
}


def load(spec: str, seed: int) -> DataBundle:
    """20,000 points to train on and 5,000 held out, float32 ``[2]``."""
    draw, num_classes, picture = SETS[spec]
    parts = []
    for part, n in (("train", TRAIN), ("test", TEST)):
        generator = Generator().manual_seed(derived_seed(spec, part, seed))
        x, y = draw(n, generator)
        parts.append(TensorPairs(x.float(), y))
    classes = [str(i) for i in range(num_classes)] if num_classes else None
    return make_bundle(spec, f"{picture}, points in the plane", parts, (2,), classes=classes)


def _scaled(points: Tensor, mean_square: float) -> Tensor:
    """Scale points of E‖x‖² = mean_square to E‖x‖² = 2."""
    return points * math.sqrt(2.0 / mean_square)


def _labels(n: int, count: int, generator: Generator) -> Tensor:
    return torch.randint(count, (n,), generator=generator)


def _uniform(n: int, generator: Generator) -> Tensor:
    return torch.rand(n, generator=generator, dtype=torch.float64)


def _normal(n: int, generator: Generator) -> Tensor:
    return torch.randn(n, 2, generator=generator, dtype=torch.float64)
