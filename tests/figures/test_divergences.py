"""`genkernels figure divergences`: each bound is one, and trained critics come near what is exact."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from genkernels._seeds import fixed_seed
from genkernels.cli import main
from genkernels.figures import divergences as figure

KL, JS, W = figure.divergences().values()


class Scores(nn.Module):
    """A critic of the first coordinate alone, ``factor · (½ − x₁)``, with the middle between lines at 0 and 1."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * (0.5 - x[:, :1])


@pytest.fixture(scope="module")
def lines():
    height = (torch.arange(50, dtype=torch.float64) + 0.5) / 50
    return figure.line(0.0, height), figure.line(1.0, height)


@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0])
def test_bounds_of_a_known_critic(lines, factor):
    assert KL.bound(Scores(factor), *lines).item() == pytest.approx(factor)
    logistic = math.log(2) - math.log1p(math.exp(-factor / 2))
    assert JS.bound(Scores(factor), *lines).item() == pytest.approx(logistic)
    assert W.bound(Scores(factor), *lines).item() == pytest.approx(1), "whatever its slope"
    assert KL.loss(Scores(factor), *lines).item() == pytest.approx(-factor)
    assert W.loss(Scores(factor), *lines).item() == pytest.approx(-factor + 10 * (factor - 1) ** 2, rel=1e-5)


def test_a_bound_is_not_above_what_is_exact(lines):
    torch.manual_seed(1)
    for _ in range(5):
        critic = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        for p in critic.parameters():
            p.data *= 5
        assert JS.bound(critic, *lines) <= math.log(2)
        assert W.bound(critic, *lines) <= 1 + 1e-9
        for divergence in (KL, JS, W):
            assert divergence.bound(critic, lines[0], lines[0]) <= 1e-9, "of a line and itself"


def test_exact_values():
    for divergence, far in ((KL, math.inf), (JS, math.log(2)), (W, 0.6)):
        assert divergence.exact(-0.6) == divergence.exact(0.6) == far and divergence.exact(0.0) == 0


def test_trained_critics_come_near(monkeypatch):
    monkeypatch.setattr(figure, "WIDTH", 32)
    monkeypatch.setattr(figure, "LEARNING_RATE", 1e-2)
    with fixed_seed(0):
        first, last = figure.estimates(JS, 0.5, [5, 150])
        assert first < last and last == pytest.approx(math.log(2), abs=0.05)
        assert figure.estimates(W, 0.5, [150])[0] == pytest.approx(0.5, abs=0.05)
        values = figure.estimates(KL, 0.5, [20, 60, 150])
        assert values[2] > 2 * values[1] > 4 * values[0] > 0, "without end"


def test_it_is_drawn_and_refuses_in_one_sentence(tmp_path, capsys, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert main(["figure", "divergences", "--steps", "2", "1", "--seed", "3"]) == 0
    page = np.asarray(image.open("divergences.png"))
    assert page.shape[1] > 2 * page.shape[0]
    capsys.readouterr()
    for argv, words in (
        (["--steps", "0"], "--steps must be from 1 to 10,000, got 0"),
        (["--steps", "5", "20000"], "--steps must be from 1 to 10,000, got 5 20000"),
        (["--seed", "9" * 30], "--seed must be an integer of 64 bits"),
    ):
        assert main(["figure", "divergences", *argv, "--out", "a.png"]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["divergences.png"]
