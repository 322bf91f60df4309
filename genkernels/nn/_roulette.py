"""Where the series of a residual block's log-determinant stops, if it does so at random."""

from __future__ import annotations

import torch
from torch import Tensor

from genkernels.networks.log_det_series import STOPS, Series
from genkernels.ops._operator import in_graph
from genkernels.ops.log_det_series import Stopped

#: Of an adaptive stop: the survival of the roulette over the ratio of two terms, and its bounds.
MARGIN, LEAST, MOST = 1.1, 0.3, 0.98


def adapted(series: Series, ratio: float) -> Series:
    """The series with the survival that this ratio of two terms asks for."""
    return series._replace(p=1 - min(max(MARGIN * ratio, LEAST), MOST))


def drawn(series: Series, ratio: Tensor | None) -> Stopped:
    """The terms as `Series.draw` draws them, `adapted` to a ratio where one is given, within a compiled pass: one
    operator, into which the compiler does not look."""
    # in each call another tensor: of two equal draws a compiler would leave out one
    apart = torch.empty((), dtype=torch.float64)
    stopped = torch.ops.genkernels.log_det_series_stop(ratio, series.terms, STOPS.index(series.stop), series.p, apart)
    return Stopped(stopped, series.terms, series.stop == "poisson")


def _run(ratio, terms, stop, p, apart):
    series = Series("unbiased", terms, STOPS[stop], p)
    if ratio is not None:
        series = adapted(series, float(ratio))
    return torch.tensor([series.p, series.further()], dtype=torch.float64)


in_graph(
    "log_det_series_stop(Tensor? ratio, int terms, int stop, float p, Tensor apart) -> Tensor",
    _run,
    lambda ratio, terms, stop, p, apart: apart.new_empty((2,)),
    torch.Tag.nondeterministic_seeded,
)
