"""Every line of ``wrong_inputs.txt``: exit code 2, the one sentence that stands beside it, no traceback, and everything
that lay in the folder as it was. One process runs them all, among runs and data that are sound, and those that are not.
"""

import contextlib
import io
import json
import os
import pickle
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from genkernels.cli import main

pytest.importorskip("lightning")
Image = pytest.importorskip("PIL.Image")

CASES = [line.split(" => ") for line in Path(__file__).with_name("wrong_inputs.txt").read_text().splitlines() if line]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    base, before = tmp_path_factory.mktemp("place"), Path.cwd()
    os.chdir(base)
    try:
        lay_runs()
        lay_broken_runs()
        lay_archives()
        lay_pictures()
        lay_files()
    finally:
        os.chdir(before)
    return base


def lay_runs():
    """``flow``, ``pixels`` of classes, ``points``."""
    few = ["--max-steps", "2", "--samples", "4", "--eval-examples", "8", "--accelerator", "cpu", "--quiet"]
    for line in (
        "train nice --data digits --out flow --set hidden=8 --set couplings=2",
        "train gatedpixelcnn --data digits --out pixels --set width=4 --set layers=0 --class-conditional",
        "train nice --data moons --out points --set hidden=8",
    ):
        assert main([*line.split(), *few, "--no-tensorboard"]) == 0


