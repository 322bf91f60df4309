"""Masked linear layers and the inverse of an autoregressive transform: schemas, fakes, gradients, backend choice.

The maths is in `genkernels.reference.made`, the checks are in `genkernels.ops._made_checks`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from genkernels.ops import _autocast as autocast
from genkernels.ops import _made_checks as checks
from genkernels.ops._autocast import work_dtype
from genkernels.ops._gradients import THROUGH_REFERENCE, Formula
from genkernels.ops._operator import Operator, TorchOp, transforms_active
from genkernels.reference import made as reference
from genkernels.reference._made_maps import Affine, Elementwise, Splines

NAME, SCALE_MAPS, METHODS = checks.NAME, checks.SCALE_MAPS, checks.METHODS


def masked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_degrees: Tensor, out_degrees: Tensor, *, strict: bool = False
) -> Tensor:
    r"""A linear layer in which an output sees the inputs of degree up to its own (`strict`: below its own) and no
    others.

    Dead weights are neither multiplied nor given gradient (exactly 0), whatever stands in them.

    Equivalent to::

        mask = out_degrees[:, None] > in_degrees if strict else out_degrees[:, None] >= in_degrees
        y = torch.nn.functional.linear(x, weight * mask, bias)

    Args:
        x: ``[..., in]``, fp64, fp32, bf16 or fp16. Halves are summed in fp32.
        weight: ``[out, in]``. bias: ``[out]`` or None. The dtype of x (under autocast any mixture: all take autocast's
            dtype).
        in_degrees: ``[in]``, out_degrees: ``[out]``, integers, in any order; sorted ones are the fastest.
        strict: an output sees lower degrees only.

    Returns:
        y ``[..., out]``, contiguous, of x's dtype.

    Raises:
        ValueError: a shape or device is wrong. TypeError: a dtype is. BackendUnavailable: a forced backend cannot run.

    Source: Germain et al., "MADE: Masked autoencoder for distribution estimation", 2015.
    """
    x, weight, bias = checks.linear(x, weight, bias, in_degrees, out_degrees)
    # a small layer takes no longer than a few calls that change nothing: none is made where nothing is to be changed
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if LINEAR.runs_reference(rows, weight, bias, in_degrees, out_degrees, strict):
        y = reference.masked_linear(rows, weight, bias, in_degrees, out_degrees, strict)
    else:
        work = work_dtype(x)  # the CPU kernel computes halves in fp32
        y = LINEAR.run(
            _dense(rows, work),
            _dense(weight, work),
            None if bias is None else _dense(bias, work),
            in_degrees.contiguous(),
            out_degrees.contiguous(),
            strict,
        )
        if work != x.dtype:
            y = y.to(x.dtype)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], weight.shape[0])


def _dense(t: Tensor, dtype: torch.dtype) -> Tensor:
    return (t if t.dtype == dtype else t.to(dtype)).contiguous()


def made_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    order: Tensor,
    counts: Tensor,
    *,
    context: Tensor | None = None,
    residual: bool = False,
    scale_map: str = "exp",
    scale_constant: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""An autoregressive affine transform, all masked layers of its network, the map and the log-determinant in one
    call.

    .. math:: z_i = x_i\,\sigma(s_i) + t_i,\qquad (s, t)_i = \mathrm{MADE}(x_{<i}),\qquad \mathrm{ldj} =
        \sum\log\sigma(s)

    Equivalent to (natural order)::

        s, t = made(x).chunk(2, 1)
        z = x * torch.exp(log_scale(s)) + t
        ldj = log_scale(s).sum(1)

    Args:
        x: ``[N, D]``, fp64, fp32, bf16 or fp16 (halves are computed in fp32).
        weights, biases, order, counts, context, residual: as for `made_inverse`.
        scale_map, scale_constant: as for `made_inverse`.

    Returns:
        ``(z, ldj)``: z like x (contiguous); ldj ``[N]``, nats, fp32 (fp64 for fp64).

    Raises: as for `made_inverse`. Source: the same.
    """
    codes = checks.affine(scale_map, scale_constant)
    weights, biases = list(weights), list(biases)
    checks.network("x", x, weights, biases, order, counts, context, residual, 2)
    dtype = x.dtype
    x, context, weights, biases, order, counts, residual = _arguments(
        x, weights, biases, order, counts, context, residual
    )
    contexts = [] if context is None else [context]
    z, ldj = made_chain(x, contexts, weights, biases, [], [order], [counts], residual, *codes)
    return z.to(dtype), ldj


