r"""The network of a residual block, as its two operators take it: an alternation of linear maps and one activation.

.. math:: g(x) = W_L\,\varphi(\dots \varphi(W_1 x + b_1) \dots) + b_L

The maps are matrices, or convolutions of odd sizes with zeros around, stride 1. With z the argument of an activation,
everything that is asked of it are five functions: its value, its slope and curvature by z, and the derivatives of value
and slope by its one parameter. An activation that takes [z, −z] (CLipSwish) has twice the outputs that it has inputs.

Vectors are ``[..., N, features]`` or ``[..., N, C, H, W]``; what stands before N are probes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from genkernels._options import CLIPSWISH_DIVISOR, LIPSWISH_DIVISOR, Nonlinearity


class Curve(NamedTuple):
    """Functions of ``(z, parameter)``."""

    value: Callable
    slope: Callable
    curvature: Callable
    value_by: Callable
    slope_by: Callable


def _zero(z: Tensor, _) -> Tensor:
    return torch.zeros_like(z)


def _one_where(z: Tensor, otherwise) -> Tensor:
    return torch.where(z > 0, torch.ones_like(z), otherwise)


def _negative(value: Callable) -> Callable:
    """A function that counts below 0 alone."""
    return lambda z, a: torch.where(z > 0, torch.zeros_like(z), value(z.clamp(max=0), a))


def _swish(divisor: float) -> Curve:
    def parts(z, beta):
        return torch.sigmoid(beta * z), torch.sigmoid(-beta * z)

    def value(z, beta):
        return z * parts(z, beta)[0] / divisor

    def slope(z, beta):
        up, down = parts(z, beta)
        return up * (1 + beta * z * down) / divisor

    def bend(z, beta):
        """The curvature over the parameter, which is the slope's derivative by it over z."""
        up, down = parts(z, beta)
        return up * down * (2 + beta * z * (down - up)) / divisor

    def value_by(z, beta):
        up, down = parts(z, beta)
        return z * z * (up * down) / divisor

    return Curve(value, slope, lambda z, b: b * bend(z, b), value_by, lambda z, b: z * bend(z, b))


def _at_one(curve: Curve) -> Curve:
    """The parameter is 1, whatever it says."""
    value, slope, curvature, *_ = curve
    return Curve(lambda z, _: value(z, 1.0), lambda z, _: slope(z, 1.0), lambda z, _: curvature(z, 1.0), _zero, _zero)


def _tanh_slope(z: Tensor, _) -> Tensor:
    return 4 * (torch.sigmoid(2 * z) * torch.sigmoid(-2 * z))


CURVES = {
    Nonlinearity.RELU: Curve(lambda z, _: F.relu(z), lambda z, _: (z > 0).to(z.dtype), _zero, _zero, _zero),
    Nonlinearity.LEAKY_RELU: Curve(
        lambda z, a: torch.where(z > 0, z, a * z),
        lambda z, a: _one_where(z, a.to(z.dtype)),
        _zero,
        lambda z, a: z.clamp(max=0),
        lambda z, a: (z <= 0).to(z.dtype),
    ),
    Nonlinearity.ELU: Curve(
        lambda z, a: torch.where(z > 0, z, a * torch.expm1(z.clamp(max=0))),
        lambda z, a: _one_where(z, a * z.clamp(max=0).exp()),
        _negative(lambda z, a: a * z.exp()),
        _negative(lambda z, a: torch.expm1(z)),
        _negative(lambda z, a: z.exp()),
    ),
    Nonlinearity.SILU: _at_one(_swish(1.0)),
    Nonlinearity.TANH: Curve(
        lambda z, _: torch.tanh(z), _tanh_slope, lambda z, a: -2 * torch.tanh(z) * _tanh_slope(z, a), _zero, _zero
    ),
    Nonlinearity.LIPSWISH: _swish(LIPSWISH_DIVISOR),
    Nonlinearity.CLIPSWISH: _swish(CLIPSWISH_DIVISOR),
}


