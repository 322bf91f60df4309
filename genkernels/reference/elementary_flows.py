r"""Planar and radial flows, K layers in a row, in plain PyTorch: the definition, the oracle and the fallback.

Planar, with :math:`t = w^\top z + b`:

.. math:: z' = z + \hat u \tanh t,\qquad \log|\det| = \log(1 + (1 - \tanh^2 t)\,w^\top\hat u),\qquad
    \hat u = u + (m(w^\top u) - w^\top u)\,\frac{w}{\lVert w\rVert^2},\quad m(a) = -1 + \mathrm{softplus}(a)

so that :math:`w^\top\hat u = m(w^\top u) > -1`: the layer is invertible, though not in closed form. Radial, with
:math:`r = \lVert z - c\rVert`, :math:`\alpha = \mathrm{softplus}` of the raw α, :math:`\beta = -\alpha +
\mathrm{softplus}` of the raw β:

.. math:: z' = z + \frac{\beta}{\alpha + r}(z - c),\qquad \log|\det| =
    (D - 1)\log\left(1 + \frac{\beta}{\alpha + r}\right) + \log\left(1 + \frac{\alpha\beta}{(\alpha + r)^2}\right)

(Rezende & Mohamed, "Variational inference with normalizing flows", 2015, and its appendix A on the constraints).

Shapes: z ``[N, D]`` or ``[N, S, D]``, the log-determinant, summed over the layers, z's without D. Parameters shared by
all, ``[K, D]`` and ``[K]``, or each example's own, ``[N, K, D]`` and ``[N, K]``. Half numbers are computed in fp32 and
rounded once, at the end. Saved for backward: the inputs, which are small beside every layer's z.

Where the formulas have no value or lose theirs:

- Near −1 the arguments of both logarithms cancel; there they are added up from positive parts: :math:`\tanh^2 t + (1 -
  \tanh^2 t)\,\mathrm{softplus}(a)`, :math:`(r + \mathrm{softplus}(\beta)) / (\alpha + r)` and so on (`_log_one_plus`).
- A softplus counts as at least :math:`\sqrt{\mathrm{tiny}}` (1e-19 in fp32), with a gradient of 0 below: it neither
  vanishes nor does what it is multiplied or divided by leave the dtype.
- w/‖w‖² is formed from w over its largest part, whose square neither over- nor underflows. w = 0 needs no constraint,
  and has none: û = u, as the limit does not exist (û grows as 1/‖w‖).
- At its centre the log-determinant of a radial layer has a kink; there r has the gradient 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def planar_flow(z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``(z_K, ldj)``; ldj fp32 or wider."""
    x, (w, b), p = _wide(z), (_wide(w), _wide(b)), _planar(_wide(w), _wide(u))
    ldj = x.new_zeros(x.shape[:-1])
    for k in range(w.shape[-2]):
        w_k, b_k, u_k, soft = (_layer(t, k, x, has) for t, has in ((w, 1), (b, 0), (p.u, 1), (p.soft, 0)))
        h, s = _tanh_sech2((x * w_k).sum(-1) + b_k)
        x = x + h.unsqueeze(-1) * u_k
        ldj = ldj + _log_one_plus(s * (soft - 1), h * h + s * soft)
    return x.to(z.dtype, copy=not w.shape[-2]), ldj


