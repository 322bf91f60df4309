"""Benchmark cases of `genkernels.ops.bias_leaky_relu`: what follows a critic's convolution.

Bytes: forward reads x and writes y; backward reads the gradient and y and writes the gradient of x. The bias is small.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from genkernels import ops
from genkernels.benchmarks.cases import Case


def cases(device: str, quick: bool) -> list[Case]:
    shape = (4, 16, 8, 8) if quick else (16, 64, 64, 64) if device == "cpu" else (64, 256, 128, 128)
    rows = [("images", shape, torch.float32)]
    if not quick:
        rows += [("images", shape, torch.bfloat16), ("vectors", (4096, 512), torch.float32)]
    return [case(*row) for row in rows]


def case(variant, shape, dtype) -> Case:
    def inputs(rng):
        draw = functools.partial(torch.randn, generator=rng, device=rng.device)
        return {"x": draw(shape).to(dtype), "bias": draw(shape[1]).mul_(0.1)}

    return Case(
        name=f"bias_leaky_relu/{variant}",
        shape=shape,
        dtype=dtype,
        direction="forward+backward",
        inputs=inputs,
        op=ops.bias_leaky_relu,
        reference=_formula,
        outputs=("y",),
        bytes=5 * math.prod(shape) * dtype.itemsize,
        flops=5 * math.prod(shape),
    )


def _formula(x, bias):
    """In fp32 at least, rounded once, as the operator has it."""
    a = x.to(bias.dtype) + bias.view(-1, *[1] * (x.dim() - 2))
    return (F.leaky_relu(a, 0.2) * math.sqrt(2)).to(x.dtype)
