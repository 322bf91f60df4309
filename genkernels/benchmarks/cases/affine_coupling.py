"""Benchmark cases of `genkernels.ops.affine_coupling`, parameters ready, pass-through copy included.

Bytes in half-tensors, a half-tensor being half of x: forward reads x (2) and s, t (1 + 1) and writes z (2); backward
reads the gradient of z (2), the transformed x (1) and s (1) and writes the gradients of x (2), s and t (1 + 1).
Checkerboard parameters have full resolution and memory moves in whole lines, so every tensor counts in full there.
"""

from __future__ import annotations

import functools
import math

import torch

from genkernels import ops
from genkernels._options import SCALE_CONSTANTS
from genkernels.benchmarks.cases import Case
from genkernels.reference import affine_coupling as reference
from genkernels.reference.affine_coupling import Layout, ScaleMap, Split

#: Flops of one transformed element, (forward, backward), the log-determinant's sum included.
_FLOPS = {"exp": (4, 4), "sigmoid": (6, 7), "tanh": (5, 8), "additive": (1, 0)}
_DRAWN = {"forward": ("x", "params"), "inverse": ("z", "params"), "reverse": ("grad_z", "grad_ldj", "z", "params")}


def cases(device: str, quick: bool) -> list[Case]:
    both, fp32, bf16 = "forward+backward", torch.float32, torch.bfloat16
    checkerboard, interleaved = {"split": "checkerboard"}, {"layout": "interleaved"}
    main = [(scale_map, both, fp32, {}) for scale_map in ("exp", "sigmoid", "tanh", "additive")]
    if quick:
        rows = [*main[:2], ("tanh", both, bf16, {}), ("exp", "inverse", fp32, {}), ("exp", both, fp32, checkerboard)]
        return [case((16, 24, 16, 16), *row) for row in rows]
    rows = main + [(scale_map, direction, bf16, options) for scale_map, direction, _, options in main]
    rows += [("exp", direction, fp32, {}) for direction in ("forward", "inverse", "reverse")]
    rows += [("exp", both, fp32, checkerboard), ("exp", both, fp32, interleaved)]
    small = (64, 48, 32, 32)
    if device == "cpu":
        return [case(small, *row) for row in rows]
    # the small shape is too small to fill a GPU: it shows what a call costs there
    return [case((256, 96, 64, 64), *row) for row in rows] + [case(small, *row) for row in main]


def case(shape, scale_map, direction, dtype, options) -> Case:
    """One row; `options` are those of ``split`` and ``layout`` that differ from the operator's defaults."""
    settings = {"scale_map": scale_map, "split": "channel", "layout": "halves", **options}
    code = ScaleMap[scale_map.upper()]
    codes = (code, SCALE_CONSTANTS.get(code, 1.0), Split[settings["split"].upper()], Layout[settings["layout"].upper()])
    first = direction.split("+", 1)[0]
    op = {
        "forward": ops.affine_coupling,
        "inverse": ops.affine_coupling_inverse,
        "reverse": ops.affine_coupling_reverse,
    }
    op = functools.partial(op[first], **settings)
    if first == "reverse":
        plain = lambda gz, gl, z, params: reference.affine_coupling_reverse(gz, gl, z, params, *codes)  # noqa: E731
    else:
        plain = lambda x, params: reference.affine_coupling(x, params, *codes, False, first == "inverse")  # noqa: E731
    return Case(
        name="/".join(["affine_coupling", ",".join([scale_map, *options.values()])]),
        shape=shape,
        dtype=dtype,
        direction=direction,
        inputs=functools.partial(_inputs, shape, dtype, settings, _DRAWN[first]),
        op=op,
        reference=plain,
        outputs={"forward": ("z", "ldj"), "inverse": ("x", "ldj"), "reverse": ("x", "grad_x", "grad_params")}[first],
        bytes=_bytes(shape, dtype, settings, direction),
        flops=_flops(shape, scale_map, direction),
        settings=settings,
    )


def _inputs(shape, dtype, settings, names, rng) -> dict[str, torch.Tensor]:
    batch, channels, *spatial = shape
    count = channels * (2 if settings["split"] == "checkerboard" else 1)
    if settings["scale_map"] == "additive":
        count //= 2
    draw = functools.partial(torch.randn, generator=rng, device=rng.device)
    x = draw(shape).to(dtype)
    # the spread of a trained network's output: neither constant nor in the scale map's saturated ends
    params = draw(batch, count, *spatial).mul_(0.5).to(dtype)
    drawn = {"x": x, "z": x, "params": params}
    if "grad_z" in names:
        drawn |= {"grad_z": draw(shape).to(dtype), "grad_ldj": draw(batch)}
    return {name: drawn[name] for name in names}


def _bytes(shape, dtype, settings, direction) -> int:
    additive, checkerboard = settings["scale_map"] == "additive", settings["split"] == "checkerboard"
    s, t, moved = (2, 2, 2) if checkerboard else (1, 1, 1)
    forward, backward = 2 + s + t + 2, (2 + moved + s) + (2 + s + t)
    if additive:  # no log-scale; the gradients are z's and a part of it
        forward, backward = 2 + t + 2, 0
    halves = {
        "forward": forward,
        "inverse": forward,
        "reverse": 2 + s + t + 2 + 2 + 2 + s + t,
        "forward+backward": forward + backward,
    }[direction]
    return halves * math.prod(shape) * dtype.itemsize // 2


def _flops(shape, scale_map, direction) -> int:
    forward, backward = _FLOPS[scale_map]
    each = forward + backward if direction in ("forward+backward", "reverse") else forward
    return each * math.prod(shape) // 2
