"""Planar and radial flows: schema, checks, fakes, gradients. The maths is in
`genkernels.reference.elementary_flows`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from genkernels.ops import _autocast as autocast
from genkernels.ops import _checks as checks
from genkernels.ops._gradients import THROUGH_REFERENCE, Formula
from genkernels.ops._operator import Operator
from genkernels.reference import elementary_flows as reference

NAME, PLANAR, RADIAL = "elementary_flows", "planar_flow", "radial_flow"


def planar_flow(z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    r"""K planar layers, one after the other, with their log-determinant, in one pass.

    .. math:: z' = z + \hat u\tanh(w^\top z + b),\qquad \hat u = u + (m(w^\top u) - w^\top u)\,\frac{w}{\lVert
        w\rVert^2},\quad m(a) = -1 + \mathrm{softplus}(a)

    û makes every layer invertible: :math:`w^\top\hat u > -1`. The inverse has no closed form, and none is offered.

    Equivalent to (shared parameters)::

        ldj = 0
        for w_k, u_k, b_k in zip(w, u, b):
            a = w_k @ u_k
            u_hat = u_k + (softplus(a) - 1 - a) * w_k / (w_k @ w_k)
            h = torch.tanh(z @ w_k + b_k)
            ldj = ldj + torch.log(1 + (1 - h**2) * (w_k @ u_hat))
            z = z + h[..., None] * u_hat

    Args:
        z: ``[N, D]``, or ``[N, S, D]``: S samples of each example. fp64, fp32, bf16 or fp16.
        w, u: ``[K, D]``, shared by all rows, or ``[N, K, D]``, each example's own (amortised). u is raw: the constraint
            is applied here.
        b: ``[K]`` or ``[N, K]``. All of z's dtype; under autocast the widest of all is taken.

    Returns:
        ``(z_K, ldj)``: z_K like z, contiguous; ldj ``[N]`` or ``[N, S]``, nats, fp32 (fp64 for fp64). K = 0 is the
        identity. Half numbers are computed in fp32 and rounded once. Where w is 0, û is u; as w nears 0 the formula's û
        grows as 1/‖w‖. Softplus counts as at least 1e-19 (1e-154 in fp64). A NaN stays in its row.

    Raises:
        ValueError: a shape or a device is wrong. TypeError: a dtype is. BackendUnavailable: a forced backend cannot
            run.

    Source: Rezende & Mohamed, "Variational inference with normalizing flows", 2015.
    """
    return PLANAR_FLOW(*_checked(PLANAR, {"z": z, "w": w, "u": u, "b": b}))


def radial_flow(z: Tensor, center: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    r"""K radial layers, one after the other, with their log-determinant, in one pass.

    .. math:: z' = z + \frac{\hat\beta}{\hat\alpha + r}\,(z - c),\qquad r = \lVert z - c\rVert,\quad \hat\alpha =
        \mathrm{softplus}(\alpha),\quad \hat\beta = -\hat\alpha + \mathrm{softplus}(\beta)

    :math:`\hat\beta > -\hat\alpha` makes every layer invertible; no inverse is offered, as the planar layer has none.

    Equivalent to (shared parameters)::

        ldj = 0
        for c, alpha_k, beta_k in zip(center, softplus(alpha), softplus(beta) - softplus(alpha)):
            r = torch.linalg.vector_norm(z - c, dim=-1)
            h = 1 / (alpha_k + r)
            ldj = ldj + (D - 1) * torch.log1p(beta_k * h) + torch.log1p(beta_k * alpha_k * h**2)
            z = z + (beta_k * h)[..., None] * (z - c)

    Args:
        z: ``[N, D]``, or ``[N, S, D]``: S samples of each example. fp64, fp32, bf16 or fp16.
        center: ``[K, D]``, shared by all rows, or ``[N, K, D]``, each example's own (amortised).
        alpha, beta: ``[K]`` or ``[N, K]``, raw: the constraints are applied here. All of z's dtype; under autocast the
            widest of all is taken.

    Returns:
        ``(z_K, ldj)``: z_K like z, contiguous; ldj ``[N]`` or ``[N, S]``, nats, fp32 (fp64 for fp64). K = 0 is the
        identity. Half numbers are computed in fp32 and rounded once. At its centre r counts as constant: the
        log-determinant has a kink there. Softplus counts as at least 1e-19 (1e-154 in fp64). A NaN stays in its row.

    Raises: as for `planar_flow`. Source: the same.
    """
    return RADIAL_FLOW(*_checked(RADIAL, {"z": z, "center": center, "alpha": alpha, "beta": beta}))


def _checked(who: str, named: Mapping[str, Tensor]) -> list[Tensor]:
    """z and the parameters in one dtype; every condition on shapes, dtypes and devices."""
    checks.tensors(who, named)
    z, *parameters = named.values()
    if autocast.active(z):
        dtype = autocast.widest(z, *parameters)
        z, *parameters = (t.to(dtype) for t in (z, *parameters))
    else:
        checks.same_dtype(who, named)
    if z.dim() not in (2, 3) or z.shape[-1] < 1:
        raise ValueError(f"{who}: z must be [N, D] or [N, S, D] with D at least 1, got {list(z.shape)}")
    lead = list(named)[1]
    first = parameters[0]
    rows, features = z.shape[0], z.shape[-1]
    own = first.dim() == 3
    if first.dim() not in (2, 3) or first.shape[-1] != features or (own and first.shape[0] != rows):
        raise ValueError(
            f"{who}: {lead} must be [K, D] = [K, {features}] or [N, K, D] = [{rows}, K, {features}], "
            f"got {list(first.shape)}"
        )
    vector, number = ("[N, K, D]", "[N, K]") if own else ("[K, D]", "[K]")
    for (label, _), value in zip(list(named.items())[2:], parameters[1:], strict=True):
        is_vector = label == "u"
        expected = first.shape if is_vector else first.shape[:-1]
        checks.shape(who, label, value, expected, vector if is_vector else number, f", as {lead} is {vector}")
    return [z, *parameters]


def _fake(z, *parameters):
    return (
        torch.empty_like(z, memory_format=torch.contiguous_format),
        z.new_empty(z.shape[:-1], dtype=autocast.work_dtype(z)),
    )


def _fake_backward(grad_z, grad_ldj, *inputs):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _planar_backward(ctx, grad_z, grad_ldj):
    return PLANAR_BACKWARD.dense(grad_z, grad_ldj, *ctx.saved_tensors)


def _radial_backward(ctx, grad_z, grad_ldj):
    return RADIAL_BACKWARD.dense(grad_z, grad_ldj, *ctx.saved_tensors)


OPERATOR = Operator(NAME, functions=(planar_flow, radial_flow), kernels={"cpu": "", "triton": "", "cuda": ""})
PLANAR_FLOW = OPERATOR.define(
    "planar_flow(Tensor z, Tensor w, Tensor u, Tensor b) -> (Tensor, Tensor)",
    reference.planar_flow,
    _fake,
    gradient=Formula(_setup, _planar_backward),
)
PLANAR_BACKWARD = OPERATOR.define(
    "planar_flow_backward(Tensor? grad_z, Tensor? grad_ldj, Tensor z, Tensor w, Tensor u, Tensor b) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference.planar_flow_backward,
    _fake_backward,
    gradient=THROUGH_REFERENCE,
)
RADIAL_FLOW = OPERATOR.define(
    "radial_flow(Tensor z, Tensor center, Tensor alpha, Tensor beta) -> (Tensor, Tensor)",
    reference.radial_flow,
    _fake,
    gradient=Formula(_setup, _radial_backward),
)
RADIAL_BACKWARD = OPERATOR.define(
    "radial_flow_backward(Tensor? grad_z, Tensor? grad_ldj, Tensor z, Tensor center, Tensor alpha, Tensor beta) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference.radial_flow_backward,
    _fake_backward,
    gradient=THROUGH_REFERENCE,
)
