"""Every mistake a user can make gives one sentence, exit code 2, and no traceback; nothing is left behind."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from genkernels.cli import main

TINY = ["--set", "hidden=8", "--set", "couplings=2", "--set", "layers=1"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GENKERNELS_DEBUG", raising=False)


@pytest.fixture
def refused(capsys):
    def run(*argv, code=2):
        before = sorted(os.listdir())
        assert main(list(map(str, argv))) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("genkernels: error: ") and err.count("\n") == 1 and err.endswith("\n"), err
        assert "Traceback" not in err
        assert sorted(os.listdir()) == before, "something was left behind"
        return err

    return run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A small run of NICE on digits."""
    pytest.importorskip("lightning")
    folder = tmp_path_factory.mktemp("runs") / "nice-digits"
    argv = ["train", "nice", "--data", "digits", "--out", str(folder), "--max-steps", "3", *TINY, "--quiet"]
    assert main([*argv, "--samples", "4", "--accelerator", "cpu"]) == 0
    return folder


def test_a_backend_that_cannot_run_says_why(refused, run_folder):
    import torch

    if torch.cuda.is_available():
        pytest.skip("every backend may run here")
    assert "backend 'triton' cannot run here" in refused("eval", run_folder, "--backend", "triton")
    assert "backend 'cuda' cannot run here" in refused("train", "nice", "--data", "digits", *TINY, "--backend", "cuda")
    assert "accelerator gpu needs" in refused("eval", run_folder, "--accelerator", "gpu")
    assert "--accelerator gpu needs" in refused("train", "nice", "--data", "digits", *TINY, "--accelerator", "gpu")


def test_a_backend_in_the_environment_is_checked(refused, run_folder, monkeypatch):
    monkeypatch.setattr("genkernels.backends._forced", "reference2")
    assert "backend must be one of" in refused("eval", run_folder)


def test_inpainting_that_cannot_be_done(refused, run_folder):
    sentence = "NICE cannot in-paint: only models that draw pixel by pixel can, pixelcnn"
    assert sentence in refused("sample", run_folder, "--inpaint", "top-half")
    assert "--label cannot be given" in refused("sample", run_folder, "--inpaint", "top-half", "--label", 1)


def test_a_model_of_images_on_points(refused):
    assert "PixelCNN is a model of images, the data are points: try nice, " in refused(
        "train", "pixelcnn", "--data", "moons"
    )


def test_a_folder_that_cannot_be_read(refused, tmp_path):
    locked = tmp_path / "pictures"
    locked.mkdir(mode=0o000)
    try:
        assert f"folder:{locked}" in refused("train", "nice", "--data", f"folder:{locked}")
    finally:
        locked.chmod(0o700)


def test_data_with_nan(refused, tmp_path):
    x = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    x[3, 1] = np.nan
    np.savez(tmp_path / "bad.npz", x=x)
    assert "x must be finite" in refused("train", "nice", "--data", "npz:bad.npz")


def test_labels_where_there_are_none(refused, tmp_path):
    np.savez(tmp_path / "plain.npz", x=np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32))
    words = "--class-conditional needs labels: the data npz:plain.npz have none"
    assert words in refused("train", "nice", "--data", "npz:plain.npz", "--class-conditional")


def test_a_run_that_is_there_is_not_replaced_unasked(refused, run_folder):
    before = (run_folder / "metrics.json").read_bytes()
    line = ["train", "nice", "--data", "digits", "--out", run_folder]
    assert "already holds a run: continue it with --resume or replace it with --overwrite" in refused(*line)
    for extra, words in (
        (["--preset", "digits"], "--preset cannot be given with --resume"),
        (["--set", "hidden=4"], "--set cannot be given with --resume"),
        (["--batch-size", "7"], "begun with --batch-size 64, which a resume cannot change, got 7"),
    ):
        assert words in refused("train", "--resume", "--out", run_folder, *extra)
    assert "begun with model nice, which a resume cannot change, got glow" in refused(
        "train", "glow", "--resume", "--out", run_folder
    )
    words = "begun with --data digits, which a resume cannot change, got moons"
    assert words in refused("train", "--data", "moons", "--resume", "--out", run_folder)
    assert (run_folder / "metrics.json").read_bytes() == before


