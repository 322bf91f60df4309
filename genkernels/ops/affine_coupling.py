"""Affine coupling: schema, checks, fake, gradients, backend choice. The maths is in
`genkernels.reference.affine_coupling`."""

from __future__ import annotations

import torch
from torch import Tensor

from genkernels._options import SCALE_CONSTANTS, Layout, ScaleMap, Split
from genkernels.ops import _autocast as autocast
from genkernels.ops import _checks as checks
from genkernels.ops._gradients import THROUGH_REFERENCE, Formula, Refused
from genkernels.ops._operator import Operator
from genkernels.reference import affine_coupling as reference

NAME = "affine_coupling"
SCALE_MAPS, SPLITS, LAYOUTS = ScaleMap.words(), Split.words(), Layout.words()


def affine_coupling(
    x: Tensor,
    params: Tensor,
    *,
    scale_map: str = "exp",
    scale_constant: float | None = None,
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
            of the C/2 transformed channels. Checkerboard: ``[N, 2*C, H, W]``; values at pass-through pixels are ignored
            and get a gradient of exactly 0. Without a split: ``[N, 2*C, *spatial]``. Additive: the shift alone, half as
            many channels. The dtype of `x`, or bf16 or fp16 beside an fp32 `x`.
        scale_map: ``exp``: σ = exp(s); ``sigmoid``: σ = sigmoid(s + 2); ``tanh``: σ = exp(c·tanh(s)); ``additive``: σ =
            1 (NICE). What other libraries have: ``sigmoid_floor``: σ = sigmoid(s + 2) + c; ``softplus_floor``: σ =
            softplus(s) + c; ``sigmoid_inverse``: σ = 1 / sigmoid(s + 2); ``atan``: σ = exp(c·atan(s));
            ``soft_clip``: σ = exp(s / (1 + abs(s) / c)).
        scale_constant: c > 0 of the scale maps that have one; by default 1, 1e-3 of the floors, log(1000) of the clip.
        split: ``channel``; ``checkerboard``: pixels with even h + w pass through; ``none``: nothing passes through;
            ``alternate``: as ``channel``, the halves being the even channels, which pass through, and the odd ones.
        layout: ``halves``: all log-scales, then all shifts; ``interleaved``: channel 2c is the log-scale, 2c + 1 the
            shift; ``shift_halves``, ``shift_interleaved``: the same, the shift first.
        flip: swaps the half that passes through and the half that is transformed.

    Returns:
        ``(z, ldj)``: z like `x` (contiguous); ldj ``[N]``, nats, fp32 (fp64 for fp64).

    Raises:
        ValueError: a shape or an option is wrong. TypeError: a dtype is. BackendUnavailable: a forced backend cannot
            run.

    Source: Dinh et al., "Density estimation using Real NVP", 2017; Kingma & Dhariwal, "Glow", 2018.
    """
    return _couple(x, params, scale_map, scale_constant, split, layout, flip, inverse=False)


def affine_coupling_inverse(
    z: Tensor,
    params: Tensor,
    *,
    scale_map: str = "exp",
    scale_constant: float | None = None,
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
        scale_map, scale_constant, split, layout, flip: as for `affine_coupling`.

    Raises: as for `affine_coupling`. Source: the same.

    Returns:
        ``(x, ldj)``: x like `z` (contiguous); ldj ``[N]`` being the log-determinant of the inverse, minus that of the
        forward map.
    """
    return _couple(z, params, scale_map, scale_constant, split, layout, flip, inverse=True)


def affine_coupling_reverse(
    grad_z: Tensor | None,
    grad_ldj: Tensor | None,
    z: Tensor,
    params: Tensor,
    *,
    scale_map: str = "exp",
    scale_constant: float | None = None,
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
        grad_z: of the shape of `z`, or None. grad_ldj: ``[N]``, or None. The others: as for `affine_coupling`.

    Returns:
        ``(x, grad_x, grad_params)``. They carry no graph: differentiating them raises.
    """
    codes = _check(z, params, scale_map, scale_constant, split, layout)
    z, params = _one_pair(z, params)
    grads = {"grad_z": grad_z, "grad_ldj": grad_ldj}
    checks.tensors(NAME, {"z": z, **grads}, optional=grads)
    for label, grad, expected, meaning in (
        ("grad_z", grad_z, z.shape, "[N, C, ...]"),
        ("grad_ldj", grad_ldj, z.shape[:1], "[N]"),
    ):
        if grad is not None:
            checks.shape(NAME, label, grad, expected, meaning)
    grad_z, grad_ldj = _as(z.dtype, grad_z), _as(autocast.work_dtype(z), grad_ldj)
    arguments = (grad_z, grad_ldj, z, params, *codes, flip)
    if REVERSE.runs_reference(*arguments):
        with torch.no_grad():
            return reference.affine_coupling_reverse(*arguments)
    return REVERSE.dense(*arguments)


def _couple(x, params, scale_map, scale_constant, split, layout, flip, inverse):
    codes = _check(x, params, scale_map, scale_constant, split, layout)
    return COUPLING(*_one_pair(x, params), *codes, flip, inverse)


def _as(dtype: torch.dtype, t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(dtype)


# ------------------------------------------------------------------------------------------------------------- checks


def _one_pair(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    """Dtypes that kernels take; under autocast any mixture of floats came through the checks, and the wider one
    wins."""
    if _pairs(x.dtype, params.dtype):
        return x, params
    dtype = autocast.widest(x, params)
    return x.to(dtype), params.to(dtype)


def _pairs(x: torch.dtype, params: torch.dtype) -> bool:
    return x == params or (x == torch.float32 and params in checks.HALVES)


def scale_constant_of(who: str, scale_map: int, given: float | None) -> float:
    """c of a scale map: what was given, its default, or 1 where it has none."""
    default = SCALE_CONSTANTS.get(ScaleMap(scale_map))
    if given is None:
        return 1.0 if default is None else default
    if default is None:
        raise ValueError(f"{who}: scale map {SCALE_MAPS[scale_map]} has no constant, got scale_constant={given!r}")
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < float("inf"):
        raise ValueError(f"{who}: scale_constant must be a positive number, got {given!r}")
    return float(given)


def _check(
    x: Tensor, params: Tensor, scale_map: str, scale_constant: float | None, split: str, layout: str
) -> tuple[int, float, int, int]:
    """Every condition on shapes, dtypes, devices and options; the option codes."""
    code = checks.option(NAME, "scale_map", scale_map, SCALE_MAPS)
    codes = (
        code,
        scale_constant_of(NAME, code, scale_constant),
        checks.option(NAME, "split", split, SPLITS),
        checks.option(NAME, "layout", layout, LAYOUTS),
    )
    checks.tensors(NAME, {"x": x, "params": params})
    if not _pairs(x.dtype, params.dtype) and not autocast.active(x):
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
        if split in ("channel", "alternate") and shape[1] % 2:
            raise ValueError(f"{NAME}: x must have an even number of channels for the {split} split, got {shape}")
        moved = shape[1] if split == "none" else shape[1] // 2
    count, formula = (moved, "C") if scale_map == "additive" else (2 * moved, "2*C")
    expected, where = [shape[0], count, *shape[2:]], f", C = {moved} being the transformed channels"
    checks.shape(NAME, "params", params, expected, f"[N, {formula}, ...]", where)
    return codes


# ---------------------------------------------------------------------------------------------------- fakes, gradients


def _fake(input, params, *attributes):
    return (
        torch.empty_like(input, memory_format=torch.contiguous_format),
        input.new_empty((input.shape[0],), dtype=autocast.work_dtype(input)),
    )


def _fake_backward(grad_output, grad_ldj, input, params, *attributes):
    like = torch.contiguous_format
    return torch.empty_like(input, memory_format=like), torch.empty_like(params, memory_format=like)


def _fake_reverse(grad_output, grad_ldj, output, params, *attributes):
    return torch.empty_like(output, memory_format=torch.contiguous_format), *_fake_backward(None, None, output, params)


def _setup_context(ctx, inputs, output):
    input, params, *ctx.attributes = inputs
    if ctx.attributes[0] == ScaleMap.ADDITIVE:
        ctx.dtype = params.dtype
    else:
        ctx.save_for_backward(input, params)


def _backward(ctx, grad_output, grad_ldj):
    others = (None,) * len(ctx.attributes)
    if ctx.attributes[0] == ScaleMap.ADDITIVE:  # nothing is multiplied, and the log-determinant is a constant
        if grad_output is None:
            return None, None, *others
        _, _, split, _, flip, inverse = ctx.attributes
        by_shift = reference.moved_part(grad_output, split, flip).to(ctx.dtype)
        return grad_output, -by_shift if inverse else by_shift, *others
    by_input, by_params = BACKWARD.dense(grad_output, grad_ldj, *ctx.saved_tensors, *ctx.attributes)
    return by_input if grad_output is not None else None, by_params, *others  # input has no part in the log-determinant


# --------------------------------------------------------------------------------------------------------- registration

OPERATOR = Operator(
    NAME,
    functions=(affine_coupling, affine_coupling_inverse, affine_coupling_reverse),
    kernels={"cpu": "", "triton": "", "cuda": ""},
)

_OPTIONS = "int scale_map, float constant, int split, int layout, bool flip"
COUPLING = OPERATOR.define(
    f"affine_coupling(Tensor input, Tensor params, {_OPTIONS}, bool inverse) -> (Tensor, Tensor)",
    reference.affine_coupling,
    _fake,
    gradient=Formula(_setup_context, _backward),
)
BACKWARD = OPERATOR.define(
    "affine_coupling_backward(Tensor? grad_output, Tensor? grad_ldj, Tensor input, Tensor params, "
    f"{_OPTIONS}, bool inverse) -> (Tensor, Tensor)",
    reference.affine_coupling_backward,
    _fake_backward,
    gradient=THROUGH_REFERENCE,
)
REVERSE = OPERATOR.define(
    "affine_coupling_reverse(Tensor? grad_output, Tensor? grad_ldj, Tensor output, Tensor params, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    reference.affine_coupling_reverse,
    _fake_reverse,
    gradient=Refused(
        "affine_coupling_reverse: the gradients of a reversible flow cannot be differentiated again; "
        "use reversible=False"
    ),
)
