"""Benchmark cases of `genkernels.ops.log_det_series`: the residual blocks of normflows' examples, a step of training
each: a fully connected one on points, and one of 3-1-3 convolutions.

Bytes: x, the probes, the weights and the gradients once each; the sums are written and read.

Flops: a pass of g is two a weight and column (a sample, a pixel). Forward takes 1 + n passes for n terms (for points of
D features, whose Jacobians can be taken whole, 1 + D where that is less), backward 1 (the slopes anew), 2 (tangents and
cotangents), 1 (the gradient of x) and 2 (those of the weights); an exact first term one product of the middle
map's size forward and three backward, for one pass of the probe less in the sums.
"""

from __future__ import annotations

import functools
import math

import torch

from genkernels import ops
from genkernels._options import Nonlinearity
from genkernels.benchmarks.cases import Case
from genkernels.ops.log_det_series import FIRST_TERMS
from genkernels.reference import _block
from genkernels.reference import log_det_series as reference

#: By name: batch, size of a sample, widths, kernels.
BLOCKS = {"mlp": (500, (2,), (128, 128, 128), None), "cnn": (32, (12, 16, 16), (128, 128), (3, 1, 3))}
QUICK = {"mlp": (7, (2,), (8, 8), None), "cnn": (3, (2, 4, 4), (8, 8), (3, 1, 3))}
NORM = 0.9


def cases(device: str, quick: bool) -> list[Case]:
    blocks, both = QUICK if quick else BLOCKS, "forward+backward"
    rows = [case("mlp", blocks["mlp"], 5, both), case("cnn", blocks["cnn"], 5, both)]
    if quick:
        return rows
    return [
        *rows,
        case("mlp", blocks["mlp"], 10, both),
        case("cnn", blocks["cnn"], 10, both),
        case("cnn", blocks["cnn"], 5, both, "exact"),
    ]


def case(variant, block, terms, direction, first_term=FIRST_TERMS[0]) -> Case:
    """One row; its shape is (batch, size of a sample, terms)."""
    batch, size, widths, kernels = block
    count = len(widths) + 1
    weights = [1.0] * terms

    def op(x, probes, parameters, *both):
        out = ops.log_det_series(
            x,
            both[:count],
            both[count:],
            "lipswish",
            parameters.detach(),
            probes=probes.detach(),
            terms=weights,
            first_term=first_term,
        )
        return out.value, out.log_det

    def plain(x, probes, parameters, *both):
        parameters, probes = parameters.detach(), probes.detach()
        kind = Nonlinearity.LIPSWISH
        m = (
            _block.trace_map(_block.Block(both[:count], both[count:], parameters, kind))
            if first_term == "exact"
            else None
        )
        return reference.log_det_series(x, both[:count], both[count:], parameters, m, probes, weights, kind)[:2]

    numbers = sum(math.prod(shape) for shape in _shapes(size, widths, kernels))
    columns = batch * math.prod(size[1:])
    name = f"log_det_series/{variant}" + ("/exact first term" if first_term == "exact" else "")
    products = terms if kernels else min(terms, size[0])
    middle = 2 * columns * widths[0] * widths[-1] * 4 if first_term == "exact" else 0
    return Case(
        name=name,
        shape=(batch, *size, terms),
        dtype=torch.float32,
        direction=direction,
        inputs=functools.partial(inputs, batch, size, widths, kernels, NORM),
        op=op,
        reference=plain,
        outputs=("value", "log_det"),
        bytes=4 * (6 * batch * math.prod(size) + 3 * numbers),
        flops=2 * columns * numbers * (7 + products) + middle,
        settings={"terms": terms, "first_term": first_term, "kernels": kernels},
        compiled="the series' derivative is a function of its own, which torch.compile takes by parts alone",
    )


def _shapes(size, widths, kernels) -> list[tuple[int, ...]]:
    outs, ins = [*widths, size[0]], [size[0], *widths]
    return [
        (o, i, *(() if kernels is None else (kernels[n],) * 2)) for n, (o, i) in enumerate(zip(outs, ins, strict=True))
    ]


def inputs(batch, size, widths, kernels, norm, rng) -> dict[str, torch.Tensor]:
    """x, probes, steepness of the activations, weights of a norm of at most `norm` each, biases."""
    draw = functools.partial(torch.randn, generator=rng, device=rng.device)
    signs = 2.0 * torch.randint(0, 2, (1, batch, *size), generator=rng, device=rng.device) - 1
    named = {
        "x": draw(batch, *size),
        "probes": signs,
        "parameters": 0.5 + torch.rand(len(widths), generator=rng, device=rng.device),
    }
    shapes = _shapes(size, widths, kernels)
    for i, shape in enumerate(shapes):
        weight = draw(shape)
        taps = 1 if kernels is None else kernels[i]
        named[f"weight {i}"] = norm * weight / (taps * torch.linalg.matrix_norm(weight.flatten(1), 2))
    return named | {f"bias {i}": 0.1 * draw(shape[0]) for i, shape in enumerate(shapes)}
