"""The peers' rational-quadratic splines as their coupling layers call them, on ready parameters, each in its own
parametrization. Inputs are split outside the clock, as a view.

- **nflows** ``unconstrained_rational_quadratic_spline``, linear tails: it takes what lies within out of its tensors and
  puts it back, and asks twice whether anything does.
- **zuko** ``MonotonicRQSTransform``: ``call_and_ladj``, of the inverse ``inv.call_and_ladj``, which runs the forward
  map too.
- **normflows** ``unconstrained_rational_quadratic_spline``, circular tails, otherwise as nflows.

Of whole autoregressive transforms: `genkernels.benchmarks.peers.made`.
"""

from __future__ import annotations

from genkernels.benchmarks.peers import Adapter, made

PEERS = ("nflows", "zuko", "normflows")
_KINDS = {"nflows": "nflows", "zuko": "zuko", "normflows": "circular"}


def unsupported(peer: str, case) -> str:
    kind = case.settings["parametrization"]
    return "" if _KINDS[peer] == kind else f"has no {kind} parametrization"


def adapter(peer: str, settings: dict, direction: str, shape: list[int]) -> Adapter:
    if "autoregressive" in settings:
        return made.adapter(peer, settings, direction, shape)
    bins, bound, inverse = shape[-1], settings["bound"], direction == "inverse"
    call = _zuko(bound, inverse) if peer == "zuko" else _function(peer, bound, inverse)

    def op(x, params):
        y, ladj = call(x, params[..., :bins], params[..., bins : 2 * bins], params[..., 2 * bins :])
        return y, ladj.flatten(1).sum(1)

    return Adapter(op, lambda x, params: (x, params))


def _zuko(bound: float, inverse: bool):
    from zuko.transforms import MonotonicRQSTransform

    def call(x, *parameters):
        spline = MonotonicRQSTransform(*parameters, bound=bound)
        return (spline.inv if inverse else spline).call_and_ladj(x)

    return call


def _function(peer: str, bound: float, inverse: bool):
    if peer == "nflows":
        from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline as spline
    else:
        from normflows.utils.splines import unconstrained_rational_quadratic_spline as spline
    tails = {"nflows": "linear", "normflows": "circular"}[peer]
    return lambda *tensors: spline(*tensors, inverse=inverse, tails=tails, tail_bound=bound)
