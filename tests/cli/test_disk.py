"""A disk that is full, or output that nobody takes: one sentence, exit code 2, and what was there is as it was."""

import contextlib
import hashlib
import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from genkernels.cli import main

pytest.importorskip("lightning")

ROOT = Path(__file__).parents[2]
TRAIN = ["train", "nice", "--data", "digits", "--set", "hidden=8", "--set", "couplings=2", "--set", "layers=1"]
TRAIN += [
    "--accelerator",
    "cpu",
    "--samples",
    "9",
    "--quiet",
    "--max-steps",
    "12",
    "--eval-every",
    "4",
    "--checkpoint-every",
    "3",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main([*TRAIN, "--out", str(out)]) == 0
    return out


@contextlib.contextmanager
def room(size: int):
    """No file can grow beyond `size` bytes; the system says so as it does of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def losses(run: Path) -> list[str]:
    return [line.split(",")[1] for line in (run / "losses.csv").read_text().splitlines()]


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["sample", "--n", "50", "--out", "a.png"], "a.png"),
        (["sample", "--n", "50", "--out", "a.npz"], "a.npz"),
        (["sample", "--n", "50"], "n50-t1-seed0.png"),
        (["eval", "--json", "a.json"], "a.json"),
        (["figure", "losses", "--out", "a.png"], "a.png"),
    ],
)
def test_what_is_written_beside_a_run(run, tmp_path, monkeypatch, capsys, argv, name):
    monkeypatch.chdir(tmp_path)
    argv = [argv[0], *(argv[1:2] + ["--run", str(run)] if argv[0] == "figure" else [str(run), *argv[1:2]]), *argv[2:]]
    earlier = Path(argv[-1]) if "--out" in argv or "--json" in argv else run / "samples" / name
    earlier.write_text("earlier")
    before = contents(run), contents(tmp_path)
    with room(64):
        assert main(argv) == 2
    err = capsys.readouterr().err
    assert err == f"genkernels: error: {earlier}: File too large\n"
    assert (contents(run), contents(tmp_path)) == before
    earlier.unlink()


@pytest.mark.parametrize("size", [30, 600, 1200, 2500, 5000, 9000, 20000])
def test_a_run_that_runs_out_of_disk_goes_on_when_there_is_room(run, tmp_path, capsys, size):
    out = tmp_path / "run"
    with room(size):
        code = main([*TRAIN, "--out", str(out)])
    err = capsys.readouterr().err
    if code:
        errors = [line for line in err.splitlines() if line.startswith("genkernels: error: ")]
        assert code == 2 and len(errors) == 1 and "File too large" in errors[0] and str(out) in errors[0], err
    assert all(line.startswith("genkernels: ") for line in err.splitlines()), err
    assert not list(out.rglob("*.tmp"))
    begun = (out / "config.json").exists()
    assert main(["train", "--out", str(out), "--resume", "--quiet"] if begun else [*TRAIN, "--out", str(out)]) == 0
    assert losses(out) == losses(run)
    held = [json.loads((folder / "metrics.json").read_text())["held_out"] for folder in (out, run)]
    assert held[0] == held[1]


@pytest.mark.parametrize("size", [30, 1200, 9000])
def test_a_resume_that_runs_out_of_disk_loses_nothing(run, tmp_path, capsys, size):
    out, whole = tmp_path / "run", tmp_path / "whole"
    longer = ["--max-steps", "20", "--warmup", "1"]
    assert main([*TRAIN, "--warmup", "1", "--out", str(out)]) == 0
    before = contents(out / "checkpoints"), contents(out)["best.ckpt"]
    with room(size):
        assert main(["train", "--out", str(out), "--resume", "--quiet", *longer]) == 2
    err = capsys.readouterr().err
    assert err.count("error: ") == 1 and "File too large" in err and "Traceback" not in err
    if size < 9000:
        assert (contents(out / "checkpoints"), contents(out)["best.ckpt"]) == before
    assert main(["train", "--out", str(out), "--resume", "--quiet", *longer]) == 0
    assert main([*TRAIN, *longer, "--out", str(whole)]) == 0
    assert losses(out) == losses(whole) and len(losses(out)) == 21


def shell(line: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = line.replace("genkernels", f"{sys.executable} -m genkernels")
    return subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_nobody_takes():
    for command in ("info", "figure"):
        done = shell(f"genkernels {command} > /dev/full")
        assert done.returncode == 2 and done.stderr.endswith("No space left on device\n"), done.stderr
        assert done.stderr.startswith("genkernels: error: ") and done.stderr.count("\n") == 1


def test_a_run_whose_stderr_nobody_reads_goes_on(tmp_path, run, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    loud = [word for word in TRAIN if word != "--quiet"]
    for name, stderr in (("closed", None), ("gone", Gone())):
        monkeypatch.setattr(sys, "stderr", stderr)
        assert main([*loud, "--out", str(tmp_path / name)]) == 0
        assert main(["sample", "nowhere"]) == 2
        monkeypatch.undo()
        assert losses(tmp_path / name) == losses(run)


def test_a_run_folder_that_is_removed_is_not_begun_anew(tmp_path, capsys, monkeypatch):
    from genkernels.training.sampling import Sheets

    out, draw = tmp_path / "run", Sheets.draw

    def removed(self, due):
        out.rename(tmp_path / "moved")
        draw(self, due)

    monkeypatch.setattr(Sheets, "draw", removed)
    assert main([*TRAIN, "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.count("error: ") == 1 and "No such file or directory" in err and "Traceback" not in err, err
    assert not list(out.rglob("*.ckpt"))


def test_samples_that_are_not_finite_leave_the_earlier_file_alone(run, tmp_path, capsys, monkeypatch):
    from genkernels.models import NICE

    sample = NICE.sample

    def overflow(self, n, *a, **k):
        x = sample(self, n, *a, **k)
        x[:broken] = float("inf")
        return x

    monkeypatch.setattr(NICE, "sample", overflow)
    for name in ("a.npz", "a.png"):
        path = tmp_path / name
        path.write_text("earlier")
        argv, broken = ["sample", str(run), "--n", "6", "--out", str(path)], 6
        assert main(argv) == 2 and path.read_text() == "earlier"
        sentence = f"no sample is finite, {path} is left alone: lower --temperature, or train longer"
        assert capsys.readouterr().err == f"genkernels: error: {sentence}\n"
        broken = 2
        assert main(argv) == 0
        assert "genkernels: 2 of 6 samples are not finite" in capsys.readouterr().err
    assert np.load(tmp_path / "a.npz")["x"].shape == (4, 1, 8, 8)