def made_chain(x, contexts, weights, biases, norms, orders, counts, residual, scale_map, constant):
    """`made_forward` of several transforms one after the other, ActNorms between them, their tensors in lists as
    `genkernels.reference.made.made_forward` has them; for layers, which have checked what they give."""
    every = (x, *contexts, *weights, *biases, *norms)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in every)
    arguments = (x, contexts, weights, biases, norms, orders, counts, residual, scale_map, constant, keep)
    with autocast.kept_out(x):
        if FORWARD.runs_reference(*arguments):
            for k, (order, count) in enumerate(zip(orders, counts, strict=True)):
                layers = len(weights) // len(orders)
                sizes = [w.shape[0] for w in weights[k * layers : (k + 1) * layers - 1]]
                checks.plan_values(order, count, sizes, residual)
            return FORWARD.reference(*arguments[:-1])[:2]
        return FORWARD.now(*arguments)[:2]


def made_inverse(
    z: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    order: Tensor,
    counts: Tensor,
    *,
    context: Tensor | None = None,
    residual: bool = False,
    scale_map: str = "exp",
    scale_constant: float | None = None,
    method: str = "blocked",
) -> tuple[Tensor, Tensor]:
    r"""Inverts an autoregressive affine transform at about the price of one forward pass, D being the number of
    features.

    .. math:: x_i = (z_i - t_i) / \sigma(s_i),\qquad (s, t)_i = \mathrm{MADE}(x_{<i}),\qquad \mathrm{ldj} =
        -\sum\log\sigma(s)

    Gradients come from the implicit function: one transposed triangular solve and one vector-Jacobian product, never a
    graph of D passes.

    Equivalent to (natural order)::

        x = torch.zeros_like(z)
        for _ in range(z.shape[1]):
            s, t = made(x).chunk(2, 1)
            x = (z - t) * torch.exp(-log_scale(s))
        ldj = -log_scale(s).sum(1)

    Args:
        z: ``[N, D]``, fp64, fp32, bf16 or fp16 (halves are computed in fp32).
        weights: the layers' ``[out, in]``, last ``[2*D, H]`` (s for each feature, then t); dead entries never act.
            biases: ``[out]``.
            The dtype of z, or under autocast any mixture: the widest then, fp32 at least.
        order: ``[D]`` integers, the feature of each step. counts: ``[layers - 1, D + 1]`` integers, the units of each
            hidden layer that are known once k features are (`genkernels.reference.made.plan` makes both from degrees;
            units are sorted by degree).
        context: ``[N, H]`` added to the first hidden layer, or None.
        residual: hidden layers after the first come in pairs, each a residual block.
        scale_map: ``exp``: σ = exp(s); ``sigmoid``: σ = sigmoid(s + 2); ``tanh``: σ = exp(c·tanh(s)); the others are
            those of `affine_coupling`.
        scale_constant: c of the scale maps that have one, as for `affine_coupling`.
        method: ``blocked``: the triangular solve; ``jacobi``: sweeps over all features until nothing changes, at most
            D;
            ``sequential``: D passes, the definition.

    Returns:
        ``(x, ldj)``: x like z (contiguous); ldj ``[N]``, nats, fp32 (fp64 for fp64).

    Raises:
        ValueError: a shape, device or option is wrong. TypeError: a dtype is. BackendUnavailable: a forced backend
            cannot run.

    Source: Kingma et al., "Improving variational inference with inverse autoregressive flow", 2016; Papamakarios et
    al., "Masked autoregressive flow for density estimation", 2017.
    """
    codes = checks.affine(scale_map, scale_constant)
    return _solve(AFFINE, 2, z, weights, biases, order, counts, context, residual, codes, method)


