"""The peers' planar and radial flows, a module a layer, their parameters as tensors of the graph in the place of
``nn.Parameter``.

- **normflows** ``Planar``, the same function, and ``Radial``, which takes |α| where our layer takes softplus(α): it is
  handed the latter, outside the clock, and so are the layers' parameters, one tensor each. It has no layers of each
  example's own, and adds up no log-determinants: the sum is its ``NormalizingFlow``'s.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from genkernels.benchmarks.peers import Adapter

PEERS = ("normflows",)


def unsupported(peer: str, case) -> str:
    return "has no layers of each example's own" if case.settings["own"] else ""


def adapter(peer: str, settings: dict, direction: str, shape: list[int]) -> Adapter:
    *_, features, count = shape
    return {"planar": _planar, "radial": _radial}[settings["kind"]](features, count)


def _planar(features: int, count: int) -> Adapter:
    from normflows.flows import Planar

    layers = [_bare(Planar((features,)), "w", "u", "b") for _ in range(count)]

    def arrange(z, w, u, b):
        return z, *(row for layer in zip(w.split(1), u.split(1), b.split(1), strict=True) for row in layer)

    return Adapter(lambda z, *rows: _chain(layers, ("w", "u", "b"), z, rows), arrange)


def _radial(features: int, count: int) -> Adapter:
    from normflows.flows import Radial

    layers = [_bare(Radial((features,)), "z_0", "alpha", "beta") for _ in range(count)]

    def arrange(z, center, alpha, beta):
        parts = zip(center.split(1), F.softplus(alpha).split(1), beta.split(1), strict=True)
        return z, *(row for layer in parts for row in layer)

    return Adapter(lambda z, *rows: _chain(layers, ("z_0", "alpha", "beta"), z, rows), arrange)


def _bare(layer: torch.nn.Module, *names: str) -> torch.nn.Module:
    for name in names:
        delattr(layer, name)
    return layer


def _chain(layers, names: tuple[str, ...], z: Tensor, rows: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    total = z.new_zeros(len(z))
    for i, layer in enumerate(layers):
        for name, row in zip(names, rows[3 * i : 3 * i + 3], strict=True):
            setattr(layer, name, row)
        z, log_det = layer(z)
        total = total + log_det
    return z, total
