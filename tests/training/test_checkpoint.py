import os
import random
import stat

import pytest
import torch

from genkernels._files import write_json
from genkernels.training import checkpoint as ckpt
from genkernels.training.checkpoint import CheckpointError, read_checkpoint, write_checkpoint


@pytest.fixture
def state():
    return {
        "step": 3,
        "model": {"w": torch.arange(6.0).view(2, 3), "flag": torch.tensor(True)},
        "average": {},
        "best": [2, 1.5],
        "optimizers": {
            "model": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]}
        },
    }


def test_a_checkpoint_comes_back_and_is_an_ordinary_torch_file(tmp_path, state):
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, state)
    for back in (read_checkpoint(path), torch.load(path, weights_only=True)):
        assert back["step"] == 3 and back["best"] == [2, 1.5] and back["average"] == {} and back["format"] == 2
        assert torch.equal(back["model"]["w"], state["model"]["w"]) and back["model"]["flag"].item() is True
        assert back["optimizers"]["model"]["param_groups"][0]["betas"] == (0.9, 0.99)
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_every_truncation_is_refused(tmp_path, state):
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, state)
    whole = path.read_bytes()
    for size in [0, 1, 50, 100, len(whole) // 2, *range(len(whole) - 110, len(whole))]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="cut short|damaged"):
            read_checkpoint(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError):
        read_checkpoint(path)


def test_every_flipped_bit_is_refused(tmp_path, state):
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, state)
    whole = path.read_bytes()
    rng = random.Random(0)
    for at in [0, len(whole) - 1, *rng.sample(range(len(whole)), 150)]:
        broken = bytearray(whole)
        broken[at] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        with pytest.raises(CheckpointError):
            read_checkpoint(path)


def test_missing_foreign_and_unreadable_files_are_refused_in_a_sentence(tmp_path, state):
    with pytest.raises(CheckpointError, match="does not exist"):
        read_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(tmp_path)
    torch.save({"format": 1}, tmp_path / "plain.ckpt")
    with pytest.raises(CheckpointError, match="not written by genkernels"):
        read_checkpoint(tmp_path / "plain.ckpt")
    write_checkpoint(tmp_path / "old.ckpt", {**state, "format": 0})
    with pytest.raises(CheckpointError, match="format 1 or 2, got 0"):
        read_checkpoint(tmp_path / "old.ckpt")


def test_what_there_was_of_one_player_is_read_as_of_a_player_called_model(tmp_path):
    weights = {"w": torch.ones(2)}
    old = {
        "format": 1,
        "step": 7,
        "model": weights,
        "ema": {"updates": 7, "average": weights},
        "optimizer": {"state": {}},
    }
    write_checkpoint(tmp_path / "old.ckpt", old)
    write_checkpoint(tmp_path / "best.ckpt", {"format": 1, "step": 7, "model": weights, "ema": None})
    now, best = read_checkpoint(tmp_path / "old.ckpt"), read_checkpoint(tmp_path / "best.ckpt")
    assert now["average"]["model"]["updates"] == 7 and torch.equal(
        now["average"]["model"]["weights"]["w"], weights["w"]
    )
    assert now["optimizers"] == {"model": {"state": {}}} and best["average"] == {} and "optimizers" not in best


class Runs:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_checkpoint_never_runs_code(tmp_path, state):
    write_checkpoint(tmp_path / "evil.ckpt", {**state, "model": Runs(tmp_path / "ran")})
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, state, monkeypatch):
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, state)
    before = path.read_bytes()

    def full(value, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(path, {**state, "step": 4})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.ckpt"]


def test_files_are_as_open_as_others(tmp_path, state):
    write_checkpoint(tmp_path / "a.ckpt", state)
    (tmp_path / "b").write_text("")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.ckpt", "b")]
    assert modes[0] == modes[1]


def test_the_newest_sound_one_is_used_and_the_others_are_named(tmp_path, state):
    for step in (5, 10, 15):
        write_checkpoint(ckpt.step_path(tmp_path, step), {**state, "step": step})
    ckpt.step_path(tmp_path, 15).write_bytes(b"PK half")
    (tmp_path / "step-99.ckpt").write_text("no checkpoint's name")
    path, found, notes = ckpt.read_newest(tmp_path)
    assert found["step"] == 10 and path.name == "step-00000010.ckpt"
    assert len(notes) == 1 and "step-00000015.ckpt" in notes[0] and "cut short" in notes[0]
    for step in (5, 10):
        ckpt.step_path(tmp_path, step).write_bytes(b"")
    with pytest.raises(CheckpointError, match="00000015.*00000010.*00000005"):
        ckpt.read_newest(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        ckpt.read_newest(tmp_path / "empty")


def test_steps_are_ordered_as_numbers_and_only_the_newest_are_kept(tmp_path):
    for step in (99_999_999, 100_000_000, 5):
        ckpt.step_path(tmp_path, step).write_bytes(b"")
    ckpt.keep_newest(tmp_path, 2)
    assert [p.name for p in ckpt.list_checkpoints(tmp_path)] == ["step-100000000.ckpt", "step-99999999.ckpt"]


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "m.json", {"a": float("nan"), "b": [float("inf"), 1.5], "c": (1, tmp_path)})
    assert (tmp_path / "m.json").read_text().split() == [
        "{",
        '"a":',
        "null,",
        '"b":',
        "[",
        "null,",
        "1.5",
        "],",
        '"c":',
        "[",
        "1,",
        f'"{tmp_path}"',
        "]",
        "}",
    ]
