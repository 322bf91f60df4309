"""What is drawn of a run: rows of a class, facts in the PNG, single pictures, a chosen checkpoint."""

from pathlib import Path

import numpy as np
import pytest

from genkernels import data
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


def test_several_classes_have_a_row_each(runs, tmp_path, capsys):
    argv = ["sample", str(runs / "classes"), "--accelerator", "cpu"]
    chosen = ["--label", "3,5", "--label", "7"]
    assert main([*argv, *chosen, "--n", "13", "--out", str(tmp_path / "a.png")]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/a.png: 12 samples at")
    sheet = Image.open(tmp_path / "a.png")
    assert sheet.text["label"] == "3, 5, 7" and sheet.text["n"] == "12"
    assert main([*argv, *chosen, "--n", "13", "--out", str(tmp_path / "a.npz")]) == 0
    assert np.load(tmp_path / "a.npz")["y"].tolist() == [3] * 5 + [5] * 4 + [7] * 4
    assert data.load(f"npz:{tmp_path}/a.npz").classes == ("3", "5", "7")
    assert main([*argv, *chosen, "--n", "13", "--out", f"{tmp_path}/a/"]) == 0
    files = sorted(str(path.relative_to(tmp_path / "a")) for path in (tmp_path / "a").rglob("*.png"))
    assert files == [f"{label}/{i:02d}.png" for label, part in ((3, range(5)), (5, range(5, 9))) for i in part] + [
        f"7/{i:02d}.png" for i in range(9, 13)
    ]
    assert data.load(f"folder:{tmp_path}/a").classes == ("3", "5", "7")
    assert main([*argv, "--n", "10", "--out", str(tmp_path / "b.npz")]) == 0
    assert np.load(tmp_path / "b.npz")["y"].tolist() == list(range(10)), "each in turn"
    capsys.readouterr()
    for given, words in (
        (["3,11"], "--label must be one of 0, 1, 2, 3, …, 9, got '11'"),
        (["3,"], "--label must be one of 0, 1, 2, 3, …, 9, got ''"),
        (["3", "--label", "5,3"], "--label must name a class once, got '3' twice"),
        (["3,5", "--n", "1"], "--n must be at least 1 for each of the 2 classes of --label, got 1"),
    ):
        assert main([*argv, "--label", *given]) == 2 and words in capsys.readouterr().err


def by_the_definition(part: str) -> np.ndarray:
    known = np.ones((8, 8), bool)
    rows, columns = {"bottom": (slice(4, 8), slice(8)), "right": (slice(8), slice(4, 8))}.get(part, (slice(2, 6),) * 2)
    known[rows, columns] = False
    return known


@pytest.mark.parametrize("part", ["bottom", "right", "centre", "mask.png", "mask.npy"])
def test_a_part_of_held_out_pictures_is_drawn_anew(runs, tmp_path, monkeypatch, capsys, part):
    monkeypatch.chdir(tmp_path)
    known = by_the_definition(part)
    Image.fromarray(np.where(known, 0, 255).astype(np.uint8)).convert("RGB").save("mask.png")
    np.save("mask.npy", (~known).astype(np.int32))
    argv = ["sample", str(runs / "classes"), "--accelerator", "cpu", "--inpaint", part, "--n", "6"]
    assert main([*argv, "--out", "a.npz"]) == 0
    arrays, err = np.load("a.npz"), capsys.readouterr().err
    drawn, original = arrays["x"], arrays["original"]
    assert (arrays["known"] == known).all() and (drawn[..., known] == original[..., known]).all()
    assert all((a != b).any() for a, b in zip(drawn[..., ~known], original[..., ~known], strict=True))
    late = int(known.ravel()[np.flatnonzero(~known.ravel())[0] :].sum())
    assert (f"{late} of the {known.sum()} kept ones come after drawn ones" in err) if late else err == ""
    assert main([*argv, "--out", "a.png"]) == 0
    picture = np.asarray(Image.open("a.png"))
    blue = (picture[..., 2] == 230) & (picture[..., 0] == 89)
    tile = blue.sum() / (6 * (~known).sum())
    assert tile == int(tile) > 0, "what is drawn anew is blue in each of the six that are kept"
    assert Image.open("a.png").text["in-painted"] == part


def test_the_default_name_of_a_sheet_tells_what_was_done(runs, tmp_path, capsys):
    np.save(tmp_path / "m.npy", np.eye(8) > 0)
    argv = ["sample", str(runs / "classes"), "--accelerator", "cpu", "--n", "2"]
    for more, end in ((["--label", "3,5"], "label3-5"), (["--inpaint", str(tmp_path / "m.npy")], "m.npy")):
        assert main([*argv, *more]) == 0
        assert capsys.readouterr().out.split(":")[0].endswith(f"{end}.png")


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.zeros((8, 8), bool), "of an image of 8x8 pixels nothing would be drawn anew"),
        (np.ones((8, 8), np.uint8), "of an image of 8x8 pixels nothing would be kept"),
        (np.ones((4, 8), bool), "must be 8x8, black and white, got an array of shape [4, 8]"),
        (np.full((8, 8), 0.5), "must be False and True, or 0 and 1 alone, 64 of its pixels are not"),
        (np.full((8, 8), np.nan), "must be False and True, or 0 and 1 alone, 64 of its pixels are not"),
        (np.array([[None]]), "cannot be read: it is no array of numpy.save"),
        (np.arange(64).reshape(8, 8) < 40, "of what is kept nothing comes before what is to be drawn"),
        (b"", "cannot be read: "),
        (b"nothing of the kind", "cannot be read: "),
    ],
)
def test_a_mask_that_is_none(runs, tmp_path, monkeypatch, capsys, mask, words):
    monkeypatch.chdir(tmp_path)
    Path("m.npy").write_bytes(mask) if isinstance(mask, bytes) else np.save("m.npy", mask)
    assert main(["sample", str(runs / "classes"), "--inpaint", "m.npy", "--out", "a.png"]) == 2
    err = capsys.readouterr().err
    assert words in err and "m.npy" in err or "raster order" in err
    assert err.count("\n") == 1 and not Path("a.png").exists()


def test_a_picture_that_is_no_mask(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    white = np.zeros((8, 8, 4), np.uint8)
    white[2:] = 255
    for array, words in (
        (white[:4, :, :3], "m.png must be 8x8, got 4x8"),
        (white, "m.png must be black and white, it is transparent somewhere"),
        (white[..., 0] // 2, "m.png must be black or white alone, 48 of its pixels are not"),
        (white[..., :3] // np.uint8([1, 1, 2]), "m.png must be 8x8, black and white, got colours"),
    ):
        Image.fromarray(array).save("m.png")
        assert main(["sample", str(runs / "classes"), "--inpaint", "m.png", "--out", "a.png"]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1, err
