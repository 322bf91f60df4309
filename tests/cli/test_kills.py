"""``genkernels train`` that is killed at any moment, in the midst of writing too, goes on to the unbroken run's losses.

``GENKERNELS_TEST_KILLS=10`` kills more often; with ``-s`` it says where each kill fell.
"""

import csv
import functools
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from genkernels.cli import main
from genkernels.training.checkpoint import list_checkpoints, read_checkpoint
from tests.processes import Command

pytest.importorskip("lightning")

KILLS = int(os.environ.get("GENKERNELS_TEST_KILLS", "2"))
STEPS = 240
TRAIN = ["train", "nice", "--data", "digits", "--set", "hidden=8", "--set", "couplings=2", "--accelerator", "cpu"]
TRAIN += ["--max-steps", str(STEPS), "--eval-every", "40", "--checkpoint-every", "30", "--seed", "3", "--samples", "9"]
TRAIN += ["--schedule", "cosine", "--quiet"]


def cut(at: int) -> None:
    """The process kills itself when the file of that number is half written, before it takes its place."""
    replace, seen = os.replace, []

    def cut_short(source, target):
        seen.append(target)
        if len(seen) == at:
            os.truncate(source, os.path.getsize(source) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = cut_short


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main([*TRAIN, "--out", str(out)]) == 0
    return facts(out)


def facts(run: Path) -> dict:
    """All that a run leaves which does not depend on when it ran."""
    with open(run / "losses.csv") as file:
        rows = [{name: cell for name, cell in row.items() if name != "seconds"} for row in csv.DictReader(file)]
    results = json.loads((run / "metrics.json").read_text())
    last, best = read_checkpoint(list_checkpoints(run / "checkpoints")[0]), read_checkpoint(run / "best.ckpt")
    weights = [[value.tolist() for value in state["model"].values()] for state in (last, best)]
    pictures = {path.name: path.read_bytes() for path in (run / "samples").iterdir()}
    return {"rows": rows, "weights": weights, "pictures": pictures} | {
        name: results[name] for name in ("held_out", "evaluations", "best", "steps")
    }


def steps_done(run: Path) -> int:
    """Whole rows of ``losses.csv``."""
    path = run / "losses.csv"
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def goes_on(run: Path, whole: dict, killed: str) -> None:
    kept = list_checkpoints(run / "checkpoints")
    begun = (run / "config.json").exists()
    line = f"killed {killed}: step {steps_done(run)}, newest checkpoint {kept[0].stem if kept else None}"
    half = sorted(path.name.split(".tmp")[0] for path in run.rglob("*.tmp"))
    assert main(["train", "--out", str(run), "--resume", "--quiet"] if begun else [*TRAIN, "--out", str(run)]) == 0
    print(f"{line}, half written {half}: {'equal' if facts(run) == whole else 'DIFFERENT'}")
    assert facts(run) == whole and not list(run.rglob("*.tmp"))


@pytest.mark.parametrize("k", range(KILLS))
def test_killed_at_a_random_moment(tmp_path, whole, k):
    draw, run = random.Random(k), tmp_path / "run"
    target = draw.randrange(1, 25) if k % 3 == 0 else draw.randrange(1, STEPS - 20)  # a third before any checkpoint
    process = Command(*TRAIN, "--out", str(run))
    while process.poll() is None and steps_done(run) < target:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr
    goes_on(run, whole, f"at {target} rows")


#: Which file is half written: config.json, losses.csv, the checkpoint of step 30, best.ckpt, a sheet, later ones.
@pytest.mark.parametrize("at", [1, 4] if KILLS < 10 else [1, 2, 3, 4, 5, 6, 12, 20, 22, 23])
def test_killed_in_the_midst_of_writing(tmp_path, whole, at):
    run = tmp_path / "run"
    process = Command(*TRAIN, "--out", str(run), before=functools.partial(cut, at))
    assert process.wait(120) == -signal.SIGKILL, process.stderr
    goes_on(run, whole, f"in file {at}")
