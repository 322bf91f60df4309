"""Benchmark cases of `genkernels.ops.made`: the autoregressive affine transform, forward and inverted, weights and all.

The transform is what is measured, not the layer: forward is every masked layer, the scale map and the log-determinant.
The reference of the inverse is its definition, D sequential passes. One forward pass of our own is the yardstick of the
inverse.

Bytes: z and x once, the live weights once. Flops: two for each live weight and sample, forward and inverse alike;
backward twice that. The unit for a transcendental function is lost in them.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
import torch.nn.functional as F

from genkernels import ops
from genkernels.benchmarks.cases import Case, constant
from genkernels.reference import made as reference
from genkernels.reference.made import degrees_of, made_forward, plan

NOT_COMPILED = "left out: the compiler would unroll D passes, for minutes"
LARGE, SMALL, QUICK = (100, 784, 1024, 1024), (100, 64, 512, 512), (10, 8, 24, 24)


def cases(device: str, quick: bool) -> list[Case]:
    shapes = [QUICK] if quick else [LARGE, SMALL]
    return [case(shape, direction) for shape in shapes for direction in ("forward", "forward+backward", "inverse")]


def case(shape: tuple[int, ...], direction: str) -> Case:
    """One row; shape: batch, features, hidden units of each layer."""
    batch, features, *hidden = shape
    inverse = direction == "inverse"
    weights = live_weights(features, *hidden, 2 * features)
    options = {"yardstick": forward, "compiled": NOT_COMPILED} if inverse else {}
    return Case(
        name="made/affine",
        shape=shape,
        dtype=torch.float32,
        direction=direction,
        inputs=functools.partial(network_inputs, shape),
        op=invert if inverse else forward,
        reference=plain_inverse if inverse else plain_forward,
        outputs=("x" if inverse else "z", "ldj"),
        bytes=4 * (weights + 2 * batch * features) * (3 if "+" in direction else 1),
        flops=2 * batch * weights * (3 if "+" in direction else 1),
        settings={"scale_map": "sigmoid"},
        **options,
    )


def live_weights(*sizes: int) -> int:
    """Of layers between units of these numbers."""
    return sum(math.ceil(a * b / 2) for a, b in itertools.pairwise(sizes))


def degrees(features: int, hidden) -> list[torch.Tensor]:
    """Natural order; hidden degrees go round 1 … D − 1, sorted."""
    span = features - 1
    return [torch.arange(features) + 1, *((torch.arange(h) % span + 1).sort().values for h in hidden)]


@constant
def _plan(features: int, hidden: tuple[int, ...], params: int, device: str):
    order, counts = (t.to(device) for t in plan(degrees(features, hidden)))
    unit_degrees = degrees_of(order, counts, hidden)
    return order, counts, [*unit_degrees, unit_degrees[0].repeat(params)]


def split(x, both):
    layers = len(both) // 2
    weights, biases = both[:layers], both[layers:]
    *hidden, outputs = (w.shape[0] for w in weights)
    return weights, biases, _plan(x.shape[1], tuple(hidden), outputs // x.shape[1], str(x.device))


def params_of(x, both):
    """``[N, P, D]``, the parameters of each feature."""
    weights, biases, (_, _, at) = split(x, both)
    u, last = x, len(weights) - 1
    for layer, (w, b) in enumerate(zip(weights, biases, strict=True)):
        u = ops.masked_linear(u, w, b, at[layer], at[layer + 1], strict=layer == last)
        u = u if layer == last else F.relu(u)
    return u.unflatten(1, (-1, x.shape[1]))


def forward(x, *both):
    weights, biases, (order, counts, _) = split(x, both)
    return ops.made_forward(x, weights, biases, order, counts, scale_map="sigmoid")


def invert(z, *both):
    weights, biases, (order, counts, _) = split(z, both)
    return ops.made_inverse(z, weights, biases, order, counts, scale_map="sigmoid")


def plain_forward(x, *both):
    weights, biases, (order, counts, _) = split(x, both)
    return made_forward(x, [], weights, biases, [], [order], [counts], False, 1, 1.0)[:2]


def plain_inverse(z, *both):
    weights, biases, (order, counts, _) = split(z, both)
    return reference.made_inverse(z, None, weights, biases, order, counts, False, 1, 1.0)


def network_inputs(shape, rng, params=2) -> dict[str, torch.Tensor]:
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
