"""Benchmark cases of `genkernels.ops.rational_quadratic_spline`: 16 features a row through 8 bins each, as coupling
layers and autoregressive flows have them, and the inverse of whole autoregressive transforms by zuko's splines.

Bytes: forward and inverse read the point and its P parameters and write a point and the log-determinant; backward reads
both and the gradients, and writes as much as it read. Flops of a number, a transcendental function being one: a softmax
over K and a sum up to the bin, of widths and of heights, then the bin; see `_FLOPS`. Backward a softmax's gradient
twice, and the bin's. Of an autoregressive inverse the live weights are read too, each multiplied once; its reference is
D passes, its yardstick one pass forward, and the many features have few samples and units, for the passes of others
take as many times the yardstick as there are features.
"""

from __future__ import annotations

import functools
import math

import torch

from genkernels import ops
from genkernels._options import Spline
from genkernels.benchmarks.cases import Case, made
from genkernels.ops.rational_quadratic_spline import NAME
from genkernels.reference import made as made_reference
from genkernels.reference import rational_quadratic_spline as reference

#: (per bin, beside): 6 each of widths and heights for a softmax, a sum and a comparison.
_FLOPS = {"forward": (12, 45), "inverse": (12, 55), "forward+backward": (20, 150)}


def cases(device: str, quick: bool) -> list[Case]:
    if quick:
        return [case((64, 3), 4, "nflows", "forward+backward"), autoregressive_case((10, 8, 24, 24))]
    directions = ("forward", "inverse", "forward+backward")
    if device == "cuda":
        rows = [case((1 << 16, 64), 8, "nflows", direction) for direction in directions]
        return rows + [case((1 << 16, 64), 8, kind, "forward+backward") for kind in ("zuko", "circular")]
    rows = [case((4096, 16), 8, kind, way) for kind in ("nflows", "zuko", "circular") for way in directions]
    rows += [case((4096, 16), 8, "nflows", "forward+backward", torch.bfloat16)]
    return rows + [autoregressive_case(shape) for shape in ((20, 784, 256, 256), (100, 64, 512, 512))]


def case(
    shape: tuple[int, ...], bins: int, kind: str, direction: str, dtype: torch.dtype = torch.float32, bound: float = 5.0
) -> Case:
    """The last number of the row's shape is K."""
    count, params = math.prod(shape), 3 * bins - (kind != "circular")
    inverse, passes = direction == "inverse", 2.5 if "+" in direction else 1
    per_bin, beside = _FLOPS[direction]
    options = {"parametrization": kind, "bound": bound}
    way = ops.rational_quadratic_spline_inverse if inverse else ops.rational_quadratic_spline
    codes = (Spline[kind.upper()], bound, 1.0, 1e-3, inverse)
    # forward: x, params and y; backward: x, params, the gradient by y and those by x and params
    moved = 2 + params if passes == 1 else (2 + params) + (3 + 2 * params)
    return Case(
        name=f"{NAME}/{kind}",
        shape=(*shape, bins),
        dtype=dtype,
        direction=direction,
        inputs=functools.partial(_inputs, shape, params, dtype),
        op=functools.partial(way, **options),
        reference=lambda x, p: reference.rational_quadratic_spline(x, p, *codes),
        outputs=("x" if inverse else "y", "ldj"),
        bytes=count * moved * dtype.itemsize + shape[0] * 4 * (1 if passes == 1 else 2),
        flops=count * (per_bin * bins + beside),
        settings=options,
    )


def autoregressive_case(shape: tuple[int, ...], bins: int = 8) -> Case:
    """The inverse of a whole transform; shape: batch, features, hidden units of each layer."""
    batch, features, *hidden = shape
    params, (per_bin, beside) = 3 * bins - 1, _FLOPS["inverse"]
    options = {"parametrization": "zuko", "bound": 5.0}
    weights = made.live_weights(features, *hidden, params * features)

    def forward(x, *both):
        return ops.rational_quadratic_spline(x, made.params_of(x, both).movedim(1, 2), **options)

    def invert(z, *both):
        *layers, (order, counts, _) = made.split(z, both)
        return ops.made_spline_inverse(z, *layers, order, counts, **options)

    def passes(z, *both):
        *layers, (order, counts, _) = made.split(z, both)
        return made_reference.made_spline_inverse(
            z, None, *layers, order, counts, False, Spline.ZUKO, options["bound"], 1.0, 1e-3
        )

    return Case(
        name=f"{NAME}/autoregressive",
        shape=shape,
        dtype=torch.float32,
        direction="inverse",
        inputs=functools.partial(made.network_inputs, shape, params=params),
        op=invert,
        reference=passes,
        outputs=("x", "ldj"),
        bytes=4 * (weights + 2 * batch * features),
        flops=2 * batch * weights + batch * features * (per_bin * bins + beside),
        settings={"autoregressive": bins, **options},
        yardstick=forward,
        compiled=made.NOT_COMPILED,
    )


def _inputs(shape, params, dtype, rng) -> dict[str, torch.Tensor]:
    draw = functools.partial(torch.randn, generator=rng, device=rng.device)
    return {"x": (2 * draw(shape)).to(dtype), "params": (0.5 * draw((*shape, params))).to(dtype)}