def made_spline_inverse(
    z: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    order: Tensor,
    counts: Tensor,
    *,
    context: Tensor | None = None,
    residual: bool = False,
    parametrization: str = "nflows",
    bound: float = 5.0,
    logit_scale: float = 1.0,
    floor: float = 1e-3,
    method: str = "blocked",
) -> tuple[Tensor, Tensor]:
    r"""Inverts an autoregressive transform by rational-quadratic splines at about the price of one forward pass, where
    D features are otherwise D passes.

    .. math:: z_i = \mathrm{spline}(x_i;\,p_i),\qquad p_i = \mathrm{MADE}(x_{<i}) \in \mathbb{R}^P

    Gradients are those of the implicit function, as for `made_inverse`.

    Equivalent to (natural order)::

        x = torch.zeros_like(z)
        for _ in range(z.shape[1]):
            params = made(x).unflatten(1, (P, D)).movedim(1, 2)
            x, ldj = genkernels.ops.rational_quadratic_spline_inverse(z, params)

    Args:
        z, order, counts, context, residual, method: as for `made_inverse`.
        weights, biases: as for `made_inverse`, the last layer's ``[P*D, H]`` and ``[P*D]``: the first of the P numbers
            of a spline for all features, then the second, …. K width logits, K height logits, K − 1 slopes (with
            ``circular`` K of them) say K.
        parametrization, bound, logit_scale, floor: as for `rational_quadratic_spline`.

    Returns:
        ``(x, ldj)``: x like z (contiguous); ldj ``[N]``, that of the inverse, nats, fp32 (fp64 for fp64).

    Raises: as for `made_inverse`.

    Source: Durkan et al., "Neural spline flows", 2019, its autoregressive splines.
    """
    weights = list(weights)
    outputs, codes = checks.splines(z, weights, parametrization, bound, logit_scale, floor)
    return _solve(SPLINES, outputs, z, weights, biases, order, counts, context, residual, codes, method)


def _solve(kind: _Kind, outputs: int, z, weights, biases, order, counts, context, residual, codes, method):
    """The inverse by maps of some kind, `outputs` parameters a feature; codes: what else its torch operator takes."""
    weights, biases = list(weights), list(biases)
    checks.inverse(z, weights, biases, order, counts, context, residual, outputs, method)
    dtype, arguments = z.dtype, (*_arguments(z, weights, biases, order, counts, context, residual), *codes)
    with autocast.kept_out(z):
        if transforms_active():
            x, ldj = kind.solve.reference(*arguments)
        elif method != "blocked" or kind.solve.runs_reference(*arguments):
            checks.plan_values(order, counts, [w.shape[0] for w in weights[:-1]], residual)
            x, ldj = kind.solve.reference(*arguments) if method == "blocked" else _by_passes(kind, method, arguments)
        else:
            x, ldj = kind.solve.run(*arguments)
    return x.to(dtype), ldj


def _arguments(z, weights, biases, order, counts, context, residual) -> tuple:
    """What every torch operator of a transform takes first, in one dtype and dense, as kernels ask for it."""
    work = work_dtype(z, context, *weights, *biases)
    weights, biases = [_dense(w, work) for w in weights], [_dense(b, work) for b in biases]
    context = None if context is None else _dense(context, work)
    return _dense(z, work), context, weights, biases, order.contiguous(), counts.contiguous(), bool(residual)


# ------------------------------------------------------------------------------------------------------------ gradients


class _Kind(NamedTuple):
    """A kind of maps: its torch operators, and its maps of the reference from what those take last."""

    solve: TorchOp
    backward: TorchOp
    maps: Callable[..., Elementwise]


def _by_passes(kind: _Kind, method: str, arguments) -> tuple[Tensor, Tensor]:
    """The solution by whole passes without a graph, its gradient that of the implicit function."""
    z, context, weights, biases, *rest = arguments
    return _Solved.apply(kind, method, rest, len(weights), z, context, *weights, *biases)


class _Solved(torch.autograd.Function):
    """A solution found by whatever means, with the gradient of `made_inverse`."""

    @staticmethod
    def forward(ctx, kind, method, rest, layers, z, context, *both):
        network, codes = (context, both[:layers], both[layers:], *rest[:3]), rest[3:]
        solve = reference.inverse_by_sweeps if method == "jacobi" else reference.inverse
        x, ldj = solve(kind.maps(*codes), z, *network)
        ctx.kind, ctx.rest, ctx.layers = kind, rest, layers
        ctx.save_for_backward(x, context, *both)
        ctx.set_materialize_grads(False)
        return x, ldj

    @staticmethod
    def backward(ctx, grad_x, grad_ldj):
        x, context, *both = ctx.saved_tensors
        layers = both[: ctx.layers], both[ctx.layers :]
        grads = _implicit(ctx.kind.backward, grad_x, grad_ldj, x, context, *layers, *ctx.rest)
        if grads is None:
            return (None,) * (6 + len(both))
        z, by_context, weights, biases = grads
        return None, None, None, None, z, by_context, *weights, *biases


