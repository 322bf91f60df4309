"""The sliced Wasserstein distance against closed forms, and against quantile functions on a fine grid."""

import importlib
import math

import pytest
import torch

from genkernels.metrics import sliced_wasserstein

NAN = float("nan")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def by_definition(x, y, projections, seed, order):
    directions = torch.randn(projections, x.shape[1], generator=seeded(seed), dtype=torch.float64)
    directions /= directions.norm(dim=1, keepdim=True)
    n, m = len(x), len(y)
    cells = torch.arange(n * m)  # of [0, 1], in each of which both quantile functions are constant
    gaps = (directions @ x.T).sort().values[:, cells // m] - (directions @ y.T).sort().values[:, cells // n]
    return gaps.abs().pow(order).mean().item() ** (1 / order)


@pytest.mark.parametrize(("n", "m"), [(5, 5), (4, 7), (6, 9), (8, 2), (1, 3), (1, 1)])
@pytest.mark.parametrize("order", [1, 2, 3.5])
def test_it_is_the_integral_over_quantiles(n, m, order):
    x, y = torch.randn(n, 3, dtype=torch.float64), 2 * torch.randn(m, 3, dtype=torch.float64) + 1
    found = sliced_wasserstein(x, y, 20, seeded(3), order=order)
    assert isinstance(found, float) and found == pytest.approx(by_definition(x, y, 20, 3, order), rel=1e-12)
    assert found == pytest.approx(sliced_wasserstein(y, x, 20, seeded(3), order=order), rel=1e-12)


def test_a_shift_costs_its_length_seen_along_a_direction():
    """E (θᵀv)² = ‖v‖² / D for any set, whatever its shape."""
    x, v = torch.randn(50, 6, dtype=torch.float64), torch.tensor([3.0, 0, 0, 4.0, 0, 0], dtype=torch.float64)
    assert sliced_wasserstein(x, x + v, 20_000, seeded()) == pytest.approx(5 / math.sqrt(6), rel=0.01)
    mean = 5 * math.gamma(3) / (math.sqrt(math.pi) * math.gamma(3.5))
    assert sliced_wasserstein(x, x + v, 20_000, seeded(), order=1) == pytest.approx(mean, rel=0.01)


def test_on_a_line_there_is_one_direction():
    x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    assert sliced_wasserstein(x, x.flip(0) + 0.5, 1) == 0.5
    assert sliced_wasserstein(x, torch.tensor([[1.0], [2.0]]), 3, order=1) == pytest.approx(0.5)  # 1 0 0 1 of four
    assert sliced_wasserstein(x, 2 * x, 1) == pytest.approx(math.sqrt((0 + 1 + 4 + 9) / 4))


def test_scaled_gaussians():
    """Each projection of N(0, σ²I) is N(0, σ²), and two of these are |σ − τ| apart."""
    x = torch.randn(20_000, 4, generator=seeded(1))
    y = 3 * torch.randn(15_000, 4, generator=seeded(2))
    assert sliced_wasserstein(x, y, 64, seeded()) == pytest.approx(2, rel=0.02)


def test_equal_sets_are_nothing_apart_and_real_halves_little():
    x = torch.randn(50, 1, 3, 4)
    assert sliced_wasserstein(x, x[torch.randperm(50)], 30) == pytest.approx(0, abs=1e-14)
    assert sliced_wasserstein(x, x.repeat(3, 1, 1, 1), 30) == pytest.approx(0, abs=1e-14), "as many copies of each"
    digits = pytest.importorskip("sklearn.datasets").load_digits().images
    a, b = torch.from_numpy(digits / 16)[torch.randperm(1796, generator=seeded())].flatten(1).split(898)
    assert sliced_wasserstein(a, b, 100, seeded()) < 0.1 * sliced_wasserstein(a, torch.rand_like(b), 100, seeded())


def test_blocks_change_nothing(monkeypatch):
    x, y = torch.randn(30, 2, 3), torch.randn(17, 2, 3)
    whole = sliced_wasserstein(x, y, 50, seeded())
    monkeypatch.setattr(importlib.import_module("genkernels.metrics.sliced_wasserstein"), "MOST_VALUES", 40)
    assert sliced_wasserstein(x, y, 50, seeded()) == pytest.approx(whole, rel=1e-13)


def test_dtypes_layouts_and_generators():
    x, y = torch.randn(20, 4).bfloat16(), torch.randn(20, 4).bfloat16()
    expected = sliced_wasserstein(x.double(), y.double(), 30, seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sliced_wasserstein(x, y, 30, seeded()) == expected
    wide = torch.stack([y, -y], dim=-1)[..., 0]
    assert sliced_wasserstein(x, wide, 30, seeded()) == pytest.approx(expected, rel=1e-13)
    assert sliced_wasserstein(x, y, 30, seeded(1)) != expected
    scans = torch.randint(0, 17, (9, 1, 2, 2), dtype=torch.uint8)
    assert sliced_wasserstein(scans, scans + 1, 9, seeded()) > 0
    asked = torch.randn(5, 2, requires_grad=True)
    assert isinstance(sliced_wasserstein(asked, asked * 2, 3), float)


@pytest.mark.parametrize("value", [NAN, math.inf])
def test_what_is_not_finite_gives_nan(value):
    x, y = torch.randn(6, 3), torch.randn(6, 3)
    x[2, 1] = value
    assert math.isnan(sliced_wasserstein(x, y, 10))


@pytest.mark.parametrize("scale", [1e-200, 1e200])
@pytest.mark.parametrize("order", [2, 400])
def test_powers_of_gaps_neither_vanish_nor_overflow(monkeypatch, scale, order):
    x, y = torch.randn(30, 2, dtype=torch.float64), torch.randn(17, 2, dtype=torch.float64) + 1
    by_scale = [sliced_wasserstein(s * x, s * y, 50, seeded(), order=order) / s for s in (1.0, scale)]
    assert by_scale[1] == pytest.approx(by_scale[0], rel=1e-12) and 0.5 < by_scale[0] < 9
    monkeypatch.setattr(importlib.import_module("genkernels.metrics.sliced_wasserstein"), "MOST_VALUES", 40)
    blocks = sliced_wasserstein(scale * x, scale * y, 50, seeded(), order=order) / scale
    assert blocks == pytest.approx(by_scale[0], rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((torch.zeros(0, 2), torch.zeros(3, 2)), {}, ValueError, r"x must be \[N, ...\] of at least 1 examples"),
        ((torch.zeros(3), torch.zeros(3)), {}, ValueError, r"x must be \[N, ...\].*got \[3\]"),
        ((torch.zeros(3, 0), torch.zeros(3, 0)), {}, ValueError, r"got \[3, 0\]"),
        ((torch.zeros(3, 2), torch.zeros(3, 1, 2)), {}, ValueError, r"of one shape, got \[2\] and \[1, 2\]"),
        ((torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.uint8)), {}, TypeError, "on one scale, got .*uint8"),
        ((torch.zeros(3, 2), [[0.0, 1.0]]), {}, TypeError, "y must be a torch.Tensor, got list"),
        ((torch.zeros(3, 2), torch.zeros(3, 2)), {"projections": 0}, ValueError, "projections must be an integer"),
        ((torch.zeros(3, 2), torch.zeros(3, 2)), {"order": 0.5}, ValueError, "order must be a number of at least 1"),
        ((torch.zeros(3, 2), torch.zeros(3, 2)), {"order": NAN}, ValueError, "order must be a number of at least 1"),
    ],
)
def test_refusals(arguments, options, error, words):
    with pytest.raises(error, match=f"^sliced_wasserstein: .*{words}"):
        sliced_wasserstein(*arguments, **options)
