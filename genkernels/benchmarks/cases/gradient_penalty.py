"""Benchmark cases of `genkernels.ops.gradient_penalty`: the points of a penalty and the penalty of their gradients; and
whole critics with their gradients (`genkernels.benchmarks.critics`).

Bytes: points read real and fake and are written; the penalty reads the gradients, its backward reads them again and
writes as much. What goes by samples is small. The definition adds up squares in fp64; the yardstick ``one pass`` of the
penalty is the formula as it is mostly written, in fp32.
"""

from __future__ import annotations

import functools
import math

import torch

from genkernels import ops
from genkernels.benchmarks import critics
from genkernels.benchmarks.cases import Case
from genkernels.reference import gradient_penalty as reference


def cases(device: str, quick: bool) -> list[Case]:
    shapes = [(64, 3, 32, 32), (16, 3, 256, 256)] if device == "cpu" else [(256, 3, 32, 32), (64, 3, 512, 512)]
    fp32, bf16 = torch.float32, torch.bfloat16
    rows = [(shape, dtype) for dtype in (fp32, bf16) for shape in shapes]
    operators = [case(*row) for row in ([((8, 3, 16, 16), fp32)] if quick else rows) for case in (_points, _penalty)]
    if quick:
        networks = {"convolutional": (critics.convolutional(4, 8), 2, 8)}
    else:
        batch, width = (16, 32) if device == "cpu" else (128, 64)
        networks = {"convolutional": (critics.convolutional(width), batch, 32)}
        networks["residual"] = (critics.Residual(128), batch, 32)
    return operators + [
        case(name, *row) for name, row in networks.items() for case in (critics.penalty_case, critics.step_case)
    ]


def _points(shape, dtype) -> Case:
    return Case(
        name="gradient_penalty/points",
        shape=shape,
        dtype=dtype,
        direction="forward",
        inputs=functools.partial(_inputs, shape, dtype, ("real", "fake", "u")),
        op=ops.interpolate_pairs,
        reference=reference.interpolate_pairs,
        outputs=("x",),
        bytes=3 * math.prod(shape) * dtype.itemsize,
        flops=3 * math.prod(shape),
    )


def _penalty(shape, dtype) -> Case:
    return Case(
        name="gradient_penalty/penalty",
        shape=shape,
        dtype=dtype,
        direction="forward+backward",
        inputs=functools.partial(_inputs, shape, dtype, ("gradient",)),
        op=ops.gradient_penalty,
        reference=lambda gradient: reference.gradient_penalty(gradient, 1.0, False)[0],
        outputs=("penalty",),
        bytes=3 * math.prod(shape) * dtype.itemsize,
        flops=3 * math.prod(shape),
        yardstick=lambda gradient: (gradient.flatten(1).norm(dim=1) - 1).square(),
    )


def _inputs(shape, dtype, names, rng) -> dict[str, torch.Tensor]:
    draw = functools.partial(torch.randn, generator=rng, device=rng.device)
    drawn = {"u": torch.rand(shape[0], generator=rng, device=rng.device)}
    # norms about 1, as of a critic that the penalty has reached
    scale = math.prod(shape[1:]) ** -0.5 if names == ("gradient",) else 1.0
    drawn |= {name: draw(shape).mul_(scale).to(dtype) for name in names if name != "u"}
    return {name: drawn[name] for name in names}