def _implicit(backward: TorchOp, grad_x, grad_ldj, x, context, weights, biases, *rest):
    """``(grad_z, grad_context, grad_weights, grad_biases)``, or None where nothing arrived."""
    if grad_x is None and grad_ldj is None:
        return None
    # a recorded pass that is mapped over takes the reference: lists of tensors have no fallback under vmap
    run = backward.reference if transforms_active() else backward.dense
    with autocast.kept_out(x):  # GPUs multiply by torch here
        by_z, by_context, *by_layers = run(grad_x, grad_ldj, x, context, weights, biases, *rest)
    return by_z, None if context is None else by_context, by_layers[0::2], by_layers[1::2]


def _setup_inverse(ctx, inputs, output):
    z, context, weights, biases, order, counts, *ctx.codes = inputs
    ctx.layers = len(weights)
    ctx.save_for_backward(output[0], context, order, counts, *weights, *biases)


def _backward_inverse(backward: TorchOp, ctx, grad_x, grad_ldj):
    x, context, order, counts, *both = ctx.saved_tensors
    weights, biases = both[: ctx.layers], both[ctx.layers :]
    grads = _implicit(backward, grad_x, grad_ldj, x, context, weights, biases, order, counts, *ctx.codes)
    return *(grads or (None,) * 4), None, None, *(None,) * len(ctx.codes)


def _setup_forward(ctx, inputs, output):
    x, contexts, weights, biases, norms, orders, counts, *codes, _ = inputs
    ctx.codes, ctx.chain = codes, tuple(map(len, (contexts, weights, biases, norms, orders, counts)))
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(x, output[2], *contexts, *weights, *biases, *norms, *orders, *counts)


def _backward_forward(ctx, grad_z, grad_ldj, _):
    x, kept, *rest = ctx.saved_tensors
    lists, at = [], 0
    for count in ctx.chain:
        lists.append(rest[at : at + count])
        at += count
    by_layers = any(ctx.needs_input_grad[2]) or any(ctx.needs_input_grad[3])
    run = FORWARD_BACKWARD.reference if transforms_active() else FORWARD_BACKWARD.dense
    with autocast.kept_out(x):
        by_x, *grads = run(grad_z, grad_ldj, x, kept, *lists, *ctx.codes, by_layers)
    contexts, norms = ctx.chain[0], ctx.chain[3]
    by_contexts, by_norms, grads = grads[:contexts], grads[contexts : contexts + norms], grads[contexts + norms :]
    by_weights, by_biases = (grads[0::2], grads[1::2]) if by_layers else (None, None)
    return by_x, by_contexts, by_weights, by_biases, by_norms, None, None, *(None,) * (len(ctx.codes) + 1)


def _setup_linear(ctx, inputs, output):
    input, weight, bias, in_degrees, out_degrees, ctx.strict = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(input, weight, in_degrees, out_degrees)


def _backward_linear(ctx, grad):
    input, weight, in_degrees, out_degrees = ctx.saved_tensors
    wants_input, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    degrees = (in_degrees, out_degrees, ctx.strict)
    by_input = LINEAR_GRAD_INPUT.dense(grad, weight, *degrees) if wants_input else None
    by_weight = LINEAR_GRAD_WEIGHT.dense(grad, input, *degrees) if wants_weight else None
    return by_input, by_weight, grad.sum(0) if ctx.has_bias and wants_bias else None, None, None, None


# --------------------------------------------------------------------------------------------------------------- fakes


def _fake_linear(input, weight, bias, in_degrees, out_degrees, strict):
    return input.new_empty((input.shape[0], weight.shape[0]))


def _fake_grad_input(grad_output, weight, in_degrees, out_degrees, strict):
    return grad_output.new_empty((grad_output.shape[0], weight.shape[1]))


def _fake_grad_weight(grad_output, input, in_degrees, out_degrees, strict):
    return input.new_empty((grad_output.shape[1], input.shape[1]))


def _fake_forward(x, contexts, weights, biases, norms, orders, counts, residual, scale_map, constant, keep):
    rows = len(orders) * x.shape[1] + sum(b.shape[0] for b in biases)
    kept = (rows, reference.stride_of_samples(x.shape[0])) if keep else (0, 0)
    return x.new_empty(x.shape), x.new_empty((x.shape[0],)), x.new_empty(kept)


def _fake_forward_backward(grad_z, grad_ldj, x, kept, contexts, weights, biases, norms, *rest):
    layers = [t for pair in zip(weights, biases, strict=True) for t in pair] if rest[-1] else []
    return [t.new_empty(t.shape) for t in (x, *contexts, *norms, *layers)]


