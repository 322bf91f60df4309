"""Flows of zuko, swapped and not."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from torch import nn

from genkernels.swap import _made, swap_
from tests.swap.checks import DTYPES, calls_of, check_swap, draw

pytest.importorskip("zuko", reason="needs the extra bench")

import zuko


def run_of(x, context=None):
    def run(model):
        flow = model(context)
        z, log_det = flow.transform.call_and_ladj(x)
        return {"log p": flow.log_prob(x), "z": z, "log-det": log_det, "x": flow.transform.inv(x)}

    return run


FLOWS = {
    "maf": (partial(zuko.flows.MAF, 4, transforms=2, hidden_features=(9, 7)), 2),
    "narrow": (partial(zuko.flows.MAF, 6, transforms=2, randperm=True, hidden_features=(4,)), 2),
    "tanh": (partial(zuko.flows.MAF, 4, transforms=1, activation=nn.Tanh), 1),
    "residual": (partial(zuko.flows.MAF, 4, transforms=1, residual=True), 1),
    "passes": (partial(zuko.flows.MAF, 4, transforms=1, passes=2), 1),
    "nice": (partial(zuko.flows.NICE, 5, transforms=2), 2),
    "nice even": (partial(zuko.flows.NICE, 4, transforms=2, randmask=True), 2),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FLOWS)
def test_flows(name, dtype):
    make, count = FLOWS[name]
    features = make.args[0]
    report = check_swap(make, run_of(draw(5, features, dtype=dtype)), dtype, swapped=count)
    keeps = name in ("tanh", "residual", "passes")
    assert all(("keeps its passes" in entry.reason) == keeps for entry in report.entries)


@pytest.mark.parametrize("flow", [zuko.flows.MAF, zuko.flows.NICE])
def test_contexts_and_batches(flow):
    make = lambda: flow(4, 3, transforms=2, hidden_features=(8, 8))  # noqa: E731
    for shape, context in (((5, 4), (5, 3)), ((5, 4), (3,)), ((2, 5, 4), (5, 3)), ((4,), (3,))):
        x, c = draw(*shape, dtype=torch.float64), draw(*context, dtype=torch.float64, seed=1)
        check_swap(make, run_of(x, c), torch.float64, swapped=2)


@pytest.mark.parametrize(
    ("make", "inverse", "forward"),
    [(zuko.flows.MAF, "made_inverse", "made_forward"), (zuko.flows.NSF, "made_spline_inverse", "")],
)
def test_the_inverse_is_the_solve_and_affine_maps_are_one_call(make, inverse, forward, monkeypatch):
    calls = calls_of(monkeypatch, "made_inverse", "made_spline_inverse", "made_forward")
    model = make(6, 2, transforms=2)
    swap_(model)
    flow = model(torch.randn(2))
    x = flow.sample((3,))
    assert calls == [inverse, inverse]
    torch.testing.assert_close(flow.transform.inv(flow.transform(x)), x, rtol=1e-4, atol=1e-5)
    assert calls[2:] == [forward] * 2 * bool(forward) + [inverse, inverse]


def test_small_networks_are_not_read_before_they_are_left_to_pytorch(monkeypatch):
    model = zuko.flows.MAF(3, 2, transforms=1, hidden_features=(4, 4))
    swap_(model)
    weights = (3 + 2) * 4 + 4 * 4 + 4 * 6
    monkeypatch.setattr(_made, "SMALL_PRODUCTS", 1000)
    monkeypatch.setattr(sys.modules["genkernels.swap.zuko"], "_why_not", None)
    c = torch.zeros(2)
    model(c).log_prob(torch.randn(999 // weights, 3))
    with pytest.raises(TypeError):
        model(c).log_prob(torch.randn(1000 // weights + 1, 3))


SPLINES = {
    "nsf": (partial(zuko.flows.NSF, 4, 2, transforms=2, hidden_features=(9, 7)), 2),
    "passes": (partial(zuko.flows.NSF, 4, 2, transforms=1, passes=2, bins=5, slope=1e-2), 1),
    "one bin": (partial(zuko.flows.NSF, 3, 2, transforms=1, randperm=True, bins=1), 1),
    "coupling": (
        partial(
            zuko.flows.NICE,
            5,
            2,
            transforms=2,
            univariate=partial(zuko.transforms.MonotonicRQSTransform, bound=2),
            shapes=[(4,), (4,), (3,)],
        ),
        2,
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPLINES)
def test_splines(name, dtype):
    """Of numbers within the bound and beyond it, with a context for all of them."""
    make, count = SPLINES[name]
    x, context = 3 * draw(3, 5, make.args[0], dtype=dtype), draw(5, 2, dtype=dtype, seed=1)
    run = lambda model: run_of(*(t.to(next(model.parameters())) for t in (x, context)))(model)  # noqa: E731
    report = check_swap(make, run, dtype, swapped=count, lossy=True)
    assert all(("keeps its D passes" in entry.reason) == (name == "passes") for entry in report.entries)


def test_splines_of_no_sample():
    model = nn.ModuleList([SPLINES["nsf"][0](), SPLINES["coupling"][0]()])
    swap_(model)
    for flow, features in zip(model, (4, 5), strict=True):
        transform, x = flow(torch.zeros(2)).transform, torch.empty(0, features)
        assert [t.shape for t in (*transform.call_and_ladj(x), transform.inv(x))] == [x.shape, (0,), x.shape]


def test_other_maps_and_slopes():
    model = nn.ModuleList([zuko.flows.NCSF(3, transforms=1), zuko.flows.MAF(3, transforms=1)])
    affine = zuko.transforms.MonotonicAffineTransform
    make = lambda: zuko.flows.MAF(3, transforms=1, univariate=partial(affine, slope=1e-2))  # noqa: E731
    assert [bool(e.became) for e in swap_(model).entries] == [False, True]
    check_swap(make, run_of(3 * draw(5, 3, dtype=torch.float64)), torch.float64, swapped=1)
