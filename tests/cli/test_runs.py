"""The commands on real models and data, in this process; and what happens to a process that is killed."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from genkernels import data
from genkernels.cli import main
from tests.processes import Command, end_with_parent

pytest.importorskip("lightning")

SMALL = ["--set", "hidden=8", "--max-steps", "4", "--accelerator", "cpu", "--quiet"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def losses(run) -> list[str]:
    with open(Path(run) / "losses.csv") as file:
        return [row["loss"] for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    ("model", "spec", "extra"),
    [
        ("nice", "digits", ["--set", "couplings=2"]),
        ("realnvp", "moons", ["--class-conditional"]),
        ("glow", "digits", ["--set", "steps=2", "--reversible", "--class-conditional"]),
    ],
)
def test_train_sample_evaluate(model, spec, extra, capsys):
    assert main(["train", model, "--data", spec, *SMALL, *extra]) == 0
    run = Path("runs") / f"{model}-{spec}"
    out, err = capsys.readouterr()
    assert out.startswith("4 steps, ") and "held out: " in out and str(run) in out and err == ""
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["model"] == model and metrics["data"] == spec and metrics["steps"] == 4
    assert metrics["hparams"]["hidden"] == 8 and (run / "samples" / "step-00000004.png").stat().st_size > 500

    assert main(["eval", str(run), "--accelerator", "cpu", "--json", "e.json", "--checkpoint", "last"]) == 0
    assert json.loads(Path("e.json").read_text())["estimates"] == metrics["held_out"], "to the last digit"
    value = metrics["held_out"][metrics["metric"]]["value"]
    assert f"{model} on {spec}: {value:.4f} ± " in capsys.readouterr().out

    conditional = "--class-conditional" in extra
    argv = ["sample", str(run), "--n", "5", "--temperature", "0.7", "--accelerator", "cpu"]
    assert main([*argv, "--out", "a.npz", *(["--label", "1"] if conditional else [])]) == 0
    assert main([*argv, "--out", "a.png"]) == 0 and Path("a.png").read_bytes()[:4] == b"\x89PNG"
    arrays = np.load("a.npz")
    shape = data.load(spec).form.shape
    assert arrays["x"].shape == (5, *shape) and np.isfinite(arrays["x"]).all()
    if spec == "digits":
        assert arrays["x"].dtype == np.uint8 and arrays["x"].max() <= 16 and arrays["levels"] == 17
    assert main([*argv, "--out", "b.npz", "--seed", "1"]) == 0
    assert main(argv) == 0 and (run / "samples" / "n5-t0.7-seed0.png").exists()


def test_samples_are_data_again():
    assert main(["train", "nice", "--data", "digits", *SMALL]) == 0
    assert main(["sample", "runs/nice-digits", "--n", "40", "--out", "s.npz", "--accelerator", "cpu"]) == 0
    bundle = data.load("npz:s.npz")
    assert (
        bundle.form.shape == (1, 8, 8) and bundle.form.grey_levels == 17 and len(bundle.train) + len(bundle.test) == 40
    )
    os.makedirs("deep")
    os.chdir("deep")
    assert main(["train", "nice", "--data", "npz:../s.npz", *SMALL, "--out", "r"]) == 0
    os.chdir("..")
    assert main(["eval", "deep/r", "--accelerator", "cpu"]) == 0, "a relative path is found from another folder"


def test_resume_from_the_command_line(capsys):
    argv = ["train", "nice", "--data", "digits", *SMALL]
    assert main([*argv, "--out", "whole", "--max-steps", "9"]) == 0
    assert main([*argv, "--out", "part"]) == 0
    assert main(["train", "--out", "part", "--resume", "--max-steps", "9", "--quiet"]) == 0
    assert losses("part") == losses("whole") and len(losses("part")) == 9
    capsys.readouterr()
    assert main(["train", "nice", "--data", "digits", "--out", "part", "--resume", "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("9 steps"), "nothing was left to do"
    assert main([*argv, "--out", "part", "--overwrite"]) == 0 and len(losses("part")) == 4


def test_the_reference_backend_gives_the_same_numbers():
    for name in ("auto", "reference"):
        assert (
            main(["train", "glow", "--data", "digits", *SMALL, "--set", "steps=2", "--out", name, "--backend", name])
            == 0
        )
    a, b = ([float(x) for x in losses(name)] for name in ("auto", "reference"))
    assert a == pytest.approx(b, rel=1e-5)
    assert json.loads(Path("reference/metrics.json").read_text())["backend"] == "reference"


def test_settings_are_read_as_python_values():
    from genkernels import models
    from genkernels.cli.build import _value, chosen_preset, model_class, model_kwargs

    assert [_value(v) for v in ("3", "1e-3", "true", "None", "(1, 2)", "exp", "'a'")] == [
        3,
        1e-3,
        True,
        None,
        (1, 2),
        "exp",
        "a",
    ]
    kind, digits, moons = model_class("glow"), data.load("digits"), data.load("moons")
    given = {"preset": None, "settings": [], "reversible": False, "classes": False}
    assert model_kwargs(kind, "glow", digits, **given) == kind.presets["digits"].sizes, "the data set's own preset"
    assert model_kwargs(kind, "glow", moons, **given) == {**kind.presets["points"].sizes, "grey_levels": None}
    for bundle, preset, chosen in ((digits, None, "digits"), (moons, None, "points"), (digits, "cifar10", "cifar10")):
        assert chosen_preset(kind, bundle, preset) == chosen
    assert chosen_preset(models.PixelCNN, moons, None) is None
    wide = model_kwargs(
        kind, "glow", digits, **{**given, "preset": "cifar10", "settings": ["hidden=7"], "classes": True}
    )
    assert (wide["shape"], wide["grey_levels"], wide["hidden"], wide["steps"]) == ((1, 8, 8), 17, 7, 32)
    assert wide["num_classes"] == 10


def test_info_names_each_backend_and_operator(capsys):
    """Each operator with a line for each of its backends, and its row of the composability table as it was declared."""
    from genkernels import backends, ops

    assert main(["info", "--ops"]) == 0
    first, rows, cells = capsys.readouterr().out.rstrip().split("\n\n")[1:]
    for name in backends.NAMES[1:]:
        assert any(line.startswith(f"{name} ") for line in first.splitlines())
    head, *lines = rows.splitlines()
    assert head.split() == ["operator", "backend", "runs", "why", "not"] and len(lines) == 4 * len(ops.OPERATORS)
    for begin, operator in zip(range(0, len(lines), 4), ops.OPERATORS.values(), strict=True):
        names = [line.split()[i] for i, line in zip((1, 0, 0, 0), lines[begin : begin + 4], strict=True)]
        assert lines[begin].split()[0] == operator.name and names == list(backends.NAMES[1:])
        for line, name in zip(lines[begin + 1 : begin + 4], names[1:], strict=True):
            assert line.rstrip().endswith(operator.kernels[name])
    head, *lines = cells.splitlines()
    assert [cell.strip() for cell in head.split("  ") if cell] == ["operator", *ops.FEATURES]
    rows = [[cell.strip() for cell in line.split("  ") if cell] for line in lines]
    found = {name: cells for name, *cells in rows}
    assert found == {o.name: [o.composability[f] for f in ops.FEATURES] for o in ops.OPERATORS.values()}


def start(*argv) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "genkernels", *argv]
    return subprocess.Popen(
        command,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=end_with_parent,
    )


def wait_for_steps(process, run, steps):
    while process.poll() is None:
        if (Path(run) / "losses.csv").exists() and len(losses(run)) >= steps:
            return
        time.sleep(0.01)
    raise AssertionError(f"the process ended by itself: {process.stderr}")


def test_kill_minus_nine_and_ctrl_c_lose_nothing():
    base = [
        "train",
        "nice",
        "--data",
        "digits",
        "--set",
        "hidden=8",
        "--accelerator",
        "cpu",
        "--eval-every",
        "0",
        "--warmup",
        "5",
    ]
    base += ["--checkpoint-every", "5"]
    long = ["--max-steps", "100000"]
    process = Command(*base, *long, "--out", "cut", "--quiet")
    wait_for_steps(process, "cut", 12)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not Path("cut/metrics.json").exists()

    process = Command("train", "--out", "cut", "--resume", "--quiet")
    wait_for_steps(process, "cut", len(losses("cut")) + 20)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    done = len(losses("cut"))
    saved = Path("cut/checkpoints") / f"step-{done:08d}.ckpt"
    words = (
        f"genkernels: interrupted after step {done}: saved {saved}; go on with: genkernels train --out cut --resume\n"
    )
    assert process.stderr == words and saved.exists()

    total = done + 15
    assert main([*base, "--max-steps", str(total), "--out", "whole", "--quiet"]) == 0
    assert main(["train", "--out", "cut", "--resume", "--max-steps", str(total), "--quiet"]) == 0
    assert losses("cut") == losses("whole") and len(losses("cut")) == total, "bit for bit"
    held = [json.loads(Path(run, "metrics.json").read_text())["held_out"] for run in ("cut", "whole")]
    assert held[0] == held[1]


def test_two_processes_train_one_model_and_stop_together():
    argv = [
        "train",
        "glow",
        "--data",
        "digits",
        "--set",
        "hidden=8",
        "--set",
        "steps=2",
        "--accelerator",
        "cpu",
        "--devices",
        "2",
    ]
    process = start(
        *argv, "--max-steps", "100000", "--batch-size", "32", "--warmup", "5", "--eval-every", "20", "--out", "pair"
    )
    for line in process.stderr:
        if line.startswith("step 20: held out"):
            break
    process.send_signal(signal.SIGINT)  # to the first process alone: the other one must hear of it
    err = process.stderr.read()
    assert process.wait() == 130 and "interrupted after step" in err, err
    done = len(losses("pair"))
    assert main(["train", "--out", "pair", "--resume", "--max-steps", str(done), "--devices", "1", "--quiet"]) == 0
    held = json.loads(Path("pair/metrics.json").read_text())["held_out"]
    assert held["bits_per_dim"]["examples"] == 360
    first = [float(x) for x in losses("pair")]
    assert np.mean(first[-10:]) < np.mean(first[:10])
    # 32 examples on each of two devices are the 64 of one: the weights begin alike and only the noise differs
    assert main([*argv[:-2], "--max-steps", "3", "--warmup", "5", "--out", "one", "--quiet"]) == 0
    assert [float(x) for x in losses("one")] == pytest.approx(first[:3], rel=0.1)


@pytest.mark.parametrize(
    ("model", "spec", "settings"),
    [
        ("maf", "digits", {"hidden": 70, "transforms": 2}),
        ("iaf", "digits", {"hidden": 70, "transforms": 1}),
        ("pixelcnn", "digits", {"width": 8, "layers": 1}),
        ("pixelcnn", "npz:colour.npz", {"width": 6, "layers": 1}),
        ("gatedpixelcnn", "npz:colour.npz", {"width": 6, "layers": 1}),
        ("gatedpixelcnn", "photos32", {"width": 6, "layers": 1}),  # its preset has the mixture
    ],
)
def test_masked_models_train_by_name(model, spec, settings):
    noise = np.random.default_rng(0)
    np.savez("colour.npz", x=noise.integers(0, 256, (30, 3, 6, 5), dtype=np.uint8))
    options = ["--max-steps", "2", "--batch-size", "4", "--eval-examples", "8", "--accelerator", "cpu", "--quiet"]
    options += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    assert main(["train", model, "--data", spec, *options, "--samples", "2", "--out", "run"]) == 0
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["metric"] == "bits_per_dim" and 0 < metrics["held_out"]["bits_per_dim"]["value"] < 20
    assert metrics["held_out"]["bits_per_dim"]["examples"] == len(data.load(spec).test)
    assert (metrics["hparams"].get("head") == "logistic_mixture") == (spec == "photos32")
    assert main(["sample", "run", "--n", "2", "--out", "s.npz", "--accelerator", "cpu"]) == 0
    bundle = data.load(spec)
    drawn = np.load("s.npz")
    assert drawn["x"].shape == (2, *bundle.form.shape) and drawn["levels"] == bundle.form.grey_levels


def test_a_pixel_model_trains_samples_evaluates_and_completes_images(capsys):
    small = ["--set", "width=8", "--set", "layers=1", "--max-steps", "3", "--accelerator", "cpu", "--quiet"]
    assert main(["train", "gatedpixelcnn", "--data", "digits", *small, "--class-conditional"]) == 0
    run = Path("runs/gatedpixelcnn-digits")
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["hparams"]["grey_levels"] == 17 and metrics["hparams"]["num_classes"] == 10
    assert main(["eval", str(run), "--accelerator", "cpu", "--json", "e.json"]) == 0
    assert main(["sample", str(run), "--n", "3", "--out", "s.npz", "--accelerator", "cpu", "--label", "4"]) == 0
    assert np.load("s.npz")["x"].shape == (3, 1, 8, 8)

    argv = ["sample", str(run), "--inpaint", "top-half", "--n", "5", "--accelerator", "cpu"]
    assert main([*argv, "--out", "i.npz"]) == 0
    arrays = np.load("i.npz")
    known, drawn, original = (arrays[k] for k in ("known", "x", "original"))
    assert known[:4].all() and not known[4:].any()
    assert (drawn[..., known] == original[..., known]).all() and (drawn != original).any()
    assert (original == data.load("digits").take("test", 5)[0].numpy()).all()
    capsys.readouterr()
    assert main(argv) == 0
    assert (run / "samples" / "n5-t1-seed0-top-half.png").stat().st_size > 500
    assert "5 held-out images (each: whole, kept, completed) with the top-half kept" in capsys.readouterr().out