def _fake_inverse(z, *network):
    return z.new_empty(z.shape), z.new_empty((z.shape[0],))


def _fake_inverse_backward(grad_x, grad_ldj, x, context, weights, biases, *rest):
    grads = [x.new_empty(x.shape), x.new_empty((x.shape[0], weights[0].shape[0]))]
    for weight, bias in zip(weights, biases, strict=True):
        grads += [weight.new_empty(weight.shape), bias.new_empty(bias.shape)]
    return grads


# -------------------------------------------------------------------------------------------------------- registration

OPERATOR = Operator(
    NAME,
    functions=(masked_linear, made_forward, made_inverse, made_spline_inverse),
    kernels={"cpu": "", "triton": "", "cuda": ""},
)

_BY_CUBLAS = (
    "would win nothing: on a GPU a dense product (cuBLAS) with the masked weight costs less than a product of one's "
    "own over the live half"
)
_LINEAR_KERNELS = {"triton": _BY_CUBLAS, "cuda": _BY_CUBLAS}
_DEGREES = "Tensor in_degrees, Tensor out_degrees, bool strict"
LINEAR = OPERATOR.define(
    f"masked_linear(Tensor input, Tensor weight, Tensor? bias, {_DEGREES}) -> Tensor",
    reference.masked_linear,
    _fake_linear,
    gradient=Formula(_setup_linear, _backward_linear),
    kernels=_LINEAR_KERNELS,
)
LINEAR_GRAD_INPUT = OPERATOR.define(
    f"masked_linear_grad_input(Tensor grad_output, Tensor weight, {_DEGREES}) -> Tensor",
    reference.masked_linear_grad_input,
    _fake_grad_input,
    gradient=THROUGH_REFERENCE,
    kernels=_LINEAR_KERNELS,
)
LINEAR_GRAD_WEIGHT = OPERATOR.define(
    f"masked_linear_grad_weight(Tensor grad_output, Tensor input, {_DEGREES}) -> Tensor",
    reference.masked_linear_grad_weight,
    _fake_grad_weight,
    gradient=THROUGH_REFERENCE,
    kernels=_LINEAR_KERNELS,
)

_NETWORK = "Tensor? context, Tensor[] weights, Tensor[] biases, Tensor order, Tensor counts, bool residual"

_CHAIN = (
    "Tensor[] contexts, Tensor[] weights, Tensor[] biases, Tensor[] norms, Tensor[] orders, Tensor[] counts, "
    "bool residual, int scale_map, float constant"
)
_BY_LAYERS = (
    "would win nothing: on a GPU the products are cuBLAS's on masked weights, and layers call it and the coupling's "
    "kernel one by one"
)
_FORWARD_KERNELS = {"triton": _BY_LAYERS, "cuda": _BY_LAYERS}
FORWARD = OPERATOR.define(
    f"made_forward(Tensor x, {_CHAIN}, bool keep) -> (Tensor, Tensor, Tensor)",
    reference.made_forward,
    _fake_forward,
    gradient=Formula(_setup_forward, _backward_forward),
    kernels=_FORWARD_KERNELS,
)
FORWARD_BACKWARD = OPERATOR.define(
    f"made_forward_backward(Tensor? grad_z, Tensor? grad_ldj, Tensor x, Tensor kept, {_CHAIN}, bool by_layers) "
    "-> Tensor[]",
    reference.made_forward_backward,
    _fake_forward_backward,
    gradient=THROUGH_REFERENCE,
    kernels=_FORWARD_KERNELS,
)


def _define_inverse(name: str, codes: str, maps: Callable[..., Elementwise]) -> _Kind:
    backward = OPERATOR.define(
        f"{name}_backward(Tensor? grad_x, Tensor? grad_ldj, Tensor x, {_NETWORK}, {codes}) -> Tensor[]",
        getattr(reference, f"{name}_backward"),
        _fake_inverse_backward,
        gradient=THROUGH_REFERENCE,
    )
    solve = OPERATOR.define(
        f"{name}(Tensor z, {_NETWORK}, {codes}) -> (Tensor, Tensor)",
        getattr(reference, name),
        _fake_inverse,
        gradient=Formula(_setup_inverse, partial(_backward_inverse, backward)),
    )
    return _Kind(solve, backward, maps)


AFFINE = _define_inverse("made_inverse", "int scale_map, float constant", Affine)
SPLINES = _define_inverse(
    "made_spline_inverse", "int parametrization, float bound, float logit_scale, float floor", Splines
)
