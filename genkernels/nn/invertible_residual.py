"""The residual block of a flow: y = x + g(x) for a network g that contracts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from genkernels import ops
from genkernels.networks import NativeBlock, log_det_series, native_block
from genkernels.networks._outside import outside
from genkernels.networks.invertible_residual import Solution, attach, solve
from genkernels.networks.log_det_series import ESTIMATORS, Series
from genkernels.nn import _roulette
from genkernels.nn._draws import given_generator
from genkernels.nn._log_det import wanted, zero_log_det
from genkernels.nn.spectral_norm import join, parts_below
from genkernels.ops import OPERATORS, checks, transforms_active
from genkernels.ops.log_det_series import takes_exact_first, trace

WHO = "InvertibleResidual"
#: The weight of the newest step in the running ratio.
NEWEST = 0.1
FIRST_TERMS = ("auto", "exact", "probe")


class InvertibleResidual(nn.Module):
    r"""y = x + g(x) for a network g of a Lipschitz constant below 1, such as one of `LipschitzLinear` or
    `LipschitzConv2d` and `LipSwish`.

    Its inverse is a fixed point, found by an accelerated iteration that stops sample by sample; its log-determinant a
    power series of traces. Both take any network that mixes no samples and keeps the shape of x. Alternations of linear
    maps, or of 1×1 and 3×3 convolutions, and one activation (LipSwish, CLipSwish, ELU, SiLU, tanh, ReLU, LeakyReLU)
    have kernels (`genkernels.ops.log_det_series`, `genkernels.ops.invertible_residual`), with a context too where that
    only adds to what the first map gives, as a method ``context_shift(context)`` tells; others run through autograd.

    Equivalent to::

        y = x + net(x)
        log_det = torch.linalg.slogdet(jacobian_of(y, x))[1]

    Args:
        net: g, called as ``net(x)``, or ``net(x, context)`` where a context is given. Where it has a method
            ``context_shift``, ``net(x, context)`` must be ``net(x)`` with ``context_shift(context)``, ``[N, outputs]``,
            added to its first map's output.
        log_det: ``exact`` (the whole Jacobian, up to 256 features), ``series`` (`terms` terms) or ``unbiased``: `terms`
            terms, then Russian roulette.
        terms: see there. stop: of the roulette, ``geometric`` (another term follows with probability 1 − `p`),
            ``adaptive`` (geometric, with the ratio that earlier steps have shown to be needed) or ``poisson``.
        p: of ``geometric``, between 0 and 1; of ``poisson`` the mean.
        probe: ``rademacher`` or ``gaussian``. probes: how many a sample.
        first_term: of a series, ``exact`` takes the trace of the Jacobian by its closed form, which three maps have
            whose middle one is a matrix or a 1×1 convolution; ``probe`` estimates it as the others; ``auto`` takes the
            closed form where there is one.
        rtol, atol: the inverse ends where no element of y − x − g(x) is above ``atol + rtol * max|y|``, of each sample
            its own. max_iterations: of the inverse.
        on_failure: of samples that did not get there, ``raise``, ``warn`` or ``ignore``.

    Shapes:
        x ``[N, ...]`` → y like x, log_det ``[N]``, nats.

    Raises:
        ValueError: an option is wrong, a layer of the network has a coefficient of 1 or more, or the network changes
            the shape. RuntimeError: the inverse did not converge.

    The number of terms and the probes come from torch's generator. The gradient of the log-determinant, of any order of
    terms, costs one recorded product. A geometric roulette has a finite variance only where its survival 1 − p exceeds
    the square of the ratio of two terms: where it does not, a warning says so.

    What an exact first term gives, measured on a `ResidualFlow` of the preset ``digits`` after 1,000 steps (360 images
    held out, dequantised once, 100 repetitions; one probe, a geometric roulette of p = 0.5 after 2 terms, and after 20
    terms in brackets): of an image's bits/dim 0.071 (0.060) of the variance that a probe leaves, for 1.09 (1.03) times
    the processor time of an evaluation of 64 images, and 1.10 (1.03) times that of all of them. A loss with its
    gradient takes 1.13 (1.07) times as long, and the gradient has 0.42 (0.13) of the variance. (fp32, 1 thread of an
    AMD EPYC with AVX-512.)

    Source: Behrmann et al., "Invertible residual networks", 2019; Chen et al., "Residual flows for invertible
    generative modeling", 2019.
    """

    def __init__(
        self,
        net: nn.Module,
        log_det: str = "unbiased",
        *,
        terms: int = 2,
        stop: str = "adaptive",
        p: float = 0.5,
        probe: str = "rademacher",
        probes: int = 1,
        first_term: str = "auto",
        rtol: float = 0.0,
        atol: float = 1e-5,
        max_iterations: int = 200,
        on_failure: str = "raise",
    ):
        super().__init__()
        if not isinstance(net, nn.Module):
            raise TypeError(f"{WHO}: net must be a torch.nn.Module, got {type(net).__name__}")
        for part in parts_below(net):
            if part.settings.coefficient >= 1:
                raise ValueError(
                    f"{WHO}: the coefficient of each layer of net must be below 1 for an inverse to exist, got "
                    f"{part.settings.coefficient:g}"
                )
        checks.option(WHO, "on_failure", on_failure, ("raise", "warn", "ignore"))
        checks.integer(WHO, "max_iterations", max_iterations, 1)
        for label, value in (("rtol", rtol), ("atol", atol)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(f"{WHO}: {label} must be a number, 0 or more, got {value!r}")
        if not rtol and not atol:
            raise ValueError(f"{WHO}: rtol or atol must be above 0, got 0 for both")
        self.net = net
        self.on_failure = on_failure
        self.options = {"rtol": rtol, "atol": atol, "max_iterations": max_iterations}
        self.set_log_det(log_det, terms=terms, stop=stop, p=p, probe=probe, probes=probes, first_term=first_term)
        self.register_buffer("decay", torch.zeros((), dtype=torch.float64))  #: ratio of two terms, over past steps
        join(parts_below(net))

    decay: Tensor

    def set_log_det(
        self,
        log_det: str,
        *,
        terms: int = 2,
        stop: str = "adaptive",
        p: float = 0.5,
        probe: str = "rademacher",
        probes: int = 1,
        first_term: str = "auto",
    ) -> None:
        """Another estimator of the log-determinant; arguments as for the constructor."""
        checks.option(WHO, "log_det", log_det, ESTIMATORS)
        checks.option(WHO, "stop", stop, ("geometric", "poisson", "adaptive"))
        checks.option(WHO, "first_term", first_term, FIRST_TERMS)
        self.first_term = first_term
        self.adaptive = stop == "adaptive" and log_det == "unbiased"
        kind = "geometric" if stop == "adaptive" else stop
        self.series = Series(log_det, terms, kind, p, probe, probes).check(WHO)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not wanted():
            return x + self._g(x, context), zero_log_det(x)
        if torch.compiler.is_compiling():
            block = self._block(x, context)[0]
            # of another network the series differentiates inside of what is differentiated, as compilers cannot
            value, log_det = outside(self._log_det, x, context) if block is None else self._in_graph(x, block)
        else:
            value, log_det = self._log_det(x, context)
        return x + value, log_det

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return outside(self._inverse, y, context) if torch.compiler.is_compiling() else self._inverse(y, context)

    def _inverse(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        block = self._block(y, context)[0]
        if block is not None and _has_kernels("invertible_residual", y):
            solution = ops.invertible_residual(y, *block, **self.options)
            self._judge(solution)
            x = solution.x
        else:
            solution = self.solve(y, context)
            self._judge(solution)
            x = solution.x
            if torch.is_grad_enabled():
                x = attach(lambda at: self._g(at, context), y, x, **self.options)
        return x, -self._log_det(x, context)[1] if wanted() else zero_log_det(x)

    @torch.no_grad()
    def solve(self, y: Tensor, context: Tensor | None = None, start: Tensor | None = None) -> Solution:
        """x of y, without a graph, with each sample's residual and iterations."""
        checks.tensor(WHO, "y", y)
        block = self._block(y, context)[0]
        if block is not None and _has_kernels("invertible_residual", y):
            return ops.invertible_residual(y, *block, start=start, **self.options)

        def g(x: Tensor, rows: Tensor | None) -> Tensor:
            return self._g(x, context if rows is None or context is None else context[rows])

        return solve(g, y, start, **self.options)

    def _block(self, x: Tensor, context: Tensor | None) -> tuple[NativeBlock | None, str]:
        """The network as kernels take it, or None and why it is none."""
        if x.dim() not in (2, 4):
            return None, f"samples of {x.dim() - 1} axes have none"
        block, reason = native_block(self.net, x, context)
        if block is not None and len(block.weights[-1]) != x.shape[1]:
            return None, "it changes the shape"
        return block, reason

    def _g(self, x: Tensor, context: Tensor | None) -> Tensor:
        value = self.net(x) if context is None else self.net(x, context)
        if not isinstance(value, Tensor) or value.shape != x.shape:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{WHO}: net must keep the shape of x, {list(x.shape)}, got {got} from it")
        return value

    def _log_det(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        checks.tensor(WHO, "x", x)
        series = self.series
        if series.estimator == "unbiased" and series.stop == "geometric":
            ratio = float(self.decay)
            if self.adaptive:
                series = _roulette.adapted(series, ratio)
            elif ratio * ratio >= 1 - series.p:
                warnings.warn(
                    f"{WHO}: the survival 1 - p of the roulette must exceed the square of the ratio of two terms for "
                    f"its variance to be finite, got {1 - series.p:g} and {ratio:.3g}²; stop='adaptive' sees to it",
                    stacklevel=3,
                )
        block, why = self._block(x, context)
        exact_first = self._exact_first(x, block, why)
        if block is not None and _has_kernels("log_det_series", x):
            value, log_det, decay = _by_kernels(x, block, series, exact_first, series.draw)
        else:
            first = trace(x, *block) if exact_first else None
            value, log_det, decay = log_det_series.log_det_series(
                lambda at: self._g(at, context), x, series, generator=given_generator(), first=first
            )
        if self.training and decay and decay < float("inf"):
            with torch.no_grad():
                self.decay.copy_(self._with_newest(decay))
        return value, log_det

    def _in_graph(self, x: Tensor, block: NativeBlock) -> tuple[Tensor, Tensor]:
        """The same within a compiled pass, with the same draws: nothing is read on the host."""
        series = self.series

        def draw(generator):
            if series.estimator != "unbiased":
                return series.draw()
            return _roulette.drawn(series, self.decay if self.adaptive else None)

        value, log_det, decay = _by_kernels(x, block, series, self._exact_first(x, block, ""), draw)
        if self.training and isinstance(decay, Tensor):
            with torch.no_grad():
                seen = (decay > 0) & (decay < float("inf"))
                # as a vector: what compiled passes write to a single float64, torch (2.13) drops
                self.decay.view(1).copy_(torch.where(seen, self._with_newest(decay), self.decay))
        return value, log_det

    def _with_newest(self, decay: Tensor | float) -> Tensor:
        """`decay` with that of the newest step."""
        seen = self.decay * (1 - NEWEST) + NEWEST * decay
        return torch.where(self.decay == 0, decay, torch.maximum(seen, self.decay * 0.99))

    def _exact_first(self, x: Tensor, block: NativeBlock | None, why: str) -> bool:
        if self.series.estimator == "exact" or self.first_term == "probe":
            return False
        exact_first = block is not None and takes_exact_first(block.weights, x.shape[2:])
        if self.first_term == "exact" and not exact_first:
            raise ValueError(
                f"{WHO}: first_term 'exact' needs a network of three maps, the middle one a matrix or a 1x1 "
                f"convolution: {why or 'this one is of another form'}"
            )
        return exact_first

    def _judge(self, solution: Solution) -> None:
        if self.on_failure == "ignore" or bool(solution.converged.all()):
            return
        worst = int(torch.where(solution.converged, 0, solution.residual.nan_to_num(float("inf"))).argmax())
        sentence = (
            f"{WHO}: the inverse must reach a residual of {self._limit()} within "
            f"{self.options['max_iterations']} iterations, {int((~solution.converged).sum())} of "
            f"{len(solution.converged)} samples did not, the worst (sample {worst}) has "
            f"{solution.residual[worst].item():.3g} after {int(solution.iterations[worst])}"
        )
        if self.on_failure == "raise":
            raise RuntimeError(sentence)
        warnings.warn(sentence, stacklevel=3)

    def _limit(self) -> str:
        atol, rtol = self.options["atol"], self.options["rtol"]
        return f"{atol:g}" + (f" + {rtol:g}·max|y|" if rtol else "")

    def extra_repr(self) -> str:
        series: dict[str, Any] = self.series._asdict()
        series["stop"] = "adaptive" if self.adaptive else series["stop"]
        return ", ".join(f"{k}={v}" for k, v in series.items())


def _has_kernels(operator: str, x: Tensor) -> bool:
    return not transforms_active() and OPERATORS[operator].backend_on(x.device.type) != "reference"


def _by_kernels(
    x: Tensor, block: NativeBlock, series: Series, exact_first: bool, draw: Callable
) -> tuple[Tensor, Tensor, Tensor | float]:
    """The draws of `networks.log_det_series`, in their order, the terms by `draw`, and the operator. What comes last is
    a tensor within a compiled pass."""
    if series.estimator == "exact":
        value, log_det, _ = ops.log_det_series(x, *block, probes=None)
        return value, log_det, 0.0
    generator = given_generator()
    terms = draw(generator)
    probes = torch.stack([log_det_series.probe(x, series.probe, generator) for _ in range(series.probes)])
    first_term = "exact" if exact_first else "probe"
    value, log_det, shrink = ops.log_det_series(x, *block, probes=probes, terms=terms, first_term=first_term)
    if not (shrink.numel() and terms):
        return value, log_det, 0.0
    largest = shrink.detach().max()
    return value, log_det, largest if torch.compiler.is_compiling() else float(largest)
