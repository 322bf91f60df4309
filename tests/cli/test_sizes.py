"""Sizes that fit: a user's own pictures get a model that this machine can train, whatever their form; the large ones
only by name."""

import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from genkernels import models
from genkernels._config import TrainConfig
from genkernels._words import UsageError
from genkernels.cli import forecast, main
from genkernels.cli.build import candidates, fitted
from genkernels.data import Form

ANY = {"preset": None, "settings": [], "reversible": False, "classes": False}


def data_of(shape, examples, name="folder:pics"):
    form = Form(shape, 256 if len(shape) == 3 else None, 10)
    return SimpleNamespace(name=name, form=form, train=range(examples), notes=(), untrained=())


def test_every_model_of_images_has_a_size_for_them():
    """28x28 takes other scales and strides than the presets have. Built without storage, which takes no time."""
    for shape, examples in (((1, 28, 28), 5000), ((3, 24, 16), 180)):
        for name, kind in models.MODELS.items():
            if "images" in kind.takes and kind.domains == 1:
                with torch.device("meta"):
                    model, preset, words = fitted(kind, name, data_of(shape, examples), **ANY)
                assert tuple(model.shape) == shape and preset in ("digits", "photos32", "photos64"), name
                assert f"at the preset {preset}, which fits {'x'.join(map(str, shape))} and {examples:,} exam" in words
                assert 1e3 < sum(p.numel() for p in model.parameters()) < 3e7, name


def test_the_choice_follows_resolution_and_examples():
    glow = models.Glow
    for shape, examples, chosen in (
        ((3, 32, 32), 50_000, "photos32"),
        ((3, 64, 64), 50_000, "photos32"),
        ((3, 64, 64), 300, "digits"),
        ((1, 8, 8), 50_000, "digits"),
        ((2,), 10, "points"),
    ):
        assert candidates(glow, data_of(shape, examples), None)[0] == chosen
    assert candidates(glow, data_of((3, 32, 32), 100), "cifar10") == ["cifar10"], "by name"
    assert candidates(models.PixelVAE, data_of((3, 64, 64), 50_000), None)[0] == "photos64"
    wide, _, words = fitted(glow, "glow", data_of((3, 20, 20), 5000), **ANY)
    assert wide.hparams["scales"] == 2 and "(by name: --preset digits or cifar10)" in words
    with pytest.raises(UsageError, match="multiples of 8 for scales=3"):
        fitted(glow, "glow", data_of((3, 20, 20), 5000), **{**ANY, "settings": ["scales=3"]})
    words = r"--data 'folder:pics\?size=16' scales and crops the pictures"
    with pytest.raises(UsageError, match=f"multiples of 8 for scales=3, got 15x15; {words}"):
        fitted(glow, "glow", data_of((3, 15, 15), 5000), **ANY)


def test_a_folder_of_small_pictures_improves_by_the_defaults(tmp_path, monkeypatch, capsys):
    pytest.importorskip("lightning")
    Image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pics").mkdir()
    rng = np.random.default_rng(0)
    for i in range(60):
        ramp = np.linspace(rng.integers(80), 255 - rng.integers(80), 24)[:, None, None]
        Image.fromarray((ramp + rng.integers(0, 20, (24, 16, 3))).clip(0, 255).astype(np.uint8)).save(f"pics/{i}.png")
    small = ["--max-steps", "24", "--batch-size", "8", "--samples", "4", "--accelerator", "cpu", "--warmup", "4"]
    assert main(["train", "glow", "--data", "folder:pics", *small]) == 0
    err = capsys.readouterr().err
    first = err.splitlines()[0]
    assert first.startswith("genkernels: Glow at the preset digits, which fits 3x24x16 and 5"), first
    assert re.search(r"149,456 parameters, about \d+:\d\d for 24 steps of 8$", first)
    held = [
        float(line.split("held out ")[1].split()[0])
        for line in err.splitlines()
        if "): held out" in line or ": held out " in line
    ]
    assert held[-1] < held[0] - 0.2, held