def planar_flow_backward(
    grad_z: Tensor | None, grad_ldj: Tensor | None, z: Tensor, w: Tensor, u: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Gradients by z, w, u and b from those of z_K and ldj (None: nothing came).

    With g the gradient by a layer's z′, :math:`\ell` that by ldj and :math:`d = 1 + s\,w^\top\hat u,\ s = 1 - h^2,\ h =
    \tanh t`, the gradient by t is :math:`s (g^\top\hat u - 2 \ell h\,w^\top\hat u / d)`, by z :math:`g` and w times
    that, by û :math:`h g`, by :math:`w^\top\hat u` :math:`\ell s / d`; the last two go on to u and w by the constraint.
    """
    raw_w, raw_u, x = _wide(w), _wide(u), _wide(z)
    p, passed = _planar(raw_w, raw_u), []
    for k in range(w.shape[-2]):
        w_k, b_k, u_k, soft = (_layer(t, k, x, has) for t, has in ((raw_w, 1), (_wide(b), 0), (p.u, 1), (p.soft, 0)))
        h, s = _tanh_sech2((x * w_k).sum(-1) + b_k)
        passed.append((x, w_k, u_k, soft, h, s))
        x = x + h.unsqueeze(-1) * u_k
    g = torch.zeros_like(x) if grad_z is None else _wide(grad_z)
    sums = []
    for before, w_k, u_k, soft, h, s in reversed(passed):
        by_t = (g * u_k).sum(-1) * s if grad_z is not None or sums else torch.zeros_like(h)
        by_m = torch.zeros_like(h)
        if grad_ldj is not None:
            slope = _wide(grad_ldj) * s / (h * h + s * soft)
            by_t, by_m = by_t - 2 * h * (soft - 1) * slope, slope
        by_t_, h_ = by_t.unsqueeze(-1), h.unsqueeze(-1)
        sums.append([_over_rows(v, w, has) for v, has in ((before * by_t_, 1), (g * h_, 1), (by_m, 0), (by_t, 0))])
        g = g + w_k * by_t_
    by_w, by_u, by_m, by_b = _stacked(sums[::-1], (w, u, b, b))
    by_u, through_w = _planar_backward(raw_w, raw_u, p, by_u, by_m)
    return g.to(z.dtype), (by_w + through_w).to(w.dtype), by_u.to(u.dtype), by_b.to(b.dtype)


def radial_flow(z: Tensor, center: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """``(z_K, ldj)``; ldj fp32 or wider."""
    x, center, inner, outer = _wide(z), _wide(center), _softplus(_wide(alpha)), _softplus(_wide(beta))
    ldj = x.new_zeros(x.shape[:-1])
    for k in range(center.shape[-2]):
        p = _radial(x, center, inner, outer, k)
        x = x + p.x.unsqueeze(-1) * p.d
        ldj = ldj + (x.shape[-1] - 1) * _log_one_plus(p.x, p.around) + _log_one_plus(p.x * p.share, p.along)
    return x.to(z.dtype, copy=not center.shape[-2]), ldj


def radial_flow_backward(
    grad_z: Tensor | None, grad_ldj: Tensor | None, z: Tensor, center: Tensor, alpha: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Gradients by z, center, alpha and beta from those of z_K and ldj (None: nothing came).

    In :math:`A = \alpha + r`, :math:`x = \beta / A`, :math:`\rho = \alpha / A` and :math:`d = z - c` a layer is
    :math:`z' = z + x d`, :math:`\log|\det| = (D - 1) \log(1 + x) + \log(1 + \rho x)`; the chain rule goes back from x
    and ρ to A, α and β, from A to r, and from there along d/r.
    """
    x, c = _wide(z), _wide(center)
    inner, outer, passed = _softplus(_wide(alpha)), _softplus(_wide(beta)), []
    for k in range(center.shape[-2]):
        p = _radial(x, c, inner, outer, k)
        passed.append(p)
        x = x + p.x.unsqueeze(-1) * p.d
    g = torch.zeros_like(x) if grad_z is None else _wide(grad_z)
    sums = []
    for p in reversed(passed):
        by_x = (g * p.d).sum(-1) if grad_z is not None or sums else torch.zeros_like(p.x)
        by_share = torch.zeros_like(p.x)
        if grad_ldj is not None:
            of = _wide(grad_ldj)
            by_x = by_x + of * ((x.shape[-1] - 1) / p.around + p.share / p.along)
            by_share = of * p.x / p.along
        by_beta = by_x / p.sum
        by_sum = -(by_x * p.x + by_share * p.share) / p.sum
        by_alpha = by_share / p.sum + by_sum
        along = torch.where(p.r > 0, by_sum / torch.where(p.r > 0, p.r, 1), torch.where(p.r == 0, 0, p.r))
        by_d = p.x.unsqueeze(-1) * g + along.unsqueeze(-1) * p.d
        sums.append([_over_rows(v, center, has) for v, has in ((-by_d, 1), (by_alpha - by_beta, 0), (by_beta, 0))])
        g = g + by_d
    by_center, by_inner, by_outer = _stacked(sums[::-1], (center, alpha, beta))
    by_alpha = by_inner * _softplus_slope(_wide(alpha), inner)
    by_beta = by_outer * _softplus_slope(_wide(beta), outer)
    return g.to(z.dtype), by_center.to(center.dtype), by_alpha.to(alpha.dtype), by_beta.to(beta.dtype)


# ---------------------------------------------------------------------------------------------------------- constraints


class _Planar(NamedTuple):
    """What the constraint makes of w and u."""

    u: Tensor  #: û, ``[..., K, D]``
    soft: Tensor  #: 1 + wᵀû, ``[..., K]``
    a: Tensor  #: wᵀu
    c: Tensor  #: m(a) − a = softplus(−a) − 1
    q: Tensor  #: w/‖w‖²
    free: Tensor  #: bool: w = 0


def _planar(w: Tensor, u: Tensor) -> _Planar:
    largest = w.detach().abs().amax(-1)
    free = largest == 0
    unit = torch.where(free, 1, largest).unsqueeze(-1)
    v = w / unit
    square = (v * v).sum(-1)
    q = v / torch.where(free, 1, square).unsqueeze(-1) / unit
    a = (w * u).sum(-1)
    c = torch.where(free, 0, -F.logsigmoid(a) - 1)
    soft = torch.where(free, 1 + a, _softplus(a))
    return _Planar(u + c.unsqueeze(-1) * q, soft, a, c, q, free)


def _planar_backward(w: Tensor, u: Tensor, p: _Planar, by_u: Tensor, by_m: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients by u and by w through û and wᵀû, from those by û ``[..., K, D]`` and by wᵀû ``[..., K]``."""
    by_c = torch.where(p.free, 0, (by_u * p.q).sum(-1))
    by_a = by_m * torch.where(p.free, 1, _softplus_slope(p.a, p.soft)) - by_c * torch.sigmoid(-p.a)
    # q = w/‖w‖², whose derivative is that of w, less twice its part along w, over ‖w‖²
    by_q = p.c.unsqueeze(-1) * by_u
    along = (p.q * by_q).sum(-1, keepdim=True)
    inverse_square = (p.q * p.q).sum(-1, keepdim=True)
    by_w = inverse_square * by_q - 2 * along * p.q
    return by_u + by_a.unsqueeze(-1) * w, by_w + by_a.unsqueeze(-1) * u


class _Radial(NamedTuple):
    """A layer at its z: d ``[..., D]``, the others ``[...]``."""

    d: Tensor  #: z − c
    r: Tensor  #: ‖d‖, with a gradient of 0 at 0
    sum: Tensor  #: α + r
    x: Tensor  #: β / (α + r)
    share: Tensor  #: α / (α + r)
    around: Tensor  #: 1 + x: the stretch around the centre, of D − 1 directions
    along: Tensor  #: 1 + x·share: the stretch away from it


def _radial(z: Tensor, center: Tensor, inner: Tensor, outer: Tensor, k: int) -> _Radial:
    c, alpha, soft = _layer(center, k, z, 1), _layer(inner, k, z, 0), _layer(outer, k, z, 0)
    d = z - c
    square = (d * d).sum(-1)
    r = torch.where(square == 0, 0, torch.where(square == 0, 1, square).sqrt())
    total = alpha + r
    share = alpha / total
    # where the square overflows r is infinite and the layer the identity; these quotients alone would be NaN there
    far = r == torch.inf
    part, whole = torch.where(far, 1, r), torch.where(far, 1, total)
    around = torch.where(far, 1, (part + soft) / whole)
    along = torch.where(far, 1, part / whole * (1 + share) + share * (soft / whole))
    return _Radial(d, r, total, (soft - alpha) / total, share, around, along)


# --------------------------------------------------------------------------------------------------------------- pieces


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _layer(t: Tensor, k: int, z: Tensor, has_features: int) -> Tensor:
    """Layer k of a parameter, ``[..., K, D]`` or ``[..., K]``, to go with z ``[..., D]`` or with a number a row."""
    layer = t.select(-1 - has_features, k)
    return layer.unsqueeze(1) if layer.dim() > has_features and z.dim() == 3 else layer


def _over_rows(t: Tensor, like: Tensor, has_features: int) -> Tensor:
    """The sum over all rows that share a parameter, `like` being w or the centres."""
    if like.dim() == 2:
        return t.sum(list(range(t.dim() - has_features)))
    return t.sum(1) if t.dim() == 2 + has_features else t


def _stacked(sums: list[list[Tensor]], parameters: tuple[Tensor, ...]) -> list[Tensor]:
    """Each layer's gradients as ``[..., K, D]`` or ``[..., K]``."""
    if not sums:
        return [torch.zeros_like(_wide(p)) for p in parameters]
    columns = zip(*sums, strict=True)
    features = [p.dim() - q.dim() for p, q in zip(parameters, parameters[-1:] * len(parameters), strict=True)]
    return [torch.stack(column, -1 - has) for column, has in zip(columns, features, strict=True)]


def _softplus(x: Tensor) -> Tensor:
    return (-F.logsigmoid(-x)).clamp(min=torch.finfo(x.dtype).tiny ** 0.5)


def _softplus_slope(x: Tensor, value: Tensor) -> Tensor:
    return torch.where(value > torch.finfo(x.dtype).tiny ** 0.5, torch.sigmoid(x), 0)


def _tanh_sech2(t: Tensor) -> tuple[Tensor, Tensor]:
    """tanh t and 1 − tanh² t, the latter without cancellation."""
    return torch.tanh(t), 4 * torch.sigmoid(2 * t) * torch.sigmoid(-2 * t)


def _log_one_plus(x: Tensor, sum: Tensor) -> Tensor:
    """log(1 + x): by x where that is accurate, near x = −1 by `sum`, which is 1 + x without cancellation."""
    far = x > -0.5
    return torch.where(far, torch.log1p(torch.where(far, x, 0)), torch.log(torch.where(far, 1, sum)))
