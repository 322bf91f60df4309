"""Leaky ReLU with bias, gain and clamp: schema, checks, fakes, gradients. The maths is in
`genkernels.reference.bias_leaky_relu`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genkernels.ops import _autocast as autocast
from genkernels.ops import _checks as checks
from genkernels.ops._gradients import Formula
from genkernels.ops._operator import DIFFERENTIABLE, KERNEL, Operator
from genkernels.reference import bias_leaky_relu as reference

NAME = "bias_leaky_relu"


def bias_leaky_relu(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    negative_slope: float = 0.2,
    gain: float = math.sqrt(2),
    clamp: float | None = None,
) -> Tensor:
    r"""Bias, leaky ReLU, gain and clamp in one pass, of which the output alone is kept for backward.

    .. math:: y = \mathrm{clamp}\bigl(\gamma\,\phi(x + b),\ \pm m\bigr)

    Equivalent to::

        a = x + bias.view(-1, *[1] * (x.dim() - 2))
        y = (gain * F.leaky_relu(a, negative_slope)).clamp(-clamp, clamp)

    Args:
        x: ``[N, C, ...]``, fp64, fp32, bf16 or fp16.
        bias: ``[C]`` of x's dtype, fp32 beside half numbers too; under autocast any dtype. None for no bias.
        negative_slope: s, 0 or more.
        gain: γ, above 0; that of the default keeps the variance of a normal x where the slope is small.
        clamp: m, above 0, rounded to x's dtype; None for none. What is clamped has a gradient of 0.

    Returns:
        y like x, contiguous. Derivatives of any order run by kernels: the second by x alone is 0.

    Raises:
        ValueError: a shape, a device or an option is wrong. TypeError: a dtype is. BackendUnavailable: a forced
            backend cannot run.

    Source: Karras et al., "Analyzing and improving the image quality of StyleGAN", 2020.
    """
    checks.tensors(NAME, {"x": x, "bias": bias}, optional=("bias",))
    if x.dim() < 2:
        raise ValueError(f"{NAME}: x must be [N, C, ...], got {list(x.shape)}")
    if bias is not None:
        if not autocast.active(x) and not (bias.dtype == torch.float32 and x.dtype in checks.HALVES):
            checks.same_dtype(NAME, {"x": x, "bias": bias})
        checks.shape(NAME, "bias", bias, x.shape[1:2], "[C]")
        bias = bias.to(autocast.work_dtype(x))
    _finite("negative_slope", negative_slope, "0 or more", negative_slope == 0)
    _finite("gain", gain, "above 0")
    if clamp is not None:
        _finite("clamp", clamp, "above 0, or None")
    return ACTIVATION(x, bias, float(negative_slope), float(gain), math.inf if clamp is None else float(clamp))


def _finite(label: str, value, kind: str, also: bool = False) -> None:
    if not isinstance(value, int | float) or not (also or 0 < value < math.inf):
        raise ValueError(f"{NAME}: {label} must be a finite number {kind}, got {value!r}")


def _fake(x, bias, negative_slope, gain, clamp):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_backward(grad, y, with_bias, negative_slope, gain, clamp):
    by_bias = y.new_empty((y.shape[1] if with_bias else 0,), dtype=autocast.work_dtype(y))
    return torch.empty_like(y, memory_format=torch.contiguous_format), by_bias


def _setup(ctx, inputs, output):
    _, bias, *ctx.options = inputs
    ctx.with_bias = bias is not None
    ctx.save_for_backward(output)


def _backward(ctx, grad):
    by_x, by_bias = BACKWARD.dense(grad, *ctx.saved_tensors, ctx.with_bias, *ctx.options)
    return by_x, by_bias if ctx.with_bias else None, None, None, None


def _setup_backward(ctx, inputs, output):
    _, y, ctx.with_bias, *ctx.options = inputs
    ctx.save_for_backward(y)


def _backward_of_backward(ctx, grad_x, grad_bias):
    (y,) = ctx.saved_tensors
    if ctx.with_bias and grad_bias is not None:
        of_bias = grad_bias.reshape(-1, *[1] * (y.dim() - 2)).to(y.dtype)
        grad_x = of_bias.expand(y.shape) if grad_x is None else grad_x + of_bias
    if grad_x is None:
        return (None,) * 6
    return BACKWARD.dense(grad_x, y, False, *ctx.options)[0], None, None, None, None, None


OPERATOR = Operator(
    NAME,
    functions=(bias_leaky_relu,),
    kernels={"cpu": "", "triton": "", "cuda": "would win nothing: one pass in Triton already moves the fewest bytes"},
    composability=DIFFERENTIABLE | {"double backward": KERNEL},
)
ACTIVATION = OPERATOR.define(
    "bias_leaky_relu(Tensor x, Tensor? bias, float negative_slope, float gain, float clamp) -> Tensor",
    reference.bias_leaky_relu,
    _fake,
    gradient=Formula(_setup, _backward),
)
BACKWARD = OPERATOR.define(
    "bias_leaky_relu_backward(Tensor grad, Tensor y, bool with_bias, float negative_slope, float gain, float clamp) "
    "-> (Tensor, Tensor)",
    reference.bias_leaky_relu_backward,
    _fake_backward,
    gradient=Formula(_setup_backward, _backward_of_backward),
)
