import doctest
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import genkernels.data
from genkernels.data import NAMES, DataBundle, DataError, Form, TensorPairs, load
from genkernels.data.spec import image_side, split_options
from genkernels.data.split import derived_seed, hash64, hash_order, held_out

EMBEDDED = [name for name in NAMES if ":" not in name]


def test_import_takes_torch_and_numpy_alone():
    heavy = ["sklearn", "scipy", "PIL", "datasets", "pandas", "pyarrow", "lightning", "matplotlib"]
    code = f"import sys, genkernels.data; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_docstring_examples():
    assert doctest.testmod(genkernels.data).attempted > 0
    assert doctest.testmod(genkernels.data).failed == 0


@pytest.mark.parametrize("name", EMBEDDED)
def test_contract_of_embedded_sets(name):
    bundle = load(name)
    assert bundle.name == name and "\n" not in bundle.description
    for split in ("train", "test"):
        part = getattr(bundle, split)
        x, y = part[0]
        assert tuple(x.shape) == bundle.form.shape and type(y) is int
        assert x.dtype == (torch.uint8 if bundle.form.is_image else torch.float32)
        xs, ys = bundle.take(split, 50)
        assert xs.shape == (50, *bundle.form.shape) and ys.dtype == torch.int64
        assert all(torch.equal(xs[i], part[i][0]) and ys[i] == part[i][1] for i in range(50))
        if bundle.form.num_classes is None:
            assert not ys.any()
        else:
            assert 0 <= ys.min() and ys.max() < bundle.form.num_classes
        with pytest.raises(IndexError):
            part[len(part)]
        again = pickle.loads(pickle.dumps(part))
        assert len(again) == len(part) and torch.equal(again[7][0], part[7][0])


@pytest.mark.parametrize("name", ["digits", "photos32"])
def test_workers_see_the_same_data(name):
    part = load(name).test
    x, y = next(iter(DataLoader(part, batch_size=16, num_workers=1)))
    assert torch.equal(x, torch.stack([part[i][0] for i in range(16)]))
    assert y.tolist() == [part[i][1] for i in range(16)]


def test_take_gives_copies_and_at_most_all():
    parts = TensorPairs(torch.zeros(4, 2)), TensorPairs(torch.ones(3, 2))
    bundle = DataBundle("b", *parts, Form((2,)), "")
    x, y = bundle.take("train", 100)
    assert len(x) == len(y) == 4
    x.fill_(7.0)
    y.fill_(7)
    assert not bundle.train.tensors[0].any() and not bundle.train.tensors[1].any()
    assert bundle.take("test", 0)[0].shape == (0, 2)
    for split, n, error in (("val", 1, DataError), ("test", -1, DataError), ("test", 1.0, TypeError)):
        with pytest.raises(error):
            bundle.take(split, n)


def test_take_from_a_set_without_tensors():
    bundle = load("photos32")
    x, y = bundle.take("test", 0)
    assert x.shape == (0, 3, 32, 32) and x.dtype == torch.uint8 and y.dtype == torch.int64
    assert len(bundle.take("test", 10**6)[0]) == len(bundle.test)


@pytest.mark.parametrize(
    ("spec", "near"),
    [
        ("digit", "digits$"),
        ("Moons", "moons$"),
        ("eight-gaussians", "eight_gaussians$"),
        ("photo64", "photos64"),
        ("foldr:x/y", "folder:x/y"),
        ("HF:mnist", "hf:mnist"),
        ("ring2d", "for eight Gaussians on a circle write eight_gaussians$"),
        ("wibble", "the names: .*digits.*rings"),
        ("", "the names: "),
        ("digits:8", "digits"),
    ],
)
def test_unknown_specs_name_the_nearest(refusal, spec, near):
    refusal(spec, near)


def test_bare_paths_are_told_their_prefix(refusal, tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 2)))
    refusal(str(tmp_path), f"folder:{tmp_path}$")
    refusal(str(tmp_path / "a.npz"), f"npz:{tmp_path}/a.npz$")


def test_types_are_checked():
    with pytest.raises(TypeError, match="spec must be a str"):
        load(None)
    with pytest.raises(TypeError, match="seed must be an int"):
        load("moons", seed=1.5)


@pytest.mark.parametrize(
    ("spec", "blocked", "package"),
    [
        ("digits", "sklearn", "scikit-learn"),
        ("photos32", "sklearn", "scikit-learn"),
        ("photos32", "PIL", "pillow"),
        ("hf:mnist", "datasets", "datasets"),
    ],
)
def test_missing_package_names_the_extra(refusal, monkeypatch, spec, blocked, package):
    for module in [m for m in sys.modules if m.split(".")[0] == blocked]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, blocked, None)
    refusal(spec, rf'needs {package}.*pip install "genkernels\[train\]"')


def test_options_stand_at_the_end_and_a_question_mark_in_a_path_does_not():
    readers = {"size": image_side}
    assert split_options("s", "a/b?size=32", readers) == ("a/b", {"size": 32})
    assert split_options("s", "what?/b", readers) == ("what?/b", {})
    assert split_options("s", "what?size=1/b", readers) == ("what?size=1/b", {})
    assert split_options("s", "what?/b?size=7", readers) == ("what?/b", {"size": 7})
    for bad in ("size=0", "size=", "size=-3", "size=9.5", "size=5000", "width=3", "size=3&size=4"):
        with pytest.raises(DataError, match="^s: "):
            split_options("s", f"a?{bad}", readers)


def test_hash_is_pinned():
    # A change of these numbers changes every user's held-out part.
    assert hash64(b"") == 0xE4A6A0577479B2B4
    assert hash64(b"cat/001.png") == 0xEA8BECE1216BCA59
    assert derived_seed("moons", "train", 0) != derived_seed("moons", "test", 0)


def test_held_out_is_a_disjoint_cover_in_hash_order():
    keys = [str(i).encode() for i in range(3000)]
    train, test = held_out("s", keys, "rows")
    assert sorted([*train, *test]) == list(range(3000))
    assert abs(len(test) - 300) < 5 * (3000 * 0.09) ** 0.5
    order = hash_order(keys)
    assert [*test, *train] == order.tolist()  # the held-out hashes are the lowest
    assert abs(np.corrcoef(np.arange(3000), order)[0, 1]) < 0.1


def test_held_out_does_not_move_when_rows_are_added():
    keys = [f"{i}.png".encode() for i in range(400)]
    few, many = held_out("s", keys[::2], "rows"), held_out("s", keys, "rows")
    for side in (0, 1):
        old = {keys[::2][i] for i in few[side]}
        assert old <= {keys[i] for i in many[side]}


def test_equal_keys_stay_together_and_no_side_is_empty():
    keys = [str(i % 50).encode() for i in range(500)]
    train, test = held_out("s", keys, "rows")
    assert {keys[i] for i in train}.isdisjoint(keys[i] for i in test)
    for n in range(2, 12):
        for offset in range(40):  # so small that the threshold alone would often leave a side empty
            train, test = held_out("s", [str(offset + i).encode() for i in range(n)], "rows")
            assert len(train) and len(test) and len(train) + len(test) == n
    for keys in ([], [b"a"], [b"a"] * 5):
        with pytest.raises(DataError, match="s: a held-out part needs at least two different rows"):
            held_out("s", keys, "rows")
    # Fractions so extreme that one side would be empty still leave one row there.
    assert [len(part) for part in held_out("s", [b"a", b"b", b"c"], "rows", fraction=0.0)] == [2, 1]
    assert [len(part) for part in held_out("s", [b"a", b"b", b"c"], "rows", fraction=0.999999)] == [1, 2]