def test_what_is_told_first_includes_evaluations_and_sheets(monkeypatch):
    bundle = SimpleNamespace(train=range(1000), test=list(zip(torch.zeros(80, 1, 4, 4), range(80), strict=True)))
    config = TrainConfig(max_steps=200, eval_every=20, sample_every=50, eval_examples=40, batch_size=16, samples=9)
    for name, seconds in (("step", 0.01), ("evaluation", 0.5), ("sheet", 3.0)):
        monkeypatch.setattr(forecast, f"{name}_seconds", lambda *_, seconds=seconds: seconds)
    model = torch.nn.Identity()
    assert forecast.run_seconds(model, bundle, config) == pytest.approx(200 * 0.01 + (10 + 2) * 0.5 + 4 * 3)
    monkeypatch.undo()

    class Slow(torch.nn.Module):
        has_prior, num_classes, samples_by_class, shape = True, None, False, (1, 4, 4)

        def evaluate(self, batches):
            time.sleep(0.05)
            return {"x": sum(len(x) for x, _ in batches)}

    class ByRow(Slow):
        def sample(self, n, temperature=1.0, generator=None, progress=None):
            for row in range(50):
                time.sleep(0.1)
                progress(row + 1, 50)

    class AtOnce(Slow):
        def sample(self, n, temperature, generator):
            time.sleep(0.01 * n)
            return torch.zeros(n, 1)

    assert forecast.evaluation_seconds(Slow(), bundle, config) == pytest.approx(3 * 0.05, rel=0.4), "40 by 16"
    assert forecast.sheet_seconds(ByRow(), config) == pytest.approx(50 * 0.1, rel=0.4)
    assert forecast.sheet_seconds(AtOnce(), config.changed(samples=40)) == pytest.approx(40 * 0.01, rel=0.4)


def test_another_run_with_single_flags_changed(tmp_path, monkeypatch, capsys):
    pytest.importorskip("lightning")
    import json

    monkeypatch.chdir(tmp_path)
    few = ["--max-steps", "2", "--samples", "4", "--accelerator", "cpu", "--quiet"]
    sizes = ["--set", "hidden=8", "--set", "couplings=2"]
    assert main(["train", "nice", "--data", "digits", *sizes, *few, "--lr", "0.002", "--class-conditional"]) == 0
    assert main(["train", "--like", "runs/nice-digits", "--out", "again", "--quiet"]) == 0
    assert (
        main(["train", "--like", "runs/nice-digits", "--out", "b", "--seed", "1", "--set", "hidden=9", "--quiet"]) == 0
    )
    assert main(["train", "realnvp", "--like", "runs/nice-digits", "--out", "c", "--data", "moons", "--quiet"]) == 0
    read = {
        run: json.loads((tmp_path / run / "config.json").read_text()) for run in ("runs/nice-digits", "again", "b", "c")
    }
    first, again, other, moons = read.values()
    assert (
        again == first
        and (tmp_path / "again/best.ckpt").read_bytes() == (tmp_path / "runs/nice-digits/best.ckpt").read_bytes()
    ), "the same run"
    assert other["train"] == first["train"] | {"seed": 1} and other["model"]["hparams"] == first["model"]["hparams"] | {
        "hidden": 9
    }
    assert moons["model"]["name"] == "realnvp" and moons["train"] == first["train"], "settings, but not sizes"
    (tmp_path / "mine.json").write_text('{"model": {"name": "nice"}, "train": {"max_steps": 1, "lr": 0.5}}')
    assert (
        main(["train", "--config", "mine.json", "--data", "digits", *sizes, "--out", "d", "--lr", "0.1", "--quiet"])
        == 0
    )
    mine = json.loads((tmp_path / "d/config.json").read_text())["train"]
    assert mine["max_steps"] == 1 and mine["lr"] == 0.1
    capsys.readouterr()
    (tmp_path / "mine.json").write_text('{"train": {"max_steps": 1, "lrr": 0.5}}')
    assert main(["train", "nice", "--config", "mine.json", "--data", "digits", "--out", "e"]) == 2
    assert "unknown training setting 'lrr'; did you mean lr?" in capsys.readouterr().err
