"""Benchmark cases of `genkernels.ops.masked_conv`: layers of PixelCNNs.

Flops count live taps alone, two for each product, of the interior (borders included, as if padding were multiplied);
the backward has
two products of that size. Bytes: every tensor once in full; forward: x, weight, bias and condition in, the output out;
backward: the output's gradient, x, the weight and, for the gate, the pre-activation (which the forward writes too) in,
the gradients out.

The reference does as peers do: it multiplies the weight by a ready mask on every call, then calls ``F.conv2d``.
"""

from __future__ import annotations

import functools
import math

import torch

from genkernels import ops
from genkernels.benchmarks.cases import Case, constant
from genkernels.reference import masked_conv as reference
from genkernels.reference.masked_conv import ACTIVATIONS, MASK_TYPES, REGIONS, causal_mask

_FORWARD, _BOTH = "forward", "forward+backward"


def _row(variant, shape, outputs, kernel, mask_type="B", **options):
    """`shape` is x's, [N, Cin, H, W]."""
    return {"variant": variant, "shape": shape, "outputs": outputs, "kernel": kernel, "mask_type": mask_type} | options


def cases(device: str, quick: bool) -> list[Case]:
    fp32, bf16 = torch.float32, torch.bfloat16
    gated = {"activation": "gate", "condition": True}
    if quick:
        rows = [_row("3x3B", (4, 16, 8, 8), 16, (3, 3)), _row("gated", (2, 8, 9, 7), 16, (3, 3), **gated)]
        return [case(dtype=fp32, direction=direction, **row) for row in rows for direction in (_FORWARD, _BOTH)]
    batch = 16 if device == "cpu" else 256
    rows = [
        _row("3x3B", (batch, 64, 32, 32), 64, (3, 3)),
        _row("3x3B", (batch, 64, 28, 28), 64, (3, 3)),
        _row("7x7A", (batch, 1, 28, 28), 64, (7, 7), "A"),
        _row("5x5B", (batch, 64, 28, 28), 64, (5, 5)),
        _row("gated", (batch, 64, 28, 28), 128, (3, 3), **gated),
        _row("rgb", (batch, 66, 32, 32), 66, (3, 3), data_channels=3, activation="relu"),
        _row("vertical", (batch, 64, 28, 28), 64, (3, 3), region="vertical"),
        _row("horizontal", (batch, 64, 28, 28), 64, (1, 3), region="horizontal"),
        _row("digits", (64 if device == "cpu" else 1024, 64, 8, 8), 64, (3, 3)),
        _row("1x1", (batch, 64, 28, 28), 256, (1, 1)),
    ]
    halves = [rows[0], rows[4], rows[-1]] if device == "cpu" else rows
    wanted = [(row, direction, fp32) for row in rows for direction in (_FORWARD, _BOTH)]
    wanted += [(row, direction, bf16) for row in halves for direction in (_FORWARD, _BOTH)]
    return [case(dtype=dtype, direction=direction, **row) for row, direction, dtype in wanted]


def case(
    variant,
    shape,
    outputs,
    kernel,
    mask_type,
    dtype,
    direction,
    region="raster",
    data_channels=1,
    activation="none",
    condition=False,
) -> Case:
    options = {"mask_type": mask_type, "data_channels": data_channels, "region": region, "activation": activation}
    batch, inputs, height, width = shape
    of_mask = outputs, inputs, kernel, mask_type, data_channels, region, activation == "gate"
    mask = causal_mask(*of_mask)
    codes = MASK_TYPES.index(mask_type), data_channels, REGIONS.index(region), ACTIVATIONS.index(activation)
    left = outputs // 2 if activation == "gate" else outputs
    pixels = batch * height * width
    small = mask.numel() + outputs + (batch * outputs if condition else 0)
    forward = pixels * (inputs + left) + small
    backward = pixels * (left + inputs + inputs) + 2 * mask.numel() + outputs + (batch * outputs if condition else 0)
    kept = {"gate": 2 * outputs, "relu": left, "none": 0}[activation] * pixels
    live = 2 * int(mask.sum()) * pixels
    both = "+backward" in direction
    return Case(
        name=f"masked_conv/{variant}",
        shape=(*shape, outputs),
        dtype=dtype,
        direction=direction,
        inputs=functools.partial(_inputs, shape, outputs, kernel, condition, dtype),
        op=functools.partial(_ours, options),
        reference=functools.partial(_plain, of_mask, codes),
        outputs=("y",),
        bytes=(forward + (backward + kept if both else 0)) * dtype.itemsize,
        flops=live * (3 if both else 1),
        settings=options | {"kernel": kernel},
    )


def _ours(options, x, weight, bias, condition=None):
    return ops.masked_conv(x, weight, bias, condition=condition, **options)


_constant_mask = constant(causal_mask)


def _plain(of_mask, codes, x, weight, bias, condition=None):
    mask = _constant_mask(*of_mask, x.device)
    return reference.masked_conv(x, weight * mask, bias, condition, None, *codes)[0]


def _inputs(shape, outputs, kernel, condition, dtype, rng) -> dict[str, torch.Tensor]:
    draw = functools.partial(torch.randn, generator=rng, device=rng.device)
    weight = draw(outputs, shape[1], *kernel).mul_((shape[1] * math.prod(kernel)) ** -0.5)
    drawn = {"x": draw(shape), "weight": weight, "bias": draw(outputs)}
    if condition:
        drawn["condition"] = draw(shape[0], outputs)
    return {name: t.to(dtype) for name, t in drawn.items()}
