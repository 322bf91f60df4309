"""Rules for pooling and resizing."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from genkernels.networks._registry import each, filled, function, layer, named, spatial
from genkernels.networks.pooling import AveragePool, Filter, MaxPool, Upsample
from genkernels.reference.upfirdn2d import length_of


@layer("avg_pool", nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
def _avg_pool_layer(b, m, input):
    dims = int(type(m).__name__[-2])
    divisor = getattr(m, "divisor_override", None)
    return _avg_pool(b, input, dims, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, divisor)


def _avg_pool(b, x, dims, kernel, stride, padding, ceil_mode, count_include_pad, divisor):
    size = spatial(b, x, dims)
    kernel, padding = each(kernel, dims), each(padding, dims)
    stride = each(stride, dims) if stride not in (None, ()) else kernel
    out = _windows(size, kernel, stride, padding, (1,) * dims, ceil_mode)
    fields = {"ceil_mode": ceil_mode, "count_include_pad": count_include_pad, "divisor": divisor}
    shape = filled(b, (b.shape(x)[0], *out))
    return b.emit(AveragePool, [x], shape, kernel=kernel, stride=stride, padding=padding, **fields)


@layer("max_pool", nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
def _max_pool_layer(b, m, input):
    dims = int(type(m).__name__[-2])
    options = (m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices)
    return _max_pool(b, input, dims, *options)


def _max_pool(b, x, dims, kernel, stride, padding, dilation, ceil_mode, return_indices):
    if return_indices:
        b.refuse("gives indices beside its maxima")
    size = spatial(b, x, dims)
    kernel, padding, dilation = each(kernel, dims), each(padding, dims), each(dilation, dims)
    stride = each(stride, dims) if stride not in (None, ()) else kernel
    shape = filled(b, (b.shape(x)[0], *_windows(size, kernel, stride, padding, dilation, ceil_mode)))
    fields = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation, "ceil_mode": ceil_mode}
    return b.emit(MaxPool, [x], shape, **fields)


def _windows(size, kernel, stride, padding, dilation, ceil_mode) -> list[int]:
    out = []
    for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True):
        room = n + 2 * p - d * (k - 1) - 1
        count = (-(-room // s) if ceil_mode else room // s) + 1
        out.append(count - 1 if ceil_mode and (count - 1) * s >= n + p else count)  # a window begins inside
    return out


def _pool_functions(dims: int, averages, maxima: tuple, adaptive) -> None:
    @function("avg_pool", averages)
    def avg_pool(
        b, input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
    ):
        options = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
        return _avg_pool(b, input, dims, *options)

    @function("max_pool", *maxima)
    def max_pool(b, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
        return _max_pool(b, input, dims, kernel_size, stride, padding, dilation, ceil_mode, return_indices)

    @function("avg_pool", adaptive)
    def adaptive_avg_pool(b, input, output_size):
        return _adaptive(b, input, dims, output_size)


_pool_functions(1, F.avg_pool1d, (torch.max_pool1d, F.max_pool1d), F.adaptive_avg_pool1d)
_pool_functions(2, F.avg_pool2d, (torch.max_pool2d, F.max_pool2d), F.adaptive_avg_pool2d)
_pool_functions(3, F.avg_pool3d, (torch.max_pool3d, F.max_pool3d), F.adaptive_avg_pool3d)


@layer("avg_pool", nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
def _adaptive_layer(b, m, input):
    return _adaptive(b, input, int(type(m).__name__[-2]), m.output_size)


def _adaptive(b, x, dims, output_size):
    size = spatial(b, x, dims)
    out = [n if o is None else o for n, o in zip(size, each(output_size, dims), strict=True)]
    if any(o < 1 or n % o for n, o in zip(size, out, strict=True)):
        b.refuse(f"pools {list(size)} to {out}: only windows of one size have a rule")
    kernel = tuple(n // o for n, o in zip(size, out, strict=True))
    return b.emit(AveragePool, [x], (b.shape(x)[0], *out), kernel=kernel, stride=kernel, padding=(0,) * dims)


@layer("upsample", nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
def _upsample_layer(b, m, input):
    return _interpolate(b, input, m.size, m.scale_factor, m.mode, m.align_corners, m.recompute_scale_factor)


@function("upsample", F.interpolate)
def _interpolate(
    b,
    input,
    size=None,
    scale_factor=None,
    mode="nearest",
    align_corners=None,
    recompute_scale_factor=None,
    antialias=False,
):
    dims = len(b.shape(input)) - 1
    if antialias or mode not in ("nearest", {1: "linear", 2: "bilinear", 3: "trilinear"}.get(dims)):
        b.refuse(f"resizes by {mode!r}{' with antialiasing' if antialias else ''}: that has no rule")
    old, scale = spatial(b, input, dims), None
    if size is None:
        scale = tuple(float(s) for s in each(scale_factor, dims))
        size = [math.floor(float(n * s)) for n, s in zip(old, scale, strict=True)]
    new = filled(b, (b.shape(input)[0], *each(size, dims)))
    scale = None if recompute_scale_factor else scale
    return b.emit(Upsample, [input], new, mode=mode, scale=scale, align_corners=align_corners)


@named("upfirdn2d", "upfirdn2d")
def _filter(b, m, input):
    """A layer with ``taps`` and the operator's further arguments in ``options``."""
    height, width = spatial(b, input, 2)
    taps = m._buffers.get("taps")
    if taps is None or taps.requires_grad:
        b.refuse("learns its taps")
    options = {"up": 1, "down": 1, "gain": 1.0, **m.options}
    (left, right, top, bottom), count, up, down = options["padding"], taps.shape[0], options["up"], options["down"]
    size = length_of(height, count, up, down, top, bottom), length_of(width, count, up, down, left, right)
    return b.emit(Filter, [input], filled(b, (b.shape(input)[0], *size)), b.own(m, taps="taps"), **options)
