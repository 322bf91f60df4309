import numpy as np
import pytest
import torch

from genkernels.data import DataError, Form, load

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (40, 6, 5, 3), dtype=np.uint8)
POINTS = RNG.normal(size=(60, 4))


@pytest.fixture
def save(tmp_path):
    def saved(**arrays):
        np.savez(tmp_path / "a.npz", **arrays)
        return f"npz:{tmp_path}/a.npz"

    return saved


def rows(x):
    return sorted(row.numpy().tobytes() for row in x)


@pytest.mark.parametrize(
    ("x", "options", "want"),
    [
        (IMAGES, "", IMAGES.transpose(0, 3, 1, 2)),
        (IMAGES.transpose(0, 3, 1, 2), "", IMAGES.transpose(0, 3, 1, 2)),
        (IMAGES[..., :1], "", IMAGES[..., :1].transpose(0, 3, 1, 2)),
        (IMAGES[..., 0], "", IMAGES[..., :1].transpose(0, 3, 1, 2)),
        (np.asfortranarray(IMAGES), "", IMAGES.transpose(0, 3, 1, 2)),
        (IMAGES[:, :3], "?layout=nchw", IMAGES[:, :3]),  # [40, 3, 5, 3]
        (IMAGES[:, :3], "?layout=nhwc", IMAGES[:, :3].transpose(0, 3, 1, 2)),
        (IMAGES[..., :2], "?layout=nhwc", IMAGES[..., :2].transpose(0, 3, 1, 2)),
    ],
)
def test_image_layouts(save, x, options, want):
    bundle = load(save(train=x[:30], test=x[30:]) + options)
    assert bundle.form == Form(want.shape[1:], 256, None)
    assert torch.equal(bundle.train.tensors[0], torch.from_numpy(want[:30].copy()))
    assert torch.equal(bundle.test.tensors[0], torch.from_numpy(want[30:].copy()))
    assert bundle.train.tensors[0].is_contiguous() and not bundle.train.tensors[1].any()


@pytest.mark.parametrize("dtype", ["<f4", "<f8", ">f4", ">f8", "f2"])
def test_points_become_float32(save, dtype):
    x = POINTS.astype(dtype)
    bundle = load(save(x_train=x[:50], x_test=x[50:]))
    assert bundle.form == Form((4,))
    assert torch.equal(bundle.train.tensors[0], torch.from_numpy(x[:50].astype(np.float32)))


@pytest.mark.parametrize("x", [IMAGES, POINTS.astype(np.float32)], ids=["images", "points"])
def test_one_array_is_split_without_overlap(save, x):
    x = np.concatenate([x, x, x])  # equal rows must stay on one side
    spec = save(x=x, y=np.arange(len(x)))
    bundle = load(spec)
    train, test = bundle.train.tensors, bundle.test.tensors
    assert set(rows(train[0])).isdisjoint(rows(test[0]))
    assert sorted(train[1].tolist() + test[1].tolist()) == list(range(len(x)))  # here labels are row numbers
    for data, label in zip((*train[0], *test[0]), (*train[1], *test[1]), strict=True):
        row = x[label].transpose(2, 0, 1) if x.ndim == 4 else x[label]
        assert np.array_equal(data.numpy(), row)
    again = load(spec, seed=9)
    assert torch.equal(again.test.tensors[0], test[0]) and torch.equal(again.test.tensors[1], test[1])


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.uint64, ">i4"])
def test_labels(save, dtype):
    y = (np.arange(40) % 7).astype(dtype)
    bundle = load(save(x_train=IMAGES[:30], x_test=IMAGES[30:], y_train=y[:30], y_test=y[30:, None]))
    assert bundle.form.num_classes == 7
    assert bundle.train.tensors[1].tolist() == y[:30].tolist()
    assert bundle.test.tensors[1].tolist() == y[30:].tolist()
    x, label = bundle.test[3]
    assert torch.equal(x, bundle.test.tensors[0][3]) and type(label) is int and label == y[33]


@pytest.mark.parametrize("key", ["grey_levels", "levels"])
def test_grey_levels(save, refusal, key):
    x = IMAGES % 17
    assert load(save(x=x, **{key: 17})).form.grey_levels == 17
    assert load(save(x=x, **{key: np.array([20])})).form.grey_levels == 20
    refusal(save(x=x, **{key: 16}), "with 16 grey levels x must lie in 0 to 15, got 16")
    for value in (1, 257, 16.0, np.array([16, 16]), "many", -3):
        refusal(save(x=x, **{key: value}), f": {key} must be one integer from 2 to 256")
    refusal(save(x=x, grey_levels=17, levels=17), "must hold grey_levels or levels, got both")


