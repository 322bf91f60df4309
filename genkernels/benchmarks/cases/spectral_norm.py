"""Benchmark cases of `genkernels.ops.spectral_norm`: the weights of an SN-GAN critic (8 layers, 2.9 M weights), those
of residual blocks as convolutions, and two rows of layers at batch 2, where the norms weigh most: a whole pass of the
critic, and its weights as linear layers side by side ("update and backward": as little as there can be beside them).
The yardstick of both is the same with the weights as they are, and what a provider takes beyond it is the price of the
norms. Ours runs the layers that `genkernels.nn.spectral_norm_` makes, which decide by bytes which weights they write.

The pass gives each sample's features beside its score, and all of them are held against the truth as one tensor. Two
scores alone are a matter of luck: moving the weights by one rounding moves the reference's own by 0.9e-6 to 2.7e-6 of
their length, where its error happens to be 0.8e-6; that of features and scores together is 1.8e-6 each time. A score is
as large as a feature, so that one which is wrong shows.

Bytes: forward reads the weights once and writes the normalised ones; backward reads gradients and weights and writes
gradients; where a layer does without its normalised weight, forward reads the weight, and backward reads and writes the
gradient (of a linear layer it writes it, and the product reads the weight once more). u and v are read and written, but
too small to count beside them; of a convolution they are counted.

Flops: a power iteration is two products with the weight, its norm none more; normalising one multiplication a weight;
backward three (the inner product, the scaling, the outer product). A pass of the critic adds three products an input.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import increment_version

from genkernels import ops
from genkernels.benchmarks.cases import Case
from genkernels.nn import _scaled_norm
from genkernels.nn.spectral_norm import join, parts_below, spectral_norm_
from genkernels.ops import CONVOLUTION, Geometry
from genkernels.reference import spectral_norm as reference

#: Miyato et al., table 3: 3×3 of stride 1 and 4×4 of stride 2 in turn, and the last linear layer.
CRITIC = [
    *((64, 3, 3, 3), (64, 64, 4, 4), (128, 64, 3, 3), (128, 128, 4, 4)),
    *((256, 128, 3, 3), (256, 256, 4, 4), (512, 256, 3, 3), (1, 8192)),
]
SLOPE = 0.1  # of its leaky ReLUs
#: Residual blocks of 3-1-3 convolutions on 12×16×16.
BLOCKS = [(128, 12, 3, 3), (128, 128, 1, 1), (12, 128, 3, 3)]


def cases(device: str, quick: bool) -> list[Case]:
    both = "forward+backward"
    critic = [(8, 3, 3, 3), (16, 8, 4, 4), (2, 256)] if quick else CRITIC
    blocks, size = ([(8, 4, 3, 3), (4, 8, 3, 3)], (4, 4)) if quick else (BLOCKS * 4, (16, 16))
    rows = [case("critic", critic, None, both), case("convolutions", blocks, size, both)]
    return [
        *rows,
        layers("critic pass", critic, 8 if quick else 32),
        layers("update and backward", critic, None),
        *([] if quick else [case("critic", critic, None, "forward")]),
    ]


def case(variant, weights, size, direction) -> Case:
    """One row; its shape is (number of weights, their numbers in all)."""
    count, numbers = len(weights), sum(math.prod(shape) for shape in weights)
    op, plain = (functools.partial(_weights, normalise, count) for normalise in _normalisations(weights, size))
    return Case(
        name=f"spectral_norm/{variant}",
        shape=(count, numbers),
        dtype=torch.float32,
        direction=direction,
        inputs=functools.partial(_inputs, weights, size),
        op=op,
        reference=plain,
        outputs=tuple(f"weight {i}" for i in range(count)),
        bytes=4 * numbers * (2 if direction == "forward" else 5),
        flops=_flops(weights, size, direction),
        settings={"size": size, "layers": ""},
        constants=_vectors(count),
    )


def layers(variant: str, weights, side: int | None, batch: int = 2) -> Case:
    """One row: the critic's features and scores of a batch of images of this side, and their gradients; or, without a
    side, what linear layers of its weights make of one batch each, and the gradients by the weights."""
    _, plain = _normalisations(weights, None)
    count, numbers = len(weights), sum(math.prod(shape) for shape in weights)
    kind, shape = ("critic", (batch, 3, side, side)) if side else ("matrices", (batch, _widest(weights)))
    run = scores if side else products

    def inputs(rng):
        return {"x": torch.randn(shape, generator=rng, device=rng.device), **_inputs(weights, None, rng)}

    return Case(
        name=f"spectral_norm/{variant}",
        shape=shape,
        dtype=torch.float32,
        direction="forward+backward",
        inputs=inputs,
        op=_Layers(kind, weights),
        reference=lambda x, *tensors: run(x, plain(*tensors)[:count]),
        outputs=("features and scores" if side else "products",),
        bytes=4 * (5 * numbers - 2 * _unwritten(kind, weights, shape)),
        flops=_flops(weights, None, "forward+backward")
        + (3 * _pass_flops(weights, side, batch) if side else 4 * batch * numbers),
        yardstick=lambda x, *tensors: run(x, tensors[:count]),
        settings={"size": None, "layers": kind},
        constants=(*_vectors(count), *(() if side else ("x",))),
    )


def scores(x: torch.Tensor, weights) -> torch.Tensor:
    """The critic's, of a batch of images, beside the features that they are of."""
    *convolutions, last = weights
    for weight in convolutions:
        x = F.leaky_relu(F.conv2d(x, weight, None, _stride(weight.shape), 1), SLOPE)
    x = x.flatten(1)
    return torch.cat([x, F.linear(x, last)], 1)


