"""`genkernels figure energies`: the energies of the paper, and flows that come nearer to them."""

import math

import numpy as np
import pytest
import torch

from genkernels._seeds import fixed_seed
from genkernels.cli import main
from genkernels.figures import energies as figure


def at(*point):
    """The four energies at one point."""
    return figure.energies(torch.tensor(point, dtype=torch.float64).expand(4, 2)).tolist()


def test_energies_of_the_paper_at_points_that_tell_them_apart():
    tail = math.log1p(math.exp(-0.5 * (4 / 0.6) ** 2))
    assert at(2.0, 0.0)[0] == pytest.approx(-tail)
    assert at(-2.0, 0.0)[0] == pytest.approx(-tail)
    assert at(0.0, 2.0)[0] == pytest.approx(0.5 * (2 / 0.6) ** 2 - math.log(2))
    assert at(1.0, 1.0)[1] == 0 and at(1.0, 1.4)[1] == pytest.approx(0.5)
    assert at(1.0, 1.0)[2] == pytest.approx(0, abs=1e-12) and at(1.0, -2.0)[2] == pytest.approx(0, abs=1e-12)
    assert at(-1.0, -0.65)[2] == pytest.approx(
        0.5 - math.log1p(math.exp(0.5 - 0.5 * ((0.35 + 3 * math.exp(-50 / 9)) / 0.35) ** 2))
    )
    assert at(4.0, 0.0)[3] == pytest.approx(0, abs=1e-12)
    assert at(4.0, -3 / (1 + math.exp(-10)))[3] == pytest.approx(0, abs=1e-12)
    assert [a - b for a, b in zip(at(8.4, 0.0), at(4.4, 0.0), strict=True)][1] == pytest.approx(0.5 * (11**2 - 1))


def test_constants_are_those_of_integrals_that_are_known():
    log_z = figure.log_constants()
    wide = 8 + 0.4 * math.sqrt(2 * math.pi)  # between the walls, and in their flanks
    assert log_z[1].item() == pytest.approx(math.log(wide * 0.4 * math.sqrt(2 * math.pi)), abs=1e-3)
    torch.testing.assert_close(log_z, figure.log_constants(9.0, 0.04), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["planar", "radial"])
def test_a_fit_comes_nearer(kind):
    log_z, found = figure.log_constants(), []
    for steps in (1, 200):
        with fixed_seed(0):
            flow = figure.fit(kind, 4, steps)
            with torch.no_grad():
                z, log_q = flow.sample(5000)
        found.append((log_q + figure.energies(z)).double().mean(1) + log_z)
    assert (found[1] > -0.02).all(), "a divergence"
    assert (found[1] < 0.6 * found[0]).all()


def test_counts_are_a_density_with_y_upwards():
    z = torch.tensor([[0.03, 0.03], [0.04, 0.02], [-3.99, 3.99], [5.0, 0.0], [float("nan"), 0.0]])
    counted = figure._counted(z)
    half = figure.SQUARES // 2
    assert counted.count_nonzero() == 2 and counted[half, half] == 2 * counted[-1, 0]
    assert counted.sum() * (2 * figure.EDGE / figure.SQUARES) ** 2 == pytest.approx(3 / 5)


def test_it_is_drawn_and_refuses_in_one_sentence(tmp_path, capsys, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figure, "SAMPLES", 500)
    assert main(["figure", "energies", "--layers", "1", "0", "--steps", "3", "--seed", "2"]) == 0
    page = np.asarray(image.open("energies.png"))
    assert page.shape[1] > 5 * 160 and page.shape[0] > 4 * 160
    capsys.readouterr()
    for argv, words in (
        (["--layers", "-1"], "--layers must be from 0 to 256, got -1"),
        (["--layers", "2", "300"], "--layers must be from 0 to 256, got 2 300"),
        (["--steps", "0"], "--steps must be from 1 to 100,000, got 0"),
        (["--seed", "9" * 30], "--seed must be an integer of 64 bits"),
    ):
        assert main(["figure", "energies", *argv, "--out", "a.png"]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["energies.png"]
