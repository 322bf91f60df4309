"""Benchmark cases of `genkernels.ops.made`: the autoregressive transform, affine and by splines of 8 bins, forward and
inverted, weights and all.

The transform is what is measured, not the layer: forward is every masked layer, the map of each feature and the
log-determinant. The reference of the inverse is its definition, D sequential passes. One forward pass of our own is the
yardstick of the inverse. Of splines the inverse alone is measured; the many features have few samples and units, for
each of the D passes that it is compared with takes 23 numbers a feature.

Bytes: z and x once, the live weights once. Flops: two for each live weight and sample, forward and inverse alike;
backward twice that. The unit for a transcendental function is lost in them; a spline's are counted in
`genkernels.benchmarks.cases.rational_quadratic_spline`.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
import torch.nn.functional as F

from genkernels import ops
from genkernels._options import Spline
from genkernels.benchmarks.cases import Case, constant
from genkernels.benchmarks.cases.rational_quadratic_spline import FLOPS as SPLINE_FLOPS
from genkernels.reference import made as reference
from genkernels.reference.affine_coupling import log_scale
from genkernels.reference.made import degrees_of, made_forward, plan

_NOT_COMPILED = "left out: the compiler would unroll D passes, for minutes"
LARGE, SMALL, QUICK = (100, 784, 1024, 1024), (100, 64, 512, 512), (10, 8, 24, 24)
LARGE_SPLINES, BINS = (20, 784, 256, 256), 8
_SPLINES = {"parametrization": "zuko", "bound": 5.0}


def cases(device: str, quick: bool) -> list[Case]:
    shapes = [QUICK] if quick else [LARGE, SMALL]
    affine = [case(shape, direction) for shape in shapes for direction in ("forward", "forward+backward", "inverse")]
    # on a GPU there is no solve by splines: passes against passes
    return affine + [spline_case(shape) for shape in ([QUICK] if quick else [LARGE_SPLINES, SMALL]) if device == "cpu"]


def case(shape: tuple[int, ...], direction: str) -> Case:
    """One row; shape: batch, features, hidden units of each layer."""
    batch, features, *hidden = shape
    inverse = direction == "inverse"
    weights = sum(math.ceil(a * b / 2) for a, b in itertools.pairwise([features, *hidden, 2 * features]))
    options = {"yardstick": forward, "compiled": _NOT_COMPILED} if inverse else {}
    return Case(
        name="made/affine",
        shape=shape,
        dtype=torch.float32,
        direction=direction,
        inputs=functools.partial(_inputs, shape),
        op=invert if inverse else forward,
        reference=plain_inverse if inverse else plain_forward,
        outputs=("x" if inverse else "z", "ldj"),
        bytes=4 * (weights + 2 * batch * features) * (3 if "+" in direction else 1),
        flops=2 * batch * weights * (3 if "+" in direction else 1),
        settings={"scale_map": "sigmoid"},
        **options,
    )


def spline_case(shape: tuple[int, ...]) -> Case:
    """The inverse by splines, zuko's."""
    batch, features, *hidden = shape
    params = 3 * BINS - 1
    weights = sum(math.ceil(a * b / 2) for a, b in itertools.pairwise([features, *hidden, params * features]))
    per_bin, beside = SPLINE_FLOPS["inverse"]
    return Case(
        name="made/spline",
        shape=shape,
        dtype=torch.float32,
        direction="inverse",
        inputs=functools.partial(_inputs, shape, params=params),
        op=invert_splines,
        reference=plain_inverse_of_splines,
        outputs=("x", "ldj"),
        bytes=4 * (weights + 2 * batch * features),
        flops=2 * batch * weights + batch * features * (per_bin * BINS + beside),
        settings={"spline": BINS, **_SPLINES},
        yardstick=forward_splines,
        compiled=_NOT_COMPILED,
    )


def degrees(features: int, hidden) -> list[torch.Tensor]:
    """Natural order; hidden degrees go round 1 … D − 1, sorted."""
    span = features - 1
    return [torch.arange(features) + 1, *((torch.arange(h) % span + 1).sort().values for h in hidden)]


@constant
def _plan(features: int, hidden: tuple[int, ...], device: str):
    order, counts = (t.to(device) for t in plan(degrees(features, hidden)))
    unit_degrees = degrees_of(order, counts, hidden)
    return order, counts, [*unit_degrees, unit_degrees[0]]


def _split(x, both):
    layers = len(both) // 2
    weights, biases = both[:layers], both[layers:]
    return weights, biases, _plan(x.shape[1], tuple(w.shape[0] for w in weights[:-1]), str(x.device))


def _params(x, both):
    """``[N, P, D]``"""
    weights, biases, (_, _, at) = _split(x, both)
    u, last = x, len(weights) - 1
    for layer, (w, b) in enumerate(zip(weights, biases, strict=True)):
        out = at[layer + 1] if layer < last else at[-1].repeat(w.shape[0] // x.shape[1])
        u = ops.masked_linear(u, w, b, at[layer], out, strict=layer == last)
        u = u if layer == last else F.relu(u)
    return u.unflatten(1, (-1, x.shape[1]))


def forward(x, *both):
    s, t = _params(x, both).unbind(1)
    ell = log_scale(s, 1)
    return x * torch.exp(ell) + t, ell.sum(1)


def invert(z, *both):
    weights, biases, (order, counts, _) = _split(z, both)
    return ops.made_inverse(z, weights, biases, order, counts, scale_map="sigmoid")


def plain_forward(x, *both):
    weights, biases, (order, counts, _) = _split(x, both)
    return made_forward(x, None, weights, biases, order, counts, False, 1, 1.0)


def plain_inverse(z, *both):
    weights, biases, (order, counts, _) = _split(z, both)
    return reference.made_inverse(z, None, weights, biases, order, counts, False, 1, 1.0)


def forward_splines(x, *both):
    return ops.rational_quadratic_spline(x, _params(x, both).movedim(1, 2), **_SPLINES)


def invert_splines(z, *both):
    weights, biases, (order, counts, _) = _split(z, both)
    return ops.made_spline_inverse(z, weights, biases, order, counts, **_SPLINES)


def plain_inverse_of_splines(z, *both):
    weights, biases, (order, counts, _) = _split(z, both)
    codes = Spline[_SPLINES["parametrization"].upper()], _SPLINES["bound"], 1.0, 1e-3
    return reference.made_spline_inverse(z, None, weights, biases, order, counts, False, *codes)


def _inputs(shape, rng, params=2) -> dict[str, torch.Tensor]:
    batch, features, *hidden = shape
    sizes = [features, *hidden, params * features]
    draw = functools.partial(torch.rand, generator=rng, device=rng.device)
    # torch.nn.Linear's own start, dead weights drawn too: they must not matter
    uniform = lambda n, *s: (2 * draw(s) - 1) * n**-0.5  # noqa: E731
    pairs = list(itertools.pairwise(sizes))
    return {
        "x": torch.randn((batch, features), generator=rng, device=rng.device),
        **{f"weight {i}": uniform(n, m, n) for i, (n, m) in enumerate(pairs)},
        **{f"bias {i}": uniform(n, m) for i, (n, m) in enumerate(pairs)},
    }
