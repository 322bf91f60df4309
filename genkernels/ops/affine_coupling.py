"""Affine coupling: schema, checks, fake, gradients, backend choice. The maths is in
`genkernels.reference.affine_coupling`."""

from __future__ import annotations

import torch
from torch import Tensor

from genkernels import reference
from genkernels.ops._operator import (
    DIFFERENTIABLE,
    Operator,
    autocasting,
    choose,
    define,
    differentiate,
    differentiate_reference,
    refuse_gradient,
    register,
    runs_reference,
)

NAME = "affine_coupling"
SCALE_MAPS = ("exp", "sigmoid", "tanh", "additive")
SPLITS = ("channel", "checkerboard")
LAYOUTS = ("halves", "interleaved")

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_HALVES = (torch.bfloat16, torch.float16)


def affine_coupling(
    x: Tensor,
    params: Tensor,
    *,
    scale_map: str = "exp",
    split: str = "channel",
    layout: str = "halves",
    flip: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Scales and shifts one half of `x` by `params`, copies the other, and gives the log-determinant, in one pass.

    .. math:: z_1 = x_1,\qquad z_2 = x_2\,\sigma(s) + t,\qquad \mathrm{ldj} = \sum\log\sigma(s)

    Equivalent to (channel split, ``scale_map="exp"``)::

        (x1, x2), (s, t) = x.chunk(2, 1), params.chunk(2, 1)
        z = torch.cat([x1, x2 * s.exp() + t], 1)
        ldj = s.flatten(1).sum(1)

    Args:
        x: ``[N, C, *spatial]``, fp64, fp32, bf16 or fp16. C is even for the channel split; the checkerboard split takes
            ``[N, C, H, W]``.
        params: what the network made of the pass-through half. Channel split: ``[N, C, *spatial]``, log-scale and shift
            of the C/2
            transformed channels. Checkerboard: ``[N, 2*C, H, W]``; values at pass-through pixels are ignored and get a
                gradient of
            exactly 0. Additive: the shift alone, half as many channels. The dtype of `x`, or bf16 or fp16 beside an
                fp32 `x`.
        scale_map: ``exp``: σ = exp(s); ``sigmoid``: σ = sigmoid(s + 2); ``tanh``: σ = exp(tanh(s)); ``additive``: σ = 1
            (NICE).
        split: ``channel``, or ``checkerboard``: pixels with even h + w pass through.
        layout: ``halves``: all log-scales, then all shifts; ``interleaved``: channel 2c is the log-scale, 2c + 1 the
            shift.
        flip: swaps the half that passes through and the half that is transformed.

    Returns:
        ``(z, ldj)``: z like `x` (contiguous); ldj ``[N]``, nats, fp32 (fp64 for fp64).

    Raises:
        ValueError: a shape or an option is wrong. TypeError: a dtype is. BackendUnavailable: a forced backend cannot
            run.

    Source: Dinh et al., "Density estimation using Real NVP", 2017; Kingma & Dhariwal, "Glow", 2018.
    """
    return _couple(x, params, scale_map, split, layout, flip, inverse=False)


def affine_coupling_inverse(
    z: Tensor,
    params: Tensor,
    *,
    scale_map: str = "exp",
    split: str = "channel",
    layout: str = "halves",
    flip: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""The inverse of `affine_coupling` with the same arguments: :math:`x_2 = (z_2 - t)/\sigma(s)`.

    Equivalent to (channel split, ``scale_map="exp"``)::

        (z1, z2), (s, t) = z.chunk(2, 1), params.chunk(2, 1)
        x = torch.cat([z1, (z2 - t) * (-s).exp()], 1)
        ldj = -s.flatten(1).sum(1)

    Args:
        z: ``[N, C, *spatial]``, what `affine_coupling` gave.
        params: as for `affine_coupling`; the network reads them off z's pass-through half, which is x's.
        scale_map, split, layout, flip: as for `affine_coupling`.

    Raises: as for `affine_coupling`. Source: the same.

    Returns:
        ``(x, ldj)``: x like `z` (contiguous); ldj ``[N]`` being the log-determinant of the inverse, minus that of the
        forward map.
    """
    return _couple(z, params, scale_map, split, layout, flip, inverse=True)


def affine_coupling_reverse(
    grad_z: Tensor | None,
    grad_ldj: Tensor | None,
    z: Tensor,
    params: Tensor,
    *,
    scale_map: str = "exp",
    split: str = "channel",
    layout: str = "halves",
    flip: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`affine_coupling`'s input and gradients from its output, in one pass: the backward of a reversible flow.

    Equivalent to::

        x, _ = affine_coupling_inverse(z, params)
        z_, ldj = affine_coupling(x, params)
        grad_x, grad_params = torch.autograd.grad((z_, ldj), (x, params), (grad_z, grad_ldj))

    Args:
        grad_z: like `z`, or None. grad_ldj: ``[N]``, or None. The others: as for `affine_coupling`.

    Returns:
        ``(x, grad_x, grad_params)``. They carry no graph: differentiating them raises.
    """
    codes = _check(z, params, scale_map, split, layout)
    z, params = _autocast(z, params)
    _check_gradients(z, grad_z, grad_ldj)
    tensors = (_dense(grad_z), _dense(grad_ldj), z.contiguous(), params.contiguous())
    if runs_reference(OPERATOR, z):
        with torch.no_grad():
            return reference.affine_coupling_reverse(*tensors, *codes, flip)
    return torch.ops.genkernels.affine_coupling_reverse(*tensors, *codes, flip)


def _couple(x, params, scale_map, split, layout, flip, inverse):
    codes = _check(x, params, scale_map, split, layout)
    x, params = _autocast(x, params)
    if runs_reference(OPERATOR, x):
        return reference.affine_coupling(x, params, *codes, flip, inverse)
    return torch.ops.genkernels.affine_coupling(x.contiguous(), params.contiguous(), *codes, flip, inverse)


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _autocast(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast any mixture of floats is fine: the wider one wins, except that fp32 beside half params is
    native."""
    if x.dtype != params.dtype and not _pairs(x.dtype, params.dtype):
        wide = torch.promote_types(x.dtype, params.dtype)
        return x.to(wide), params.to(wide)
    return x, params


def _pairs(x: torch.dtype, params: torch.dtype) -> bool:
    return x == params or (x == torch.float32 and params in _HALVES)


def _check(x: Tensor, params: Tensor, scale_map: str, split: str, layout: str) -> tuple[int, int, int]:
    """Every condition on shapes, dtypes, devices and options; the option codes."""
    codes = (
        choose(NAME, "scale_map", scale_map, SCALE_MAPS),
        choose(NAME, "split", split, SPLITS),
        choose(NAME, "layout", layout, LAYOUTS),
    )
    for label, tensor in (("x", x), ("params", params)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{NAME}: {label} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _FLOATS:
            raise TypeError(f"{NAME}: {label} must be float64, float32, bfloat16 or float16, got {tensor.dtype}")
    if x.device != params.device:
        raise ValueError(f"{NAME}: x and params must be on one device, got {x.device} and {params.device}")
    if not _pairs(x.dtype, params.dtype) and not autocasting(x):
        raise TypeError(
            f"{NAME}: params must have x's dtype, or be bfloat16 or float16 beside a float32 x, "
            f"got x {x.dtype} and params {params.dtype}"
        )
    shape = list(x.shape)
    if split == "checkerboard":
        if x.dim() != 4:
            raise ValueError(f"{NAME}: x must be [N, C, H, W] for the checkerboard split, got {shape}")
        moved = shape[1]
    else:
        if x.dim() < 2:
            raise ValueError(f"{NAME}: x must be [N, C, ...], got {shape}")
        if shape[1] % 2:
            raise ValueError(f"{NAME}: x must have an even number of channels for the channel split, got {shape}")
        moved = shape[1] // 2
    count, formula = (moved, "C") if scale_map == "additive" else (2 * moved, "2*C")
    expected = [shape[0], count, *shape[2:]]
    if list(params.shape) != expected:
        raise ValueError(
            f"{NAME}: params must be [N, {formula}, ...] = {expected}, C = {moved} being the transformed channels, "
            f"got {list(params.shape)}"
        )
    return codes


def _check_gradients(z: Tensor, grad_z: Tensor | None, grad_ldj: Tensor | None) -> None:
    if grad_z is not None and grad_z.shape != z.shape:
        raise ValueError(f"{NAME}: grad_z must have z's shape {list(z.shape)}, got {list(grad_z.shape)}")
    if grad_ldj is not None and list(grad_ldj.shape) != [z.shape[0]]:
        raise ValueError(f"{NAME}: grad_ldj must be [N] = [{z.shape[0]}], got {list(grad_ldj.shape)}")


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _fake(input, params, *attributes):
    return (
        torch.empty_like(input, memory_format=torch.contiguous_format),
        input.new_empty((input.shape[0],), dtype=_work_dtype(input)),
    )


def _fake_backward(grad_output, grad_ldj, input, params, *attributes):
    like = torch.contiguous_format
    return torch.empty_like(input, memory_format=like), torch.empty_like(params, memory_format=like)


def _fake_reverse(grad_output, grad_ldj, output, params, *attributes):
    return torch.empty_like(output, memory_format=torch.contiguous_format), *_fake_backward(None, None, output, params)


def _setup_context(ctx, inputs, output):
    input, params, *ctx.attributes = inputs
    ctx.save_for_backward(input, params)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, grad_ldj):
    nothing = (None,) * len(ctx.attributes)
    if grad_output is None and grad_ldj is None:
        return None, None, *nothing
    input, params = ctx.saved_tensors
    grads = torch.ops.genkernels.affine_coupling_backward(
        _dense(grad_output), _dense(grad_ldj), input, params, *ctx.attributes
    )
    return *grads, *nothing


OPERATOR = register(
    Operator(
        name=NAME,
        functions=(affine_coupling, affine_coupling_inverse, affine_coupling_reverse),
        backends={"cpu": "", "triton": "", "cuda": ""},
        composability=DIFFERENTIABLE,
    )
)

_OPTIONS = "int scale_map, int split, int layout, bool flip"
define(
    OPERATOR,
    f"affine_coupling(Tensor input, Tensor params, {_OPTIONS}, bool inverse) -> (Tensor, Tensor)",
    reference=reference.affine_coupling,
    fake=_fake,
)
define(
    OPERATOR,
    "affine_coupling_backward(Tensor? grad_output, Tensor? grad_ldj, Tensor input, Tensor params, "
    f"{_OPTIONS}, bool inverse) -> (Tensor, Tensor)",
    reference=reference.affine_coupling_backward,
    fake=_fake_backward,
)
_NO_GRADIENT = (
    "affine_coupling_reverse: the gradients of a reversible flow cannot be differentiated again; use reversible=False"
)
define(
    OPERATOR,
    "affine_coupling_reverse(Tensor? grad_output, Tensor? grad_ldj, Tensor output, Tensor params, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    reference=reference.affine_coupling_reverse,
    fake=_fake_reverse,
    not_differentiable=_NO_GRADIENT,
)
differentiate("affine_coupling", _setup_context, _backward)
differentiate_reference("affine_coupling_backward", reference.affine_coupling_backward)
refuse_gradient("affine_coupling_reverse", _NO_GRADIENT)