class Block(NamedTuple):
    """A network: L weights ``[out, in]`` or ``[out, in, k, k]``, as many biases, ``[out]`` or, one for each sample,
    ``[N, out]``, the activations' L − 1 parameters (1 where there is none), and which activation it is."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    parameters: Tensor
    activation: int

    @property
    def mirrored(self) -> bool:
        return self.activation == Nonlinearity.CLIPSWISH

    def to(self, dtype: torch.dtype) -> Block:
        weights, biases = [w.to(dtype) for w in self.weights], [b.to(dtype) for b in self.biases]
        return Block(weights, biases, self.parameters.to(dtype), self.activation)

    def of(self, rows: Tensor | None) -> Block:
        """Of some samples; of all for None."""
        if rows is None:
            return self
        return self._replace(biases=[b if b.dim() == 1 else b[rows] for b in self.biases])


def work_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# ---------------------------------------------------------------------------------------------------------- linear maps


def _per_sample(run: Callable[[Tensor], Tensor], vectors: Tensor, weight: Tensor) -> Tensor:
    lead = vectors.shape[: vectors.dim() - weight.dim() + 1]
    found = run(vectors.reshape(lead.numel(), *vectors.shape[len(lead) :]))
    return found.reshape(*lead, *found.shape[1:])


def push(weight: Tensor, t: Tensor) -> Tensor:
    """W t."""
    if weight.dim() == 2:
        return t @ weight.T
    return _per_sample(lambda v: F.conv2d(v, weight, padding=weight.shape[-1] // 2), t, weight)


def pull(weight: Tensor, w: Tensor) -> Tensor:
    """Wᵀ w."""
    if weight.dim() == 2:
        return w @ weight
    return _per_sample(lambda v: F.conv_transpose2d(v, weight, padding=weight.shape[-1] // 2), w, weight)


def outer(weight: Tensor, g: Tensor, t: Tensor) -> Tensor:
    """The gradient of ⟨g, W t⟩ by W, summed over samples and probes."""
    if weight.dim() == 2:
        return g.reshape(-1, g.shape[-1]).T @ t.reshape(-1, t.shape[-1])
    size = weight.shape[-1]
    flat = t.reshape(t.shape[:-3].numel(), *t.shape[-3:])
    near = F.unfold(flat, size, padding=size // 2)  # [N, C_in * size * size, pixels]
    return torch.einsum("nop,nip->oi", g.reshape(len(flat), g.shape[-3], near.shape[-1]), near).reshape(weight.shape)


def bias_gradient(bias: Tensor, g: Tensor) -> Tensor:
    """The gradient of ⟨g, a map's output⟩ by its bias."""
    over = *range(2 - bias.dim()), *range(2, g.dim())
    return g.sum(over) if over else g.clone()


def _channels(vector: Tensor, weight: Tensor) -> Tensor:
    return vector if weight.dim() == 2 else vector[..., None, None]


# --------------------------------------------------------------------------------------------------------------- passes


class Linearized(NamedTuple):
    """A block at x: the input of each map, the value, and of each activation its argument with the sign that each of
    its outputs takes it by (z, or [z, −z] by 1 and −1), and its slopes."""

    inputs: list[Tensor]
    value: Tensor
    points: list[Tensor]
    signs: list[Tensor | float]
    slopes: list[Tensor]


def linearize(block: Block, x: Tensor) -> Linearized:
    curve, inputs, points, slopes = CURVES[block.activation], [x], [], []
    signs: list[Tensor | float] = []
    for i, (weight, bias) in enumerate(zip(block.weights, block.biases, strict=True)):
        z = push(weight, inputs[-1]) + _channels(bias, weight)
        if i == len(block.weights) - 1:
            return Linearized(inputs, z, points, signs, slopes)
        signs.append(1.0)
        if block.mirrored:
            ones = z.new_ones(z.shape[1])
            z, signs[-1] = torch.cat([z, -z], 1), _channels(torch.cat([ones, -ones]), weight)
        points.append(z)
        slopes.append(signs[-1] * curve.slope(z, block.parameters[i]))
        inputs.append(curve.value(z, block.parameters[i]))
    raise AssertionError("a block has at least one map")


def _spread(block: Block, t: Tensor, weight: Tensor) -> Tensor:
    """A tangent of z at each output of the activation."""
    return torch.cat([t, t], -1 if weight.dim() == 2 else -3) if block.mirrored else t


def _gathered(block: Block, w: Tensor, weight: Tensor) -> Tensor:
    """Its transpose."""
    return sum(w.chunk(2, -1 if weight.dim() == 2 else -3)) if block.mirrored else w


