"""`genkernels figure snr` and `figure bounds`: what they draw is what the theory says."""

import math

import pytest

from genkernels.cli import main
from genkernels.figures import bounds, snr

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")


def test_ratios_follow_the_powers_of_k(monkeypatch, tmp_path):
    monkeypatch.setattr(snr, "DRAWS", (16, 64, 256))
    series = snr.measured(2000, seed=0)
    for panel, name, power in ((snr.ENCODER, "DReG", 0.5), (snr.ENCODER, "IWAE", -0.5), (snr.DECODER, "IWAE", 0.5)):
        _, y = series[panel][name]
        assert abs(math.log(y[-1] / y[0]) / math.log(16) - power) < 0.1, (panel, name, y)
    assert main(["figure", "snr", "--rows", "100", "--out", str(tmp_path / "s.png")]) == 0
    assert Image.open(tmp_path / "s.png").size[0] > 600


def test_bounds_rise_with_k(monkeypatch, tmp_path, capsys):
    pytest.importorskip("lightning")
    monkeypatch.setattr(bounds, "MODELS", {"VAE": 1, "IWAE, k = 5": 5})
    monkeypatch.setattr(bounds, "DRAWS", (1, 10, 100))
    monkeypatch.setattr(bounds, "EXAMPLES", 60)
    found = []
    measured = bounds.measured
    monkeypatch.setattr(bounds, "measured", lambda *arguments: found.append(measured(*arguments)) or found[-1])
    assert main(["figure", "bounds", "--steps", "10", "--out", str(tmp_path / "b.png")]) == 0
    assert all(first < second < third < 0 for first, second, third in found)
    assert capsys.readouterr().err.count("\n") == 2 and Image.open(tmp_path / "b.png").size[0] > 300


@pytest.mark.parametrize(
    "line,words",
    [
        ("figure snr --rows 5", "--rows must be from 100 to 100,000, got 5"),
        ("figure bounds --steps 0", "--steps must be from 1 to 1,000,000, got 0"),
        ("figure snr --seed 99999999999999999999", "--seed must be an integer of 64 bits"),
    ],
)
def test_mistakes_are_one_sentence(line, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())
