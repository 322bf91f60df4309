"""The options of rational-quadratic splines, for the operators and layers that have them."""

from __future__ import annotations

from genkernels._options import Spline
from genkernels.ops import _checks as checks
from genkernels.reference.rational_quadratic_spline import bins_of

PARAMETRIZATIONS = Spline.words()


def check_options(who: str, parametrization, bound, logit_scale, floor) -> tuple[int, float, float, float]:
    """The options as the torch operator takes them."""
    kind = checks.option(who, "parametrization", parametrization, PARAMETRIZATIONS)
    bound, logit_scale, floor = (
        checks.positive(who, label, value)
        for label, value in (("bound", bound), ("logit_scale", logit_scale), ("floor", floor))
    )
    if floor >= 1:
        raise ValueError(f"{who}: floor must be below 1, got {floor}")
    return kind, bound, logit_scale, floor


def check_bins(who: str, params: int, kind: int, floor: float) -> int:
    """K of P parameters."""
    count = bins_of(params, kind)
    if count < 1:
        raise ValueError(
            f"{who}: params must have P = {'3K' if kind == Spline.CIRCULAR else '3K - 1'} numbers for each of x, "
            f"{PARAMETRIZATIONS[kind]}, with K at least 1, got {params}"
        )
    if kind != Spline.ZUKO and count * floor >= 1:
        raise ValueError(f"{who}: floor must be below 1/K = 1/{count}, the share of a bin, got {floor}")
    return count
