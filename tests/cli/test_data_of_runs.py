"""A run knows its data: names of classes, examples and their order. What has changed since is refused, not mixed up."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from genkernels import data
from genkernels.cli import main
from genkernels.data import TensorPairs

pytest.importorskip("lightning")
Image = pytest.importorskip("PIL.Image")

SMALL = ["--set", "width=4", "--set", "layers=0", "--batch-size", "4", "--samples", "2", "--accelerator", "cpu"]
RNG = np.random.default_rng(0)


def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (4, 3), dtype=np.uint8)).save(path)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Pictures of three classes, and a run on them that knows the classes."""
    base = tmp_path_factory.mktemp("begun")
    for name in ("cat", "dog", "fox"):
        for i in range(20):
            write(base / "pics" / name / f"{i}.png")
    argv = ["train", "pixelcnn", "--data", "folder:pics", "--data-root", str(base), "--class-conditional", "--quiet"]
    assert main([*argv, *SMALL, "--max-steps", "2", "--out", str(base / "run")]) == 0
    return base


@pytest.fixture
def here(begun, tmp_path, monkeypatch):
    """A copy of them as the current folder."""
    here = tmp_path / "here"
    shutil.copytree(begun, here)
    config = json.loads((here / "run/config.json").read_text())
    config["data"]["root"] = str(here)
    (here / "run/config.json").write_text(json.dumps(config))
    monkeypatch.chdir(here)
    return here


@pytest.fixture
def refused(capsys):
    def run(line):
        before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
        assert main([*line.split(), *([] if line.startswith("train") else ["--accelerator", "cpu"])]) == 2, line
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("genkernels: error: ") and err.count("\n") == 1, err
        assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before
        return err

    return run


EVAL, RESUME, INPAINT = "eval run", "train --out run --resume --max-steps 4 --quiet", "sample run --inpaint top-half"
LOSSES = "a resume could not reach the losses of an unbroken run"


def test_renamed_classes(here, refused):
    Path("pics/cat").rename("pics/zebra")
    words = "the data must have labels, and no class beside cat, dog, fox: got folder:pics with zebra"
    assert words in refused(EVAL) and words in refused(INPAINT) and words in refused("eval run --data folder:pics")
    words = "the classes of folder:pics are not those that run was begun with, which a resume cannot change: "
    assert words + "zebra new and cat gone" in refused(RESUME)
    Path("pics/zebra").rename("pics/cat")
    Path("pics/ant").mkdir()
    write(Path("pics/ant/1.png"))
    assert words + "ant new" in refused(RESUME)
    assert "got folder:pics with ant" in refused(EVAL)


def test_swapped_classes(here, refused):
    for old, new in (("cat", "x"), ("dog", "cat"), ("x", "dog")):
        Path("pics", old).rename(Path("pics", new))
    words = "the held-out part of folder:pics has other examples or labels, or another order of them, than when the run"
    assert words in refused(EVAL) and words in refused(INPAINT)
    assert LOSSES in refused(RESUME)


def test_added_pictures(here, refused, capsys):
    for i in range(20, 60):
        write(Path("pics/dog") / f"{i}.png")
    for line in (EVAL, INPAINT):
        assert "the held-out part of folder:pics had " in (said := refused(line)) and "may be among them" in said
    assert "the part to train on of folder:pics had " in (said := refused(RESUME)) and LOSSES in said
    assert main(["eval", "run", "--data", "folder:pics", "--accelerator", "cpu"]) == 0, "as any other data"
    out, err = capsys.readouterr()
    assert "held-out examples" in out and err.startswith("genkernels: the held-out part of folder:pics had ")
    assert err.count("\n") == 1


