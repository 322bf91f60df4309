"""Couplings and autoregressive transforms by rational-quadratic splines.

nflows and normflows have those of Durkan et al.'s neural spline flows, under the same names of methods and attributes:
each says how its numbers go through their splines in one method, and it is that one which is replaced. What surrounds
it (the network, the features that pass and what becomes of them, the passes of an inverse) is the library's own.
"""

from __future__ import annotations

from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from genkernels import ops
from genkernels.swap._rules import Becomes


class Splines(NamedTuple):
    """`genkernels.ops.rational_quadratic_spline` with its options, of K bins."""

    parametrization: str
    bins: int
    bound: float
    logit_scale: float
    floor: float

    @property
    def numbers(self) -> int:
        """How many parameters one number has."""
        return 3 * self.bins - (self.parametrization != "circular")

    def __call__(self, x: Tensor, params: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Values like x, ``[N, C, ...]``, and log-determinants ``[N]``; params ``[N, C * numbers, ...]``."""
        params = params.reshape(*x.shape[:2], self.numbers, *x.shape[2:]).movedim(2, -1)
        return self.run(x, params, inverse)

    def run(self, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """The same of params ``[N, C, ..., numbers]``."""
        function = ops.rational_quadratic_spline_inverse if inverse else ops.rational_quadratic_spline
        return function(
            x,
            params,
            parametrization=self.parametrization,
            bound=self.bound,
            logit_scale=self.logit_scale,
            floor=self.floor,
        )


def refused(module, bins: int) -> str:
    """Why a module's splines are none of the operator's, "" where they are."""
    if not isinstance(module.tails, str):
        return "its splines are of an interval, without tails" if module.tails is None else "its tails are several"
    if module.tails != "linear":
        return f"its tails are {module.tails}"
    floors = {module.min_bin_width, module.min_bin_height, module.min_derivative}
    if len(floors) > 1:
        return "its least width, height and slope are not one number"
    if not 0 < floors.pop() * bins < 1:
        return "its least width leaves its bins no choice"
    return "" if isinstance(module.tail_bound, Real) and module.tail_bound > 0 else "its tail_bound is no number"


def splines_of(module, bins: int, logit_scale: float = 1.0) -> Splines | None:
    """The splines of a module of nflows or normflows, None where the library's own way is taken."""
    if torch.compiler.is_compiling() or refused(module, bins):
        return None
    return Splines("nflows", bins, float(module.tail_bound), logit_scale, module.min_derivative)


def _logit_scale(network, *names: str) -> float | None:
    """What nflows scales width and height logits by: the width of the network, under the first name that it has."""
    width = next((getattr(network, name) for name in names if hasattr(network, name)), 1)
    return width**-0.5 if isinstance(width, Real) and width > 0 else None


class Coupling:
    """Of a coupling: the features that are transformed."""

    def _coupling_transform(self, inputs, transform_params, inverse=False):
        scale = _logit_scale(self.transform_net, "hidden_features", "hidden_channels")
        splines = None if scale is None else splines_of(self, self.num_bins, scale)
        if splines is None:
            return super()._coupling_transform(inputs, transform_params, inverse)
        return splines(inputs, transform_params, inverse)


class Autoregressive:
    """Of a masked autoregressive transform: all features, in each pass."""

    def _elementwise(self, inputs, autoregressive_params, inverse=False):
        scale = _logit_scale(self.autoregressive_net, "hidden_features")
        splines = None if scale is None else splines_of(self, self.num_bins, scale)
        if splines is None:
            return super()._elementwise(inputs, autoregressive_params, inverse)
        return splines(inputs, autoregressive_params, inverse)


class Elementwise:
    """Of splines that are parameters themselves, the same for all samples."""

    def _spline(self, inputs, inverse=False):
        raw = self.unnormalized_widths, self.unnormalized_heights, self.unnormalized_derivatives
        splines = splines_of(self, raw[0].shape[-1])
        if splines is None:
            return super()._spline(inputs, inverse)
        params = torch.cat(raw, -1).expand(inputs.shape[0], *raw[0].shape[:-1], -1)
        return splines.run(inputs, params, inverse)


def rule(to: type, note: str = ""):
    """What becomes of a module of nflows or normflows whose splines are the operator's."""

    def choose(thing) -> Becomes | str:
        bins = thing.unnormalized_widths.shape[-1] if issubclass(to, Elementwise) else thing.num_bins
        return refused(thing, bins) or Becomes(to, note)

    return choose


#: Of an autoregressive transform by splines.
PASSES = "the inverse keeps its D passes, each by the operator: no inverse of a spline is a part of the blocked solve"
