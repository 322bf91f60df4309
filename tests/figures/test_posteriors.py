"""`genkernels figure posteriors`: what flows and weighted draws gain where the true posterior is curved."""

import numpy as np
import pytest
import torch

from genkernels._seeds import fixed_seed
from genkernels.cli import main
from genkernels.figures import posteriors as figure


@pytest.fixture(scope="module")
def fits():
    steps = {"Gaussian": 1000, "radial": 400}
    with fixed_seed(0):
        return {name: figure.fitted(name, steps.get(name, 250)) for name in figure.FITTED}


def test_the_likelihood_by_quadrature_is_that_by_draws():
    grid, density, log_evidence = figure.truth()
    cell = (grid[1] - grid[0]).item() ** 2
    assert density.sum().item() * cell == pytest.approx(1, abs=1e-6)
    weights = figure.log_likelihood(torch.randn(1_000_000, 2, dtype=torch.float64)).exp()
    error = weights.std() / 1000 / weights.mean()
    assert abs(weights.mean().log() - log_evidence) < 4 * error < 0.02


def test_flows_and_weighted_draws_close_the_gap_that_a_gaussian_leaves(fits):
    left = fits["Gaussian"].gap
    assert left > 0.9
    assert fits["radial"].gap < left - 0.05
    for name in ("planar", "IAF", "IWAE, k = 50"):
        assert fits[name].gap < left / 2, name
    assert all(fit.gap > -4 * fit.error and fit.draws.shape[1] == 2 for fit in fits.values())


def test_it_is_drawn_and_refuses_in_one_sentence(tmp_path, capsys, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert main(["figure", "posteriors", "--steps", "2"]) == 0
    page = np.asarray(image.open("posteriors.png"))
    assert page.shape[1] > 2 * page.shape[0], "five panels side by side"
    capsys.readouterr()
    assert main(["figure", "posteriors", "--steps", "0", "--out", "a.png"]) == 2
    err = capsys.readouterr().err
    assert "--steps must be from 1 to 100,000, got 0" in err and err.count("\n") == 1
