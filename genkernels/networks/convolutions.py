"""Steps with weights: linear layers, convolutions and transposed ones. The transpose of each is the other kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from genkernels.networks.steps import Size, Step
from genkernels.ops import _autocast as autocast

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class Weighted(Step):
    """A step with a weight and a bias, whose linear part is fresh memory."""

    def bias_gradient(self, weights, cotangent, factors=None):
        outer = tuple(range(1, cotangent.dim()))
        others = outer[:-1] if self.kind == "linear" else outer[1:]  # than the outputs' axis
        sums = cotangent.sum(others, dtype=autocast.work_dtype(cotangent)) if others else cotangent
        return sums.sum(0) if factors is None else factors.to(sums.dtype) @ sums


class Linear(Weighted):
    kind = "linear"

    def value(self, weights, x):
        return F.linear(x, weights["weight"], weights.get("bias"))

    def push(self, weights, slope, tangent):
        return F.linear(tangent, weights["weight"])

    def pull(self, weights, slope, cotangent, sizes):
        return (F.linear(cotangent, weights["weight"].t()),)

    def weight_gradient(self, weights, cotangent, x):
        cotangent, x = autocast.lowered(cotangent, x)
        if x.dim() > 2:
            cotangent, x = cotangent.flatten(0, -2), x.flatten(0, -2)
        return torch.mm(cotangent.t(), x)


@dataclass(frozen=True, eq=False, kw_only=True)
class Convolution(Weighted):
    """`padding` has a pair (before, after) an axis; `circular` ones wrap around, others are zeros."""

    kind = "conv"
    stride: Size
    padding: tuple[tuple[int, int], ...]
    dilation: Size
    groups: int
    circular: bool

    def value(self, weights, x):
        return self._convolve(x, weights["weight"], weights.get("bias"))

    def push(self, weights, slope, tangent):
        return self._convolve(tangent, weights["weight"], None)

    def pull(self, weights, slope, cotangent, sizes):
        weight, size = weights["weight"], sizes[0][1:]
        padding = self._even_zeros()
        padded = size if padding else [b + n + a for n, (b, a) in zip(size, self.padding, strict=True)]
        beyond = [
            n + 2 * p - (o - 1) * s - d * (k - 1) - 1
            for n, p, o, s, d, k in zip(
                padded,
                padding or [0] * len(size),
                cotangent.shape[2:],
                self.stride,
                self.dilation,
                weight.shape[2:],
                strict=True,
            )
        ]
        transposed = _TRANSPOSED[len(size)]
        x = transposed(cotangent, weight, None, self.stride, padding or 0, beyond, self.groups, self.dilation)
        return (x if padding else self._unpad(x, size),)

    def weight_gradient(self, weights, cotangent, x):
        padding = self._even_zeros()
        x, none = x if padding else self._pad(x), [0] * len(self.stride)
        options = (self.stride, padding or none, self.dilation, False, none, self.groups)
        return _by_weight(cotangent, x, weights["weight"], *options)

    def _convolve(self, x, weight, bias):
        padding = self._even_zeros()
        x = x if padding else self._pad(x)
        convolution = _CONVOLUTIONS[len(self.stride)]
        return convolution(x, weight, bias, self.stride, padding or 0, self.dilation, self.groups)

    def _even_zeros(self) -> list[int]:
        """The padding as torch's convolutions take it, nothing where they do not."""
        even = not self.circular and all(before == after for before, after in self.padding)
        return [before for before, _ in self.padding] if even else []

    def _pad(self, x: Tensor) -> Tensor:
        return F.pad(
            x, [n for pair in reversed(self.padding) for n in pair], "circular" if self.circular else "constant"
        )

    def _unpad(self, x: Tensor, size: Size) -> Tensor:
        """The transpose of padding."""
        for axis, n, (before, after) in zip(range(2, x.dim()), size, self.padding, strict=True):
            inner = x.narrow(axis, before, n)
            if self.circular:
                rest = [0, 0] * (x.dim() - 1 - axis)
                if before:
                    inner = inner + F.pad(x.narrow(axis, 0, before), [*rest, n - before, 0])
                if after:
                    inner = inner + F.pad(x.narrow(axis, before + n, after), [*rest, 0, n - after])
            x = inner
        return x


@dataclass(frozen=True, eq=False, kw_only=True)
class TransposedConvolution(Weighted):
    kind = "conv_transpose"
    stride: Size
    padding: Size
    output_padding: Size
    dilation: Size
    groups: int

    def value(self, weights, x):
        return self._spread(x, weights["weight"], weights.get("bias"))

    def push(self, weights, slope, tangent):
        return self._spread(tangent, weights["weight"], None)

    def pull(self, weights, slope, cotangent, sizes):
        convolution = _CONVOLUTIONS[len(self.stride)]
        x = convolution(cotangent, weights["weight"], None, self.stride, self.padding, self.dilation, self.groups)
        for axis, n in enumerate(sizes[0][1:], start=2):  # output_padding may leave room for more than there is
            x = x.narrow(axis, 0, n)
        return (x,)

    def weight_gradient(self, weights, cotangent, x):
        options = (self.stride, self.padding, self.dilation, True, self.output_padding, self.groups)
        return _by_weight(cotangent, x, weights["weight"], *options)

    def _spread(self, x, weight, bias):
        transposed = _TRANSPOSED[len(self.stride)]
        return transposed(x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation)


def _by_weight(cotangent: Tensor, x: Tensor, weight: Tensor, *options: Sequence[int] | bool | int) -> Tensor:
    """The gradient of a convolution by its weight alone."""
    cotangent, x, weight = autocast.lowered(cotangent, x, weight)
    only = (False, True, False)
    return torch.ops.aten.convolution_backward(cotangent, x, weight, None, *options, only)[1]
