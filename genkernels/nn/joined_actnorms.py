r"""The ActNorms of one pass together: one exponential for all their scales and one sum for all their log-determinants.

Each layer by itself is a handful of operations on C numbers around two on the batch; where the batch is small, as with
points, the handful is what costs. z is the same to the bit as layer by layer; the log-determinant, the same for every
sample, is added up in another order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genkernels.networks._plain import plain
from genkernels.nn.actnorm import ActNorm


class JoinedActNorms:
    """ActNorms as one pass runs them. Holds references, no parameters of its own."""

    def __init__(self, layers: list[ActNorm], inverse: bool):
        self.inverse = inverse
        alike: dict[int, list[ActNorm]] = {}
        for layer in layers:
            alike.setdefault(layer.channels, []).append(layer)
        self._groups = [_Group(members, inverse) for members in alike.values()]
        self._place = {id(layer): (group, i) for group in self._groups for i, layer in enumerate(group.layers)}

    @staticmethod
    def takes(layer) -> bool:
        """Whether a layer can run here now: the very class, without hooks, and with nothing left to initialise."""
        return isinstance(layer, ActNorm) and plain(layer, ActNorm) and (not layer.training or layer.ready)

    def __bool__(self) -> bool:
        return bool(self._place)

    def __contains__(self, layer) -> bool:
        return id(layer) in self._place

    def apply(self, layer: ActNorm, x: Tensor) -> Tensor:
        layer.check(x)
        group, index = self._place[id(layer)]
        group.pixels[index] += x.shape[2:].numel()  # a layer may stand at several places
        shape = (-1, *[1] * (x.dim() - 2))
        bias, scale = layer.bias.view(shape).to(x.dtype), group.scales(x.dtype)[index].view(shape)
        return x * scale - bias if self.inverse else (x + bias) * scale

    def log_det(self, dtype: torch.dtype) -> Tensor:
        """A scalar: the sum over the layers applied so far."""
        total = sum(group.total() for group in self._groups).to(dtype)
        return -total if self.inverse else total


class _Group:
    def __init__(self, layers: list[ActNorm], inverse: bool):
        self.layers, self.inverse = layers, inverse
        self.pixels = [0] * len(layers)
        self._log_scales = torch.stack([layer.log_scale for layer in layers])
        self._scales: dict[torch.dtype, tuple[Tensor, ...]] = {}

    def scales(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        if dtype not in self._scales:
            log_scales = self._log_scales.to(dtype)
            self._scales[dtype] = (-log_scales if self.inverse else log_scales).exp().unbind(0)
        return self._scales[dtype]

    def total(self) -> Tensor:
        if len(set(self.pixels)) == 1:
            return self.pixels[0] * self._log_scales.sum()
        return sum(n * each for n, each in zip(self.pixels, self._log_scales.sum(1).unbind(0), strict=True))