def products(x: torch.Tensor, weights) -> torch.Tensor:
    """Of each weight as a matrix with as many of the columns as it takes."""
    flat = [weight.flatten(1) for weight in weights]
    return torch.cat([F.linear(x[:, : w.shape[1]], w) for w in flat], 1)


def _widest(shapes) -> int:
    return max(math.prod(shape[1:]) for shape in shapes)


def _stride(shape) -> int:
    return 1 if shape[-1] == 3 else 2


class _Layers:
    """Layers that are given their tensors, a step of training later at each call: the weights count as written, and the
    u and v of each set of tensors go on from where its last call left them."""

    def __init__(self, kind: str, weights):
        self.kind, self.shapes = kind, weights
        self._layers: list[nn.Module] = []
        self._sets: dict[int, tuple] = {}  # by the first weight, which is kept beside what belongs to it

    def __call__(self, x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        if not self._layers:
            self._layers = [spectral_norm_(layer) for layer in LAYERS[self.kind](self.shapes, "meta")]
            join(part for layer in self._layers for part in parts_below(layer))
        count = len(self._layers)
        weights = tensors[:count]
        if id(weights[0]) not in self._sets:
            self._sets[id(weights[0])] = weights, own_weights(self.kind, weights), [t.clone() for t in tensors[count:]]
        increment_version(weights)
        put(self._layers, *self._sets[id(weights[0])][1:])
        return RUNS[self.kind](x, self._layers)


def own_weights(kind: str, weights) -> list[torch.Tensor]:
    """These as the layers have them."""
    return list(weights) if kind == "critic" else [weight.flatten(1) for weight in weights]


def put(layers, weights, vectors) -> None:
    """Tensors of the graph in the place of the ``nn.Parameter`` of each layer, and its u and v, the u before the v."""
    for i, (layer, weight) in enumerate(zip(layers, weights, strict=True)):
        held = layer._modules["parametrizations"]._modules["weight"]
        held._parameters["original"] = weight
        part = held._modules["0"]._buffers
        part["_u"], part["_v"] = vectors[i], vectors[len(layers) + i]


def passed(x: torch.Tensor, layers) -> torch.Tensor:
    """`scores` by layers."""
    *convolutions, last = layers
    for layer in convolutions:
        x = F.leaky_relu(layer(x), SLOPE)
    x = x.flatten(1)
    return torch.cat([x, last(x)], 1)


def side_by_side(x: torch.Tensor, layers) -> torch.Tensor:
    """`products` by layers."""
    return torch.cat([layer(x[:, : layer.in_features]) for layer in layers], 1)


def critic(shapes, device: str = "cpu") -> list[nn.Module]:
    """Its layers, of weights of these shapes."""
    where = {"bias": False, "device": device}
    convolutions = [nn.Conv2d(s[1], s[0], s[2], _stride(s), 1, **where) for s in shapes[:-1]]
    return [*convolutions, nn.Linear(*shapes[-1][::-1], **where)]


def matrices(shapes, device: str = "cpu") -> list[nn.Module]:
    """Linear layers of as many weights."""
    return [nn.Linear(math.prod(s[1:]), s[0], bias=False, device=device) for s in shapes]


#: By the kind of a row: its layers, and what runs them.
LAYERS, RUNS = {"critic": critic, "matrices": matrices}, {"critic": passed, "matrices": side_by_side}


def _unwritten(kind: str, shapes, shape) -> int:
    """How many numbers of the weights are never written."""
    total, x = 0, torch.empty(shape, device="meta")
    for layer in LAYERS[kind](shapes, "meta"):
        if kind == "matrices":
            given = x[:, : layer.in_features]
        else:
            given = x if layer.weight.dim() > 2 else x.flatten(1)
            x = layer(given)
        total += layer.weight.numel() if _scaled_norm.suits(layer, layer.weight, None, given) else 0
    return total


def _weights(normalise, count: int, *tensors) -> tuple[torch.Tensor, ...]:
    """What a network takes: σ stays behind."""
    return normalise(*tensors)[:count]


def _normalisations(weights, size):
    """Two functions of ``(*weights, *u, *v)`` that give the normalised weights and σ: the operator's and the
    reference's."""
    geometries = [_geometry(shape, size) for shape in weights]
    plan = reference.as_plan(geometries)
    count = len(weights)

    def lists(tensors):
        return tensors[:count], tensors[count : 2 * count], tensors[2 * count :]

    def op(*tensors):
        out = ops.spectral_norm(*lists(tensors), geometries)
        return *out.weights, out.sigma

    def plain(*tensors):
        out = reference.spectral_norm(*lists(tensors), plan)
        return *out[:count], out[-1]

    return op, plain


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


def _vectors(count: int) -> tuple[str, ...]:
    """The inputs that a network holds in buffers."""
    return tuple(f"{letter} {i}" for letter in "uv" for i in range(count))


def _flops(weights, size, direction) -> int:
    places = 1 if size is None else math.prod(size)
    numbers = sum(math.prod(shape) for shape in weights)
    forward = 4 * places * numbers + numbers
    return forward if direction == "forward" else forward + 2 * places * numbers + 3 * numbers


def _pass_flops(weights, side: int, batch: int) -> int:
    """Of the critic's products, one pass."""
    total, places = 0, side * side
    for shape in weights[:-1]:
        places //= 1 if shape[-1] == 3 else 4
        total += 2 * batch * places * math.prod(shape)
    return total + 2 * batch * math.prod(weights[-1])
