"""The lists: models, runs, data sets, and what a shell completes."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from genkernels import data, models
from genkernels._files import lock, locked
from genkernels.cli import main
from genkernels.cli.completion import words
from genkernels.cli.runs import ago
from tests.processes import Command


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def told(capsys, *argv) -> str:
    assert main(list(argv)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_every_model_tells_its_arguments_and_presets(capsys):
    listed = told(capsys, "models").splitlines()
    assert [line.split()[0] for line in listed[1:]] == list(models.MODELS)
    for name, kind in models.MODELS.items():
        text = told(capsys, "models", name)
        rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
        parameters = inspect.signature(kind).parameters.values()
        assert [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in rows] == [], name
        assert all(preset in rows for preset in kind.presets) and "`" not in text, name
    glow = told(capsys, "models", "glow")
    assert "hidden          512: width of the coupling networks\n" in glow
    assert "class_features  16: size of its embedding\n" in glow, "the second of a line"
    assert "cifar10   43,954,512  shape=(3, 32, 32), scales=3, steps=32, hidden=512" in glow
    assert main(["models", "glwo"]) == 2 and "did you mean glow?" in capsys.readouterr().err


def test_data_are_told_before_anything_is_trained(capsys):
    Image = pytest.importorskip("PIL.Image")
    assert all(name in told(capsys, "data") for name in data.NAMES)
    y = np.repeat([3, 7], [50, 30])
    np.savez("a.npz", x=np.random.default_rng(0).integers(0, 16, (80, 5, 6, 1), dtype=np.uint8), y=y, grey_levels=16)
    out = told(capsys, "data", "npz:a.npz", "--out", "a.png")
    bundle = data.load("npz:a.npz")
    assert out.startswith(f"npz:a.npz: {bundle.description}\nan example: 1x5x6, 16 grey levels\n")
    counts = [line.split() for line in out.splitlines()[3:5]]
    assert [row[0] for row in counts] == ["3", "7"] and [sum(map(int, row[1:])) for row in counts] == [50, 30]
    assert sum(int(row[2]) for row in counts) == len(bundle.test)
    assert Image.open("a.png").text["data"] == "npz:a.npz" and out.endswith("a.png: pictures of both parts\n")
    assert "points" in told(capsys, "data", "moons") and "data-moons.png" in told(capsys, "data", "moons")
    assert main(["data", "digitz"]) == 2 and "the nearest: digits" in capsys.readouterr().err
    assert main(["data", "digits", "--out", "a.jpg"]) == 2


def test_the_rules_of_own_data_stand_in_the_help_without_the_heavy_parts():
    code = "import sys; from genkernels.cli import main; main(['data', '--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "=====" not in done.stdout and "``" not in done.stdout
    for word in ("?size=S", "?layout=", "grey_levels", "x_train", "holdout", "EXIF", "Transparency", "ClassLabel"):
        assert word in done.stdout, word


def test_runs_stand_beside_each_other(capsys):
    pytest.importorskip("lightning")
    few = ["--max-steps", "2", "--samples", "4", "--accelerator", "cpu", "--quiet", "--set", "hidden=8"]
    assert main(["train", "nice", "--data", "digits", *few, "--no-tensorboard", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "tensorboard" not in out and not Path("runs/nice-digits/tensorboard").exists()
    assert main(["train", "maf", "--data", "moons", *few, "--set", "transforms=1", "--out", "runs/deep/b"]) == 0
    capsys.readouterr()
    Path("runs/deep/b/metrics.json").unlink()
    Path("runs/other").mkdir()
    Path("runs/other/config.json").write_text("{")
    head, first, second, third = told(capsys, "runs").splitlines()
    held = json.loads(Path("runs/nice-digits/metrics.json").read_text())["held_out"]["bits_per_dim"]["value"]
    assert first.split()[:5] == ["runs/deep/b", "maf", "moons", first.split()[3], "2"] and "not finished" in first
    assert second.split()[:6] == ["runs/nice-digits", "nice", "digits", second.split()[3], "2", f"{held:.4f}"]
    assert "damaged" in third and head.split()[0] == "run"
    assert main(["runs", "nowhere"]) == 2 and "there is no folder nowhere" in capsys.readouterr().err


def test_a_run_that_trains_is_told_from_one_that_was_killed(capsys):
    pytest.importorskip("lightning")
    argv = ["train", "nice", "--data", "moons", "--set", "hidden=8", "--max-steps", "1000000", "--out", "runs/a"]
    process = Command(*argv, "--quiet", "--accelerator", "cpu", "--eval-every", "0", "--warmup", "1")
    while not (Path("runs/a/losses.csv").exists() and len(Path("runs/a/losses.csv").read_text().split("\n")) > 9):
        assert process.poll() is None, process.stderr
        time.sleep(0.01)
    head, row = told(capsys, "runs").splitlines()
    step, total = re.search(r"  ([\d,]+) of ([\d,]+)  ", row).groups()
    assert int(step.replace(",", "")) >= 8 and total == "1,000,000"
    assert row.endswith("trains now") and re.search(r"  [\d,]+ +[01] s ago", row), row
    assert head.split()[-2:] == ["images/s", "written"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    os.utime("runs/a/losses.csv", (0, time.time() - 7300))
    os.utime("runs/a/config.json", (0, time.time() - 7500))
    row = told(capsys, "runs").splitlines()[1]
    assert re.search(r"  2 h ago +not finished$", row) and "  0 of 1,000,000  " in row, "what was not saved is lost"
    again = "train", "--out", "runs/a", "--resume", "--max-steps", "3", "--quiet"
    assert main(list(again)) == 0, "nobody has it any more"
    handle = lock(Path("runs/a"))
    assert locked(Path("runs/a")) and "trains now" in told(capsys, "runs")
    os.close(handle)
    assert not locked(Path("runs/a"))


def test_ages():
    assert [ago(s) for s in (-3, 59, 119, 120, 7199, 7200, 86400, 200000)] == [
        "0 s ago",
        "59 s ago",
        "119 s ago",
        "2 min ago",
        "119 min ago",
        "2 h ago",
        "24 h ago",
        "2 days ago",
    ]


def test_a_shell_completes_commands_options_and_names(capsys):
    assert words(["tr"]) == ["train"] and "sample" in words([""])
    assert words(["train", "gated"]) == ["gatedpixelcnn"] and words(["models", "wg"]) == ["wgan", "wgangp"]
    assert words(["sample", "runs/x", "--tem"]) == ["--temperature"]
    assert words(["eval", "runs/x", "--split", ""]) == ["test", "train"]
    assert "temperature" in words(["figure", ""]) and "made" in words(["bench", "affine_coupling", ""])
    assert words(["sample", ""]) == words(["nothing", ""]) == [], "files, by the shell itself"
    assert told(capsys, "completion", "words", "--", "train", "glo") == "glow\n"
    for shell in ("bash", "zsh"):
        script = told(capsys, "completion", shell)
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert "complete -c genkernels" in told(capsys, "completion", "fish")
