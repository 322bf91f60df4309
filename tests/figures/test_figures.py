"""`genkernels figure`: every figure there is, drawn from a run, and every mistake in one sentence."""

import importlib

import numpy as np
import pytest
import torch

from genkernels import figures, models
from genkernels._words import UsageError
from genkernels.cli import main
from genkernels.figures import temperature

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run on images and a run on points, of a few steps."""
    pytest.importorskip("lightning")
    folder = tmp_path_factory.mktemp("runs")
    tiny = ["--set", "hidden=8", "--set", "couplings=2", "--set", "layers=1", "--max-steps", "6", "--quiet"]
    for data in ("digits", "moons"):
        argv = ["train", "nice", "--data", data, "--out", str(folder / data), *tiny, "--accelerator", "cpu"]
        assert main([*argv, "--eval-every", "2", "--samples", "4"]) == 0
    return folder


@pytest.fixture
def drawn(capsys, tmp_path):
    """Draws a figure and gives its pixels."""

    def draw(name, *argv):
        out = tmp_path / f"{name}.png"
        assert main(["figure", name, *map(str, argv), "--out", str(out)]) == 0
        assert capsys.readouterr().out == f"{out}\n"
        return np.asarray(Image.open(out))

    return draw


def test_every_figure_has_its_three_parts_and_is_listed(capsys):
    assert main(["figure"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == figures.names()
    for name, line in zip(figures.names(), listed, strict=True):
        module = importlib.import_module(f"genkernels.figures.{name}")
        assert line.endswith(module.TITLE) and callable(module.draw) and callable(module.add_arguments)
        assert main(["figure", name, "--help"]) == 0
        assert "--out" in capsys.readouterr().out


def test_samples_at_several_temperatures(drawn, runs):
    page = drawn("temperature", "--run", runs / "digits", "--temperatures", 0, 1, "--n", 5)
    assert page.shape[1] > 5 * 64 and page.shape[0] > 2 * 64
    rows = page[-(2 * 132 + 4 + 7) : -7, -(5 * 132 + 4 + 7) : -7]  # lines of 4, half a letter of white around
    cold = [rows[4:132, 4 + 132 * i : 132 + 132 * i] for i in range(5)]
    hot = [rows[136:264, 4 + 132 * i : 132 + 132 * i] for i in range(5)]
    assert all((tile == cold[0]).all() for tile in cold), "at T = 0 there is one sample"
    assert not all((tile == hot[0]).all() for tile in hot)
    points = drawn("temperature", "--run", runs / "moons", "--temperatures", 0.5, 1, "--n", 50)
    assert points.ndim == 3 and points.shape[1] > points.shape[0], "a panel each, and one of the data"


def test_a_figure_draws_as_sampling_does_and_tells_what_it_passed_over(runs, tmp_path, monkeypatch, capsys):
    import shutil

    shutil.copytree(runs / "digits", tmp_path / "run")
    (tmp_path / "run" / "best.ckpt").write_bytes(b"")
    seen, sample = [], models.NICE.sample

    def watched(self, *args, **kwargs):
        seen.append((self.training, torch.is_grad_enabled(), torch.rand(()).item()))
        return sample(self, *args, **kwargs)

    monkeypatch.setattr(models.NICE, "sample", watched)
    argv = ["figure", "temperature", "--run", str(tmp_path / "run"), "--temperatures", "0.5", "1", "--n", "3"]
    assert main([*argv, "--out", str(tmp_path / "t.png")]) == 0
    assert seen[0] == seen[1] and seen[0][:2] == (False, False), "the global generator holds the same in every row, too"
    kept = tmp_path / "run" / "checkpoints" / "step-00000006.ckpt"
    assert capsys.readouterr().err.endswith(f"best.ckpt is cut short: 0 bytes are left; using {kept} instead\n")


def test_a_figure_says_what_a_temperature_means_for_its_model():
    def meaning(kind, preset, **overrides):
        torch.manual_seed(0)
        model = kind.from_preset(preset, **overrides).eval()
        for p in model.parameters():
            p.data += 0.2 * torch.randn_like(p)  # a fresh flow is the identity, whose determinant is constant
        return temperature._meaning(model)

    assert "exact, p(x)^(1/T²)" in meaning(models.NICE, "points", prior="normal")
    assert "the prior logistic" in meaning(models.NICE, "digits", prior="logistic")
    assert "heuristic" in meaning(models.NICE, "digits", prior="normal", logit=0.05)
    assert "heuristic" in meaning(models.RealNVP, "points")
    assert "exact" in meaning(models.Glow, "points", additive=True)
    assert "heuristic" in meaning(models.Glow, "digits", additive=True), "its split priors are learned"
    assert "each conditional" in meaning(models.PixelCNN, "digits")


def test_losses_of_one_run_and_of_two(drawn, runs):
    one = drawn("losses", "--run", runs / "digits")
    two = drawn("losses", "--run", runs / "digits", runs / "moons", "--smooth", 0)
    assert one.shape == two.shape and (one != two).any()
    assert (drawn("losses", "--run", runs / "digits", "--column", "grad_norm", "--log") != one).any()


def test_losses_of_players_and_of_terms(drawn, runs, tmp_path):
    import shutil

    shutil.copytree(runs / "digits", tmp_path / "gan")
    rows = ["step,generator/loss,critic/loss,lr,penalty", *(f"{i},{'' if i % 5 else 2.0},{i},0.1,3" for i in range(60))]
    (tmp_path / "gan" / "losses.csv").write_text("\n".join(rows) + "\n")
    both = drawn("losses", "--run", tmp_path / "gan")
    critic = drawn("losses", "--run", tmp_path / "gan", "--column", "critic/loss")
    terms = drawn("losses", "--run", tmp_path / "gan", "--column", "penalty", "critic/loss")
    colours = [{tuple(p) for p in picture.reshape(-1, 3).tolist()} for picture in (both, critic, terms)]
    blue, orange = (0x16, 0x67, 0xB7), (0xD1, 0x60, 0x2C)
    assert [(blue in c, orange in c) for c in colours] == [(True, True), (True, False), (True, True)]
    (tmp_path / "gan" / "losses.csv").write_text(rows[0] + "\n")
    assert main(["figure", "losses", "--run", str(tmp_path / "gan"), "--out", str(tmp_path / "x.png")]) == 2


def test_a_run_that_was_killed_is_drawn_without_its_half_row(drawn, runs, tmp_path):
    import shutil

    shutil.copytree(runs / "digits", tmp_path / "killed")
    (tmp_path / "killed" / "metrics.json").unlink()
    with open(tmp_path / "killed" / "losses.csv", "a") as file:
        file.write("6,2.")
    assert drawn("losses", "--run", tmp_path / "killed").shape == (480, 800, 3)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "figure temprature",
            "NAME must be one of bounds, divergences, energies, jacobians, losses, posteriors, snr, temperature, "
            "vanishing, got 'temprature'; did you mean temperature?",
        ),
        ("figure temperature", "--run must be given, got nothing"),
        ("figure temperature --rum x --run DIGITS", "figure temperature: unknown argument '--rum'; did you mean --run"),
        ("figure temperature --run DIGITSS", "there is no run in"),
        ("figure temperature --run DIGITS --temperatures -1", "--temperatures must be 0 or positive, got -1.0"),
        ("figure temperature --run DIGITS --n 0", "--n must be from 1 to 10,000, got 0"),
        ("figure temperature --run DIGITS --out a.jpg", "--out must end in .png, .pdf, .svg, got 'a.jpg'"),
        ("figure temperature --run DIGITS --out a.pdf", "a picture's name must end in .png, got 'a.pdf'"),
        ("figure losses --run DIGITS --column los", "must be one of loss, grad_norm, lr, seconds in"),
        ("figure losses --run DIGITS --smooth -1", "--smooth must be at least 0, got -1"),
        ("figure losses --run DIGITS NONE", "there is no run in NONE: no such folder"),
        ("figure --out a.png temperature", "figure: unknown argument '--out'"),
    ],
)
def test_mistakes_give_one_sentence(line, words, runs, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(line.replace("DIGITS", str(runs / "digits")).split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.startswith("genkernels: error: ") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [], "something was left behind"


def test_a_figure_that_does_not_exist_is_refused_by_name():
    with pytest.raises(UsageError, match="did you mean losses"):
        figures.find("loses")
