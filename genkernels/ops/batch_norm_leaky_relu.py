"""Batch normalisation and leaky ReLU in one: schema, checks, fakes, gradients. The maths is in
`genkernels.reference.batch_norm_leaky_relu`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from genkernels.ops import _autocast as autocast
from genkernels.ops import _checks as checks
from genkernels.ops._gradients import THROUGH_REFERENCE, Formula
from genkernels.ops._operator import Operator
from genkernels.reference import batch_norm_leaky_relu as reference

NAME = "batch_norm_leaky_relu"


class BatchNormLeakyReLU(NamedTuple):
    """What `batch_norm_leaky_relu` returns.

    Args:
        y: like x.
        mean, variance: ``[C]``, of each channel, the variance with n in its denominator; 0 where there are no samples.
            They have no gradient.
    """

    y: Tensor
    mean: Tensor
    variance: Tensor


def batch_norm_leaky_relu(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    negative_slope: float = 0.0,
    eps: float = 1e-5,
) -> BatchNormLeakyReLU:
    r"""Batch normalisation by the batch's own statistics and the leaky ReLU behind it, of which x alone is kept for
    backward.

    .. math:: y = \phi\Bigl(\gamma_c\,\frac{x - \mu_c}{\sqrt{v_c + \varepsilon}} + \beta_c\Bigr)

    Equivalent to::

        y = F.leaky_relu(F.batch_norm(x, None, None, weight, bias, training=True, eps=eps), negative_slope)
        variance, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)

    Args:
        x: ``[N, C, ...]``, fp64, fp32, bf16 or fp16. Planes are what is made fast; of vectors ``[N, C]`` torch's two
            calls are faster.
        weight, bias: γ and β, ``[C]`` of x's dtype, fp32 beside half numbers too; under autocast any dtype. None for 1
            and 0.
        negative_slope: s, 0 or more; 0 is ReLU, 1 no activation.
        eps: ε, above 0.

    Returns:
        y like x, contiguous, and the statistics ``[C]`` of which running averages are made, fp32 (fp64 for fp64).

    Raises:
        ValueError: a shape, a device or an option is wrong, or a channel has one number. TypeError: a dtype is.
            BackendUnavailable: a forced backend cannot run.

    Source: Ioffe & Szegedy, "Batch normalization: accelerating deep network training by reducing internal covariate
    shift", 2015.
    """
    given = {"x": x, "weight": weight, "bias": bias}
    checks.tensors(NAME, given, optional=("weight", "bias"))
    if x.dim() < 2:
        raise ValueError(f"{NAME}: x must be [N, C, ...], got {list(x.shape)}")
    if x.numel() and x.numel() == x.shape[1]:
        raise ValueError(f"{NAME}: x must have two numbers a channel or more, got {list(x.shape)}")
    weight, bias = (_checked(x, name, given[name]) for name in ("weight", "bias"))
    _finite("negative_slope", negative_slope, "0 or more", negative_slope == 0)
    _finite("eps", eps, "above 0")
    return BatchNormLeakyReLU(*NORMALISE(x, weight, bias, float(eps), float(negative_slope)))


def _checked(x: Tensor, name: str, value: Tensor | None) -> Tensor | None:
    if value is None:
        return None
    if not autocast.active(x) and not (value.dtype == torch.float32 and x.dtype in checks.HALVES):
        checks.same_dtype(NAME, {"x": x, name: value})
    checks.shape(NAME, name, value, x.shape[1:2], "[C]")
    return value.to(autocast.work_dtype(x))


def _finite(label: str, value, kind: str, also: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (also or 0 < value < math.inf):
        raise ValueError(f"{NAME}: {label} must be a finite number {kind}, got {value!r}")


def _fake(x, weight, bias, eps, negative_slope):
    mean, variance = (x.new_empty((x.shape[1],), dtype=autocast.work_dtype(x)) for _ in range(2))
    return torch.empty_like(x, memory_format=torch.contiguous_format), mean, variance


def _fake_backward(grad, x, weight, bias, mean, variance, eps, negative_slope):
    by_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return by_x, mean.new_empty(mean.shape), mean.new_empty(mean.shape)


def _setup(ctx, inputs, output):
    x, weight, bias, ctx.eps, ctx.negative_slope = inputs
    _, mean, variance = output
    ctx.mark_non_differentiable(mean, variance)
    ctx.save_for_backward(x, weight, bias, mean, variance)


def _backward(ctx, grad, *_):
    x, weight, bias, *statistics = ctx.saved_tensors
    if torch.is_grad_enabled() and x.requires_grad:
        statistics = reference.moments(x)  # functions of x, which a gradient of the gradient goes through
    by_x, by_weight, by_bias = BACKWARD.dense(grad, x, weight, bias, *statistics, ctx.eps, ctx.negative_slope)
    return by_x, None if weight is None else by_weight, None if bias is None else by_bias, None, None


OPERATOR = Operator(
    NAME,
    functions=(batch_norm_leaky_relu,),
    types=(BatchNormLeakyReLU,),
    kernels={"cpu": "", "triton": "", "cuda": "would win nothing: Triton's passes already move the fewest bytes"},
)
NORMALISE = OPERATOR.define(
    "batch_norm_leaky_relu(Tensor x, Tensor? weight, Tensor? bias, float eps, float negative_slope) "
    "-> (Tensor, Tensor, Tensor)",
    reference.batch_norm_leaky_relu,
    _fake,
    gradient=Formula(_setup, _backward),
)
BACKWARD = OPERATOR.define(
    "batch_norm_leaky_relu_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor variance, "
    "float eps, float negative_slope) -> (Tensor, Tensor, Tensor)",
    reference.batch_norm_leaky_relu_backward,
    _fake_backward,
    gradient=THROUGH_REFERENCE,
)