def test_wishes_that_a_run_cannot_meet(refused, run_folder, tmp_path):
    assert "no classes to choose from" in refused("sample", run_folder, "--label", "3")
    assert "is not a folder" in refused("sample", run_folder, "--out", run_folder / "config.json" / "a.png")
    assert "must be a file, it is a folder" in refused("eval", run_folder, "--json", tmp_path)
    words = (
        "the data must be as those of the run, images of shape [1, 8, 8] with 17 grey levels, got moons with "
        "points of shape [2]"
    )
    assert words in refused("eval", run_folder, "--data", "moons")
    near = run_folder.with_name("nice-digit")
    assert f"did you mean {run_folder}?" in refused("sample", near)


@pytest.mark.parametrize("damage", ["config", "model", "checkpoints"])
def test_a_damaged_run(refused, run_folder, tmp_path, damage):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    if damage == "config":
        (copy / "config.json").write_text("{")
        words = "config.json cannot be read"
    elif damage == "model":
        config = json.loads((copy / "config.json").read_text())
        config["model"]["hparams"]["hidden"] = 9
        (copy / "config.json").write_text(json.dumps(config))
        words = "must hold this model's weights"
    else:
        for path in copy.rglob("*.ckpt"):
            path.write_bytes(path.read_bytes()[:1000])
        words = "is cut short"
    assert words in refused("sample", copy)
    assert words in refused("eval", copy)
    assert words in refused("train", "--resume", "--out", copy, "--max-steps", "5")


