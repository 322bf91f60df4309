r"""Activations: value, first and second derivative of each, elementwise, in plain PyTorch.

Each is a function of x and of its parameters, numbers or tensors that broadcast over x. With :math:`\sigma` the
logistic function, :math:`\sigma(x)(1 - \sigma(x))` is computed as :math:`\sigma(x)\,\sigma(-x)`, and a polynomial is
cut off where what it multiplies is 0: for large x of either sign a derivative is as small as it should be, not NaN and
not the difference of two ones.

A layer outside ``torch.nn`` says which of these it is by a class attribute, the name and then the attributes that hold
its parameters, each of which is read anew in every pass::

    class LipSwish(nn.Module):
        genkernels_activation = ("lipswish", "steepness")

        @property
        def steepness(self):
            return F.softplus(self.beta)

It counts as long as no subclass overrides ``forward`` alone. ``clipswish`` announces the layer that puts x and -x
beside one another along the first axis of a sample before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from genkernels._options import CLIPSWISH_DIVISOR, LIPSWISH_DIVISOR


class Activation(NamedTuple):
    """One activation: three functions of ``(x, *parameters)``, and the parameters' names.

    Two more, where there are any, take vectors: `scaled`, ``(vectors, x, *parameters, grad_input=out)``, gives vectors
    times the slope, which is never written; `out` may be the vectors. `bent`, ``(vectors, x, *parameters)``, gives
    vectors times the curvature, written over them. Both take the value in x's place where it tells all, `by_value`.
    """

    value: Callable[..., Tensor]
    slope: Callable[..., Tensor]
    curvature: Callable[..., Tensor]
    parameters: tuple[str, ...] = ()
    piecewise_linear: bool = False
    scaled: Callable[..., Tensor] | None = None
    bent: Callable[..., Tensor] | None = None
    by_value: bool = False


def _zero(x: Tensor, *_) -> Tensor:
    return torch.zeros_like(x)


def _relu_slope(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _leaky_relu_slope(x: Tensor, negative_slope) -> Tensor:
    return torch.where(x > 0, torch.ones_like(x), negative_slope)


def _elu_slope(x: Tensor, alpha) -> Tensor:
    return torch.where(x > 0, torch.ones_like(x), alpha * x.clamp(max=0).exp())


def _elu_curvature(x: Tensor, alpha) -> Tensor:
    return torch.where(x > 0, torch.zeros_like(x), alpha * x.clamp(max=0).exp())


def _softplus_slope(x: Tensor, beta, threshold) -> Tensor:
    return torch.where(beta * x > threshold, torch.ones_like(x), torch.sigmoid(beta * x))


def _softplus_curvature(x: Tensor, beta, threshold) -> Tensor:
    return torch.where(beta * x > threshold, torch.zeros_like(x), beta * _sigmoid_slope(beta * x))


def _sigmoid_slope(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * torch.sigmoid(-x)


def _sigmoid_curvature(x: Tensor) -> Tensor:
    return _sigmoid_slope(x) * (torch.sigmoid(-x) - torch.sigmoid(x))


def _tanh_slope(x: Tensor) -> Tensor:
    return 4 * _sigmoid_slope(2 * x)


def _tanh_curvature(x: Tensor) -> Tensor:
    return -2 * torch.tanh(x) * _tanh_slope(x)


def _swish(x: Tensor, beta) -> Tensor:
    return x * torch.sigmoid(beta * x)


def _swish_slope(x: Tensor, beta=1.0) -> Tensor:
    a = beta * x
    return torch.sigmoid(a) * (1 + a * torch.sigmoid(-a))


def _swish_curvature(x: Tensor, beta=1.0) -> Tensor:
    a = beta * x
    up, down = torch.sigmoid(a), torch.sigmoid(-a)
    return beta * (up * down) * (2 + a * (down - up))


def _over(divisor: float) -> Activation:
    """Swish divided by a number."""

    def scaled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, beta: function(x, beta) / divisor

    return Activation(scaled(_swish), scaled(_swish_slope), scaled(_swish_curvature), ("beta",))


def _normal_density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_slope(x: Tensor) -> Tensor:
    near = x.clamp(-40, 40)  # beyond, the density is 0 in fp64 too
    return 0.5 * torch.erfc(-x * math.sqrt(0.5)) + near * _normal_density(near)


def _gelu_curvature(x: Tensor) -> Tensor:
    near = x.clamp(-40, 40)
    return (2 - near * near) * _normal_density(near)


def _gelu_tanh_parts(x: Tensor):
    """x, and the argument of GELU's sigmoid with two derivatives: ``0.5 x (1 + tanh(a / 2)) = x sigmoid(a)``."""
    near = x.clamp(-25, 25)  # beyond, the sigmoid is 0 or 1 in fp64 too
    scale, cubic = 2 * math.sqrt(2 / math.pi), 0.044715
    return near, scale * (near + cubic * near**3), scale * (1 + 3 * cubic * near * near), 6 * scale * cubic * near


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    near, a, first, _ = _gelu_tanh_parts(x)
    return torch.sigmoid(a) + near * first * _sigmoid_slope(a)