def test_a_changed_picture(here, refused, capsys):
    """Where it is one to train on, the held-out value still stands, and the losses of a resume do not."""
    before = data.load("folder:pics").digest
    for path in sorted(Path("pics").rglob("*.png")):
        old = path.read_bytes()
        Image.open(path).rotate(180).save(path)
        after = data.load("folder:pics").digest
        if after["test"] == before["test"]:
            break
        path.write_bytes(old)
    assert after["train"] != before["train"]
    assert main(["eval", "run", "--accelerator", "cpu"]) == 0 and main([*INPAINT.split(), "--accelerator", "cpu"]) == 0
    assert capsys.readouterr().err == ""
    assert "the part to train on of folder:pics has other examples or labels" in (said := refused(RESUME))
    assert LOSSES in said and "the part to train on" in refused(EVAL + " --split train")


def test_labels_are_called_as_the_data_call_them(here, refused, capsys):
    from genkernels.training import load_model, sample

    assert main(["sample", "run", "--label", "dog", "--n", "4", "--out", "dog.npz", "--accelerator", "cpu"]) == 0
    model, *_ = load_model("run")
    capsys.readouterr()
    want = sample(model, 4, label=1)
    assert np.array_equal(np.load("dog.npz")["x"], (want * 255).round().byte().numpy())
    assert "--label must be one of cat, dog, fox, got '1'" in refused("sample run --label 1")
    assert "got 'fax'; did you mean fox?" in refused("sample run --label fax")


def test_several_labels_by_name(here, refused, capsys):
    argv = ["sample", "run", "--label", "cat,fox", "--n", "5", "--accelerator", "cpu"]
    assert main([*argv, "--out", "a.png", "--no-real"]) == 0
    assert Image.open("a.png").text["label"] == "cat, fox"
    assert main([*argv, "--out", "a.npz"]) == 0
    arrays = np.load("a.npz")
    assert arrays["classes"].tolist() == ["cat", "dog", "fox"] and arrays["y"].tolist() == [0, 0, 0, 2, 2]
    assert data.load("npz:a.npz?layout=nchw").form.num_classes == 2
    assert main([*argv, "--out", "drawn/"]) == 0
    assert data.load("folder:drawn").classes == ("cat", "fox")
    capsys.readouterr()
    assert "--label must be one of cat, dog, fox, got 'fix'; did you mean fox?" in refused("sample run --label cat,fix")


def test_other_data_are_counted_by_the_classes_of_the_run(here):
    from genkernels.training import evaluate, load_model

    for name in ("dog", "fox"):
        shutil.copytree(Path("pics", name), Path("other", name))
    assert main(["eval", "run", "--data", "folder:other", "--accelerator", "cpu", "--json", "e.json"]) == 0
    model, config, *_ = load_model("run")
    x, y = data.load("folder:other").test.tensors
    one, two = (evaluate(model, TensorPairs(x, y + k), batch_size=4)["bits_per_dim"].value for k in (1, 0))
    assert config["data"]["classes"] == ["cat", "dog", "fox"] and one != two
    assert json.loads(Path("e.json").read_text())["estimates"]["bits_per_dim"]["value"] == one


def test_a_run_that_does_not_know_its_data_goes_on_as_it_did(here, capsys):
    config = json.loads(Path("run/config.json").read_text())
    for key in ("classes", "examples", "digest"):
        assert config["data"].pop(key)
    Path("run/config.json").write_text(json.dumps(config))
    want = json.loads(Path("run/metrics.json").read_text())["held_out"]
    assert main(["eval", "run", "--accelerator", "cpu", "--json", "e.json", "--checkpoint", "last"]) == 0
    assert json.loads(Path("e.json").read_text())["estimates"] == want
    assert main(["sample", "run", "--label", "1", "--n", "2", "--accelerator", "cpu"]) == 0
    assert main([*INPAINT.split(), "--accelerator", "cpu"]) == 0
    assert main(RESUME.split()) == 0
    assert capsys.readouterr().err == ""
    assert json.loads(Path("run/config.json").read_text())["data"]["classes"] == ["cat", "dog", "fox"]


