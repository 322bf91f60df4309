"""Masked linear layers and the inverse of an autoregressive transform: schemas, fakes, gradients, backend choice.

The maths is in `genkernels.reference.made`, the checks are in `genkernels.ops._made_checks`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from genkernels import reference
from genkernels.ops import _made_checks as checks
from genkernels.ops._operator import (
    DIFFERENTIABLE,
    Operator,
    autocasting,
    define,
    differentiate,
    differentiate_reference,
    register,
    runs_reference,
    transforms_active,
)
from genkernels.reference.made import made_inverse_jacobi

NAME = checks.NAME
SCALE_MAPS = checks.SCALE_MAPS
METHODS = checks.METHODS


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
    x, weight, bias = checks.autocast(x, weight, bias)
    checks.linear(x, weight, bias, in_degrees, out_degrees)
    # a small layer takes no longer than a few calls that change nothing: none is made where nothing is to be changed
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if runs_reference(OPERATOR, x):
        y = reference.masked_linear(rows, weight, bias, in_degrees, out_degrees, strict)
    else:
        # the CPU kernel computes halves in fp32; on a GPU the product itself does
        work = checks.work_dtype(x) if x.device.type == "cpu" else x.dtype
        y = torch.ops.genkernels.masked_linear(
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
        scale_map: ``exp``: σ = exp(s); ``sigmoid``: σ = sigmoid(s + 2); ``tanh``: σ = exp(tanh(s)).
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
    weights, biases = list(weights), list(biases)
    scale = checks.inverse(z, weights, biases, order, counts, context, residual, scale_map, method)
    dtype = z.dtype
    work = checks.work_dtype(z, context, *weights, *biases)
    z, context, *both = (
        t if t is None else t.to(work).contiguous() for t in (z, context, *weights, *biases)
    )  # one dtype, dense: what every kernel asks for
    weights, biases = both[: len(weights)], both[len(weights) :]
    arguments = (z, context, weights, biases, order.contiguous(), counts.contiguous(), bool(residual), scale)
    # autocast must not reach the products inside: log-determinants are computed in fp32 at least
    with torch.autocast(z.device.type, enabled=False) if autocasting(z) else contextlib.nullcontext():
        if transforms_active():
            x, ldj = reference.made_inverse(*arguments)
        elif method != "blocked" or runs_reference(OPERATOR, z):
            checks.plan_values(order, counts, [w.shape[0] for w in weights[:-1]], residual)
            x, ldj = reference.made_inverse(*arguments) if method == "blocked" else _by_passes(method, arguments)
        else:
            x, ldj = torch.ops.genkernels.made_inverse(*arguments)
    return x.to(dtype), ldj


# ------------------------------------------------------------------------------------------------------------ gradients


def _by_passes(method: str, arguments) -> tuple[Tensor, Tensor]:
    """The solution by whole passes without a graph, its gradient that of the implicit function."""
    z, context, weights, biases, *rest = arguments
    return _Solved.apply(method, rest, len(weights), z, context, *weights, *biases)


class _Solved(torch.autograd.Function):
    """A solution found by whatever means, with the gradient of `made_inverse`."""

    @staticmethod
    def forward(ctx, method, rest, layers, z, context, *both):
        solve = made_inverse_jacobi if method == "jacobi" else reference.made_inverse
        x, ldj = solve(z, context, both[:layers], both[layers:], *rest)
        ctx.rest, ctx.layers = rest, layers
        ctx.save_for_backward(x, context, *both)
        ctx.set_materialize_grads(False)
        return x, ldj

    @staticmethod
    def backward(ctx, grad_x, grad_ldj):
        x, context, *both = ctx.saved_tensors
        grads = _implicit(grad_x, grad_ldj, x, context, both[: ctx.layers], both[ctx.layers :], *ctx.rest)
        if grads is None:
            return (None,) * (5 + len(both))
        z, by_context, weights, biases = grads
        return None, None, None, z, by_context, *weights, *biases


def _implicit(grad_x, grad_ldj, x, context, weights, biases, order, counts, residual, scale_map):
    """``(grad_z, grad_context, grad_weights, grad_biases)``, or None where nothing arrived."""
    if grad_x is None and grad_ldj is None:
        return None
    dense = (None if g is None else g.contiguous() for g in (grad_x, grad_ldj))
    by_z, by_context, *rest = torch.ops.genkernels.made_inverse_backward(
        *dense, x, context, weights, biases, order, counts, residual, scale_map
    )
    return by_z, None if context is None else by_context, rest[0::2], rest[1::2]


def _setup_inverse(ctx, inputs, output):
    z, context, weights, biases, order, counts, ctx.residual, ctx.scale_map = inputs
    ctx.layers = len(weights)
    ctx.save_for_backward(output[0], context, order, counts, *weights, *biases)
    ctx.set_materialize_grads(False)


def _backward_inverse(ctx, grad_x, grad_ldj):
    x, context, order, counts, *both = ctx.saved_tensors
    weights, biases = both[: ctx.layers], both[ctx.layers :]
    grads = _implicit(grad_x, grad_ldj, x, context, weights, biases, order, counts, ctx.residual, ctx.scale_map)
    none = [None] * ctx.layers
    return *(grads or (None, None, none, none)), None, None, None, None


def _setup_linear(ctx, inputs, output):
    input, weight, bias, in_degrees, out_degrees, ctx.strict = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(input, weight, in_degrees, out_degrees)


def _backward_linear(ctx, grad):
    input, weight, in_degrees, out_degrees = ctx.saved_tensors
    ops, grad = torch.ops.genkernels, grad.contiguous()
    wants_input, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    degrees = (in_degrees, out_degrees, ctx.strict)
    by_input = ops.masked_linear_grad_input(grad, weight, *degrees) if wants_input else None
    by_weight = ops.masked_linear_grad_weight(grad, input, *degrees) if wants_weight else None
    return by_input, by_weight, grad.sum(0) if ctx.has_bias and wants_bias else None, None, None, None


def _differentiate_lists(name: str, function: Callable) -> None:
    """`differentiate_reference` for an operator that takes and gives lists of tensors."""

    def setup_context(ctx, inputs, output):
        ctx.sizes = [len(v) if isinstance(v, list | tuple) else None for v in inputs]
        flat = [t for v in inputs for t in (v if isinstance(v, list | tuple) else [v])]
        ctx.is_tensor = [isinstance(t, Tensor) for t in flat]
        ctx.others = [None if isinstance(t, Tensor) else t for t in flat]
        ctx.save_for_backward(*[t for t in flat if isinstance(t, Tensor)])
        ctx.set_materialize_grads(False)

    def nested(ctx, flat):
        flat = iter(flat)
        return [next(flat) if size is None else [next(flat) for _ in range(size)] for size in ctx.sizes]

    def backward(ctx, grad_outputs):
        saved = iter(ctx.saved_tensors)
        flat = [next(saved) if is_tensor else o for is_tensor, o in zip(ctx.is_tensor, ctx.others, strict=True)]
        wanted = [i for i, t in enumerate(flat) if isinstance(t, Tensor) and t.requires_grad]
        higher = torch.is_grad_enabled()
        grads: list[Tensor | None] = [None] * len(flat)
        with torch.enable_grad():
            if not higher:
                for i in wanted:
                    flat[i] = flat[i].detach().requires_grad_()
            outputs = function(*nested(ctx, flat))
            pairs = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if g is not None and o.requires_grad]
            if pairs and wanted:
                found = torch.autograd.grad(
                    [o for o, _ in pairs],
                    [flat[i] for i in wanted],
                    [g for _, g in pairs],
                    create_graph=higher,
                    allow_unused=True,
                )
                for i, grad in zip(wanted, found, strict=True):
                    grads[i] = grad
        return tuple(nested(ctx, grads))

    differentiate(name, setup_context, backward)


# --------------------------------------------------------------------------------------------------------------- fakes


def _fake_linear(input, weight, bias, in_degrees, out_degrees, strict):
    return input.new_empty((input.shape[0], weight.shape[0]))


def _fake_grad_input(grad_output, weight, in_degrees, out_degrees, strict):
    return grad_output.new_empty((grad_output.shape[0], weight.shape[1]))


def _fake_grad_weight(grad_output, input, in_degrees, out_degrees, strict):
    return input.new_empty((grad_output.shape[1], input.shape[1]))


def _fake_inverse(z, context, weights, biases, order, counts, residual, scale_map):
    return z.new_empty(z.shape), z.new_empty((z.shape[0],))


def _fake_inverse_backward(grad_x, grad_ldj, x, context, weights, biases, order, counts, residual, scale_map):
    grads = [x.new_empty(x.shape), x.new_empty((x.shape[0], weights[0].shape[0]))]
    for weight, bias in zip(weights, biases, strict=True):
        grads += [weight.new_empty(weight.shape), bias.new_empty(bias.shape)]
    return grads


# -------------------------------------------------------------------------------------------------------- registration

OPERATOR = register(
    Operator(
        name=NAME,
        functions=(masked_linear, made_inverse),
        backends={"cpu": "", "triton": "", "cuda": ""},
        composability=DIFFERENTIABLE,
    )
)

_DEGREES = "Tensor in_degrees, Tensor out_degrees, bool strict"
_NETWORK = (
    "Tensor? context, Tensor[] weights, Tensor[] biases, Tensor order, Tensor counts, bool residual, int scale_map"
)
define(
    OPERATOR,
    f"masked_linear(Tensor input, Tensor weight, Tensor? bias, {_DEGREES}) -> Tensor",
    reference=reference.masked_linear,
    fake=_fake_linear,
)
define(
    OPERATOR,
    f"masked_linear_grad_input(Tensor grad_output, Tensor weight, {_DEGREES}) -> Tensor",
    reference=reference.masked_linear_grad_input,
    fake=_fake_grad_input,
)
define(
    OPERATOR,
    f"masked_linear_grad_weight(Tensor grad_output, Tensor input, {_DEGREES}) -> Tensor",
    reference=reference.masked_linear_grad_weight,
    fake=_fake_grad_weight,
)
define(
    OPERATOR,
    f"made_inverse(Tensor z, {_NETWORK}) -> (Tensor, Tensor)",
    reference=reference.made_inverse,
    fake=_fake_inverse,
)
define(
    OPERATOR,
    f"made_inverse_backward(Tensor? grad_x, Tensor? grad_ldj, Tensor x, {_NETWORK}) -> Tensor[]",
    reference=reference.made_inverse_backward,
    fake=_fake_inverse_backward,
)
differentiate("masked_linear", _setup_linear, _backward_linear)
differentiate_reference("masked_linear_grad_input", reference.masked_linear_grad_input)
differentiate_reference("masked_linear_grad_weight", reference.masked_linear_grad_weight)
differentiate("made_inverse", _setup_inverse, _backward_inverse)
_differentiate_lists("made_inverse_backward", reference.made_inverse_backward)
