"""Benchmark cases of `genkernels.ops.spectral_norm`: the weights of an SN-GAN critic (8 layers, 2.9 M weights), and
those of residual blocks as convolutions.

Bytes: forward reads the weights once and writes the normalised ones; backward reads gradients and weights and writes
gradients. u and v are read and written, but too small to count beside them; of a convolution they are counted.

Flops: a power iteration is two products with the weight, its norm none more; normalising one multiplication a weight;
backward three (the inner product, the scaling, the outer product).
"""

from __future__ import annotations

import functools
import math

import torch

from genkernels import ops
from genkernels.benchmarks.cases import Case
from genkernels.ops import CONVOLUTION, Geometry
from genkernels.reference import spectral_norm as reference

#: Miyato et al., table 3: 3×3 of stride 1 and 4×4 of stride 2 in turn, and the last linear layer.
CRITIC = [
    *((64, 3, 3, 3), (64, 64, 4, 4), (128, 64, 3, 3), (128, 128, 4, 4)),
    *((256, 128, 3, 3), (256, 256, 4, 4), (512, 256, 3, 3), (1, 8192)),
]
#: Residual blocks of 3-1-3 convolutions on 12×16×16.
BLOCKS = [(128, 12, 3, 3), (128, 128, 1, 1), (12, 128, 3, 3)]


def cases(device: str, quick: bool) -> list[Case]:
    both = "forward+backward"
    critic = [(8, 3, 3, 3), (16, 8, 4, 4), (2, 256)] if quick else CRITIC
    blocks, size = ([(8, 4, 3, 3), (4, 8, 3, 3)], (4, 4)) if quick else (BLOCKS * 4, (16, 16))
    rows = [case("critic", critic, None, both), case("convolutions", blocks, size, both)]
    return rows if quick else [*rows, case("critic", critic, None, "forward")]


def case(variant, weights, size, direction) -> Case:
    """One row; its shape is (number of weights, their numbers in all)."""
    geometries = [_geometry(shape, size) for shape in weights]
    plan = reference.as_plan(geometries)
    count = len(weights)

    def op(*tensors):
        lists = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        out = ops.spectral_norm(
            *([t.detach() for t in some] if i else some for i, some in enumerate(lists)), geometries
        )
        return *out.weights, out.sigma

    def plain(*tensors):
        lists = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        out = reference.spectral_norm(
            *([t.detach() for t in some] if i else some for i, some in enumerate(lists)), plan
        )
        return *out[:count], out[-1]

    numbers = sum(math.prod(shape) for shape in weights)
    return Case(
        name=f"spectral_norm/{variant}",
        shape=(count, numbers),
        dtype=torch.float32,
        direction=direction,
        inputs=functools.partial(_inputs, weights, size),
        op=op,
        reference=plain,
        outputs=(*(f"weight {i}" for i in range(count)), "sigma"),
        bytes=4 * numbers * (2 if direction == "forward" else 5),
        flops=_flops(weights, size, direction),
        settings={"size": size},
    )


def _geometry(shape, size) -> Geometry:
    if size is None:
        return Geometry()
    return Geometry(CONVOLUTION, padding=(0, shape[2] // 2, shape[3] // 2))


def _inputs(weights, size, rng) -> dict[str, torch.Tensor]:
    draw = functools.partial(torch.randn, generator=rng, device=rng.device)
    named = {f"weight {i}": draw(shape) / math.sqrt(math.prod(shape[1:])) for i, shape in enumerate(weights)}
    for letter, axis in (("u", 0), ("v", 1)):
        for i, shape in enumerate(weights):
            full = shape[0] if axis == 0 else math.prod(shape[1:])
            vector = draw((full,) if size is None else (shape[axis], *size))
            named[f"{letter} {i}"] = vector / vector.norm()
    return named


def _flops(weights, size, direction) -> int:
    places = 1 if size is None else math.prod(size)
    numbers = sum(math.prod(shape) for shape in weights)
    forward = 4 * places * numbers + numbers
    return forward if direction == "forward" else forward + 2 * places * numbers + 3 * numbers