def test_rows_of_an_archive(tmp_path, monkeypatch, refused, capsys):
    """The order of ``x`` alone decides nothing; that of ``x_train`` does."""
    monkeypatch.chdir(tmp_path)
    x = RNG.integers(0, 200, (40, 4, 6), dtype=np.uint8)
    parts = {"x_train": x[:30], "x_test": x[30:]}
    for name, arrays in (("alone", {"x": x}), ("parts", parts)):
        np.savez(f"{name}.npz", **arrays)
        argv = ["train", "pixelcnn", "--data", f"npz:{name}.npz", *SMALL, "--max-steps", "3", "--quiet"]
        assert main([*argv, "--out", "run"]) == 0
        np.savez(f"{name}.npz", **({"x": x[::-1]} if name == "alone" else parts | {"x_train": x[29::-1]}))
        if name == "alone":
            assert main(RESUME.split()) == 0
            shutil.rmtree("run")
        else:
            capsys.readouterr()
            assert LOSSES in refused(RESUME)
            assert main(["eval", "run", "--accelerator", "cpu"]) == 0


def test_labels_that_cannot_be_given_to_a_model(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    np.savez("rows.npz", x=RNG.integers(0, 256, (40, 4, 6), dtype=np.uint8), y=np.arange(40))
    words = "needs an example of every class to train on: in npz:rows.npz all those of "
    assert words in refused("train pixelcnn --data npz:rows.npz --class-conditional --out run")
    for name in ("cat/1", "dog/1", "loose"):
        write(Path(f"pics/{name}.png"))
    words = "the data folder:pics have none (no classes: 'loose.png' lies in no class folder)"
    assert words in refused("train pixelcnn --data folder:pics --class-conditional --out run")


def test_labels_with_holes(tmp_path, monkeypatch, refused, capsys):
    """A model has the classes that occur, and draws no other."""
    monkeypatch.chdir(tmp_path)
    np.savez("two.npz", x=RNG.integers(0, 256, (40, 4, 6), dtype=np.uint8), y=np.resize([3, 700], 40))
    argv = ["train", "pixelcnn", "--data", "npz:two.npz", "--class-conditional", *SMALL, "--max-steps", "1", "--quiet"]
    assert main([*argv, "--out", "run"]) == 0
    assert json.loads(Path("run/config.json").read_text())["model"]["hparams"]["num_classes"] == 2
    assert main(["sample", "run", "--label", "700", "--n", "2", "--out", "s.npz", "--accelerator", "cpu"]) == 0
    capsys.readouterr()
    for label in (0, 1, 27):
        assert f"--label must be one of 3, 700, got '{label}'" in refused(f"sample run --label {label}")


def test_what_the_data_seem_is_told_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez("dark.npz", x=RNG.integers(0, 17, (40, 4, 6), dtype=np.uint8))
    argv = ["train", "pixelcnn", "--data", "npz:dark.npz", *SMALL, "--max-steps", "1", "--quiet", "--out", "run"]
    assert main(argv) == 0
    err = capsys.readouterr().err
    assert err.startswith("genkernels: npz:dark.npz: x has no pixel above 16 of 0 to 255") and err.count("\n") == 1
    (note,) = json.loads(Path("run/metrics.json").read_text())["notes"]
    assert f"genkernels: {note}\n" == err
    assert main(RESUME.split()) == 0 and main(["eval", "run", "--accelerator", "cpu"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["eval", "run", "--data", "npz:dark.npz", "--accelerator", "cpu"]) == 0
    assert capsys.readouterr().err == err


def test_a_folder_that_an_earlier_version_read_otherwise(tmp_path):
    """It took ``Train`` and ``Test`` for classes and held a tenth of both out."""
    from genkernels.data.provenance import change

    for name in ("Train/1", "Train/2", "Test/1"):
        write(tmp_path / f"{name}.png")
    bundle = data.load(f"folder:{tmp_path}")
    said = f"folder:{tmp_path} had 2 classes when the run began, and has none"
    assert change({"shape": [1, 4, 3], "num_classes": 2}, bundle, "test") == said
    assert change({"shape": [1, 4, 3], "num_classes": None}, bundle, "test") is None