def _gelu_tanh_curvature(x: Tensor) -> Tensor:
    near, a, first, second = _gelu_tanh_parts(x)
    bent = torch.sigmoid(-a) - torch.sigmoid(a)
    return _sigmoid_slope(a) * (2 * first + near * second + near * first * first * bent)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_aten = torch.ops.aten


def _relu_scaled(vectors: Tensor, y: Tensor, *, grad_input: Tensor) -> Tensor:
    return _aten.threshold_backward.grad_input(vectors, y, 0, grad_input=grad_input)


def _leaky_relu_scaled(vectors: Tensor, y: Tensor, negative_slope, *, grad_input: Tensor) -> Tensor:
    return _aten.leaky_relu_backward.grad_input(vectors, y, negative_slope, True, grad_input=grad_input)


def _gained_leaky_relu(x: Tensor, negative_slope, gain, inplace=False) -> Tensor:
    y = F.leaky_relu(x, negative_slope, inplace)
    return y.mul_(gain) if inplace else y * gain


def _gained_leaky_relu_slope(x: Tensor, negative_slope, gain) -> Tensor:
    return gain * _leaky_relu_slope(x, negative_slope)


def _gained_leaky_relu_scaled(vectors: Tensor, y: Tensor, negative_slope, gain, *, grad_input: Tensor) -> Tensor:
    return _leaky_relu_scaled(vectors, y, negative_slope, grad_input=grad_input).mul_(gain)


def _elu_scaled(vectors: Tensor, y: Tensor, alpha, *, grad_input: Tensor) -> Tensor:
    return _aten.elu_backward.grad_input(vectors, alpha, 1, 1, True, y, grad_input=grad_input)


def _elu_bent(vectors: Tensor, y: Tensor, alpha) -> Tensor:
    return vectors.mul_(y + alpha).masked_fill_(y > 0, 0)


def _tanh_bent(vectors: Tensor, y: Tensor) -> Tensor:
    return _aten.tanh_backward.grad_input(vectors, y, grad_input=vectors).mul_(y).mul_(-2)


def _swish_bent(vectors: Tensor, x: Tensor) -> Tensor:
    up = torch.sigmoid(x)
    vectors.mul_(torch.addcmul(x, x, up, value=-2).add_(2))
    return vectors.mul_(torch.addcmul(up, up, up, value=-1))


#: All activations by name.
ACTIVATIONS = {
    "relu": Activation(F.relu, _relu_slope, _zero, piecewise_linear=True, scaled=_relu_scaled, by_value=True),
    "leaky_relu": Activation(
        F.leaky_relu,
        _leaky_relu_slope,
        _zero,
        ("negative_slope",),
        piecewise_linear=True,
        scaled=_leaky_relu_scaled,
        by_value=True,
    ),
    "gained_leaky_relu": Activation(
        _gained_leaky_relu,
        _gained_leaky_relu_slope,
        _zero,
        ("negative_slope", "gain"),
        piecewise_linear=True,
        scaled=_gained_leaky_relu_scaled,
        by_value=True,
    ),
    "silu": Activation(F.silu, _swish_slope, _swish_curvature, scaled=_aten.silu_backward.grad_input, bent=_swish_bent),
    "elu": Activation(F.elu, _elu_slope, _elu_curvature, ("alpha",), scaled=_elu_scaled, bent=_elu_bent, by_value=True),
    "softplus": Activation(
        F.softplus,
        _softplus_slope,
        _softplus_curvature,
        ("beta", "threshold"),
        scaled=_aten.softplus_backward.grad_input,
    ),
    "tanh": Activation(
        torch.tanh, _tanh_slope, _tanh_curvature, scaled=_aten.tanh_backward.grad_input, bent=_tanh_bent, by_value=True
    ),
    "sigmoid": Activation(torch.sigmoid, _sigmoid_slope, _sigmoid_curvature),
    "gelu": Activation(F.gelu, _gelu_slope, _gelu_curvature),
    "gelu_tanh": Activation(_gelu_tanh, _gelu_tanh_slope, _gelu_tanh_curvature),
    "lipswish": _over(LIPSWISH_DIVISOR),
    "clipswish": _over(CLIPSWISH_DIVISOR),
}
