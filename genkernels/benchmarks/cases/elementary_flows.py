"""Benchmark cases of `genkernels.ops.planar_flow` and `radial_flow`: points through 16 shared layers, and the posterior
of a variational autoencoder, whose 8 layers are each example's own.

Bytes: forward reads z and writes it with the log-determinant, backward reads z and both gradients and writes one by z;
parameters are read twice, their gradients written. Flops of a row and layer, a transcendental function being one: see
`_FLOPS`, by number of features and beside; a backward pass's own recomputing does not count.
"""

from __future__ import annotations

import functools
import math

import torch

from genkernels import ops
from genkernels.benchmarks.cases import Case
from genkernels.reference import elementary_flows as reference

#: (per feature, beside): planar 4 + 8 dots and updates, radial 5 + 7.
_FLOPS = {"planar": (12, 25), "radial": (12, 45)}
_NAMES = {"planar": ("z", "w", "u", "b"), "radial": ("z", "center", "alpha", "beta")}


def cases(device: str, quick: bool) -> list[Case]:
    fp32, bf16 = torch.float32, torch.bfloat16
    if quick:
        return [case(kind, (64, 2), 2, False, fp32) for kind in _NAMES]
    rows = [((4096, 2), 16, False, fp32), ((4096, 2), 16, False, bf16), ((4096, 64), 16, False, fp32)]
    rows += [((100, 50, 40), 8, True, fp32), ((100, 40), 8, True, fp32)]
    if device == "cuda":
        rows += [((1 << 20, 2), 16, False, fp32), ((1024, 50, 40), 8, True, fp32)]
    return [case(kind, *row) for kind in _NAMES for row in rows]


def case(kind: str, shape: tuple[int, ...], layers: int, own: bool, dtype: torch.dtype) -> Case:
    """The last number of the row's shape is K."""
    groups, rows, features = shape[0] if own else 1, math.prod(shape[:-1]), shape[-1]
    parameters = groups * layers * (2 * features + 1 if kind == "planar" else features + 2)
    per_feature, beside = _FLOPS[kind]
    return Case(
        name=f"elementary_flows/{kind}{',amortised' if own else ''}",
        shape=(*shape, layers),
        dtype=dtype,
        direction="forward+backward",
        inputs=functools.partial(_inputs, kind, shape, layers, own, dtype),
        op={"planar": ops.planar_flow, "radial": ops.radial_flow}[kind],
        reference={"planar": reference.planar_flow, "radial": reference.radial_flow}[kind],
        outputs=("z_K", "ldj"),
        bytes=(5 * rows * features + 3 * parameters) * dtype.itemsize + 2 * rows * 4,
        flops=rows * layers * (per_feature * features + beside),
        settings={"kind": kind, "own": own},
    )


def _inputs(kind, shape, layers, own, dtype, rng) -> dict[str, torch.Tensor]:
    draw = functools.partial(torch.randn, generator=rng, device=rng.device)
    lead, features = (shape[:1] if own else ()), shape[-1]
    vector, number = (*lead, layers, features), (*lead, layers)
    if kind == "planar":  # w of length 1, û of some 0.3, as of a flow that has begun to learn
        parameters = [draw(vector) * features**-0.5, 0.5 * draw(vector) * features**-0.5, draw(number)]
    else:
        parameters = [draw(vector), draw(number), draw(number)]
    drawn = [draw(shape), *parameters]
    return {name: value.to(dtype) for name, value in zip(_NAMES[kind], drawn, strict=True)}
