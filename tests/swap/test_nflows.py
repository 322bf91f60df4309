"""Transforms of nflows, swapped and not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from genkernels.swap import _coupling, _made, _residual_made, swap_
from tests.swap.checks import CLOSE, DTYPES, calls_of, check_swap, draw, outcome

pytest.importorskip("nflows", reason="needs the extra bench")

from nflows import distributions, flows, transforms
from nflows.nn.nets import ConvResidualNet, ResidualNet

MASKS = {
    "turns": [1, 0, 1, 0, 1, 0],
    "runs": [0, 0, 0, 1, 1, 1],
    "odd": [1, 1, 0, 0, 0],
    "anyhow": [1, 0, 0, 1, 1, 0, 1],
}


class Linear(nn.Linear):
    def forward(self, x, context=None):
        return super().forward(x if context is None else x + context.sum(1, keepdim=True))


class InPlace(nn.Module):
    """A network that writes over what it is given, as one may where an index has made a copy."""

    def __init__(self, features, out):
        super().__init__()
        self.linear = nn.Linear(features, out)

    def forward(self, x, context=None):
        x += 0.25
        return self.linear(x if context is None else x + context.sum(1, keepdim=True))


def both_ways(x, context=None):
    def run(model):
        z, log_det = model(x, context)
        back, minus = model.inverse(x.flip(0), context)
        return {"z": z, "log-det": log_det, "x": back, "minus": minus}

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("net", [Linear, InPlace])
@pytest.mark.parametrize("kind", ["AffineCouplingTransform", "AdditiveCouplingTransform"])
def test_couplings(kind, net, mask, dtype):
    mask = MASKS[mask]
    make = lambda: getattr(transforms, kind)(mask, net)  # noqa: E731
    x = draw(4, len(mask), dtype=dtype)
    check_swap(make, both_ways(x), dtype, swapped=1)
    check_swap(make, both_ways(x, draw(4, 2, dtype=dtype)), dtype)


@pytest.mark.parametrize("mask", MASKS)
def test_couplings_of_few_numbers(mask, monkeypatch):
    """What costs less without the operator."""
    monkeypatch.setattr(_coupling, "SMALL", 1 << 16)
    mask = MASKS[mask]
    make = lambda: transforms.AffineCouplingTransform(mask, Linear)  # noqa: E731
    check_swap(make, both_ways(draw(4, len(mask), dtype=torch.float64)), torch.float64, swapped=1)


@pytest.mark.parametrize("mask", [[0, 1, 0, 1], [1, 1, 0, 0], [0, 1, 1]])
def test_couplings_of_images(mask):
    net = lambda i, o: ConvResidualNet(i, o, hidden_channels=3, num_blocks=1)  # noqa: E731
    make = lambda: transforms.AffineCouplingTransform(mask, net)  # noqa: E731
    check_swap(make, both_ways(draw(3, len(mask), 4, 5, dtype=torch.float64)), torch.float64, swapped=1)


MADES = [
    {"features": 5, "hidden_features": 8},
    {"features": 6, "hidden_features": 4, "num_blocks": 1},
    {"features": 4, "hidden_features": 7, "use_residual_blocks": False, "context_features": 2},
    {"features": 4, "hidden_features": 7, "context_features": 2},
    {"features": 3, "hidden_features": 6, "use_residual_blocks": False, "random_mask": True},
    {"features": 1, "hidden_features": 3},
    {"features": 3, "hidden_features": 6, "activation": torch.tanh},
    {"features": 3, "hidden_features": 6, "use_batch_norm": True},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", MADES, ids=lambda o: "-".join(str(getattr(v, "__name__", v)) for v in o.values()))
def test_masked_autoregressive(options, dtype):
    make = lambda: transforms.MaskedAffineAutoregressiveTransform(**options)  # noqa: E731
    context = draw(4, 2, dtype=dtype, seed=1) if "context_features" in options else None
    report = check_swap(make, both_ways(draw(4, options["features"], dtype=dtype), context), dtype, swapped=1)
    keeps = "activation" in options or "use_batch_norm" in options
    assert ("keeps its D passes" in report.entries[0].reason) == (keeps or options == MADES[3])


def test_both_ways_are_one_call_and_new_masks_and_hooks_are_noticed(monkeypatch):
    calls = calls_of(monkeypatch, "made_forward", "made_inverse")
    model = transforms.MaskedAffineAutoregressiveTransform(4, 9).double()
    swap_(model)
    z = draw(3, 4, dtype=torch.float64)
    x = model.inverse(z)[0]
    torch.testing.assert_close(model(x)[0], z)
    both = ["made_inverse", "made_forward"]
    assert calls == both
    hook = model.autoregressive_net.blocks[0].linear_layers[0].register_forward_hook(lambda m, i, out: 2 * out)
    assert torch.allclose(model(model.inverse(z)[0])[0], z) and calls == both
    hook.remove()
    model.autoregressive_net.final_layer.mask[:, 0] = 0
    assert torch.allclose(model(model.inverse(z)[0])[0], z) and calls == both


def test_small_networks_are_left_to_pytorch(monkeypatch):
    calls = calls_of(monkeypatch, "made_forward")
    monkeypatch.setattr(_made, "SMALL_PRODUCTS", 1000)
    model = transforms.MaskedAffineAutoregressiveTransform(2, 8, num_blocks=1, use_residual_blocks=False)
    swap_(model)
    weights = 2 * 8 + 8 * 8 + 8 * 4
    model(torch.randn(999 // weights, 2))
    assert not calls
    model(torch.randn(1000 // weights + 1, 2))
    assert calls == ["made_forward"]
    monkeypatch.setattr(_residual_made, "_why_not", None)  # whose reading takes as long as such a network's pass
    model(torch.randn(999 // weights, 2))
    with pytest.raises(TypeError):
        model(torch.randn(1000 // weights + 1, 2))


def splines(x, context=None):
    """Both ways of numbers within the bound and beyond it; in the dtype of the model."""

    def run(model):
        to = lambda t: None if t is None else t.to(next(model.parameters()))  # noqa: E731
        return both_ways(to(x), to(context))(model)

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("mask", "options"),
    [
        ("turns", {"tail_bound": 3, "num_bins": 8}),
        ("anyhow", {"num_bins": 1}),
        ("odd", {"tail_bound": 2.5, "apply_unconditional_transform": True}),
        ("runs", {"num_bins": 4, "min_bin_width": 0.1, "min_bin_height": 0.1, "min_derivative": 0.1}),
        ("turns", {"num_bins": 4, "min_bin_width": 0.02, "min_bin_height": 0.1, "min_derivative": 0.01}),
        ("turns", {"num_bins": 4, "min_bin_width": 0.25, "min_bin_height": 0.05, "min_derivative": 0.1}),
    ],
)
def test_couplings_by_splines(mask, options, dtype):
    nets = {"runs": Linear, "anyhow": InPlace}
    net = nets.get(mask, lambda i, o: ResidualNet(i, o, 6, context_features=2, num_blocks=1))
    mask = MASKS[mask]
    make = lambda: transforms.PiecewiseRationalQuadraticCouplingTransform(mask, net, tails="linear", **options)  # noqa: E731
    x, bound = 2 * draw(9, len(mask), dtype=dtype), options.get("tail_bound", 1)
    x[0], x[1] = bound, -bound
    count = 1 + ("apply_unconditional_transform" in options)
    check_swap(make, splines(x, draw(9, 2, dtype=dtype, seed=1)), dtype, swapped=count, lossy=True)


def test_couplings_of_images_by_splines():
    net = lambda i, o: ConvResidualNet(i, o, hidden_channels=3, num_blocks=1)  # noqa: E731
    make = lambda: transforms.PiecewiseRationalQuadraticCouplingTransform([0, 1, 1], net, tails="linear")  # noqa: E731
    check_swap(make, both_ways(draw(3, 3, 4, 2, dtype=torch.float64)), torch.float64, swapped=1)


#: Options of a masked autoregressive transform by splines, and why its inverse is no solve, "" where it is.
SPLINE_MADES = [
    ({}, ""),
    ({"context_features": 2, "use_residual_blocks": False, "num_bins": 1}, ""),
    ({"use_residual_blocks": False, "random_mask": True, "num_blocks": 1}, ""),
    ({"context_features": 2}, "for its residual blocks, which see the context too"),
    ({"min_derivative": 1e-2}, "for its least width, height and slope, which are not one number"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("options", "why"), SPLINE_MADES, ids=range(len(SPLINE_MADES)))
def test_masked_autoregressive_by_splines(options, why, dtype, monkeypatch):
    from genkernels import ops

    calls = {"rational_quadratic_spline_inverse": 0, "made_spline_inverse": 0}

    def count(name, real):
        def counted(*args, **kwargs):
            calls[name] += 1
            return real(*args, **kwargs)

        return counted

    for name in calls:
        monkeypatch.setattr(ops, name, count(name, getattr(ops, name)))
    words = {"tails": "linear", "tail_bound": 3.0, "num_bins": 6, **options}
    make = lambda: transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(4, 8, **words)  # noqa: E731
    context = draw(9, 2, dtype=dtype, seed=1) if "context_features" in options else None
    report = check_swap(make, splines(2 * draw(9, 4, dtype=dtype), context), dtype, swapped=1, lossy=True)
    passes, solves = calls.values()
    if why:
        assert report.entries[0].reason == f"the inverse keeps its D passes, each by the operator, {why}"
        assert passes and passes % 4 == solves == 0
    else:
        assert (report.entries[0].reason, passes) == ("", 0) and solves


def test_splines_lose_no_more_digits_than_nflows():
    """In fp32, by the geometric mean of the largest errors of 30 couplings against nflows in fp64."""
    net = lambda i, o: ResidualNet(i, o, 6, num_blocks=1)  # noqa: E731
    lost = []
    for seed in range(30):
        torch.manual_seed(seed)
        theirs = transforms.PiecewiseRationalQuadraticCouplingTransform([0, 1, 0, 1], net, tails="linear", tail_bound=3)
        nn.init.normal_(theirs.transform_net.final_layer.weight)
        ours, wide = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
        swap_(ours)
        run = splines(draw(16, 4, dtype=torch.float32, seed=seed))
        a, b, exact = (outcome(model, run, torch.float32) for model in (ours, theirs, wide))
        largest = [[(t[name] - e).abs().max() for name, e in exact.items()] for t in (a, b)]
        lost.append(torch.tensor(largest).clamp(min=1e-9).log().mean(1))
    by_us, by_nflows = torch.stack(lost).mean(0).exp().tolist()
    assert by_us <= by_nflows, (by_us, by_nflows)


def test_splines_that_stay():
    make = lambda **words: transforms.PiecewiseRationalQuadraticCouplingTransform([0, 1], Linear, **words)  # noqa: E731
    model = nn.ModuleList(
        [
            make(),
            make(tails="linear", min_derivative=0.0),
            make(tails="linear", num_bins=1000),
            transforms.PiecewiseRationalQuadraticCDF(2),
        ]
    )
    with pytest.warns(UserWarning, match="no module of this ModuleList was swapped"):
        reasons = [entry.reason for entry in swap_(model).entries]
    assert ["without tails" in reason for reason in reasons] == [True, False, False, True]
    assert "not all above 0" in reasons[1] and "no choice" in reasons[2]


def test_splines_of_no_sample_and_changed_since():
    make = lambda **words: transforms.PiecewiseRationalQuadraticCouplingTransform([0, 1], Linear, **words)  # noqa: E731
    swapped = make(tails="linear")
    swap_(swapped)
    assert [t.shape for t in swapped.inverse(torch.empty(0, 2))] == [(0, 2), (0,)]
    swapped.tails, swapped.transform_net = None, Linear(1, 31)  # nflows' own way, and its own error
    with pytest.raises(transforms.InputOutsideDomain):
        swapped(torch.full((2, 2), 1.5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_convolution(dtype):
    def run(model):
        z, log_det = model(draw(3, 5, 4, 2, dtype=dtype))
        return {"z": z, "log-det": log_det}

    make = lambda: transforms.OneByOneConvolution(5, identity_init=False)  # noqa: E731
    check_swap(make, run, dtype, swapped=1)
    model = make().to(dtype)
    swap_(model)
    x = draw(3, 5, 4, 2, dtype=dtype)
    z, log_det = model(x)
    back, minus = model.inverse(z)
    torch.testing.assert_close(back, x, **(CLOSE[dtype] | ({"atol": 1e-5} if dtype == torch.float32 else {})))
    torch.testing.assert_close(minus, -log_det, **CLOSE[dtype])


def test_a_flow():
    """Of couplings, permutations, MAFs and splines: its density, and samples without a graph."""

    def make():
        net = lambda i, o: ResidualNet(i, o, 6, context_features=2, num_blocks=1)  # noqa: E731
        layers = [
            transforms.AffineCouplingTransform([1, 0, 1, 0], net),
            transforms.RandomPermutation(4),
            transforms.MaskedAffineAutoregressiveTransform(4, 6, context_features=2, use_residual_blocks=False),
            transforms.ActNorm(4),
            transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                4, 6, context_features=2, tails="linear"
            ),
        ]
        return flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([4]), nn.Linear(3, 2))

    x, context = draw(5, 4, dtype=torch.float64), draw(5, 3, dtype=torch.float64, seed=1)
    report = check_swap(make, lambda m: {"log p": m.log_prob(x, context)}, torch.float64, swapped=4)
    reasons = [entry.reason for entry in report.stayed]
    assert len(reasons) == 1 and "a few per cent" in reasons[0]
    torch.manual_seed(0)
    theirs, context = make().eval(), context.float()
    torch.manual_seed(5)
    expected = theirs.sample(3, context)
    swap_(theirs)
    torch.manual_seed(5)
    found = theirs.sample(3, context)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)
    assert expected.requires_grad and not found.requires_grad


def test_a_training_step_after_inference_mode():
    """What a pass in inference mode works out and keeps, such as the order of units, a later graph may save."""
    model = nn.ModuleList(
        [
            transforms.AffineCouplingTransform(MASKS["anyhow"], Linear),
            transforms.MaskedAffineAutoregressiveTransform(7, 9, use_residual_blocks=False),
        ]
    ).double()
    theirs, x = copy.deepcopy(model), draw(3, 7, dtype=torch.float64)
    swap_(model)
    for ours, their in zip(model, theirs, strict=True):
        with torch.inference_mode():
            torch.testing.assert_close(ours.inverse(x), their.inverse(x))
        a, b = (outcome(m, both_ways(x), torch.float64) for m in (ours, their))
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