def test_relative_paths_start_at_root(save, tmp_path, monkeypatch, refusal):
    save(x=POINTS)
    assert load("npz:a.npz", root=tmp_path).name == "npz:a.npz"
    assert len(load("npz:a.npz", root=str(tmp_path)).train) > 0
    refusal("npz:a.npz", "there is no file", root=tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert load("npz:./a.npz").form.shape == (4,)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("npz:~/a.npz", root="/nowhere").form.shape == (4,)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_non_finite_points_are_counted_and_located(save, refusal, value):
    x = POINTS.copy()
    x[7, 2] = x[7, 3] = x[30, 0] = value
    refusal(save(x=x), r"x must be finite in float32, got 3 numbers that are not, the first at \[7, 2\]")
    refusal(save(train=POINTS, test=x), r"test must be finite")


@pytest.mark.parametrize(
    ("arrays", "pattern"),
    [
        ({"x": POINTS[:, 0]}, r"x must be uint8 images.*got float64 \[60\]"),
        ({"x": POINTS.astype(np.int64)}, r"got int64 \[60, 4\]"),
        ({"x": IMAGES.astype(np.float32)}, r"got float32 \[40, 6, 5, 3\]"),
        ({"x": IMAGES.reshape(40, -1)}, r"got uint8 \[40, 90\]"),
        ({"x": IMAGES > 3}, "got bool"),
        ({"x": POINTS.astype(complex)}, "got complex128"),
        ({"x": np.array(["a", "b"])}, "got <U1"),
        ({"x": np.zeros(3, dtype=[("a", "f4")])}, r"got \[\('a'"),
        ({"x": IMAGES[:0]}, r"x must hold something, got uint8 \[0, 6, 5, 3\]"),
        ({"x": POINTS[:, :0]}, "x must hold something"),
        ({"x": IMAGES[:, :3]}, r"channels either second or last, got uint8 \[40, 3, 5, 3\] .*\?layout="),
        ({"x": IMAGES[..., :2]}, "1 or 3 channels either second or last"),
        ({"x": IMAGES[:1]}, "at least two different rows, got 1"),
        ({"x": np.zeros((9, 2))}, "at least two different rows, got 1"),
        ({"pictures": IMAGES, "arr_0": IMAGES}, "must hold x, or train and test.*got 'pictures', 'arr_0'"),
        ({}, "must hold x, or .*got nothing"),
        ({"x_train": IMAGES}, "must hold either x, or .*got 'x_train'"),
        ({"test": IMAGES}, "got 'test'"),
        ({"x": IMAGES, "train": IMAGES}, "got 'x', 'train'"),
        ({"train": IMAGES, "test": IMAGES, "x_train": IMAGES}, "got 'train', 'test', 'x_train'"),
        ({"y": np.arange(4)}, "got nothing"),
        ({"train": IMAGES, "test": IMAGES[:, :5]}, r"and test must agree.*\[40, 3, 6, 5\].*\[40, 3, 5, 5\]"),
        ({"train": POINTS, "test": IMAGES}, "train and test must agree in shape and type"),
        ({"x": IMAGES, "y": np.arange(39)}, r"y must be integers \[40\].*got int64 \[39\]"),
        ({"x": IMAGES, "y": np.ones(40)}, r"y must be integers \[40\].*got float64"),
        ({"x": IMAGES, "y": np.arange(40) - 1}, r"y must lie in 0 to 2\^63 - 1, got -1 to 38"),
        ({"x": IMAGES, "y": np.arange(40).astype(np.uint64) + 2**63}, "y must lie in 0 to"),
        ({"x": IMAGES, "y_train": np.arange(40)}, "labels beside x must be y, got 'y_train'"),
        ({"train": IMAGES, "test": IMAGES, "y": np.arange(40)}, "must be y_train and y_test, got 'y'"),
        ({"train": IMAGES, "test": IMAGES, "y_test": np.arange(40)}, "y_train and y_test, got 'y_test'"),
    ],
)
def test_unusable_arrays(save, refusal, arrays, pattern):
    refusal(save(**arrays), pattern)


def test_options(save, refusal):
    spec = save(x=IMAGES)
    refusal(spec + "?layout=NHWC", "layout must be nchw or nhwc, got 'NHWC'")
    refusal(spec + "?size=3", "the options here are layout, got 'size'")
    refusal("npz:", "must name a file")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the archive was unpickled",))


@pytest.mark.parametrize("name", ["x", "y"])
def test_objects_are_never_unpickled(save, refusal, name):
    arrays = {"x": IMAGES, "y": np.arange(40)} | {name: np.array([Bomb()] * 40)}
    refusal(save(**arrays), f"the array '{name}' of .* holds Python objects")


def test_other_arrays_of_the_archive_are_not_read(save):
    assert load(save(x=POINTS, notes=np.array([Bomb()]))).form.shape == (4,)


def test_missing_and_wrong_files(refusal, tmp_path, monkeypatch):
    refusal(f"npz:{tmp_path}/none.npz", "there is no file")
    refusal(f"npz:{tmp_path}", "must be a file, and is a folder")
    refusal("npz:a\0b", "there is no file")
    refusal("npz:~no-such-user-here/a.npz", "leads nowhere")
    np.save(tmp_path / "a.npy", POINTS)
    refusal(f"npz:{tmp_path}/a.npy", "must be an archive of numpy.savez")
    (tmp_path / "empty.npz").write_bytes(b"")
    refusal(f"npz:{tmp_path}/empty.npz", "must be an archive")

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", denied)
    refusal(f"npz:{tmp_path}/a.npy", "cannot be read .*Permission denied")


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_damaged_archives_never_pass_and_never_crash(tmp_path, write):
    """Cut and flip bytes anywhere: either the very same data comes back or one sentence does."""
    path = tmp_path / "a.npz"
    write(path, train=IMAGES, test=IMAGES[:9], y_train=np.arange(40), y_test=np.arange(9))
    whole = path.read_bytes()
    want = load(f"npz:{path}").train.tensors
    rng = np.random.default_rng(1)
    refused = 0
    damaged = [whole[: int(n)] for n in rng.integers(0, len(whole), 60)]
    for place in rng.integers(0, len(whole), 300):
        damaged.append(whole[:place] + bytes([whole[place] ^ (1 << rng.integers(8))]) + whole[place + 1 :])
    for data in damaged:
        path.write_bytes(data)
        try:
            got = load(f"npz:{path}").train.tensors
        except DataError as error:
            refused += 1
            assert str(error).startswith("npz:") and "\n" not in str(error)
        else:
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert refused > 200
