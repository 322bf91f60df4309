"""What is drawn of a run: rows of a class, facts in the PNG, single pictures, a chosen checkpoint."""

import numpy as np
import pytest

from genkernels.cli import main

pytest.importorskip("lightning")
Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    few = [
        "--max-steps",
        "4",
        "--eval-every",
        "2",
        "--samples",
        "20",
        "--accelerator",
        "cpu",
        "--quiet",
        "--no-tensorboard",
    ]
    argv = [
        "train",
        "gatedpixelcnn",
        "--data",
        "digits",
        "--set",
        "width=8",
        "--set",
        "layers=1",
        "--class-conditional",
    ]
    assert main([*argv, *few, "--out", str(folder / "classes")]) == 0
    assert main(["train", "nice", "--data", "moons", "--set", "hidden=8", *few, "--out", str(folder / "moons")]) == 0
    return folder


def test_sheets_of_classes_have_a_row_for_each(runs, tmp_path):
    sheet = Image.open(runs / "classes/samples/step-00000004.png")
    assert sheet.text == {
        "shows": "samples",
        "model": "GatedPixelCNN",
        "data": "digits",
        "step": "4",
        "temperature": "1.0",
    }
    out = tmp_path / "a.png"
    argv = ["sample", str(runs / "classes"), "--n", "24", "--accelerator", "cpu", "--temperature", "0.5"]
    assert main([*argv, "--out", str(out)]) == 0
    facts = {"model": "GatedPixelCNN", "data": "digits", "step": "4", "temperature": "0.5", "seed": "0", "n": "20"}
    assert Image.open(out).text == facts, "two of each of ten classes"
    width, height = Image.open(out).size
    assert height > 3 * width, "ten rows of two, and one held-out picture beside"
    assert main([*argv, "--out", str(tmp_path / "b.png"), "--no-real"]) == 0
    assert Image.open(tmp_path / "b.png").size[0] < width
    assert main([*argv, "--out", str(tmp_path / "c.png"), "--label", "3"]) == 0
    assert Image.open(tmp_path / "c.png").text["label"] == "3"


def test_the_data_stand_beside_points(runs, tmp_path):
    for name, flag in (("a.png", "--real"), ("b.png", "--no-real")):
        assert main(["sample", str(runs / "moons"), "--n", "50", flag, "--out", str(tmp_path / name)]) == 0
    (both, _), (alone, _) = (Image.open(tmp_path / name).size for name in ("a.png", "b.png"))
    assert both == 2 * alone
    assert Image.open(tmp_path / "a.png").text["data"] == "moons"


def test_single_pictures_are_the_arrays(runs, tmp_path, capsys):
    argv = ["sample", str(runs / "classes"), "--n", "12", "--accelerator", "cpu", "--label", "3"]
    assert main([*argv, "--out", str(tmp_path / "all") + "/"]) == 0
    assert main([*argv, "--out", str(tmp_path / "all.npz")]) == 0
    paths = sorted((tmp_path / "all").iterdir())
    assert [path.name for path in paths] == [f"{i:02d}.png" for i in range(12)]
    levels = np.load(tmp_path / "all.npz")["x"][:, 0]
    assert (np.stack([np.asarray(Image.open(path)) for path in paths]) == (levels * (255 / 16)).round()).all()
    assert Image.open(paths[3]).text["number"] == "3"
    capsys.readouterr()
    for out in (tmp_path / "all", tmp_path / "b.d"):
        assert main([*argv, "--out", f"{out}/"]) == 2
        assert "must be new or empty, and its name without an ending" in capsys.readouterr().err
    assert main(["sample", str(runs / "moons"), "--out", f"{tmp_path}/points/"]) == 2
    assert "points have no picture each" in capsys.readouterr().err and not (tmp_path / "points").exists()


def test_a_chosen_checkpoint(runs, tmp_path, capsys):
    for step in (2, 4):
        argv = ["sample", str(runs / "moons"), "--checkpoint", str(step), "--n", "9", "--accelerator", "cpu"]
        assert main([*argv, "--out", str(tmp_path / f"{step}.npz")]) == 0
        assert capsys.readouterr().out.endswith(f"weights of step {step}\n")
    assert (np.load(tmp_path / "2.npz")["x"] != np.load(tmp_path / "4.npz")["x"]).all()
    assert main(["eval", str(runs / "moons"), "--checkpoint", "2", "--threads", "1"]) == 0
    assert "weights of step 2" in capsys.readouterr().out
