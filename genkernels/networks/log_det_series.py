r"""log|det(I + J)| of y = x + g(x), J the Jacobian of any g that contracts, sample by sample.

.. math:: \log\lvert\det(I + J)\rvert = \sum_{k \ge 1} \frac{(-1)^{k+1}}{k} \operatorname{tr} J^k,\qquad
    \operatorname{tr} J^k = \mathrm{E}_v\, v^\top J^k v

for random v of mean 0 and covariance I. `exact` takes the whole Jacobian; `series` stops after n terms, and is off by
what is left out; `unbiased` stops at random and divides each term by the probability that it is reached (Russian
roulette), so that the mean over the stops is the whole series.

The gradient of term k is :math:`(-1)^{k+1}\operatorname{tr}(J^{k-1}\,\partial J)`, and with :math:`w_k = (J^\top)^k v`,
which the value has computed already,

.. math:: \partial \log\lvert\det(I + J)\rvert = \mathrm{E}\Bigl[\Bigl(\sum_k \tfrac{(-1)^{k+1}}{P(N \ge k)}
    w_{k-1}\Bigr)^\top \partial J\, v\Bigr]:

one more vector-Jacobian product, the only one that is recorded, however many terms there are; each sample's is its own,
so that samples may weigh as they like in what is differentiated.

Source: Behrmann et al., "Invertible residual networks", 2019; Chen et al., "Residual flows for invertible generative
modeling", 2019 (roulette, Neumann gradient).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from genkernels.ops import checks
from genkernels.reference.log_det_series import roulette_weights

ESTIMATORS = ("exact", "series", "unbiased")
STOPS = ("geometric", "poisson")
PROBES = ("rademacher", "gaussian")
#: Features of the largest Jacobian that `exact` takes: it costs as many passes.
MOST_FEATURES = 256


class Series(NamedTuple):
    """How the log-determinant of a residual block is found.

    Args:
        estimator: ``exact``, ``series`` or ``unbiased``.
        terms: of ``series``; of ``unbiased`` those before the roulette begins.
        stop: ``geometric``: a further term follows with probability 1 − `p`, of ratios of tr J^k below the root of
            that the variance is finite. ``poisson``: the number of further terms is one more than Poisson of mean `p`.
        p: see there.
        probe: ``rademacher`` (±1) or ``gaussian``. probes: how many a sample.
    """

    estimator: str = "unbiased"
    terms: int = 2
    stop: str = "geometric"
    p: float = 0.5
    probe: str = "rademacher"
    probes: int = 1

    def check(self, who: str) -> Series:
        checks.option(who, "estimator", self.estimator, ESTIMATORS)
        checks.integer(who, "terms", self.terms, 1 if self.estimator == "series" else 0)
        checks.option(who, "stop", self.stop, STOPS)
        checks.option(who, "probe", self.probe, PROBES)
        checks.integer(who, "probes", self.probes, 1)
        most = 1 if self.stop == "geometric" else math.inf
        if not isinstance(self.p, int | float) or not 0 < self.p < most:
            span = "between 0 and 1" if self.stop == "geometric" else "above 0"
            raise ValueError(f"{who}: p must be a number {span}, got {self.p!r}")
        return self

    def draw(self, generator: torch.Generator | None = None) -> list[float]:
        """The weights 1 / P(N ≥ k) of the terms of one evaluation, the first one's first: drawn on the CPU."""
        return self.weights(self.further(generator) if self.estimator == "unbiased" else 0)

    def further(self, generator: torch.Generator | None = None) -> int:
        """How many terms the roulette adds, at least 1."""
        device = "cpu" if generator is None else generator.device
        if self.stop == "geometric":
            return int(torch.empty((), device=device).geometric_(self.p, generator=generator))
        return 1 + int(torch.poisson(torch.full((), float(self.p), device=device), generator=generator))

    def weights(self, further: int) -> list[float]:
        """What `draw` gives with that many terms added."""
        return roulette_weights(self.terms, self.stop == "poisson", self.p, further)


class LogDet(NamedTuple):
    """g(x), the estimate ``[N]``, and how much the last product shrank: the largest, over samples and probes, of the
    geometric mean of ‖w_k‖ / ‖w_{k−1}‖; 0 where none was taken."""

    value: Tensor
    log_det: Tensor
    decay: float


