"""Additive couplings of halves, one after the other, on the two halves themselves.

Layer by layer each coupling takes x apart, adds to one half and puts x together again, and autograd the same backwards.
Here x is taken apart once and put together once, and a coupling is one addition: the same numbers, to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genkernels.networks._plain import plain
from genkernels.nn._log_det import zero_log_det
from genkernels.nn.affine_coupling import AffineCoupling


class AdditiveRun:
    """Neighbouring additive couplings, run as one layer. Holds references, no parameters of its own."""

    def __init__(self, *layers: AffineCoupling):
        self.layers = layers

    @staticmethod
    def takes(layer) -> bool:
        """Whether a layer can run here: the very class, additive, split by channels, without hooks."""
        if not isinstance(layer, AffineCoupling) or layer.options["scale_map"] != "additive":
            return False
        return layer.options["split"] == "channel" and plain(layer, AffineCoupling)

    def __call__(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(self.layers, x, context, 1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(self.layers[::-1], z, context, -1)

    def _run(self, layers, x: Tensor, context: Tensor | None, sign: int) -> tuple[Tensor, Tensor]:
        layers[0].check(x)
        halves = list(x.chunk(2, dim=1))
        for layer in layers:
            moved = 0 if layer.options["flip"] else 1
            shift = layer.params(halves[1 - moved], context)
            if shift.shape != halves[moved].shape or torch.promote_types(shift.dtype, x.dtype) != x.dtype:
                return layer(torch.cat(halves, dim=1), context)  # raises, and says what is wrong
            halves[moved] = torch.add(halves[moved], shift, alpha=sign)
        return torch.cat(halves, dim=1), zero_log_det(x)
