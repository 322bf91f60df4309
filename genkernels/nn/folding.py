r"""ActNorm and the 1×1 convolution behind it, both linear per pixel, as one product.

.. math::
    z = W\,\mathrm{diag}(e^a)\,(x + b) = W' x + W' b,\qquad
    \mathrm{ldj} = HW\,\Bigl(\sum_c a_c + \log|\det W|\Bigr)

and backwards :math:`x = W'^{-1} z - b`. The matrices of all pairs alike in channels are assembled together: K pairs
cost as many operations as one. They are computed in fp64 and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genkernels.networks._plain import plain
from genkernels.nn._log_det import work_dtype
from genkernels.nn._pixelwise import pixelwise_linear
from genkernels.nn.actnorm import ActNorm
from genkernels.nn.invertible_conv import InvertibleConv1x1, assemble, assemble_inverse


class FoldedPair:
    """An ActNorm and the InvertibleConv1x1 behind it, run as one layer. Holds references, no parameters of its own."""

    def __init__(self, actnorm: ActNorm, conv: InvertibleConv1x1):
        self.actnorm = actnorm
        self.conv = conv

    @staticmethod
    def fits(first, second) -> bool:
        """Whether two neighbours can be folded now: the very classes, without hooks, and nothing left to initialise."""
        return (
            isinstance(first, ActNorm)
            and isinstance(second, InvertibleConv1x1)
            and first.channels == second.channels
            and plain(first, ActNorm)
            and plain(second, InvertibleConv1x1)
            and (not first.training or first.ready)
        )

    def parameters(self) -> list[Tensor]:
        return [*self.actnorm.parameters(), *self.conv.parameters()]

    def __call__(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        folded = Folded([self], inverse=False)
        z = folded.apply(self, x)
        return z, folded.log_det(work_dtype(x)).expand(x.shape[0])

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        folded = Folded([self], inverse=True)
        x = folded.apply(self, z)
        return x, folded.log_det(work_dtype(z)).expand(z.shape[0])


class Folded:
    """The matrices of several pairs for one pass, and their share of the log-determinant, which is the same for every
    sample."""

    def __init__(self, pairs: list[FoldedPair], inverse: bool):
        self.inverse = inverse
        self.pairs = pairs
        alike: dict[tuple, list[FoldedPair]] = {}
        for pair in pairs:
            alike.setdefault((pair.conv.channels, pair.conv.lu), []).append(pair)
        self._groups = [_Group(members, inverse) for members in alike.values()]
        self._place = {id(pair): (group, i) for group in self._groups for i, pair in enumerate(group.pairs)}

    def __bool__(self) -> bool:
        return bool(self.pairs)

    def apply(self, pair: FoldedPair, x: Tensor) -> Tensor:
        pair.actnorm.check(x)
        group, index = self._place[id(pair)]
        group.pixels[index] = x.shape[2:].numel()
        weights, biases = group.matrices(x.dtype)
        return pixelwise_linear(x, weights[index], biases[index])

    def log_det(self, dtype: torch.dtype) -> Tensor:
        """A scalar: the sum over the pairs applied so far."""
        return sum(group.total() for group in self._groups).to(dtype)


class _Group:
    def __init__(self, pairs: list[FoldedPair], inverse: bool):
        self.pairs = pairs
        self.pixels = [0] * len(pairs)
        self._cast: dict[torch.dtype, tuple] = {}
        actnorms, convs = [p.actnorm for p in pairs], [p.conv for p in pairs]
        log_scale = torch.stack([a.log_scale for a in actnorms]).double()
        bias = torch.stack([a.bias for a in actnorms]).double()
        if inverse:
            weight, log_det = assemble_inverse(convs)
            self.weight = weight * (-log_scale).exp().unsqueeze(-1)
            self.bias = -bias
            self.log_dets = log_det - log_scale.sum(-1)
        else:
            weight, log_det = assemble(convs)
            self.weight = weight * log_scale.exp().unsqueeze(-2)
            self.bias = (self.weight @ bias.unsqueeze(-1)).squeeze(-1)
            self.log_dets = log_det + log_scale.sum(-1)

    def matrices(self, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        if dtype not in self._cast:
            self._cast[dtype] = self.weight.to(dtype).unbind(0), self.bias.to(dtype).unbind(0)
        return self._cast[dtype]

    def total(self) -> Tensor:
        if len(set(self.pixels)) == 1:
            return self.pixels[0] * self.log_dets.sum()
        return sum(n * each for n, each in zip(self.pixels, self.log_dets.unbind(0), strict=True))
