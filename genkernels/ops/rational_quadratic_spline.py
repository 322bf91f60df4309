"""Rational-quadratic splines: schema, checks, fakes, gradients. The maths is in
`genkernels.reference.rational_quadratic_spline`."""

from __future__ import annotations

import torch
from torch import Tensor

from genkernels.ops import _autocast as autocast
from genkernels.ops import _checks as checks
from genkernels.ops._gradients import THROUGH_REFERENCE, Formula
from genkernels.ops._operator import Operator
from genkernels.ops._spline_checks import check_bins, check_options
from genkernels.reference import rational_quadratic_spline as reference

NAME = "rational_quadratic_spline"


def rational_quadratic_spline(
    x: Tensor,
    params: Tensor,
    *,
    parametrization: str = "nflows",
    bound: float = 5.0,
    logit_scale: float = 1.0,
    floor: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    r"""Each number of x through a monotonic spline of K bins of its own, with the log-determinant, in one pass.

    Within [−B, B] the spline runs through knots with given slopes; between two of them, of width w, height h and slopes
    :math:`d_0, d_1`, with :math:`\xi = (x - x_0)/w,\ \eta = 1 - \xi,\ s = h/w`,

    .. math:: y = y_0 + h\,\frac{s\xi^2 + d_0\xi\eta}{s(\xi^2 + \eta^2) + (d_0 + d_1)\xi\eta}

    Outside, y = x.

    Equivalent to (``parametrization="nflows"``, at one number x, within)::

        w, h, v = params.split([K, K, K - 1])
        widths, heights = (2 * B * (floor + (1 - K * floor) * (logit_scale * u).softmax(0)) for u in (w, h))
        slopes = torch.cat([torch.ones(1), floor + softplus(v), torch.ones(1)])
        left, bottom = (t.cumsum(0) - t - B for t in (widths, heights))
        k = (left[1:] <= x).sum()
        xi, s, d0, d1 = (x - left[k]) / widths[k], heights[k] / widths[k], slopes[k], slopes[k + 1]
        below = s + (d0 + d1 - 2 * s) * xi * (1 - xi)
        y = bottom[k] + heights[k] * (s * xi**2 + d0 * xi * (1 - xi)) / below
        ldj = torch.log(s**2 * (d1 * xi**2 + 2 * s * xi * (1 - xi) + d0 * (1 - xi) ** 2) / below**2)

    Args:
        x: ``[N, ...]``, fp64, fp32, bf16 or fp16.
        params: ``[N, ..., P]`` for x's shape, of x's dtype; under autocast the wider dtype of the two is taken. K width
            logits, K height logits and the raw slopes: P = 3K − 1, K − 1 inner slopes, those at ±B being 1;
            ``circular``: P = 3K, the slope at −B, which is that at B too, being the first.
        parametrization: ``nflows``: a softmax of which each bin keeps the share `floor` at least, slopes `floor` +
            softplus; ``circular``: the same with one slope for both ends, for angles from −B to B; ``zuko``: logits
            and slopes u / (1 + abs(2u / log floor)), v / (1 + abs(v / log floor)), a softmax and an exponential.
        bound: B. nflows' own default is 1, zuko's 5.
        logit_scale: what width and height logits are multiplied by first; nflows' layers have 1/√hidden_features.
        floor: nflows, circular: the least share of a width and a height, and the least slope, below 1/K; ``zuko``: its
            `slope`, below 1.

    Returns:
        ``(y, ldj)``: y like x, contiguous; ldj ``[N]``, nats, fp32 (fp64 for fp64). Half numbers are computed in fp32
        and rounded once. A NaN counts as within, and stays in its number and its row's ldj.

    Raises:
        ValueError: a shape, a device or an option is wrong. TypeError: a dtype is. BackendUnavailable: a forced backend
            cannot run.

    Source: Durkan et al., "Neural spline flows", 2019; the parametrizations of nflows 0.14, zuko 1.6 and normflows 1.7.
    """
    return _spline(x, params, parametrization, bound, logit_scale, floor, inverse=False)


def rational_quadratic_spline_inverse(
    y: Tensor,
    params: Tensor,
    *,
    parametrization: str = "nflows",
    bound: float = 5.0,
    logit_scale: float = 1.0,
    floor: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    r"""The inverse of `rational_quadratic_spline` with the same arguments, by the root of a quadratic.

    With r the share of its bin's height that y has reached, :math:`q = 1 - r,\ b = d_0 q - d_1 r,\ R = \sqrt{b^2 +
    4s^2rq}`:

    .. math:: \xi : (1 - \xi) = 2sr : (b + R)\ \text{ or, where b is negative, }\ (R - b) : 2sq

    Equivalent to (within a bin)::

        b, root = d0 * q - d1 * r, torch.sqrt((d0 * q - d1 * r) ** 2 + 4 * s**2 * r * q)
        xi = 2 * s * r / (2 * s * r + b + root)
        x, ldj = left + width * xi, -log_slope(xi)

    Args:
        y: ``[N, ...]``, what `rational_quadratic_spline` gave.
        params, parametrization, bound, logit_scale, floor: as for `rational_quadratic_spline`.

    Returns:
        ``(x, ldj)``: x like y, contiguous; ldj ``[N]``, the log-determinant of the inverse, minus that of the forward
        map. Gradients are those of the implicit function: backward takes no root.

    Raises: as for `rational_quadratic_spline`. Source: the same.
    """
    return _spline(y, params, parametrization, bound, logit_scale, floor, inverse=True)


def _spline(x, params, parametrization, bound, logit_scale, floor, inverse):
    name = "y" if inverse else "x"
    options = check_options(NAME, parametrization, bound, logit_scale, floor)
    checks.tensors(NAME, {name: x, "params": params})
    if autocast.active(x):
        dtype = autocast.widest(x, params)
        x, params = x.to(dtype), params.to(dtype)
    checks.same_dtype(NAME, {name: x, "params": params})
    if x.dim() < 1:
        raise ValueError(f"{NAME}: {name} must be [N, ...], got []")
    if params.dim() != x.dim() + 1 or params.shape[:-1] != x.shape:
        wanted = ", ".join(map(str, x.shape))
        raise ValueError(f"{NAME}: params must be [N, ..., P] = [{wanted}, P], got {list(params.shape)}")
    check_bins(NAME, params.shape[-1], options[0], options[3])
    return SPLINE(x, params, *options, inverse)


def _fake(input, params, *options):
    return (
        torch.empty_like(input, memory_format=torch.contiguous_format),
        input.new_empty(input.shape[:1], dtype=autocast.work_dtype(input)),
    )


def _fake_backward(grad_output, grad_ldj, x, params, *options):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, params))


