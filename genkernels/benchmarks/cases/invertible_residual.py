"""Benchmark cases of `genkernels.ops.invertible_residual`: to a true residual of 1e-5 in every sample.

- ``mixed``: a tenth of the samples contracts at 0.97, the others at 0.5: LeakyReLU behind an orthogonal matrix, which
  all of a sample's units meet on one side;
- ``cnn``: 3-1-3 convolutions of norm 0.9 each.

Bytes: y and x once. Flops: those of one evaluation, as nobody knows beforehand how many it takes.
"""

from __future__ import annotations

import functools
import math

import torch

from genkernels import ops
from genkernels._options import Nonlinearity
from genkernels.benchmarks.cases import Case
from genkernels.benchmarks.cases.log_det_series import _shapes
from genkernels.benchmarks.cases.log_det_series import inputs as block_inputs
from genkernels.reference import _block
from genkernels.reference import invertible_residual as reference

ATOL, MOST = 1e-5, 1000


def cases(device: str, quick: bool) -> list[Case]:
    if quick:
        return [mixed(9, 6), cnn(2, (2, 4, 4), (8, 8))]
    return [mixed(512, 64), cnn(32, (12, 16, 16), (128, 128))]


def mixed(batch: int, features: int) -> Case:
    shapes = [(features, features)] * 2
    return _case("mixed", (batch, features), shapes, "leaky_relu", functools.partial(_mixed_inputs, batch, features))


def cnn(batch, size, widths) -> Case:
    kernels = (3, 1, 3)
    shapes = _shapes(size, widths, kernels)
    return _case(
        "cnn", (batch, *size), shapes, "lipswish", functools.partial(_cnn_inputs, batch, size, widths, kernels)
    )


def _case(variant, shape, shapes, activation, inputs) -> Case:
    """One row; its shape is that of y."""
    count = len(shapes)

    def op(y, parameters, *both):
        return ops.invertible_residual(
            y, both[:count], both[count:], activation, parameters, atol=ATOL, max_iterations=MOST
        ).x

    def plain(y, parameters, *both):
        kind = Nonlinearity[activation.upper()]
        return reference.invertible_residual(y, None, both[:count], both[count:], parameters, 0.0, ATOL, MOST, 5, kind)[
            0
        ]

    numbers, columns = sum(math.prod(s) for s in shapes), shape[0] * math.prod(shape[2:])
    return Case(
        name=f"invertible_residual/{variant}",
        shape=shape,
        dtype=torch.float32,
        direction="inverse",
        inputs=inputs,
        op=op,
        reference=plain,
        outputs=("x",),
        bytes=4 * (2 * math.prod(shape) + numbers),
        flops=2 * columns * numbers,
        settings={"atol": ATOL, "most": MOST, "activation": activation, "maps": count},
        compiled="it stops by the values",
    )


def _with_image(x, activation, parameters, weights, biases) -> dict[str, torch.Tensor]:
    kind = Nonlinearity[activation.upper()]
    y = x + _block.linearize(_block.Block(weights, biases, parameters, kind), x).value
    named = {"y": y, "parameters": parameters} | {f"weight {i}": w for i, w in enumerate(weights)}
    return named | {f"bias {i}": b for i, b in enumerate(biases)}


def _mixed_inputs(batch, features, rng) -> dict[str, torch.Tensor]:
    draw = functools.partial(torch.randn, generator=rng, device=rng.device)
    turn, other = (torch.linalg.qr(draw(features, features))[0] for _ in range(2))
    side = torch.where(torch.arange(batch, device=rng.device) % 10 == 0, 8.0, -8.0)[:, None]
    x = (side + draw(batch, features)) @ turn  # whose units are turn @ x
    parameters = torch.full((1,), 0.5 / 0.97, device=rng.device)
    biases = [0.01 * draw(features) for _ in range(2)]
    return _with_image(x, "leaky_relu", parameters, [turn.contiguous(), (0.97 * other).contiguous()], biases)


def _cnn_inputs(batch, size, widths, kernels, rng) -> dict[str, torch.Tensor]:
    given = list(block_inputs(batch, size, widths, kernels, 0.9, rng).values())
    count = len(widths) + 1
    return _with_image(given[0], "lipswish", given[2], given[3 : 3 + count], given[3 + count :])
