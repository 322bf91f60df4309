import math

import pytest
import torch

from genkernels.data import load
from genkernels.data.points import SETS

NAMES = list(SETS)


@pytest.mark.parametrize("name", NAMES)
def test_moments(name):
    """E x = 0 and E‖x‖² = 2, within 5 standard errors of this sample."""
    x = torch.cat([load(name).train.tensors[0], load(name).test.tensors[0]]).double()
    assert ((x.mean(0) / x.std(0)).abs() * len(x) ** 0.5 < 5).all()
    square = x.square().sum(1)
    assert abs(square.mean() - 2.0) < 5 * square.std() / len(x) ** 0.5
    assert x.std(0).min() > 0.6 and x.abs().max() < 4


@pytest.mark.parametrize("name", NAMES)
def test_seeds_and_parts_are_independent_draws(name):
    a, b, c = load(name, seed=3), load(name, seed=3), load(name, seed=4)
    assert (len(a.train), len(a.test)) == (20_000, 5_000)
    for split in ("train", "test"):
        xa, xb, xc = (getattr(bundle, split).tensors[0] for bundle in (a, b, c))
        assert torch.equal(xa, xb) and (xa == xc).all(1).sum() == 0
        assert torch.equal(getattr(a, split).tensors[1], getattr(b, split).tensors[1])
    points = [{tuple(row) for row in part.tensors[0].tolist()} for part in (a.train, a.test, c.train, c.test)]
    assert all(points[i].isdisjoint(points[j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize("name", NAMES)
def test_global_generator_is_left_alone(name):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    load(name)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", [name for name in NAMES if SETS[name][1]])
def test_labels_are_balanced(name):
    bundle = load(name)
    share = bundle.train.tensors[1].bincount(minlength=bundle.form.num_classes) / len(bundle.train)
    want = 1 / bundle.form.num_classes
    assert len(share) == bundle.form.num_classes
    assert (share - want).abs().max() < 5 * (want / len(bundle.train)) ** 0.5


def normal_residual(residual, noise):
    """The residuals (n, d) are Gaussian of the given deviation: check mean, deviation and tail."""
    n = len(residual)
    assert (residual.mean(0).abs() < 5 * noise / n**0.5).all()
    assert (residual.std(0) / noise - 1).abs().max() < 5 / (2 * n) ** 0.5
    assert residual.abs().max() < 6 * noise


def test_eight_gaussians():
    x, y = load("eight_gaussians").train.tensors
    scale = math.sqrt(2 / (1 + 2 / 64))
    centre = scale * torch.stack([(y * math.pi / 4).cos(), (y * math.pi / 4).sin()], 1)
    normal_residual(x - centre, scale / 8)


def test_checkerboard_is_uniform_on_the_dark_squares():
    x = load("checkerboard").train.tensors[0].double()
    cell = ((x / math.sqrt(3) + 1) * 2).floor().long().clamp(0, 3)
    assert ((cell.sum(1) % 2) == 0).all()
    counts = (4 * cell[:, 0] + cell[:, 1]).bincount(minlength=16)
    assert (counts > 0).sum() == 8
    want = len(x) / 8
    assert (counts[counts > 0] - want).abs().max() < 5 * want**0.5
    inside = (x / math.sqrt(3) + 1) * 2 - cell
    assert (inside.mean(0) - 0.5).abs().max() < 5 * (1 / 12 / len(x)) ** 0.5


def test_rings():
    x, y = load("rings").train.tensors
    scale = math.sqrt(2 / (15 / 32 + 2 * 0.03**2))
    for ring in range(4):
        radius = x[y == ring].double().norm(dim=1) / scale
        mean = (ring + 1) / 4
        # The radius of a ring with isotropic noise σ has mean r + σ²/2r + O(σ⁴), deviation σ.
        assert abs(radius.mean() - (mean + 0.03**2 / (2 * mean))) < 5 * 0.03 / len(radius) ** 0.5 + 1e-5
        assert abs(radius.std() / 0.03 - 1) < 0.05
        angle = torch.atan2(x[y == ring][:, 1], x[y == ring][:, 0])
        assert abs(torch.polar(torch.ones_like(angle), angle).mean()) < 5 / len(radius) ** 0.5


def test_moons_lie_on_their_half_circles():
    x, y = load("moons").train.tensors
    x = x.double() / math.sqrt(2 / (1.3125 - 1 / math.pi + 2 * 0.08**2))
    # The lower moon is the upper one, turned half a turn around the origin.
    upper = torch.where(y[:, None] == 0, x, -x) + torch.tensor([0.5, 0.25])
    radius, angle = upper.norm(dim=1), torch.atan2(upper[:, 1], upper[:, 0])
    assert abs(radius.mean() - (1 + 0.08**2 / 2)) < 5 * 0.08 / len(x) ** 0.5 + 1e-4
    assert abs(radius.std() / 0.08 - 1) < 0.03
    assert (upper[:, 1] > -5 * 0.08).all() and abs(angle.median() - math.pi / 2) < 0.05


def test_spirals_lie_on_their_arms():
    x, y = load("spirals").train.tensors
    x = x.double() / math.sqrt(2 / (0.5 + 2 * 0.02**2))
    angle = torch.linspace(0, 3 * math.pi, 4000, dtype=torch.float64)
    arm = (angle / (3 * math.pi))[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    for label, sign in ((0, 1.0), (1, -1.0)):
        own = torch.cdist(x[y == label][:2000], sign * arm).min(1).values
        other = torch.cdist(x[y == label][:2000], -sign * arm).min(1).values
        assert own.max() < 6 * 0.02
        assert (own < other).double().mean() > 0.97  # the arms meet at the origin only
        radius = x[y == label].norm(dim=1)
        # r² is uniform on [0, 1], with the noise's 2σ² on top.
        assert abs(radius.square().mean() - 0.5 - 2 * 0.02**2) < 5 * (1 / 12 / len(radius)) ** 0.5