def _setup(ctx, inputs, output):
    input, params, *ctx.options = inputs
    ctx.save_for_backward(output[0] if ctx.options[-1] else input, params)


def _backward(ctx, grad_output, grad_ldj):
    return *BACKWARD.dense(grad_output, grad_ldj, *ctx.saved_tensors, *ctx.options), *(None,) * len(ctx.options)


OPERATOR = Operator(
    NAME,
    functions=(rational_quadratic_spline, rational_quadratic_spline_inverse),
    kernels={"cpu": "", "triton": "", "cuda": ""},
)
_OPTIONS = "int parametrization, float bound, float logit_scale, float floor, bool inverse"
SPLINE = OPERATOR.define(
    f"rational_quadratic_spline(Tensor input, Tensor params, {_OPTIONS}) -> (Tensor, Tensor)",
    reference.rational_quadratic_spline,
    _fake,
    gradient=Formula(_setup, _backward),
)
BACKWARD = OPERATOR.define(
    f"rational_quadratic_spline_backward(Tensor? grad_output, Tensor? grad_ldj, Tensor x, Tensor params, {_OPTIONS}) "
    "-> (Tensor, Tensor)",
    reference.rational_quadratic_spline_backward,
    _fake_backward,
    gradient=THROUGH_REFERENCE,
)