def test_a_fault_in_the_program_shows_its_traceback(monkeypatch, capsys):
    def broken(arguments):
        raise KeyError("inner workings")

    monkeypatch.setattr("genkernels.cli.info.run", broken)
    assert main(["info"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "a fault of genkernels or of a library below it (KeyError: 'inner workings')" in err


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_debug_shows_the_traceback_of_a_mistake(monkeypatch, capsys, how):
    if how == "variable":
        monkeypatch.setenv("GENKERNELS_DEBUG", "1")
    assert main(["sample", "nowhere", *(["--debug"] if how == "flag" else [])]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("genkernels: error: there is no run in nowhere")


def test_ctrl_c_before_training_and_a_closed_pipe(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("genkernels.cli.info.run", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "genkernels: error: interrupted\n"
    command = f"{sys.executable} -m genkernels info --ops | head -c 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_help_and_version_answer_without_the_heavy_parts(capsys):
    assert main(["--help"]) == 0 and "genkernels train glow --data digits" in capsys.readouterr().out
    assert main([]) == 0 and "usage: genkernels" in capsys.readouterr().out
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("genkernels ")
    assert main(["train", "--help"]) == 0 and "--checkpoint-every" in capsys.readouterr().out
    code = (
        "import sys, genkernels; known = set(sys.modules); from genkernels.cli import main; "
        "code = main(['train', '--help']); new = set(sys.modules) - known; "
        "heavy = "
        "{'torch', 'numpy', 'lightning', 'matplotlib', 'PIL', 'sklearn', 'rich', 'typer', 'genkernels.training'}; "
        "sys.exit(code or ', '.join(sorted(heavy & new)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_class_conditional_model_on_other_labels(refused, tmp_path, capsys):
    pytest.importorskip("lightning")
    rng = np.random.default_rng(0)

    def save(name, **labels):
        np.savez(tmp_path / name, x=rng.integers(0, 4, (20, 1, 4, 6)).astype(np.uint8), levels=4, **labels)

    save("three.npz", y=np.arange(20) % 3)
    save("seven.npz", y=np.arange(20) % 7)
    save("plain.npz")
    few = ["--max-steps", "1", "--samples", "1", "--batch-size", "4", "--accelerator", "cpu", "--quiet"]
    argv = ["train", "pixelcnn", "--data", "npz:three.npz", "--class-conditional", "--set", "width=4", "--out", "run"]
    assert main([*argv, "--set", "layers=0", *few]) == 0
    capsys.readouterr()
    sentence = "the data must have labels, and no class beside 0, 1, 2: got npz:plain.npz with no labels"
    assert sentence in refused("eval", "run", "--data", "npz:plain.npz")
    assert "no class beside 0, 1, 2: got npz:seven.npz with 3, 4, 5, 6" in refused(
        "eval", "run", "--data", "npz:seven.npz"
    )
    save("three.npz", y=np.arange(20) % 7)
    assert "got npz:three.npz with 3, 4, 5, 6" in refused("sample", "run", "--inpaint", "top-half")


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def garbage(what: str, path, whole: bytes) -> bytes:
    """Writes something that is no checkpoint of the run to `path`."""
    import pickle

    import torch

    from genkernels.training.checkpoint import read_checkpoint, write_checkpoint

    state = read_checkpoint(path)
    if what == "another model":
        weights = {f"other.{name}": value for name, value in state["model"].items()}
        write_checkpoint(path, {**state, "model": weights})
    elif what == "other shapes":
        write_checkpoint(path, {**state, "model": {name: value[..., None] for name, value in state["model"].items()}})
    elif what == "no model":
        write_checkpoint(path, {"weights": state["model"]})
    elif what == "another format":
        write_checkpoint(path, {**state, "format": 9})
    elif what == "a torch file":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        texts = {"empty": b"", "truncated": whole[: len(whole) // 2], "a pickle": pickle.dumps({"model": [1, 2]})}
        path.write_bytes({**texts, "noise": bytes(range(256)) * 40, "a text": b"step 3\n"}[what])


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("empty", "is cut short: 0 bytes are left"),
        ("truncated", "is cut short or was not written by genkernels: its checksum is missing"),
        ("noise", "is cut short or was not written by genkernels: its checksum is missing"),
        ("a text", "is cut short: 7 bytes are left"),
        ("a torch file", "is cut short or was not written by genkernels: its checksum is missing"),
        ("a pickle", "is cut short: "),
        ("another model", "must hold this model's weights: Missing key(s)"),
        ("other shapes", "must hold this model's weights: size mismatch"),
        ("no model", "must hold a model and its step, it holds format, weights"),
        ("another format", "must be of format 1 or 2, got 9; another version wrote it"),
    ],
)
def test_a_checkpoint_that_is_none_of_the_run(refused, run_folder, tmp_path, what, words):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    for path in copy.rglob("*.ckpt"):
        garbage(what, path, path.read_bytes())
    before = contents(copy)
    for argv in (["sample", copy], ["eval", copy], ["train", "--resume", "--out", copy, "--max-steps", "5"]):
        sentence = refused(*argv)
        assert words in sentence and f"checkpoint {copy}" in sentence and "instead" not in sentence
        assert contents(copy) == before


@pytest.mark.parametrize("what", ["empty", "text", "truncated", "pickle", "object", "other keys"])
def test_an_npz_of_garbage(refused, run_folder, tmp_path, what):
    import pickle

    path = tmp_path / "x.npz"
    np.savez(path, x=np.random.default_rng(0).normal(size=(400, 2)).astype(np.float32))
    if what == "object":
        np.savez(path, x=np.array([{"a": 1}, None], dtype=object))
    elif what == "other keys":
        np.savez(path, pictures=np.zeros((3, 2)))
    elif what == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        path.write_bytes({"empty": b"", "text": b"nothing of the kind\n", "pickle": pickle.dumps([1, 2])}[what])
    before = contents(run_folder)
    for argv in (["train", "nice", "--out", "run"], ["eval", run_folder]):
        assert f"npz:{path}" in refused(*argv, "--data", f"npz:{path}")
    assert contents(run_folder) == before


def test_a_run_that_says_nothing_of_its_model_is_damaged(refused, run_folder, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    (copy / "config.json").write_text('{"model": {}, "data": {}, "train": {}}')
    for command in ("sample", "eval"):
        assert "config.json is damaged: it must have the parts model, data and train" in refused(command, copy)


def test_what_breaks_off_is_told_in_a_sentence_too(refused, monkeypatch, capsys):
    import torch

    failures = (
        (OSError(28, "No space left on device"), "No space left on device"),
        (PermissionError(13, "Permission denied", b"a/b"), "a/b: Permission denied"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "memory ran out"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "memory ran out"),
    )
    for error, words in failures:

        def broken(arguments, error=error):
            raise error

        monkeypatch.setattr("genkernels.cli.info.run", broken)
        assert words in refused("info")


def test_a_run_of_too_much(refused):
    for extra, words in (
        ("--max-steps 100000000000000000000", "at most 1,000,000,000,000 steps"),
        ("--epochs 1e300", "at most 1,000,000,000,000 steps"),
        ("--max-steps 5 --batch-size 1000000000", "--batch-size must be at most 65,536 for 1,437 examples"),
    ):
        assert words in refused("train", "nice", "--data", "digits", *TINY, *extra.split())


def test_more_samples_than_there_is_room_for(refused, run_folder):
    words = "error: --n 1,000,000,000,000 takes 512 TB of memory, "
    assert words in refused("sample", run_folder, "--n", 10**12)
    assert "--n must be at most 4,096 on a sheet, got 5,000: give --out F.npz" in refused(
        "sample", run_folder, "--n", 5000
    )


def test_a_checkpoint_that_is_not_there(refused, run_folder):
    words = f"--checkpoint: {run_folder} has none of step 7, it has those of 2, 3"
    assert words in refused("sample", run_folder, "--checkpoint", 7) and words in refused(
        "eval", run_folder, "--checkpoint", 7
    )


def test_help_by_its_name(capsys):
    assert main(["help"]) == 0 and "usage: genkernels" in capsys.readouterr().out
    assert main(["help", "sample"]) == 0 and "--temperature" in capsys.readouterr().out


def test_what_makes_little_sense_is_told(capsys):
    pytest.importorskip("lightning")
    few = ["--max-steps", "1", "--samples", "4", "--eval-examples", "4", "--accelerator", "cpu", "--quiet"]
    argv = ["train", "nice", "--data", "digits", *TINY, *few]
    assert main([*argv, "--warmup", "1000000000", "--batch-size", "2874"]) == 0
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("--warmup 1,000,000,000 does not end within 1 steps: the largest step size is 1e-12")
    assert second.endswith("a batch of 2,874 holds each of the 1,437 examples 2 times")


def test_info_names_the_packages_that_are_missing(monkeypatch, capsys):
    monkeypatch.setattr(
        "genkernels.cli.info._EXTRAS", {"torch": "torch", "no_such_module": "nothing", "nor_this": "nil"}
    )
    assert main(["info"]) == 0
    assert "not installed: nothing, nil (pip install 'genkernels[train]')\n" in capsys.readouterr().out


def test_threads_wait_without_spinning(monkeypatch):
    """But in a benchmark, and where the user has said otherwise."""
    monkeypatch.setattr("genkernels.cli.info.run", lambda arguments: 0)
    monkeypatch.setattr("genkernels.cli.bench.run", lambda arguments: 0)
    for command, said, waits in (("bench", None, None), ("info", None, "PASSIVE"), ("info", "ACTIVE", "ACTIVE")):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        if said:
            monkeypatch.setenv("OMP_WAIT_POLICY", said)
        assert main([command]) == 0 and os.environ.get("OMP_WAIT_POLICY") == waits
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
