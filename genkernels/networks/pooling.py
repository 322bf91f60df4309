"""Steps that pool and resize."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from genkernels import ops
from genkernels.networks.steps import Size, Step
from genkernels.reference.upfirdn2d import transposed

_AVERAGES = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_MAXIMA = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


@dataclass(frozen=True, eq=False, kw_only=True)
class AveragePool(Step):
    kind = "avg_pool"
    kernel: Size
    stride: Size
    padding: Size
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor: int | None = None

    def value(self, weights, x):
        options = (self.kernel, self.stride, self.padding, self.ceil_mode, self.count_include_pad)
        return _AVERAGES[len(self.kernel)](x, *options, *([self.divisor] if len(self.kernel) > 1 else []))

    def pull(self, weights, slope, cotangent, sizes):
        flat = len(self.kernel) == 1  # which has no backward operator of its own
        kernel, stride, padding, size = self.kernel, self.stride, self.padding, sizes[0]
        if flat:
            kernel, stride, padding, size = (1, *kernel), (1, *stride), (0, *padding), (size[0], 1, size[1])
            cotangent = cotangent.unsqueeze(-2)
        backward = torch.ops.aten.avg_pool3d_backward if len(kernel) == 3 else torch.ops.aten.avg_pool2d_backward
        like = cotangent.new_zeros(()).expand(len(cotangent), *size)
        x = backward(cotangent, like, kernel, stride, padding, self.ceil_mode, self.count_include_pad, self.divisor)
        return (x.squeeze(-2) if flat else x,)


@dataclass(frozen=True, eq=False, kw_only=True)
class MaxPool(Step):
    """The slope of a maximum is where it was: ``[N, C, *output]`` indices into the flattened spatial axes."""

    kind = "max_pool"
    kernel: Size
    stride: Size
    padding: Size
    dilation: Size
    ceil_mode: bool = False

    def value(self, weights, x):
        return self._pool(x)

    def value_and_places(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._pool(x, return_indices=True)

    def slope(self, weights, x):
        return self.value_and_places(x)[1]

    def push(self, weights, slope, tangent):
        return tangent.flatten(2).gather(2, _places(slope, tangent)).reshape(len(tangent), *self.shape)

    def pull(self, weights, slope, cotangent, sizes):
        channels, *spatial = sizes[0]
        empty = cotangent.new_zeros(len(cotangent), channels, prod(spatial))
        x = empty.scatter_add(2, _places(slope, cotangent), cotangent.flatten(2))
        return (x.reshape(len(cotangent), channels, *spatial),)

    def _pool(self, x, return_indices=False):
        options = (self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode)
        return _MAXIMA[len(self.kernel)](x, *options, return_indices=return_indices)


def _places(slope: Tensor, probes: Tensor) -> Tensor:
    """``[N, C, places]`` for samples, or the same for each of their probes."""
    places = slope.flatten(2)
    return places if len(places) == len(probes) else places.repeat(len(probes) // len(places), 1, 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Upsample(Step):
    """`scale` is None where the size was asked for."""

    kind = "upsample"
    mode: str
    scale: tuple[float, ...] | None = None
    align_corners: bool | None = None

    def value(self, weights, x):
        size = None if self.scale else self.shape[1:]
        return F.interpolate(x, size, self.scale, self.mode, self.align_corners)

    def pull(self, weights, slope, cotangent, sizes):
        name = self.mode if self.mode != "nearest" else f"nearest{len(self.shape) - 1}d"
        name = {"linear": "linear1d", "bilinear": "bilinear2d", "trilinear": "trilinear3d"}.get(name, name)
        corners = [] if self.mode == "nearest" else [bool(self.align_corners)]
        scale = self.scale or [None] * (len(self.shape) - 1)
        backward = getattr(torch.ops.aten, f"upsample_{name}_backward")
        return (backward(cotangent, self.shape[1:], (len(cotangent), *sizes[0]), *corners, *scale),)


@dataclass(frozen=True, eq=False, kw_only=True)
class Filter(Step):
    """Up-sampling by zeros, the filter ``taps`` along both axes, down-sampling: `genkernels.ops.upfirdn2d`."""

    kind = "upfirdn2d"
    up: int
    down: int
    padding: tuple[int, int, int, int]
    gain: float

    def value(self, weights, x):
        options = {"up": self.up, "down": self.down, "padding": self.padding, "gain": self.gain}
        return ops.upfirdn2d(x, weights["taps"], **options)

    def pull(self, weights, slope, cotangent, sizes):
        taps, (_, height, width), (left, right, top, bottom) = weights["taps"], sizes[0], self.padding
        along_x = transposed(width, len(taps), self.up, self.down, left, right)
        along_y = transposed(height, len(taps), self.up, self.down, top, bottom)
        options = {"up": self.down, "down": self.up, "padding": (*along_x, *along_y), "gain": self.gain}
        return (ops.upfirdn2d(cotangent, taps, **options, flip=True),)
