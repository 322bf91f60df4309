"""Benchmark cases of `genkernels.ops.upfirdn2d`: the low-pass filter 1, 3, 3, 1 about a change of resolution by 2.

Bytes: forward reads x and writes y; backward reads the gradient of y and writes that of x. Flops: a product and a sum
for each tap that meets a number, along x for every row of x, along y for every row of y; backward likewise.
"""

from __future__ import annotations

import functools
import math

import torch

from genkernels import ops
from genkernels.benchmarks.cases import Case, constant
from genkernels.reference import upfirdn2d as reference

_TAPS = (0.125, 0.375, 0.375, 0.125)
#: (up, down, padding), by name.
_KINDS = {"up": (2, 1, (2, 1, 2, 1)), "down": (1, 2, (1, 1, 1, 1)), "smooth": (1, 1, (2, 1, 2, 1))}


@constant
def _taps(device: torch.device) -> torch.Tensor:
    return torch.tensor(_TAPS, device=device)


def cases(device: str, quick: bool) -> list[Case]:
    shape = (2, 4, 16, 16) if quick else (16, 64, 64, 64) if device == "cpu" else (64, 128, 128, 128)
    rows = [(kind, torch.float32) for kind in (list(_KINDS)[:2] if quick else _KINDS)]
    return [case(shape, *row) for row in (rows if quick else [*rows, ("up", torch.bfloat16)])]


def case(shape, kind, dtype) -> Case:
    up, down, padding = _KINDS[kind]
    samples, channels, height, width = shape
    planes, results = samples * channels, (height * up // down, width * up // down)
    numbers = math.prod(shape) + planes * math.prod(results)
    each = len(_TAPS) // up
    products = planes * each * (height * results[1] + math.prod(results))
    return Case(
        name=f"upfirdn2d/{kind}",
        shape=shape,
        dtype=dtype,
        direction="forward+backward",
        inputs=functools.partial(_inputs, shape, dtype),
        op=lambda x: ops.upfirdn2d(x, _taps(x.device), up=up, down=down, padding=padding, gain=up * up),
        reference=lambda x: reference.upfirdn2d(x, *[_taps(x.device)] * 2, up, down, padding, float(up * up), False),
        outputs=("y",),
        bytes=2 * numbers * dtype.itemsize,
        flops=4 * products,
        settings={"up": up, "down": down},
    )


def _inputs(shape, dtype, rng) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(shape, generator=rng, device=rng.device).to(dtype)}