def log_det_series(
    g: Callable[[Tensor], Tensor],
    x: Tensor,
    series: Series,
    weights: list[float] | None = None,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    first: Tensor | None = None,
) -> LogDet:
    """g(x) and log|det(I + J)| of each sample, with gradients by x and by what g holds where gradients are recorded.

    Args:
        g: a function of ``[N, ...]`` that mixes no samples. x: ``[N, ...]``.
        series: how. weights: of the terms, as ``series.draw()`` gives them; drawn by default.
        generator: of the draws; torch's own by default. noise: the probes ``[P, N, ...]``; drawn by default.
        first: tr J ``[N]`` where it is known, with its own gradient: the first term then needs no probe.

    Raises:
        RuntimeError: a gradient of the gradient is asked for. Of an estimate it would leave out what the sums of the
            series depend on; that of `exact` is right.
    """
    recording = torch.is_grad_enabled()
    with torch.enable_grad():
        at = x if recording and x.requires_grad else x.detach().requires_grad_()
        value = g(at)
        if value.shape != x.shape:
            raise ValueError(
                f"log_det_series: g must keep the shape of x, {list(x.shape)}, got {list(value.shape)} from it"
            )
        if series.estimator == "exact":
            log_det, decay = _exact(value, at, recording), 0.0
        else:
            weights = series.draw(generator) if weights is None else weights
            log_det, decay = _estimate(value, at, series, weights, generator, noise, first, recording)
    return LogDet(value if recording else value.detach(), log_det if recording else log_det.detach(), decay)


def _exact(value: Tensor, x: Tensor, recording: bool) -> Tensor:
    features = math.prod(x.shape[1:])
    if features > MOST_FEATURES:
        raise ValueError(
            f"log_det_series: estimator 'exact' takes up to {MOST_FEATURES} features, got {features}; 'unbiased' takes "
            "any number"
        )
    rows = []
    flat = value.reshape(len(x), features)
    for i in range(features):
        rows.append(_pulled(flat[:, i].sum(), x, None, recording).reshape(len(x), features))
    work = torch.promote_types(x.dtype, torch.float32)
    if not rows:
        return x.new_zeros((len(x),), dtype=work)
    jacobian = torch.stack(rows, 1).to(work)
    return torch.linalg.slogdet(jacobian + torch.eye(features, dtype=work, device=x.device))[1]


def _estimate(value, x, series, weights, generator, noise, first, recording) -> tuple[Tensor, float]:
    work = torch.promote_types(x.dtype, torch.float32)
    total, decay = x.new_zeros((len(x),), dtype=work), 0.0
    known = None if first is None or not weights else weights[0] * first.to(work)
    for i in range(series.probes if noise is None else len(noise)):
        v = probe(x, series.probe, generator) if noise is None else noise[i]
        w, summed = v, torch.zeros_like(v)
        value_of = torch.zeros_like(total)
        for k, weight in enumerate(weights, start=1):
            sign = 1 if k % 2 else -1
            estimated = known is None or k > 1
            if estimated:
                summed = summed + sign * weight * w
            w = _pulled(value, x, w, record=False)
            if estimated:
                value_of = value_of + sign * weight / k * _dot(w, v)
        if weights and len(x):
            ratio = (_dot(w, w) / _dot(v, v)).clamp(min=0).amax().sqrt().item()
            decay = max(decay, ratio ** (1 / len(weights)))
        if recording:  # the value of the series with the gradient of summedᵀ J v
            through = _dot(_pulled(value, x, summed, record=True), v)
            if through.requires_grad:
                through.register_hook(_once)
            value_of = value_of + (through - through.detach())
        total = total + value_of
    total = total / (series.probes if noise is None else len(noise))
    return total if known is None else total + known, decay


def _once(grad: Tensor) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "log_det_series: the gradient of an estimated log-determinant cannot be differentiated again by this path; "
            "estimator 'exact' can be, and so can blocks of alternating maps and one activation "
            "(genkernels.ops.log_det_series)"
        )


def _pulled(value: Tensor, x: Tensor, cotangent: Tensor | None, record: bool) -> Tensor:
    """Jᵀ times a cotangent."""
    (found,) = torch.autograd.grad(value, x, cotangent, retain_graph=True, create_graph=record, materialize_grads=True)
    return found


def _dot(a: Tensor, b: Tensor) -> Tensor:
    work = torch.promote_types(a.dtype, torch.float32)
    return (a.to(work) * b.to(work)).reshape(len(a), math.prod(a.shape[1:])).sum(1)


def probe(x: Tensor, kind: str, generator: torch.Generator | None) -> Tensor:
    """One probe a sample, like x."""
    if kind == "gaussian":
        return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    given = {} if generator is None else {"generator": generator}  # a compiler of all shapes takes no None
    drawn = torch.randint(0, 2, x.shape, dtype=torch.int8, device=x.device, **given)
    return (2 * drawn - 1).to(x.dtype)
