r"""Monotonic rational-quadratic splines in plain PyTorch: the definition, the oracle and the fallback.

K bins cut [−B, B] along x and along y; within one, with :math:`\xi = (x - x_0)/w,\ \eta = 1 - \xi,\ s = h/w` and the
slopes :math:`d_0, d_1` at its ends,

.. math:: y = y_0 + h\,\frac{s\xi^2 + d_0\xi\eta}{D},\qquad \frac{dy}{dx} = \frac{s^2 N}{D^2},\qquad
    D = s(\xi^2 + \eta^2) + (d_0 + d_1)\xi\eta,\quad N = d_1\xi^2 + 2s\xi\eta + d_0\eta^2

(Durkan et al., "Neural spline flows", 2019; D and N so written have positive terms alone). Outside, y = x.

The inverse: with :math:`r = (y - y_0)/h,\ q = 1 - r` the ratio ξ/η solves
:math:`s q t^2 + b t - s r = 0,\ b = d_0 q - d_1 r`, so that

.. math:: \xi : \eta = 2 s r : (b + R)\quad\text{or, where b is negative,}\quad (R - b) : 2 s q,\qquad
    R = \sqrt{b^2 + 4 s^2 r q}

in which nothing cancels but b itself, R² is a sum of squares, and R > 0 has a finite gradient.

Shapes: x ``[N, ...]``, params ``[N, ..., P]``, for each number K width logits, K height logits and the slopes: P = 3K −
1 with K − 1 inner ones, the two ends having slope 1; ``circular`` P = 3K, the slope at −B being that at B.

- ``nflows``, ``circular``: a share of the width or height is ε + (1 − Kε) softmax(u), of logits u and the floor ε, a
  slope ε + softplus(v), of the raw v;
- ``zuko``: softmax(u / (1 + 2·abs(u / log ε))), and exp(v / (1 + abs(v / log ε))).

A NaN is within. Half numbers are computed in fp32 and rounded once. Saved for backward: params and x, which is the
output of the inverse, so that no root is taken a second time. ξ and r are held within [0, 1] where a knot is rounded,
and outputs within [−B, B], without a change of gradient.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from genkernels._options import Spline


class Bins(NamedTuple):
    """Of each number's K bins: softmax of the logits and shares, [..., K], inner or all slopes, and what became of the
    raw numbers: the slope of each by its own."""

    widths: Tensor
    heights: Tensor
    width_shares: Tensor
    height_shares: Tensor
    slopes: Tensor  #: [..., K + 1]
    by_widths: Tensor | float
    by_heights: Tensor | float
    by_slopes: Tensor  #: [..., K - 1]; circular [..., K]


class Bin(NamedTuple):
    """The one that a number lies in."""

    place: Tensor  #: [..., 1], 0 … K − 1
    left: Tensor
    width: Tensor
    bottom: Tensor
    height: Tensor
    first: Tensor  #: slope at its left end
    last: Tensor


def rational_quadratic_spline(
    input: Tensor, params: Tensor, kind: int, bound: float, logit_scale: float, floor: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """``(output, ldj)``; ldj fp32 or wider."""
    x = _wide(input)
    outside = (x < -bound) | (x > bound)
    within = torch.where(outside, torch.zeros_like(x), x)
    bins = _bins(_wide(params), kind, logit_scale, floor)
    at = _find(bins, within, bound, inverse)
    s = at.height / at.width
    if inverse:
        xi, eta = _solve(_held((within - at.bottom) / at.height, 0, 1), s, at.first, at.last)
        value = at.left + at.width * xi
    else:
        xi = _held((within - at.left) / at.width, 0, 1)
        eta = 1 - xi
    denominator, numerator = _denominator(xi, eta, s, at), _numerator(xi, eta, s, at)
    if not inverse:
        value = at.bottom + at.height * ((s * xi + at.first * eta) * xi / denominator)
    ldj = torch.log(numerator) + 2 * torch.log(s / denominator)
    value = torch.where(outside, x, _held(value, -bound, bound))
    ldj = torch.where(outside, torch.zeros_like(ldj), -ldj if inverse else ldj)
    return value.to(input.dtype), ldj.flatten(1).sum(1) if ldj.dim() > 1 else ldj


def rational_quadratic_spline_backward(
    grad_output: Tensor | None,
    grad_ldj: Tensor | None,
    x: Tensor,
    params: Tensor,
    kind: int,
    bound: float,
    logit_scale: float,
    floor: float,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    r"""Gradients by the input and by params from those of the output and of ldj (None: nothing came), at x: the
    forward map's input, the inverse's output.

    Of the forward map f with :math:`\ell = \log f'`: g by y and γ by ldj make :math:`g f' + \gamma\,\ell_x` by x and
    :math:`g f_p + \gamma\,\ell_p` by a parameter p. Of the inverse, by the implicit function: the same with −γ and
    :math:`-G` in place of γ and g, where :math:`G = (g - \gamma\,\ell_x)/f'` is the gradient by its input.
    """
    wide = _wide(x)
    outside = (wide < -bound) | (wide > bound)
    within = torch.where(outside, torch.zeros_like(wide), wide)
    g = torch.zeros_like(wide) if grad_output is None else _wide(grad_output)
    gamma = torch.zeros_like(wide)
    if grad_ldj is not None:
        gamma = gamma + _wide(grad_ldj).reshape(-1, *[1] * (wide.dim() - 1))
    bins = _bins(_wide(params), kind, logit_scale, floor)
    at = _find(bins, within, bound, False)
    s = at.height / at.width
    xi = _held((within - at.left) / at.width, 0, 1)
    eta = 1 - xi
    d, n = _denominator(xi, eta, s, at), _numerator(xi, eta, s, at)
    d0, d1, both, squares = at.first, at.last, xi * eta, xi * xi + eta * eta
    # ℓ by ξ, s, d0, d1, then y likewise over h
    ell = (
        2 * (xi * (d1 - s) + eta * (s - d0)) / n - 2 * (d0 + d1 - 2 * s) * (eta - xi) / d,
        2 * both / n + 2 / s - 2 * squares / d,
        eta * eta / n - 2 * both / d,
        xi * xi / n - 2 * both / d,
    )
    share = (s * xi + d0 * eta) * xi / d
    rise = (
        s * n / (d * d),
        both * (d1 * xi * xi - d0 * eta * eta) / (d * d),
        both * eta * (s * eta + d1 * xi) / (d * d),
        -both * xi * (s * xi + d0 * eta) / (d * d),
    )
    if inverse:
        gamma = -gamma
        by_input = (g + gamma * ell[0] / at.width) / (s * rise[0])
        g = -by_input
    by_xi, by_s, by_first, by_last = (g * at.height * r + gamma * e for r, e in zip(rise, ell, strict=True))
    by_left = -by_xi / at.width
    if not inverse:
        by_input = -by_left
    given = grad_output if grad_output is not None else torch.zeros_like(x)
    by_input = torch.where(outside, _wide(given), by_input)
    by_logits = [
        logit_scale * slope * _through_softmax(soft, at.place, first, own, 2 * bound * _left_for(soft, kind, floor))
        for soft, slope, first, own in (
            (bins.widths, bins.by_widths, by_left, -(by_xi * xi + by_s * s) / at.width),
            (bins.heights, bins.by_heights, g, g * share + by_s / at.width),
        )
    ]
    places = torch.arange(bins.slopes.shape[-1], device=x.device)
    zero = torch.zeros_like(at.first).unsqueeze(-1)
    by_slopes = torch.where(places == at.place, by_first.unsqueeze(-1), zero)
    by_slopes = by_slopes + torch.where(places == at.place + 1, by_last.unsqueeze(-1), zero)
    if kind == Spline.CIRCULAR:
        by_slopes = torch.cat([by_slopes[..., :1] + by_slopes[..., -1:], by_slopes[..., 1:-1]], -1)
    else:
        by_slopes = by_slopes[..., 1:-1]
    by_params = torch.cat([*by_logits, by_slopes * bins.by_slopes], -1)
    by_params = torch.where(outside.unsqueeze(-1), torch.zeros_like(by_params), by_params)
    return by_input.to(x.dtype), by_params.to(params.dtype)


def bins_of(params: int, kind: int) -> int:
    """K of P parameters a number; 0 where there is none."""
    count, rest = divmod(params + (kind != Spline.CIRCULAR), 3)
    return 0 if rest else count


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _held(t: Tensor, low: float, high: float) -> Tensor:
    return t + (t.clamp(low, high) - t).detach()


def _left_for(soft: Tensor, kind: int, floor: float) -> float:
    """What shares have to divide beside their floors."""
    return 1.0 if kind == Spline.ZUKO else 1 - soft.shape[-1] * floor


def _bins(params: Tensor, kind: int, logit_scale: float, floor: float) -> Bins:
    count = bins_of(params.shape[-1], kind)
    logits, raw = params[..., : 2 * count], params[..., 2 * count :]
    logits = logits * logit_scale
    by_logits = torch.ones_like(logits)
    if kind == Spline.ZUKO:
        scale = 1 / (1 + (logits * (2 / math.log(floor))).abs())
        logits, by_logits = logits * scale, scale * scale
        scale = 1 / (1 + (raw * (1 / math.log(floor))).abs())
        slopes = torch.exp(raw * scale)
        by_slopes = slopes * scale * scale
    else:
        slopes = floor + F.softplus(raw, threshold=1000)
        by_slopes = torch.sigmoid(raw)
    widths, heights = (torch.softmax(part, -1) for part in logits.split(count, -1))
    shares = (widths, heights)
    if kind != Spline.ZUKO:
        shares = tuple(floor + _left_for(t, kind, floor) * t for t in shares)
    if kind == Spline.CIRCULAR:
        slopes = torch.cat([slopes, slopes[..., :1]], -1)
    else:
        slopes = F.pad(slopes, (1, 1), value=1.0)
    return Bins(widths, heights, *shares, slopes, *by_logits.split(count, -1), by_slopes)


def _find(bins: Bins, value: Tensor, bound: float, by_height: bool) -> Bin:
    """Where `value`, a y where `by_height` and else an x, lies."""
    edges = [bound * (2 * F.pad(t.cumsum(-1)[..., :-1], (1, 0)) - 1) for t in (bins.width_shares, bins.height_shares)]
    place = (edges[by_height][..., 1:] <= value.unsqueeze(-1)).sum(-1, keepdim=True)
    here = torch.arange(bins.widths.shape[-1], device=value.device) == place
    # sums of one number each, not gathers, whose gradients would be scattered
    taken = (
        torch.where(here, t, torch.zeros_like(t)).sum(-1)
        for t in (
            edges[0],
            2 * bound * bins.width_shares,
            edges[1],
            2 * bound * bins.height_shares,
            bins.slopes[..., :-1],
            bins.slopes[..., 1:],
        )
    )
    return Bin(place, *taken)


def _denominator(xi: Tensor, eta: Tensor, s: Tensor, at: Bin) -> Tensor:
    return s * (xi * xi + eta * eta) + (at.first + at.last) * (xi * eta)


def _numerator(xi: Tensor, eta: Tensor, s: Tensor, at: Bin) -> Tensor:
    return at.last * (xi * xi) + 2 * s * (xi * eta) + at.first * (eta * eta)


def _solve(r: Tensor, s: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """ξ and 1 − ξ where the share r of the height is reached."""
    q = 1 - r
    b = first * q - last * r
    root = torch.sqrt(b * b + 4 * s * s * (r * q))
    above = torch.where(b < 0, root - b, 2 * s * r)
    below = torch.where(b < 0, 2 * s * q, b + root)
    return above / (above + below), below / (above + below)


def _through_softmax(soft: Tensor, place: Tensor, by_start: Tensor, by_size: Tensor, factor: float) -> Tensor:
    """The gradient by logits of that by where bin `place` starts and by its size, in `factor`s of softmax."""
    start, size = by_start.unsqueeze(-1), by_size.unsqueeze(-1)
    places = torch.arange(soft.shape[-1], device=soft.device)
    zero = torch.zeros_like(start)
    by_soft = torch.where(places < place, start, zero) + torch.where(places == place, size, zero)
    return factor * soft * (by_soft - (soft * by_soft).sum(-1, keepdim=True))