def pushed(block: Block, at: Linearized, t: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The tangents of the activations' arguments, those of the maps' inputs, and J t."""
    tangents, inputs = [], [t]
    for weight, slope in zip(block.weights[:-1], at.slopes, strict=True):
        tangents.append(_spread(block, push(weight, inputs[-1]), weight))
        inputs.append(slope * tangents[-1])
    return tangents, inputs, push(block.weights[-1], inputs[-1])


def pulled(block: Block, at: Linearized, w: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The cotangents of the activations' outputs, those of the maps' outputs, and Jᵀ w."""
    outputs, arguments = [], [w]
    for i in range(len(block.weights) - 1, 0, -1):
        outputs.insert(0, pull(block.weights[i], arguments[0]))
        arguments.insert(0, _gathered(block, at.slopes[i - 1] * outputs[0], block.weights[i]))
    return outputs, arguments, pull(block.weights[0], arguments[0])


def transposed(block: Block, at: Linearized, w: Tensor) -> Tensor:
    """Jᵀ w."""
    return pulled(block, at, w)[2]


def dot(a: Tensor, b: Tensor, axes: int) -> Tensor:
    """Over the last axes."""
    return (a * b).flatten(-axes).sum(-1) if axes > 1 else (a * b).sum(-1)


def basis(x: Tensor) -> Tensor:
    """``[D, N, ...]``: each unit vector, for every sample."""
    features = x[0].numel() if len(x) else x.shape[1:].numel()
    eye = torch.eye(features, dtype=x.dtype, device=x.device).reshape(features, 1, *x.shape[1:])
    return eye.expand(features, *x.shape)


def jacobian(block: Block, at: Linearized, x: Tensor) -> Tensor:
    """``[N, D, D]``, a row for each output."""
    rows = transposed(block, at, basis(x))
    return rows.reshape(*rows.shape[:2], len(rows)).transpose(0, 1)


# ---------------------------------------------------------------------------------------- the trace of a 3-1-3 block


@functools.cache
def _valid(size: int) -> Tensor:
    """``[size², size²]``: whether a tap stays inside, for the pixels of each class; the class of a row is 0 for the
    first one, 2 for the last one and 1 for those between, that of a pixel 3 · (its row's) + (its column's)."""
    if size == 1:
        return torch.ones(1, 1)
    line = torch.tensor([[0.0, 1, 1], [1, 1, 1], [1, 1, 0]])
    return torch.einsum("ay,bx->abyx", line, line).reshape(9, 9)


def classes(x: Tensor, count: int) -> Tensor:
    """``[H, W]``: the class of each pixel."""
    height, width = x.shape[-2:]

    def of(n: int) -> Tensor:
        found = torch.ones(n, dtype=torch.int64, device=x.device)
        found[0], found[-1] = 0, 2
        return found

    return 3 * of(height)[:, None] + of(width) if count == 9 else torch.zeros(height, width, dtype=torch.int64)


def trace_map(block: Block) -> Tensor:
    r"""M of :math:`\operatorname{tr} J = \sum_p d_2^\top M\, d_1`, for a block of three maps: ``[1, h2, h1]``, or of
    3-1-3 convolutions ``[9, h2, h1]``, one for each class of pixels; h counts the outputs of an activation.

    .. math:: M = W_2 \circ (W_1 W_3)^\top,\qquad (W_1 W_3)^\top = \sum_\delta W_3[-\delta]^\top W_1[\delta]^\top

    over the taps that stay inside.
    """
    first, middle, last = block.weights
    if block.mirrored:
        first, middle = torch.cat([first, first]), torch.cat([middle, middle])
    if first.dim() == 2:
        return (middle * (first @ last).T)[None]
    taps = torch.einsum("jct,cit->tij", first.flatten(2), last.flip(2, 3).flatten(2))
    valid = _valid(first.shape[-1]).to(taps)
    return middle.flatten(1) * (valid @ taps.flatten(1)).unflatten(1, taps.shape[1:])


def trace_map_backward(block: Block, grad: Tensor) -> list[Tensor]:
    """Gradients of the three weights for that of M."""
    first, middle, last = block.weights
    if block.mirrored:
        first, middle = torch.cat([first, first]), torch.cat([middle, middle])
    if first.dim() == 2:
        grad = grad[0]
        by_product = (grad * middle).T
        found = [by_product @ last.T, grad * (first @ last).T, first.T @ by_product]
    else:
        w1, w2, w3 = first.flatten(2), middle.flatten(1), last.flip(2, 3).flatten(2)
        taps = torch.einsum("jct,cit->tij", w1, w3)
        valid = _valid(first.shape[-1]).to(taps)
        by_taps = (valid.T @ (grad * w2).flatten(1)).unflatten(1, taps.shape[1:])
        by_middle = (grad * (valid @ taps.flatten(1)).unflatten(1, taps.shape[1:])).sum(0)
        by_first = torch.einsum("tij,cit->jct", by_taps, w3)
        by_last = torch.einsum("tij,jct->cit", by_taps, w1)
        found = [by_first.reshape(first.shape), by_middle.reshape(middle.shape), by_last.reshape(last.shape).flip(2, 3)]
    if block.mirrored:
        found[:2] = [sum(g.chunk(2)) for g in found[:2]]
    return found


def traced(trace_map: Tensor, d: Tensor, where: Tensor | None) -> Tensor:
    """M d, at each pixel with the M of its class."""
    if where is None:
        return d @ trace_map[0].T
    found = torch.zeros_like(d[:, :1])
    for c in range(len(trace_map)):
        here = (where.to(d.device) == c).to(d.dtype)
        found = found + torch.einsum("ij,njyx->niyx", trace_map[c], d * here)
    return found


def trace_map_gradient(trace_map: Tensor, d2: Tensor, d1: Tensor, where: Tensor | None) -> Tensor:
    """The gradient by M of Σ d2ᵀ M d1."""
    if where is None:
        return (d2.T @ d1)[None]
    found = []
    for c in range(len(trace_map)):
        here = (where.to(d1.device) == c).to(d1.dtype)
        found.append(torch.einsum("niyx,njyx->ij", d2 * here, d1))
    return torch.stack(found)
