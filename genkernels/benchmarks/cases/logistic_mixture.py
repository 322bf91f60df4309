"""Benchmark cases of `genkernels.ops.logistic_mixture`: PixelCNN++'s loss on CIFAR-10's size, one-channel images, and
the draw.

Bytes: forward reads the parameters and x; backward reads both again and writes the parameters' gradients; a draw reads
the parameters and the noise and writes 64-bit indices. x is detached: nobody differentiates by data here.

Flops of a pixel and component, a transcendental function being one: each channel takes 26 forward (mean and scale in
levels 5, two edges 4, their order 3, three exponentials 3, the probability 11) and 19 more backward, each coefficient 3
and 6, the mixture 4 and 6.
"""

from __future__ import annotations

import functools
import math

import torch

from genkernels import ops
from genkernels.benchmarks.cases import Case
from genkernels.reference import logistic_mixture as reference


def cases(device: str, quick: bool) -> list[Case]:
    both, fp32, bf16 = "forward+backward", torch.float32, torch.bfloat16
    batch = 16 if device == "cpu" else 256
    rgb, grey = ((2, 8, 8), (3, 7, 7)) if quick else ((batch, 32, 32), (4 * batch, 28, 28))
    rows = [
        case("rgb", rgb, 3, 10, 256, both, fp32),
        case("grey16", grey, 1, 5, 16, both, fp32),
        case("rgb", rgb, 3, 10, 256, "sample", fp32),
    ]
    if not quick:
        rows += [
            case("grey256", grey, 1, 5, 256, both, fp32),
            case("grey256", grey, 1, 5, 256, "sample", fp32),
            case("rgb", rgb, 3, 10, 256, both, bf16),
            case("grey256", grey, 1, 5, 256, both, bf16),
            case("rgb", rgb, 3, 10, 256, "forward", fp32),
        ]
    return rows


def case(variant, images, channels, mixtures, levels, direction, dtype) -> Case:
    """One row; `images` is [N, H, W], the row's shape that of the parameters."""
    batch, *spatial = images
    shape = (batch, mixtures * (3 if channels == 1 else 10), *spatial)
    if direction == "sample":
        op = lambda params, noise: ops.logistic_mixture_sample(params, noise, levels=levels)  # noqa: E731
        plain = lambda params, noise: reference.logistic_mixture_sample(params, noise, levels)  # noqa: E731
    else:
        op = lambda params, x: ops.logistic_mixture_nll(params, x.detach(), levels=levels)  # noqa: E731
        plain = lambda params, x: reference.logistic_mixture_nll(params, x.detach(), levels)  # noqa: E731
    return Case(
        name=f"logistic_mixture/{variant}",
        shape=shape,
        dtype=dtype,
        direction=direction,
        inputs=functools.partial(_inputs, shape, channels, mixtures, levels, direction, dtype),
        op=op,
        reference=plain,
        outputs=("index",) if direction == "sample" else ("nll",),
        bytes=_bytes(shape, channels, direction, dtype),
        flops=_flops(shape, channels, mixtures, direction),
        settings={"channels": channels, "mixtures": mixtures, "levels": levels},
    )


def _inputs(shape, channels, mixtures, levels, direction, dtype, rng) -> dict[str, torch.Tensor]:
    batch, _, *spatial = shape
    draw = functools.partial(torch.randn, generator=rng, device=rng.device)
    params = draw(shape).mul_(0.5)
    rows = params[:, mixtures:].unflatten(1, (channels, -1, mixtures))
    rows[:, :, 1] -= 3  # scales of some 13 levels of 256, as of a network that has learnt something
    if direction == "sample":
        noise = torch.rand(batch, 1 + channels, *spatial, generator=rng, device=rng.device)
        return {"params": params.to(dtype), "noise": noise}
    level = ((0.5 * draw(batch, channels, *spatial) + 1) * (levels - 1) / 2).round().clamp(0, levels - 1)
    return {"params": params.to(dtype), "x": 2 * level / (levels - 1) - 1}


def _bytes(shape, channels, direction, dtype) -> int:
    params = math.prod(shape) * dtype.itemsize
    planes = shape[0] * math.prod(shape[2:])
    if direction == "sample":
        return params + planes * ((1 + channels) * 4 + channels * 8)
    forward = params + planes * channels * 4
    return forward if direction == "forward" else 2 * forward + params


def _flops(shape, channels, mixtures, direction) -> int:
    pixels, coefficients = shape[0] * math.prod(shape[2:]), 3 if channels == 3 else 0
    if direction == "sample":  # two passes over the logits, then one component
        return pixels * (6 * mixtures + 16 * channels + 3 * coefficients)
    forward = 26 * channels + 3 * coefficients + 4
    backward = 0 if direction == "forward" else forward + 19 * channels + 6 * coefficients + 6
    return pixels * mixtures * (forward + backward)
