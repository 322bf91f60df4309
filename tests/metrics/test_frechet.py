"""The Fréchet distance against closed forms for Gaussians, singular ones among them, and against scipy."""

import math
import warnings

import pytest
import torch

from genkernels.metrics import frechet_distance

F64 = torch.float64


def whitened(n, d):
    """Points with mean 0 and covariance I, but for rounding."""
    x = torch.randn(n, d, dtype=F64)
    x = x - x.mean(0)
    return torch.linalg.qr(x).Q * math.sqrt(n - 1)


def test_a_shift_costs_its_square():
    x = torch.randn(60, 5, dtype=F64)
    assert frechet_distance(x, x + torch.tensor([1.0, 2, 0, 0, 2])) == pytest.approx(9, rel=1e-12)


def test_scales_along_axes():
    """Σ (σ − τ)² where the covariances commute."""
    sigma, tau = torch.tensor([1.0, 2, 3], dtype=F64), torch.tensor([4.0, 0.5, 3], dtype=F64)
    x, y = whitened(50, 3) * sigma, whitened(41, 3) * tau
    assert frechet_distance(x, y) == pytest.approx((sigma - tau).square().sum().item(), rel=1e-10)


def test_any_covariances_against_a_matrix_root():
    linalg = pytest.importorskip("scipy.linalg")
    x, y = (torch.randn(n, 7, dtype=F64) @ torch.randn(7, 7, dtype=F64) for n in (30, 40))
    cx, cy = x.T.cov(), y.T.cov()
    root = torch.from_numpy(linalg.sqrtm((cx @ cy).numpy()).real)
    expected = (x.mean(0) - y.mean(0)).square().sum() + (cx + cy - 2 * root).trace()
    assert frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-10)
    assert frechet_distance(y, x) == pytest.approx(expected.item(), rel=1e-10)


def test_singular_covariances():
    """A segment along one axis and one along another have nothing in common; along the same, their lengths count."""
    line = whitened(9, 1)
    x, y = (torch.cat([part, part], 1) for part in (line, torch.zeros_like(line)))
    x[:, 1] = 0  # along the first axis
    other = x.flip(1)
    assert frechet_distance(x, other) == pytest.approx(2, rel=1e-12)
    assert frechet_distance(x, 3 * x) == pytest.approx(4, rel=1e-12)
    assert frechet_distance(x, y) == pytest.approx(1, rel=1e-12), "against one point"
    assert frechet_distance(y, y) == 0


@pytest.mark.parametrize("rank", [2, 20, 64])
def test_a_set_against_itself_is_0_to_rounding(rank):
    x = torch.randn(500, rank) @ torch.randn(rank, 64) + 100
    found = frechet_distance(x, x[torch.randperm(500)])
    assert 0 <= found < 1e-12 * x.double().var(0).sum().item()


def test_two_sets_of_one_distribution_are_as_far_apart_as_is_said():
    """On average D (1/N + 1/M) by the means, and (D + 1) / 4 times as much by the covariances."""
    draws = torch.randn(40, 4000, 8)
    found = [frechet_distance(x[:1000], x[1000:]) for x in draws]
    assert sum(found) / 40 == pytest.approx(8 * 13 / 4 * (1 / 1000 + 1 / 3000), rel=0.1)


def test_images_through_a_feature_function_in_batches():
    seen = []

    def features(x):
        seen.append(len(x))
        return x.float().flatten(2).mean(2)

    x, y = torch.randint(0, 17, (11, 2, 3, 3), dtype=torch.uint8), torch.randint(0, 9, (7, 2, 3, 3), dtype=torch.uint8)
    found = frechet_distance(x, y, features, batch_size=4)
    assert seen == [4, 4, 3, 4, 3]
    assert found == frechet_distance(x.float().flatten(2).mean(2), y.float().flatten(2).mean(2))
    asked = torch.randn(9, 2, requires_grad=True)
    assert isinstance(frechet_distance(asked, asked, lambda x: x * 2), float)


def test_few_examples_are_told_and_their_number_only():
    with pytest.warns(
        UserWarning, match="more than 5 examples for as many features, got 5: their covariance is"
    ) as told:
        frechet_distance(torch.randn(5, 5), torch.randn(9, 5))
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(torch.randn(6, 5), torch.randn(9, 5))


def test_half_types_and_strides():
    x, y = torch.randn(30, 4).bfloat16(), torch.randn(30, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = frechet_distance(x, y)
    assert found == frechet_distance(x.double(), y.double())
    assert found == pytest.approx(frechet_distance(x.T.contiguous().T, torch.stack([y, y], -1)[..., 0]), rel=1e-10)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_gives_nan(value):
    x = torch.randn(9, 2)
    x[3, 0] = value
    assert math.isnan(frechet_distance(torch.randn(9, 2), x))


@pytest.mark.parametrize(
    ("x", "y", "options", "error", "words"),
    [
        (torch.zeros(1, 2), torch.zeros(9, 2), {}, ValueError, r"x must be .* at least 2 examples, got \[1, 2\]"),
        (torch.zeros(9, 2), torch.zeros(9, 3), {}, ValueError, "x and y must hold examples of one shape"),
        (torch.zeros(9, 2), torch.zeros(9, 2).long(), {}, TypeError, "x and y must be on one scale"),
        (torch.zeros(9, 2), torch.zeros(9, 2).byte(), {"features": abs}, TypeError, "x and y must be on one scale"),
        (torch.zeros(9, 2), torch.zeros(9, 2), {"features": abs, "batch_size": 0}, ValueError, "batch_size must be"),
        (torch.zeros(9, 2), torch.zeros(9, 2), {"features": lambda x: x.sum(1)}, ValueError, r"features must .*\[9\]$"),
        (torch.zeros(9, 2), torch.zeros(9, 2), {"features": lambda x: x[:2]}, ValueError, "features must give a row"),
        (torch.zeros(9, 2), torch.zeros(9, 2), {"features": len}, TypeError, "what features gives must be a torch.Ten"),
        (torch.zeros(9, 2), torch.zeros(9, 2), {"features": "vgg"}, TypeError, "features must be a function .*got str"),
    ],
)
def test_refusals(x, y, options, error, words):
    with pytest.raises(error, match=f"^frechet_distance: {words}"):
        frechet_distance(x, y, **options)
