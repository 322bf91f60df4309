"""Couplings and autoregressive transforms by rational-quadratic splines.

nflows and normflows have those of Durkan et al.'s neural spline flows, under the same names of methods and attributes:
each says how its numbers go through their splines in one method, and it is that one which is replaced. What surrounds
it (the network, the features that pass and what becomes of them) is the library's own; of an autoregressive transform
the inverse is replaced too, by a solve, where its network is one for it.
"""

from __future__ import annotations

from numbers import Real
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from genkernels import ops
from genkernels.swap._residual_made import inverse_refused, run_made
from genkernels.swap._rules import Becomes, left_alone


class Splines(NamedTuple):
    """`genkernels.ops.rational_quadratic_spline` with its options, of K bins.

    Args:
        bound: a tensor, as x broadcasts with it, where numbers have bounds of their own.
        floors: of widths, heights and slopes; the operator has one for all.
    """

    parametrization: str
    bins: int
    bound: float | Tensor
    logit_scale: float
    floors: tuple[float, float, float]

    @property
    def numbers(self) -> int:
        """How many parameters one number has."""
        return 3 * self.bins - (self.parametrization != "circular")

    def __call__(self, x: Tensor, params: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Values like x, ``[N, C, ...]``, and log-determinants ``[N]``; params ``[N, C * numbers, ...]``."""
        params = params.reshape(*x.shape[:2], self.numbers, *x.shape[2:]).movedim(2, -1)
        return self.run(x, params, inverse)

    @property
    def options(self) -> dict[str, Any] | None:
        """The operator's, None where it has none that say all: one floor, one bound."""
        if len(set(self.floors)) > 1 or isinstance(self.bound, Tensor):
            return None
        return {
            "parametrization": self.parametrization,
            "bound": self.bound,
            "logit_scale": self.logit_scale,
            "floor": self.floors[0],
        }

    def run(self, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """The same of params ``[N, C, ..., numbers]``."""
        function = ops.rational_quadratic_spline_inverse if inverse else ops.rational_quadratic_spline
        scale, floor = self.logit_scale, min(self.floors)
        if max(self.floors) > floor:
            params, scale = self._above(params, floor), 1.0
        options = {"parametrization": self.parametrization, "logit_scale": scale, "floor": floor}
        if not isinstance(self.bound, Tensor):
            return function(x, params, bound=self.bound, **options)
        value, log_det = function(x / self.bound, params, bound=1.0, **options)
        return value * self.bound, log_det

    def _above(self, params: Tensor, floor: float) -> Tensor:
        """The raw numbers that mean over one floor, the least, what params mean over three."""
        *logits, raw = params.tensor_split((self.bins, 2 * self.bins), -1)
        *least, slope = self.floors
        for i, own in enumerate(least):
            logits[i] = self.logit_scale * logits[i]
            if own > floor:
                share = own - floor + (1 - self.bins * own) * logits[i].softmax(-1)
                logits[i] = torch.log(share / (1 - self.bins * floor))
        if slope > floor:
            above = F.softplus(raw) + (slope - floor)
            raw = above + torch.log(-torch.expm1(-above))
        return torch.cat([*logits, raw], -1)


class Mixed(NamedTuple):
    """Splines of features some of which are angles, as normflows has them: K + 1 raw slopes each, of which a linear
    feature leaves the first and the last, and an angle the last; what is beyond the bound becomes zero."""

    splines: Splines
    tails: tuple[str, ...]

    def __call__(self, x: Tensor, params: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        return self.run(x, params.reshape(*x.shape, 3 * self.splines.bins + 1), inverse)

    def run(self, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        logits, slopes = params.tensor_split((2 * self.splines.bins,), -1)
        taken = {"linear": slopes[..., 1:-1], "circular": slopes[..., :-1]}
        order, values, log_det = [], [], x.new_zeros(x.shape[0])
        for tail in sorted(set(self.tails)):
            features = [i for i, own in enumerate(self.tails) if own == tail]
            given = torch.cat([logits, taken[tail]], -1)[:, features]
            bound = self.splines.bound
            bound = bound[features] if isinstance(bound, Tensor) else bound
            splines = self.splines._replace(parametrization=PARAMETRIZATIONS[tail], bound=bound)
            value, more = splines.run(x[:, features], given, inverse)
            order, values, log_det = order + features, [*values, value], log_det + more
        joined = torch.cat(values, 1)[:, sorted(range(len(order)), key=order.__getitem__)]
        return torch.where(x.abs() <= self.splines.bound, joined, torch.zeros_like(x)), log_det


#: A library's tails: the operator's parametrization.
PARAMETRIZATIONS = {"linear": "nflows", "circular": "circular"}


def _floors(module) -> tuple[float, float, float]:
    return module.min_bin_width, module.min_bin_height, module.min_derivative


def refused(module, bins: int, angles: bool) -> str:
    """Why a module's splines are none of the operator's, "" where they are. angles: whether some may be circular."""
    if module.tails is None:
        return "its splines are of an interval, without tails"
    tails = {module.tails} if isinstance(module.tails, str) else set(module.tails)
    if tails - {"linear", *(["circular"] if angles else [])}:
        return f"its tails are {', '.join(sorted(map(str, tails)))}"
    floors = _floors(module)
    if not 0 < min(floors) or floors[2] >= 1:
        return "its least width, height and slope are not all above 0, the slope below 1"
    if max(floors[:2]) * bins > 1 or min(floors) * bins >= 1:
        return "its least width or height leaves its bins no choice"
    bound = module.tail_bound
    if isinstance(bound, Tensor):
        return "" if angles and bound.dim() == 1 and bound.is_floating_point() else "its tail_bound is a tensor"
    return "" if isinstance(bound, Real) and bound > 0 else "its tail_bound is not above 0"


def _splines_of(module, bins: int, inputs: Tensor, logit_scale: float | None = 1.0) -> Splines | Mixed | None:
    """The splines of a module of nflows or normflows, None where the library's own way is taken."""
    if left_alone(module) or logit_scale is None or refused(module, bins, module._gk_angles):
        return None
    bound = module.tail_bound
    if isinstance(bound, Tensor) and bound.dtype != inputs.dtype:
        return None
    one = isinstance(module.tails, str)
    kind = PARAMETRIZATIONS[module.tails] if one else ""
    bound = bound if isinstance(bound, Tensor) else float(bound)
    splines = Splines(kind, bins, bound, logit_scale, _floors(module))
    if one:
        return splines
    return Mixed(splines, tuple(module.tails)) if inputs.shape[1:] == (len(module.tails),) else None


def _logit_scale(network, *names: str) -> float | None:
    """What nflows scales width and height logits by: the width of the network, under the first name that it has."""
    width = next((getattr(network, name) for name in names if hasattr(network, name)), 1)
    return width**-0.5 if isinstance(width, Real) and width > 0 else None


class Coupling:
    """Of a coupling: the features that are transformed."""

    _gk_angles = False

    def _coupling_transform(self, inputs, transform_params, inverse=False):
        scale = _logit_scale(self.transform_net, "hidden_features", "hidden_channels")
        splines = _splines_of(self, self.num_bins, inputs, scale)
        if splines is None:
            return super()._coupling_transform(inputs, transform_params, inverse)
        return splines(inputs, transform_params, inverse)


class Autoregressive:
    """Of a masked autoregressive transform: all features in one pass; the inverse as a solve, or in the library's own D
    passes."""

    _gk_angles = False
    _gk_made: ModuleType

    def inverse(self, inputs, context=None):
        splines = self._gk_splines(inputs)
        if isinstance(splines, Splines) and splines.options is not None:
            made, options, numbers = self._gk_made, splines.options, splines.numbers
            solved = run_made(self, made, inputs, context, options, inverse=True, numbers=numbers)
            if solved is not None:
                return solved
        return super().inverse(inputs, context)

    def _gk_splines(self, inputs: Tensor) -> Splines | Mixed | None:
        scale = _logit_scale(self.autoregressive_net, "hidden_features")
        return _splines_of(self, self.num_bins, inputs, scale)

    def _elementwise(self, inputs, autoregressive_params, inverse=False):
        splines = self._gk_splines(inputs)
        if splines is None:
            return super()._elementwise(inputs, autoregressive_params, inverse)
        return splines(inputs, autoregressive_params, inverse)


class Elementwise:
    """Of splines that are parameters themselves, the same for all samples."""

    _gk_angles = False

    def _spline(self, inputs, inverse=False):
        raw = self.unnormalized_widths, self.unnormalized_heights, self.unnormalized_derivatives
        splines = _splines_of(self, raw[0].shape[-1], inputs)
        if splines is None:
            return super()._spline(inputs, inverse)
        params = torch.cat(raw, -1).expand(inputs.shape[0], *raw[0].shape[:-1], -1)
        return splines.run(inputs, params, inverse)


def rule(to: type):
    """What becomes of a module of nflows or normflows whose splines are the operator's."""

    def choose(thing) -> Becomes | str:
        bins = thing.unnormalized_widths.shape[-1] if issubclass(to, Elementwise) else thing.num_bins
        if why := refused(thing, bins, to._gk_angles):
            return why
        return Becomes(to, _passes(thing, to._gk_made) if issubclass(to, Autoregressive) else "")

    return choose


def _passes(thing, made: ModuleType) -> str:
    """Why the inverse of an autoregressive transform is no solve, "" where it is one."""
    if not isinstance(thing.tails, str):
        why = "for its tails of two kinds"
    elif isinstance(thing.tail_bound, Tensor):
        why = "for its bounds, one a feature"
    elif len(set(_floors(thing))) > 1:
        why = "for its least width, height and slope, which are not one number"
    else:
        numbers = 3 * thing.num_bins - (thing.tails != "circular")
        why = inverse_refused(thing.autoregressive_net, made, numbers)
    return PASSES.format(why) if why else ""


#: Of an autoregressive transform by splines whose inverse is no solve.
PASSES = "the inverse keeps its D passes, each by the operator, {}"
