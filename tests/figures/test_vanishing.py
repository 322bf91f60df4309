"""`genkernels figure vanishing`: the saturating loss's gradient goes with the discriminator's certainty, the others'
stay."""

import numpy as np
import pytest

from genkernels._seeds import fixed_seed
from genkernels.cli import main
from genkernels.figures import vanishing as figure


@pytest.fixture(scope="module")
def found():
    with fixed_seed(0):
        return figure.measured(150, 0)


def test_what_is_measured_when(found):
    at, gradients, gaps = found
    assert at[0] == 1 and at[-1] == 150 and at == sorted(set(at))
    assert list(gradients) == ["saturating", "non-saturating", "Wasserstein"] and list(gaps) == [
        "discriminator",
        "critic",
    ]
    assert all(len(values) == len(at) and np.isfinite(values).all() for values in (*gradients.values(), *gaps.values()))


def test_the_saturating_gradient_vanishes_and_the_others_do_not(found):
    at, gradients, gaps = found
    largest = {name: max(values) for name, values in gradients.items()}
    assert gradients["saturating"][-1] < 0.05 * largest["saturating"]
    assert gradients["non-saturating"][-1] > 0.2 * largest["non-saturating"]
    assert gradients["Wasserstein"][-1] > 0.2 * largest["Wasserstein"]
    assert gaps["discriminator"][-1] > 5 > gaps["discriminator"][0]


def test_at_the_start_both_logistic_gradients_are_those_of_a_coin(found):
    """At D ≈ 0 the weights σ(D) and 1 − σ(D) are one half each."""
    _, gradients, _ = found
    assert gradients["saturating"][0] == pytest.approx(gradients["non-saturating"][0], rel=0.3)


def test_it_is_drawn_and_refuses_in_one_sentence(tmp_path, capsys, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert main(["figure", "vanishing", "--steps", "3"]) == 0
    page = np.asarray(image.open("vanishing.png"))
    assert page.shape[1] > 1.4 * page.shape[0], "two panels side by side"
    capsys.readouterr()
    for argv, words in (
        (["--steps", "0"], "--steps must be from 1 to 100,000, got 0"),
        (["--step", "4"], "unknown argument '--step'; did you mean --steps or --seed?"),
        (["--seed", "9" * 30], "--seed must be an integer of 64 bits"),
    ):
        assert main(["figure", "vanishing", *argv, "--out", "a.png"]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["vanishing.png"]
