"""Flows of normflows, swapped and not."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from genkernels.swap import _coupling, swap_
from tests.swap.checks import DTYPES, check_swap, draw

pytest.importorskip("normflows", reason="needs the extra bench")

import normflows as nf


def both_ways(x):
    def run(model):
        z, log_det = model(x)
        back, minus = model.inverse(x.flip(0))
        return {"z": z, "log-det": log_det, "x": back, "minus": minus}

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split_mode", ["channel", "channel_inv"])
@pytest.mark.parametrize("scale_map", ["exp", "sigmoid", "sigmoid_inv"])
@pytest.mark.parametrize("large", [True, False])
def test_couplings(monkeypatch, large, scale_map, split_mode, dtype):
    monkeypatch.setattr(_coupling, "SMALL", -1 if large else 1 << 16)
    make = lambda: nf.flows.AffineCouplingBlock(nn.Linear(3, 6), True, scale_map, split_mode)  # noqa: E731
    check_swap(make, both_ways(draw(5, 6, dtype=dtype)), dtype, swapped=1)


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("split_mode", ["channel", "channel_inv", "checkerboard", "checkerboard_inv"])
def test_couplings_of_images(monkeypatch, split_mode, large):
    monkeypatch.setattr(_coupling, "SMALL", -1 if large else 1 << 16)
    channels = 3 if "checker" in split_mode else 2
    make = lambda: nf.flows.AffineCouplingBlock(  # noqa: E731
        nn.Conv2d(channels, 2 * channels, 3, padding=1), True, "sigmoid", split_mode
    )
    x = draw(2, channels if "checker" in split_mode else 4, 3, 4, dtype=torch.float64)
    check_swap(make, both_ways(x), torch.float64, swapped=1)


def test_a_checkerboard_of_points():
    make = lambda: nf.flows.AffineCouplingBlock(nn.Linear(3, 6), split_mode="checkerboard_inv")  # noqa: E731
    check_swap(make, both_ways(draw(5, 6, dtype=torch.float64)), torch.float64, swapped=1)


def test_a_glow_block():
    make = lambda: nf.flows.GlowBlock(4, 6, init_zeros=False)  # noqa: E731
    report = check_swap(make, both_ways(draw(3, 4, 2, 2, dtype=torch.float64)), torch.float64, swapped=1)
    assert {entry.was.split()[1] for entry in report.stayed} == {"GlowBlock", "Invertible1x1Conv", "ActNorm"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [True, False])
def test_masked_autoregressive(residual, dtype):
    make = lambda: nf.flows.MaskedAffineAutoregressive(5, 8, use_residual_blocks=residual)  # noqa: E731
    report = check_swap(make, both_ways(draw(4, 5, dtype=dtype)), dtype, swapped=1)
    reason = "one direction: the inverse keeps its D passes, for its first layer, which has no activation"
    assert report.entries[0].reason == ("" if residual else reason)


SPLINES = {
    "coupled": (nf.flows.CoupledRationalQuadraticSpline, {"tail_bound": 2.0}),
    "angles": (nf.flows.CoupledRationalQuadraticSpline, {"tails": "circular"}),
    "some angles": (nf.flows.CircularCoupledRationalQuadraticSpline, {"ind_circ": [0, 3]}),
    "some bounds": (
        nf.flows.CircularCoupledRationalQuadraticSpline,
        {"ind_circ": [1, 2, 3], "tail_bound": torch.tensor([1.0, 2.0, 3.0, 1.5, 2.5])},
    ),
    "autoregressive": (nf.flows.AutoregressiveRationalQuadraticSpline, {"permute_mask": True}),
    "autoregressive angles": (nf.flows.CircularAutoregressiveRationalQuadraticSpline, {"ind_circ": [1, 2]}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPLINES)
def test_splines(name, dtype):
    kind, options = SPLINES[name]

    def make():
        model = kind(5, 1, 6, num_bins=4, num_context_channels=2, **options)
        for p in model.parameters():  # from what is the identity
            nn.init.normal_(p, std=0.5)
        return model

    def run(model):
        x, context = (t.to(next(model.parameters())) for t in (given, draw(9, 2, dtype=dtype, seed=1)))
        z, log_det = model(x, context)
        back, minus = model.inverse(x.flip(0), context)
        return {"z": z, "log-det": log_det, "x": back, "minus": minus}

    given = 2 * draw(9, 5, dtype=dtype)  # beyond the bound too
    report = check_swap(make, run, dtype, swapped=1 if "autoregressive" in name else 2, lossy=True)
    assert [entry.reason for entry in report.stayed] == ["its parts are swapped one by one"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tails", "why"), [("linear", ""), ("circular", ""), (["linear", "circular"] * 2, "for its tails of two kinds")]
)
def test_an_autoregressive_spline_is_solved(tails, why, dtype):
    """Features in any order."""
    make = lambda: nf.flows.neural_spline.autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive(  # noqa: E731
        4, 6, num_bins=5, tails=tails, tail_bound=2.0, permute_mask=True, init_identity=False
    )
    given = 2 * draw(9, 4, dtype=dtype)

    def run(model):
        return both_ways(given.to(next(model.parameters())))(model)

    report = check_swap(make, run, dtype, swapped=1, lossy=True)
    assert report.entries[0].reason == (f"the inverse keeps its D passes, each by the operator, {why}" if why else "")


@pytest.mark.parametrize("dtype", DTYPES)
def test_planar(dtype):
    def run(model):
        z, log_det = model(draw(6, 3, dtype=dtype))
        return {"z": z, "log-det": log_det}

    check_swap(lambda: nf.flows.Planar((3,)), run, dtype, swapped=1)
    model = nf.flows.Planar((3,))
    x = draw(6, 3, dtype=torch.float64)
    expected = model(x)  # of two dtypes, which PyTorch takes together
    swap_(nn.ModuleList([model]))
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3,), (2, 1, 2)])
def test_radial(shape, dtype):
    def run(model):
        z, log_det = model(given.to(model.beta))
        return {"z": z, "log-det": log_det}

    given = draw(6, *shape, dtype=dtype)
    check_swap(lambda: nf.flows.Radial(shape), run, dtype, swapped=1, lossy=True)
    model = nf.flows.Radial(shape).to(dtype)
    nn.init.zeros_(model.alpha)
    expected = model(given)
    swap_(model)
    torch.testing.assert_close(model(given), expected)
    model(given)[0].sum().backward()
    assert model.alpha.grad.isfinite()


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nets", [(True, True), (True, False), (False, True)])
def test_masked_affine(nets, dtype):
    mask = torch.tensor([1.0, 0.0, 0.0, 1.0])
    make = lambda: nf.flows.MaskedAffineFlow(mask.clone(), *(net() if has else None for has in nets))  # noqa: E731
    x = draw(5, 4, dtype=dtype)
    report = check_swap(make, both_ways(x), dtype, swapped=1)
    assert len(report.entries) == 1


def test_masked_affine_where_networks_overflow_or_write_over_what_they_see():
    class Odd(nn.Module):
        def forward(self, x):
            return x.mul_(2) if self.writes else torch.where(x > 0, torch.inf * x, -torch.inf)

    for writes in (True, False):
        nets = Odd(), Odd()
        nets[0].writes = nets[1].writes = writes
        model = nf.flows.MaskedAffineFlow(torch.tensor([1.0, 0.0, 1.0]), *nets)
        x = torch.randn(4, 3)
        expected = [model(x), model.inverse(x)]
        swap_(model)
        torch.testing.assert_close([model(x), model.inverse(x)], expected, equal_nan=True)
        assert expected[0][0].isnan().any() != writes
    report = swap_(nn.ModuleList([nf.flows.MaskedAffineFlow(torch.tensor([0.5, 1.0])), nf.flows.Radial((2,))]))
    assert report.entries[0].reason == "its mask is not of zeros and ones"


def seeded(model, x, inverse=True):
    torch.manual_seed(5)
    np.random.seed(5)
    return model.inverse(x) if inverse else model(x)


RESIDUALS = {
    "geometric": {},
    "poisson": {"n_dist": "poisson", "n_samples": 3, "n_exact_terms": 3},
    "terms": {"n_power_series": 4},
    "two": {},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RESIDUALS)
def test_residual_blocks(name, dtype):
    """The same draws, in training the same surrogate, with the same gradient where each sample has its own."""
    features = 2 if name == "two" else 4

    def make():
        layers = [features, 9, 9, features]
        model = nf.flows.Residual(nf.nets.LipschitzMLP(layers, 0.9, init_zeros=False), **RESIDUALS[name])
        model.iresblock.grad_in_forward = False  # there all samples have the gradient of the first
        return model

    def run(model):
        z, log_det = seeded(model, x.clone().requires_grad_())
        moments = {
            word: model.iresblock.get_buffer(f"last_{word}").clone() for word in ("n_samples", "firmom", "secmom")
        }
        return {"z": z, "log-det": log_det} | moments

    x = draw(7, features, dtype=dtype)
    report = check_swap(make, run, dtype, swapped=1)
    assert [entry.was for entry in report.entries] == ["normflows Residual", "normflows iResBlock"]
    assert "is within 1e-5" in report.entries[1].reason


@pytest.mark.parametrize("training", [True, False])
def test_the_inverse_of_residual_blocks(training):
    torch.manual_seed(0)
    net = nf.nets.LipschitzCNN([2, 6, 6, 2], [3, 1, 3], 0.9, init_zeros=False)
    theirs = nf.flows.Residual(net).double().train(training)
    y = draw(3, 2, 4, 5, dtype=torch.float64)
    ours = copy.deepcopy(theirs)
    swap_(ours)
    seeded(ours, y), seeded(theirs, y)  # convolutions are told the size of their input
    with torch.no_grad():
        x, log_det = seeded(ours, y, inverse=False)
        back, minus = seeded(theirs, x.clone())
        assert (back - y).abs().max() <= 2.1e-5
        torch.testing.assert_close(log_det, -minus, rtol=1e-10, atol=1e-10)
        loose, _ = seeded(theirs, y.clone(), inverse=False)
        assert (x - loose).abs().max() <= 4e-3
    direction = draw(3, 2, 4, 5, dtype=torch.float64, seed=1)
    given = y.clone().requires_grad_()
    (grad,) = torch.autograd.grad((ours.iresblock._inverse_fixed_point(given) * direction).sum(), given)
    at = x.clone().requires_grad_()
    (pulled,) = torch.autograd.grad(at + theirs.iresblock.nnet(at), at, grad)
    torch.testing.assert_close(pulled, direction, rtol=1e-3, atol=1e-4)


def test_residual_blocks_that_stay():
    nets = [nf.nets.LipschitzCNN([2, 4, 2], [5, 5]), nn.Linear(2, 2), nf.nets.LipschitzMLP([2, 4, 2])]
    blocks = [nf.flows.Residual(net, exact_trace=i == 2) for i, net in enumerate(nets)]
    with pytest.warns(UserWarning, match="no module of this ModuleList was swapped"):
        reasons = [e.reason for e in swap_(nn.ModuleList(blocks)).entries if "iResBlock" in e.was]
    assert [reason.split()[-1] for reason in reasons] == ["around", "networks", "traces"]


def test_what_stays():
    model = nn.ModuleList(
        [
            nf.flows.AffineCouplingBlock(nn.Linear(1, 1), scale=False),
            nf.flows.Planar((3,), act="leaky_relu"),
            nf.flows.Planar((3, 2, 2)),
        ]
    )
    with pytest.warns(UserWarning, match="no module of this ModuleList was swapped"):
        reasons = [entry.reason for entry in swap_(model).entries]
    assert "nothing to gain" in reasons[0]
    assert reasons[1:] == ["its activation is leaky_relu", "not of points"]
