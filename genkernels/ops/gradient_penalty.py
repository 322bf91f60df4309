"""A critic's gradient penalty: schema, checks, fakes, gradients. The maths is in
`genkernels.reference.gradient_penalty`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genkernels.ops import _autocast as autocast
from genkernels.ops import _checks as checks
from genkernels.ops._gradients import THROUGH_REFERENCE, Formula
from genkernels.ops._operator import Operator
from genkernels.reference import gradient_penalty as reference

NAME, INTERPOLATION = "gradient_penalty", "interpolate_pairs"


def interpolate_pairs(real: Tensor, fake: Tensor, u: Tensor) -> Tensor:
    r"""Points on the segments between real and fake samples, pair by pair, in one pass.

    .. math:: \hat x_n = f_n + u_n (r_n - f_n)

    Equivalent to::

        x = fake + u.view(-1, *[1] * (fake.dim() - 1)) * (real - fake)

    Args:
        real: ``[N, ...]``, any number of dimensions, fp64, fp32, bf16 or fp16.
        fake: like real; under autocast the wider dtype of the two is taken.
        u: ``[N]``, from 0 (fake) to 1 (real), any of these dtypes; one number a sample. It is not looked at whether it
            stays between the two. Where u requires a gradient the call runs in plain PyTorch.

    Returns:
        Like real, contiguous. Half numbers are computed in fp32 and rounded once.

    Raises:
        ValueError: a shape or a device is wrong. TypeError: a dtype is. BackendUnavailable: a forced backend cannot
            run.

    Source: Gulrajani et al., "Improved training of Wasserstein GANs", 2017.
    """
    checks.tensors(INTERPOLATION, {"real": real, "fake": fake, "u": u})
    if autocast.active(real):
        dtype = autocast.widest(real, fake)
        real, fake = real.to(dtype), fake.to(dtype)
    checks.same_dtype(INTERPOLATION, {"real": real, "fake": fake})
    if real.dim() == 0:
        raise ValueError(f"{INTERPOLATION}: real must be [N, ...], got []")
    checks.shape(INTERPOLATION, "fake", fake, real.shape, "[N, ...]")
    checks.shape(INTERPOLATION, "u", u, real.shape[:1], "[N]")
    u = u.to(autocast.work_dtype(real))
    if u.requires_grad:
        return reference.interpolate_pairs(real, fake, u)
    return INTERPOLATE(real, fake, u)


def gradient_penalty(gradient: Tensor, target: float = 1.0, one_sided: bool = False) -> Tensor:
    r"""How far the norm of each sample's gradient is from a target, squared, in one pass.

    .. math:: p_n = (\lVert g_n\rVert - t)^2\qquad\text{or, one-sided,}\qquad \max(\lVert g_n\rVert - t, 0)^2

    Equivalent to::

        penalty = (gradient.flatten(1).norm(dim=1) - target).square()

    but for a gradient of 0, whose second derivatives are NaN there and finite here. ``target=0`` gives
    :math:`\lVert g_n\rVert^2`, differentiable everywhere: R1 and R2.

    Args:
        gradient: ``[N, ...]``, any number of dimensions, fp64, fp32, bf16 or fp16: a critic's gradient by its input.
        target: the norm that costs nothing, 0 or more.
        one_sided: norms below the target cost nothing either.

    Returns:
        ``[N]``, fp32 (fp64 for fp64). Squares are added up in fp64, in a fixed order: no norm overflows that its dtype
        can hold, though its square may, which is inf then, with a finite gradient. In fp64 norms beyond 1e154 are inf.
        A norm below 2^-126 counts as 0 where it is divided by. NaN where the sample holds NaN.

    Raises:
        ValueError: a shape or an option is wrong. TypeError: a dtype is. BackendUnavailable: a forced backend cannot
            run.

    Source: Gulrajani et al., "Improved training of Wasserstein GANs", 2017; Mescheder et al., "Which training methods
    for GANs do actually converge?", 2018.
    """
    checks.tensors(NAME, {"gradient": gradient})
    if gradient.dim() == 0:
        raise ValueError(f"{NAME}: gradient must be [N, ...], got []")
    if isinstance(target, bool) or not isinstance(target, int | float) or not 0 <= target < math.inf:
        raise ValueError(f"{NAME}: target must be a finite number, 0 or more, got {target!r}")
    return PENALTY(gradient, float(target), checks.flag(NAME, "one_sided", one_sided))[0]


def _fake_interpolate(real, fake, u):
    return torch.empty_like(real, memory_format=torch.contiguous_format)


def _fake_interpolate_backward(grad, u):
    like = torch.contiguous_format
    return torch.empty_like(grad, memory_format=like), torch.empty_like(grad, memory_format=like)


def _fake_penalty(gradient, target, one_sided):
    samples = (gradient.shape[0],)
    return (
        gradient.new_empty(samples, dtype=autocast.work_dtype(gradient)),
        gradient.new_empty(samples, dtype=torch.float64),
    )


def _fake_penalty_backward(grad, grad_norm, gradient, norm, target, one_sided):
    return torch.empty_like(gradient, memory_format=torch.contiguous_format)


def _setup_interpolate(ctx, inputs, output):
    ctx.save_for_backward(inputs[2])


def _interpolate_backward(ctx, grad):
    if ctx.needs_input_grad[2]:
        raise RuntimeError(
            f"{INTERPOLATION}: the torch operator has no gradient by u; genkernels.ops.{INTERPOLATION} has"
        )
    return *INTERPOLATE_BACKWARD.dense(grad, *ctx.saved_tensors), None


def _setup_penalty(ctx, inputs, output):
    gradient, *ctx.options = inputs
    ctx.save_for_backward(gradient, output[1])


def _penalty_backward(ctx, grad, grad_norm):
    return PENALTY_BACKWARD.dense(grad, grad_norm, *ctx.saved_tensors, *ctx.options), None, None


OPERATOR = Operator(
    NAME, functions=(interpolate_pairs, gradient_penalty), kernels={"cpu": "", "triton": "", "cuda": ""}
)
INTERPOLATE = OPERATOR.define(
    "interpolate_pairs(Tensor real, Tensor fake, Tensor u) -> Tensor",
    reference.interpolate_pairs,
    _fake_interpolate,
    gradient=Formula(_setup_interpolate, _interpolate_backward),
)
INTERPOLATE_BACKWARD = OPERATOR.define(
    "interpolate_pairs_backward(Tensor grad, Tensor u) -> (Tensor, Tensor)",
    reference.interpolate_pairs_backward,
    _fake_interpolate_backward,
    gradient=THROUGH_REFERENCE,
)
PENALTY = OPERATOR.define(
    "gradient_penalty(Tensor gradient, float target, bool one_sided) -> (Tensor, Tensor)",
    reference.gradient_penalty,
    _fake_penalty,
    gradient=Formula(_setup_penalty, _penalty_backward),
)
PENALTY_BACKWARD = OPERATOR.define(
    "gradient_penalty_backward(Tensor? grad, Tensor? grad_norm, Tensor gradient, Tensor norm, float target, "
    "bool one_sided) -> Tensor",
    reference.gradient_penalty_backward,
    _fake_penalty_backward,
    gradient=THROUGH_REFERENCE,
)
