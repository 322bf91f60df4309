"""Spectral norm of many weights at once: schema, checks, fakes, gradient. The maths is in
`genkernels.reference.spectral_norm`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from genkernels.ops import _autocast as autocast
from genkernels.ops import _checks as checks
from genkernels.ops._gradients import THROUGH_REFERENCE, Formula, Refused, transforms_active
from genkernels.ops._operator import DIFFERENTIABLE, Operator
from genkernels.reference import spectral_norm as reference
from genkernels.reference.spectral_norm import CIRCULAR, CONVOLUTION, MATRIX, Geometry, as_plan

NAME = "spectral_norm"


class SpectralNorm(NamedTuple):
    """What `spectral_norm` returns.

    Args:
        weights: the normalised weights, a list like the one that was given. u, v: likewise, after the iterations.
        sigma: ``[L]``, the norms before the weights were divided by them.
    """

    weights: list[Tensor]
    u: list[Tensor]
    v: list[Tensor]
    sigma: Tensor


def spectral_norm(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    geometries: Sequence[Geometry] | None = None,
    *,
    iterations: int = 1,
    coefficient: float = 1.0,
    at_most: bool = False,
) -> SpectralNorm:
    r"""Divides weights by their largest singular values, all of them in one call.

    .. math:: u \leftarrow A v / \lVert A v\rVert,\quad v \leftarrow A^\top u / \lVert A^\top u\rVert,\quad
        \sigma = \langle u, A v\rangle,\quad \hat W = c\, W / \sigma

    A is what a weight does to its input: a matrix, or the convolution with its stride, padding and size of input, whose
    norm is up to the root of the number of taps away from the matrix's. Power iteration gives a lower bound that grows
    from call to call; `genkernels.nn.certify` gives an upper one.

    Equivalent to (one matrix)::

        with torch.no_grad():
            for _ in range(iterations):
                u = F.normalize(weight @ v, dim=0)
                v = F.normalize(weight.T @ u, dim=0)
        sigma = u @ weight @ v
        weight = coefficient * weight / sigma       # at_most=True: weight / max(1, sigma / coefficient)

    Args:
        weights: L tensors of one dtype (fp64, fp32, bf16 or fp16; half is computed in fp32) and of at least two axes;
            under autocast all are taken in the widest dtype of theirs and of u and v.
        u, v: for each weight the output and the input of A, of one sample and without a batch: ``[M]`` and ``[K]`` for
            a matrix, ``[C_out, *output]`` and ``[C_in, *input]`` for a convolution. Of length 1, unless zero.
        geometries: how each weight acts; by default as a matrix whose rows are the first axis.
        iterations: power iterations before the norm is taken, 0 or more.
        coefficient: c > 0. at_most: leaves a weight alone whose norm is at most c.

    Returns:
        The normalised weights, u and v after the iterations, and sigma ``[L]``, fp32 (fp64 for fp64 weights). The
        gradient takes u and v as constants, as the published method does; where a
        kernel runs, the graph may be gone through more than once.
        A weight of zeros has sigma 0 and comes back as it is, with its u and v, which a weight that is not finite
        keeps too.

    Raises:
        ValueError: a shape or an option is wrong. TypeError: a dtype is. BackendUnavailable: a forced backend cannot
            run.

    Source: Miyato et al., "Spectral normalization for generative adversarial networks", 2018; Gouk et al.,
    "Regularisation of neural networks by enforcing Lipschitz continuity", 2018.
    """
    weights, u, v = list(weights), list(u), list(v)
    if geometries is None:
        geometries = [Geometry()] * len(weights)
    weights, u, v = _of_one_dtype(weights, u, v, geometries)
    _check(weights, u, v, geometries)
    checks.integer(NAME, "iterations", iterations, 0)
    if isinstance(coefficient, bool) or not isinstance(coefficient, int | float) or not 0 < coefficient < float("inf"):
        raise ValueError(f"{NAME}: coefficient must be a positive number, got {coefficient!r}")
    with autocast.kept_out(weights[0]):  # its products stay in fp32
        out = NORMALISE(weights, u, v, as_plan(geometries), iterations, float(coefficient), bool(at_most))
    count = len(weights)
    return SpectralNorm(out[:count], out[count : 2 * count], out[2 * count : 3 * count], out[-1])


def _of_one_dtype(weights: list, u: list, v: list, geometries: Sequence[Geometry]) -> tuple[list, list, list]:
    """Tensors, as many as there must be; under autocast in the widest of their dtypes."""
    count = len(weights)
    if not count or not len(u) == len(v) == len(geometries) == count:
        raise ValueError(
            f"{NAME}: weights, u, v and geometries must be lists of one length, 1 or more, got {count}, {len(u)}, "
            f"{len(v)} and {len(geometries)}"
        )
    tensors = [*weights, *u, *v]
    first = tensors[0]
    plain = isinstance(first, Tensor) and first.dtype in checks.FLOATS
    if not plain or not all(
        isinstance(t, Tensor) and t.dtype == first.dtype and t.device == first.device for t in tensors
    ):
        named = {}  # names cost more than looking, which each step of a critic does
        for i in range(count):
            named |= {f"weights[{i}]": weights[i], f"u[{i}]": u[i], f"v[{i}]": v[i]}
        checks.tensors(NAME, named)
        if not autocast.active(first):
            checks.same_dtype(NAME, named)
    if autocast.active(first):
        dtype = autocast.widest(*tensors)
        return [t.to(dtype) for t in weights], [t.to(dtype) for t in u], [t.to(dtype) for t in v]
    return weights, u, v


def _check(weights: list, u: list, v: list, geometries: Sequence[Geometry]) -> None:
    for i, (weight, left, right, g) in enumerate(zip(weights, u, v, geometries, strict=True)):
        if weight.dim() < 2 or not weight.numel():
            raise ValueError(
                f"{NAME}: weights[{i}] must have two axes or more and no empty one, got {list(weight.shape)}"
            )
        if g.kind == MATRIX:
            if not -weight.dim() <= g.axis < weight.dim():
                raise ValueError(f"{NAME}: the axis of weights[{i}] must be one of its {weight.dim()}, got {g.axis}")
            rows = weight.shape[g.axis]
            if left.shape != (rows,) or right.shape != (weight.numel() // rows,):
                checks.shape(NAME, f"u[{i}]", left, [rows], "[M]")
                checks.shape(NAME, f"v[{i}]", right, [weight.numel() // rows], "[K]")
        else:
            _check_convolution(i, weight, left, right, g)


def _check_convolution(i: int, weight: Tensor, u: Tensor, v: Tensor, g: Geometry) -> None:
    dims = weight.dim() - 2
    if g.kind not in (CONVOLUTION, CIRCULAR) or not 1 <= dims <= 3:
        raise ValueError(
            f"{NAME}: weights[{i}] must be a matrix, or a convolution's over 1 to 3 axes, got {g} for "
            f"{list(weight.shape)}"
        )
    x, y = (u, v) if g.transposed else (v, u)
    names = ("u", "v") if g.transposed else ("v", "u")
    if weight.shape[0] % g.groups:
        raise ValueError(f"{NAME}: weights[{i}] must have outputs for each of {g.groups} groups, got {weight.shape[0]}")
    for name, value, channels in zip(names, (x, y), (weight.shape[1] * g.groups, weight.shape[0]), strict=True):
        if value.dim() != dims + 1 or value.shape[0] != channels or not value.numel():
            raise ValueError(
                f"{NAME}: {name}[{i}] must be [{channels}, {', '.join(['*'] * dims)}], got {list(value.shape)}"
            )
    behind = reference._behind(weight, g, x.shape[1:], y.shape[1:])
    if g.kind == CIRCULAR:
        for n, before, after in zip(x.shape[1:], g.padding[3 - dims :], behind, strict=True):
            if max(before, after) > n:
                raise ValueError(
                    f"{NAME}: {names[0]}[{i}] must be as large as its circular padding, {max(before, after)}, got "
                    f"{list(x.shape)}"
                )


# --------------------------------------------------------------------------------------------------- gradient and fakes


def _setup(ctx, inputs, output):
    weights, _, _, ctx.plan, _, ctx.coefficient, ctx.at_most = inputs
    count = len(weights)
    vectors = output[count : 3 * count]
    ctx.mark_non_differentiable(*vectors)
    # Kept by hand, as autograd's own store is emptied by the first backward: layers share one normalised weight between
    # passes (real and fake, micro-batches) that are differentiated one after the other. What autograd's store checks,
    # that nobody wrote over them, `_backward` does.
    ctx.weights, ctx.versions = weights, [w._version for w in weights]
    ctx.vectors, ctx.sigma = vectors, output[-1].detach()  # which has a graph that holds ctx


def _setup_applied(ctx, inputs, output):
    ctx.weights, u, v, sigma, ctx.plan, ctx.coefficient, ctx.at_most = inputs
    ctx.versions = [w._version for w in ctx.weights]
    ctx.vectors, ctx.sigma = [*u, *v], sigma


def _backward_applied(ctx, grads):
    return _backward(ctx, [*grads, None])


def _backward(ctx, grads):
    count = len(ctx.weights)
    grad_sigma = grads[-1]
    used = [i for i in range(count) if grads[i] is not None or grad_sigma is not None]
    for i in used:
        weight, version = ctx.weights[i], ctx.versions[i]
        if weight._version != version:
            raise RuntimeError(
                f"{NAME}: a weight needed for the gradient, {list(weight.shape)}, must be as it was in the forward "
                f"pass, got version {weight._version} of it where {version} was used: an in-place operation, such as "
                "an optimiser's step, came between"
            )
    by_weight: list[Tensor | None] = [None] * count
    if used:
        plan, sigma = ctx.plan, ctx.sigma
        if len(used) < count:
            plan = [n for i in used for n in plan[reference.RECORD * i : reference.RECORD * (i + 1)]]
            sigma = sigma[used]
        picked = [ctx.weights[i] for i in used]
        given = [w.new_zeros(w.shape) if grads[i] is None else grads[i] for i, w in zip(used, picked, strict=True)]
        u, v = [ctx.vectors[i] for i in used], [ctx.vectors[count + i] for i in used]
        if torch.is_grad_enabled() and any(w.requires_grad for w in picked):
            sigma = _sigma(picked, u, v, plan)
        # a recorded pass that is mapped over takes the reference: lists of tensors have no fallback under vmap
        run = reference.spectral_norm_backward if transforms_active() else BACKWARD.dense
        with autocast.kept_out(picked[0]):
            found = run(given, grad_sigma, picked, u, v, sigma, plan, ctx.coefficient, ctx.at_most)
        for i, grad in zip(used, found, strict=True):
            by_weight[i] = grad
    return by_weight, None, None, None, None, None, None


def _sigma(weights, u, v, plan):
    """The norms as functions of the weights, which a gradient of the gradient goes through."""
    work = autocast.work_dtype(weights[0])
    with autocast.kept_out(weights[0]):
        return torch.stack(
            [
                (left.to(work) * reference.apply(w.to(work), g, right.to(work), left.shape)).sum()
                for w, left, right, g in zip(weights, u, v, reference.from_plan(plan), strict=True)
            ]
        )


def _fake(weights, u, v, plan, iterations, coefficient, at_most):
    sigma = weights[0].new_empty((len(weights),), dtype=autocast.work_dtype(weights[0]))
    return [*(t.new_empty(t.shape) for t in (*weights, *u, *v)), sigma]


def _fake_vectors(weights, u, v, plan, iterations):
    return _fake(weights, u, v, plan, iterations, 1.0, False)[len(weights) :]


def _fake_applied(weights, u, v, sigma, plan, coefficient, at_most):
    return [w.new_empty(w.shape) for w in weights]


def _fake_linear(x, weight, bias, factor):
    return x.new_empty((x.shape[0], weight.shape[0])), x.new_empty((x.shape[0], weight.shape[0]))


def _fake_linear_backward(grad, x, weight, z, u, v, factor, norm, by_x):
    return weight.new_empty(weight.shape), x.new_empty(x.shape if by_x else 0)


def _fake_backward(grads, grad_sigma, weights, u, v, sigma, plan, coefficient, at_most):
    return [w.new_empty(w.shape) for w in weights]


OPERATOR = Operator(
    NAME,
    functions=(spectral_norm,),
    types=(Geometry, SpectralNorm),
    kernels={"cpu": "", "triton": "", "cuda": ""},
    # not timed on a GPU; the CUDA kernels take their addresses as arguments, where Triton's take a table that is copied
    # for each call
    prefers="cuda",
    composability=DIFFERENTIABLE,
)
NORMALISE = OPERATOR.define(
    "spectral_norm(Tensor[] weights, Tensor[] u, Tensor[] v, int[] plan, int iterations, float coefficient, "
    "bool at_most) -> Tensor[]",
    reference.spectral_norm,
    _fake,
    gradient=Formula(_setup, _backward, constants=(1, 2, 3, 4, 5, 6)),
)
#: Inputs of a linear layer that `LINEAR` takes at most: with more of them torch's products are as fast.
FEW = 8
#: Of weights that are never written, or not at once: `genkernels.nn._scaled_norm`.
NO_GPU = dict.fromkeys(("triton", "cuda"), "nothing on a GPU calls it: layers there read normalised weights")
VECTORS = OPERATOR.define(
    "spectral_norm_vectors(Tensor[] weights, Tensor[] u, Tensor[] v, int[] plan, int iterations) -> Tensor[]",
    reference.spectral_norm_vectors,
    _fake_vectors,
    gradient=Refused(
        f"{NAME}_vectors: u, v and sigma cannot be differentiated here, where they are constants; those of {NAME} can"
    ),
    kernels=NO_GPU,
)
APPLY = OPERATOR.define(
    "spectral_norm_apply(Tensor[] weights, Tensor[] u, Tensor[] v, Tensor sigma, int[] plan, float coefficient, "
    "bool at_most) -> Tensor[]",
    reference.spectral_norm_apply,
    _fake_applied,
    gradient=Formula(_setup_applied, _backward_applied, constants=(1, 2, 3, 4, 5, 6)),
    kernels=NO_GPU,
)
LINEAR = OPERATOR.define(
    "spectral_norm_linear(Tensor x, Tensor weight, Tensor? bias, float factor) -> (Tensor, Tensor)",
    reference.spectral_norm_linear,
    _fake_linear,
    gradient=Refused(
        f"{NAME}_linear: it cannot be differentiated by itself, f being a function of the weight; its gradient is "
        f"{NAME}_linear_backward"
    ),
    kernels=NO_GPU,
)
LINEAR_BACKWARD = OPERATOR.define(
    "spectral_norm_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor z, Tensor u, Tensor v, float factor, "
    "float norm, bool by_x) -> (Tensor, Tensor)",
    reference.spectral_norm_linear_backward,
    _fake_linear_backward,
    gradient=THROUGH_REFERENCE,
    kernels=NO_GPU,
)
BACKWARD = OPERATOR.define(
    "spectral_norm_backward(Tensor[] grads, Tensor? grad_sigma, Tensor[] weights, Tensor[] u, Tensor[] v, "
    "Tensor sigma, int[] plan, float coefficient, bool at_most) -> Tensor[]",
    reference.spectral_norm_backward,
    _fake_backward,
    gradient=THROUGH_REFERENCE,
)