def lay_broken_runs():
    """Copies of ``flow`` whose configuration, or whose checkpoints, are not what they were."""
    for name, content in {
        "cut": b"{",
        "nothing": b"",
        "list": b"[]",
        "parts": b'{"model": {}}',
        "bytes": b"\xff\xfe",
    }.items():
        shutil.copytree("flow", f"cfg-{name}")
        Path(f"cfg-{name}/config.json").write_bytes(content)
    for name, part, changed in (
        ("model", "model", {"name": "nise"}),
        ("own", "model", {"name": None, "class": "Mine"}),
        ("sizes", "hparams", {"hidden": 9}),
        ("argument", "hparams", {"hiden": 9}),
        ("word", "hparams", {"hidden": "many"}),
        ("hparams", "model", {"hparams": [1]}),
        ("data", "data", {"spec": "npz:gone.npz"}),
        ("nodata", "data", {"spec": None}),
        ("other", "data", {"spec": "moons"}),
        ("setting", "train", {"lr": "fast"}),
    ):
        config = json.loads(Path("flow/config.json").read_text())
        (config["model"]["hparams"] if part == "hparams" else config[part]).update(changed)
        shutil.copytree("flow", f"cfg-{name}")
        Path(f"cfg-{name}/config.json").write_text(json.dumps(config))
    sound = Path("flow/best.ckpt").read_bytes()
    for name, content in {
        "nothing": b"",
        "cut": sound[: len(sound) // 2],
        "text": b"step 3\n",
        "byte": sound[:500] + bytes([sound[500] ^ 1]) + sound[501:],
        "noise": bytes(range(256)) * 40,
        "swapped": Path("points/best.ckpt").read_bytes(),
        "gone": None,
    }.items():
        shutil.copytree("flow", f"ckpt-{name}")
        for path in list(Path(f"ckpt-{name}").rglob("*.ckpt")):
            path.unlink() if content is None else path.write_bytes(content)
    shutil.copytree("flow", "ckpt-folder")
    shutil.rmtree("ckpt-folder/checkpoints")
    Path("ckpt-folder/checkpoints").write_text("")
    Path("ckpt-folder/best.ckpt").unlink()
    Path("ckpt-folder/best.ckpt").mkdir()


def lay_archives():
    rng = np.random.default_rng(0)
    grey, y = rng.integers(0, 256, (40, 6, 5), dtype=np.uint8), np.arange(40) % 4
    points = rng.normal(size=(40, 2)).astype(np.float32)
    Path("npz").mkdir()
    for name, arrays in {
        "fine": {"x": points},
        "pics": {"x": grey},
        "complex": {"x": points * 1j},
        "flat": {"x": points[:, 0]},
        "bool": {"x": grey > 9},
        "ints": {"x": grey.astype(int)},
        "floats": {"x": grey[:, None] / 255},
        "nan": {"x": np.where(points > 1, np.nan, points)},
        "inf": {"x": np.where(points > 1, np.inf, points)},
        "empty": {"x": points[:0]},
        "one": {"x": points[:1]},
        "equal": {"x": np.repeat(points[:1], 40, 0)},
        "times": {"x": 1.7e9 + 60 * rng.random((40, 2))},
        "wide": {"x": rng.normal(size=(40, 7)).astype(np.float32)},
        "keys": {"pictures": grey},
        "single": {"x": grey[..., :3]},
        "depth": {"x": grey[..., None].repeat(2, 3)},
        "cube": {"x": grey[:, None, :3, :3].repeat(3, 1)},
        "both": {"x": points, "x_train": points},
        "half": {"x_train": points},
        "unlike": {"x_train": points, "x_test": points[:, :1]},
        "short": {"x": points, "y": y[:9]},
        "minus": {"x": points, "y": y - 1},
        "real": {"x": points, "y": y / 2},
        "mixed": {"x": points, "y_train": y},
        "strange": {"x_train": points, "x_test": points, "y_train": y, "y_test": y + 1},
        "levels": {"x": grey, "grey_levels": 300},
        "level": {"x": grey, "grey_levels": 1},
        "words": {"x": grey, "grey_levels": "many"},
        "above": {"x": grey, "grey_levels": 16},
        "twice": {"x": grey, "grey_levels": 256, "levels": 256},
        "objects": {"x": np.array([{"a": 1}, None], dtype=object)},
    }.items():
        np.savez(f"npz/{name}.npz", **arrays)
    np.save("npz/plain.npy", points)
    whole = Path("npz/fine.npz").read_bytes()
    for name, content in {
        "cut": whole[:200],
        "nothing": b"",
        "text": b"no array\n",
        "pickle": pickle.dumps([1]),
    }.items():
        Path(f"npz/{name}.npz").write_bytes(content)


def lay_pictures():
    """Folders that are named after what is wrong in them."""
    rng = np.random.default_rng(0)

    def save(path, *shape):
        Path(path).parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)

    for folder in ("pics", "deep", "junk", "sizes", "alike/train_a", "alike/test_b"):
        for i in range(6):
            save(f"{folder}/{i}.png", 6, 5)
    for i in range(6):
        save(f"odd/{i}.png", 15, 15)
    Image.fromarray(rng.integers(0, 65536, (6, 5), dtype=np.uint16)).save("deep/x.png")
    Path("junk/x.png").write_text("no picture")
    save("sizes/x.png", 7, 5)
    save("lone/x.png", 6, 5)
    for i in range(3):
        save(f"cutpics/{i}.png", 60, 50)
    Path("cutpics/2.png").write_bytes(Path("cutpics/2.png").read_bytes()[:300])
    for folder, file in (("zero", "x.png"), ("none", "x.txt"), ("hole", None), ("full", "mine.txt")):
        Path(folder).mkdir()
        if file:
            Path(folder, file).write_text("")
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 2:6] = 255
    for name, pixels in {"grey": mask // 2, "small": mask[:4], "black": 0 * mask, "white": mask | 255}.items():
        Image.fromarray(pixels).save(f"{name}.png")
    np.save("cube.npy", np.zeros((3, 8, 8)))
    np.save("half.npy", np.full((8, 8), 0.5))


def lay_files():
    for name, text in {
        "file.txt": "text",
        "text.npy": "text",
        "text.png": "text",
        "nonsense.json": "{lr: 1}",
        "list.json": "[1]",
        "part.json": '{"train": 3}',
        "nomodel.json": '{"train": {"max_steps": 1}}',
        "mine.json": '{"train": {"lrr": 1}}',
        "value.json": '{"train": {"max_steps": "many"}}',
        "badmodel.json": '{"model": {"name": "nice", "hparams": {"hiden": 3}}, "data": {"spec": "digits"}}',
        "module_of_mine.py": "x = 3\ndef fails():\n    raise ValueError('of mine')\ndef few():\n    return 3\n",
    }.items():
        Path(name).write_text(text)


def contents() -> dict[str, tuple[int, int]]:
    paths = [os.path.join(folder, name) for folder, below, files in os.walk(".") for name in (*below, *files)]
    return {path: ((stat := os.lstat(path)).st_size, stat.st_mtime_ns) for path in paths}


def test_there_are_enough_of_them():
    assert len({line for line, _ in CASES}) == len(CASES) >= 230


@pytest.mark.parametrize(("line", "words"), CASES, ids=[line for line, _ in CASES])
def test_a_wrong_input(place, monkeypatch, line, words):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delenv("GENKERNELS_DEBUG", raising=False)
    before, out, err = contents(), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(shlex.split(line))
    said = err.getvalue()
    assert (code, out.getvalue()) == (2, "") and contents() == before, said
    assert said.startswith("genkernels: error: ") and said.count("\n") == 1 and said.endswith("\n"), said
    rest = said.removeprefix("genkernels: error: ")
    for part in words.split("…"):
        assert part in rest, said
        rest = rest[rest.index(part) + len(part) :]
    assert "…" in words or rest == "\n", said
