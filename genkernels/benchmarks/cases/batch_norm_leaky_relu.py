"""Benchmark cases of `genkernels.ops.batch_norm_leaky_relu`: what follows a generator's convolution.

Bytes: forward reads x and writes y; backward reads the gradient and x and writes the gradient of x. Where a channel is
too large for the caches, what is read is read twice.

Flops: 8 a number forward (two sums, the line, the leaky ReLU), 11 backward.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from genkernels import ops
from genkernels.benchmarks.cases import Case


def cases(device: str, quick: bool) -> list[Case]:
    shape = (4, 16, 8, 8) if quick else (16, 64, 64, 64) if device == "cpu" else (64, 256, 64, 64)
    rows = [("images", shape, torch.float32)]
    if not quick:
        rows += [("images", shape, torch.bfloat16), ("digits", (64, 64, 8, 8), torch.float32)]
    return [case(*row) for row in rows]


def case(variant, shape, dtype) -> Case:
    def inputs(rng):
        draw = functools.partial(torch.randn, generator=rng, device=rng.device)
        return {"x": draw(shape).to(dtype), "weight": 1 + 0.1 * draw(shape[1]), "bias": draw(shape[1]).mul_(0.1)}

    return Case(
        name=f"batch_norm_leaky_relu/{variant}",
        shape=shape,
        dtype=dtype,
        direction="forward+backward",
        inputs=inputs,
        op=lambda x, weight, bias: ops.batch_norm_leaky_relu(x, weight, bias).y,
        reference=_formula,
        outputs=("y",),
        bytes=5 * math.prod(shape) * dtype.itemsize,
        flops=19 * math.prod(shape),
    )


def _formula(x, weight, bias):
    return F.relu(F.batch_norm(x, None, None, weight, bias, training=True), inplace=True)
