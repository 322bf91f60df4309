import io
import pickle

import numpy as np
import pytest
import torch

from genkernels.data import Form, TensorPairs, images, load
from tests.data.pngs import png

datasets = pytest.importorskip("datasets")
Image = pytest.importorskip("PIL.Image")
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Nothing here may depend on a network; loading local files needs none."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def encoded(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def arrays(count, *shape):
    return [RNG.integers(0, 256, shape or (6, 5, 3), dtype=np.uint8) for _ in range(count)]


def table(pictures, image="image", **columns):
    """A data set of encoded images; a column's value may be (values, feature)."""
    features = {image: datasets.Image()}
    data = {image: [encoded(x) if isinstance(x, np.ndarray) else x for x in pictures]}
    for name, (values, feature) in columns.items():
        data[name], features[name] = values, feature
    return datasets.Dataset.from_dict(data, features=datasets.Features(features))


@pytest.fixture
def hub(monkeypatch):
    """Let `load_dataset` answer with the given splits, and note what it was asked."""

    def serve(**splits):
        asked = []

        def load_dataset(*args, **kwargs):
            asked.append((args, kwargs))
            return datasets.DatasetDict(splits)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return serve


def hwc(x):
    return [image.permute(1, 2, 0).squeeze(-1).numpy() for image in x]


def same(x, pictures):
    return len(x) == len(pictures) and all(map(np.array_equal, hwc(x), pictures))


def in_bytes(pictures):
    return sorted(np.ascontiguousarray(x).tobytes() for x in pictures)


def test_train_and_test_splits(hub):
    train, test = arrays(7), arrays(4)
    label = datasets.ClassLabel(names=["a", "b", "c"])
    labels = [0, 1, 2, 1, 0, 1, 0], [1, 0, 1, 0]
    asked = hub(train=table(train, label=(labels[0], label)), test=table(test, label=(labels[1], label)))
    bundle = load("hf:owner/name:plain", root="/cache")
    assert asked == [(("owner/name", "plain"), {"cache_dir": "/cache"})]
    assert bundle.form == Form((3, 6, 5), 256, 3)
    assert same(bundle.train.tensors[0], train) and same(bundle.test.tensors[0], test)
    assert (bundle.train.tensors[1].tolist(), bundle.test.tensors[1].tolist()) == labels
    assert bundle.test[1][1] == 0 and type(bundle.test[1][1]) is int


def test_names_without_configuration(hub):
    asked = hub(train=table(arrays(9)))
    load("hf:mnist")
    assert asked == [(("mnist", None), {"cache_dir": None})]


@pytest.mark.parametrize(
    ("names", "held"),
    [
        (["train", "test"], "test"),
        (["train", "validation"], "validation"),
        (["train", "validation", "test"], "test"),
        (["train", "dev", "extra"], "dev"),
    ],
)
def test_held_out_split_by_name(hub, names, held):
    pictures = {name: arrays(3) for name in names}
    hub(**{name: table(x) for name, x in pictures.items()})
    bundle = load("hf:x")
    assert same(bundle.train.tensors[0], pictures["train"]) and same(bundle.test.tensors[0], pictures[held])
    assert bundle.form.num_classes is None and not bundle.train.tensors[1].any()


@pytest.mark.parametrize("only", ["train", "test", "everything"])
def test_a_single_split_is_divided_without_overlap(hub, only):
    pictures = arrays(60)
    pictures += pictures[:20]  # equal images must stay on one side
    rows = datasets.Value("int32")
    hub(**{only: table(pictures, label=(list(range(80)), rows))})
    bundle = load("hf:x", seed=1)
    train, test = bundle.train.tensors, bundle.test.tensors
    assert set(in_bytes(hwc(train[0]))).isdisjoint(in_bytes(hwc(test[0])))
    assert sorted([*train[1].tolist(), *test[1].tolist()]) == list(range(80))
    for x, y in (train, test):
        assert same(x, [pictures[i] for i in y])
    assert torch.equal(load("hf:x", seed=2).test.tensors[0], test[0])


def test_image_column_by_type_and_name(hub):
    pictures, other = arrays(5), arrays(5)
    both = table(pictures, image="img").add_column("image_id", list(range(5)))
    hub(train=both, test=both)
    assert same(load("hf:x").test.tensors[0], pictures)
    two = table(pictures, mask=([encoded(x) for x in other], datasets.Image()))
    hub(train=two.select_columns(["mask", "image"]), test=two)
    assert same(load("hf:x").train.tensors[0], pictures)
    hub(train=table(pictures, image="scan"), test=table(pictures, image="scan"))
    assert same(load("hf:x").train.tensors[0], pictures)


def test_label_column_by_name_and_type(hub):
    few, many = datasets.ClassLabel(num_classes=2), datasets.ClassLabel(num_classes=9)
    zeros, ones = [0] * 4, [1] * 4
    cases = [
        ({"coarse_label": (zeros, few), "fine_label": (ones, many)}, ("1",)),
        ({"coarse_label": (zeros, few), "label": (ones, many)}, ("1",)),
        ({"kind": (ones, many), "size": ([5] * 4, datasets.Value("int64"))}, ("1",)),
        ({"label": (["x"] * 4, datasets.Value("string")), "y": ([3, 1, 1, 1], datasets.Value("uint8"))}, ("1", "3")),
        ({"label": ([0.5] * 4, datasets.Value("float32"))}, None),
        ({"label": ([[1, 2]] * 4, datasets.Sequence(datasets.Value("int64")))}, None),
        ({"id": ([7] * 4, datasets.Value("int64"))}, None),
        ({"label": ([0, 1, -1, 1], many)}, None),
        ({"label": ([0, 1, None, 1], datasets.Value("int64"))}, None),
    ]
    for columns, want in cases:
        hub(train=table(arrays(4), **columns))
        assert load("hf:x").classes == want, columns


def test_labels_hidden_in_the_test_split_are_left_out_of_both(hub):
    label = datasets.ClassLabel(num_classes=3)
    hub(train=table(arrays(3), label=([0, 1, 2], label)), test=table(arrays(2), label=([-1, -1], label)))
    bundle = load("hf:x")
    assert bundle.form.num_classes is None and bundle.train.tensors[1].tolist() == [0, 0, 0]


def test_sizes_and_grey(hub, refusal):
    hub(train=table([*arrays(3, 4, 4), *arrays(1, 5, 4)]), test=table(arrays(2, 4, 4)))
    refusal("hf:x", r"'train\[3\]' is 4x5 and 'train\[0\]' is 4x4")
    bundle = load("hf:x:config?size=8")
    assert bundle.form.shape == (1, 8, 8)
    hub(train=table(arrays(3, 4, 4)), test=table([*arrays(1, 4, 4), *arrays(1, 4, 4, 3)]))
    assert load("hf:x").form.shape == (3, 4, 4)


@pytest.mark.parametrize("cell", [None, (b"junk", None), (None, "/none.png")])
def test_broken_cells_are_named(hub, refusal, cell):
    cell = cell and dict(zip(("bytes", "path"), cell, strict=True))
    hub(train=table([*arrays(3), cell]))
    refusal("hf:x", r"'train\[3\]' cannot be read as an image")


def test_unusable_sets(hub, refusal):
    refusal("hf:", "must name a data set")
    refusal("hf:x?crop=3", "the options here are size, got 'crop'")
    text = datasets.Dataset.from_dict({"text": ["a", "b"]})
    hub(train=text)
    refusal("hf:x", r"a column of type Image is needed, got 'text' \(Value\)")
    hub(left=table(arrays(2)), right=table(arrays(2)))
    refusal("hf:x", "one of the splits must be called 'train', got 'left', 'right'")
    hub(train=table(arrays(2)), test=table([]))
    refusal("hf:x", "the split 'test' must hold images, and is empty")


def test_a_revision(hub, refusal, tmp_path, monkeypatch):
    part = table(arrays(4))
    asked = hub(train=part, test=part)
    for spec, args, revision in (
        ("hf:owner/name@v1.2", ("owner/name", None), "v1.2"),
        ("hf:owner/name@refs/pr/3:plain?size=8", ("owner/name", "plain"), "refs/pr/3"),
    ):
        bundle = load(spec)
        assert asked.pop() == (args, {"cache_dir": None, "revision": revision}) and bundle.name == spec
        assert bundle.description.startswith(f"owner/name of the Hugging Face Hub at {revision}, 3x")
    refusal("hf:owner/name@", "a branch, a tag or a commit must stand after @, got nothing")
    refusal("hf:@main", "must name a data set")
    refusal("hf:owner/name:plain@main", "the revision must stand before the configuration, NAME@REVISION:CONFIG")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a@b").mkdir()
    (tmp_path / "a").mkdir()
    bundle = load("hf:a@b")
    assert asked.pop() == (("a@b", None), {"cache_dir": None}) and "the local folder 'a@b'" in bundle.description
    refusal("hf:a@v1", "a local folder has no revisions, got 'v1' of 'a'")
    assert asked == []


def test_what_takes_long_is_told(hub):
    hub(train=table(arrays(70)))
    told = []
    load("hf:x", progress=lambda *args: told.append(args))
    expected = [(what, done, 70) for what in ("looking at", "dividing", "decoding") for done in (0, 32, 64)]
    assert told == expected


def test_no_network_is_one_sentence(refusal, tmp_path):
    said = "the Hugging Face Hub cannot be reached, and the cache does not hold 'no-such-owner/no-such-set'"
    refusal("hf:no-such-owner/no-such-set", said, root=tmp_path)


def test_other_failures_are_one_sentence(refusal, monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ValueError("Config name is missing.\nPlease pick one.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    refusal("hf:x", r"datasets cannot load 'x' \(ValueError: Config name is missing\)$")


def test_a_local_image_folder(tmp_path):
    """Through the real `load_dataset`; here the cells hold paths and no bytes."""
    truth = {}
    for split, count in (("train", 4), ("test", 2)):
        for label, name in enumerate(["ant", "bee"]):
            for x in arrays(count):
                file = tmp_path / "set" / split / name / f"{len(truth)}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(x).save(file)
                truth[x.tobytes()] = label
    bundle = load(f"hf:{tmp_path}/set", root=tmp_path / "cache")
    assert (len(bundle.train), len(bundle.test), bundle.form.num_classes) == (8, 4, 2)
    for part in (bundle.train, bundle.test):
        x, y = part.tensors
        assert [truth[np.ascontiguousarray(image).tobytes()] for image in hwc(x)] == y.tolist()
    assert (tmp_path / "cache").is_dir()


def test_local_parquet_decoded_on_demand(tmp_path, monkeypatch):
    pictures = arrays(40)
    label = datasets.ClassLabel(num_classes=4)
    (tmp_path / "set").mkdir()
    table(pictures, label=([i % 4 for i in range(40)], label)).to_parquet(tmp_path / "set" / "train.parquet")
    spec = f"hf:{tmp_path}/set"
    held = load(spec, root=tmp_path / "cache")
    assert isinstance(held.train, TensorPairs) and held.form.num_classes == 4
    monkeypatch.setattr(images, "IN_MEMORY", 0)
    lazy = load(spec, root=tmp_path / "cache")
    assert not isinstance(lazy.train, TensorPairs)
    for split in ("train", "test"):
        part = pickle.loads(pickle.dumps(getattr(lazy, split)))
        x, y = getattr(held, split).tensors
        assert len(part) == len(x)
        assert all(torch.equal(part[i][0], x[i]) and part[i][1] == y[i] for i in range(len(x)))


def test_what_the_labels_are_not(hub, refusal):
    """Classes without an example are none; labels that cannot be used, and parts among the classes, are told."""
    label = datasets.ClassLabel(names=["ant", "bee", "cat", "dog"])
    hub(train=table(arrays(4), label=([3, 1, 3, 1], label)), test=table(arrays(2), label=([1, 3], label)))
    bundle = load("hf:x")
    assert bundle.classes == ("bee", "dog") and bundle.train.tensors[1].tolist() == [1, 0, 1, 0]
    assert bundle.notes == ("classes without an example are left out: ant, cat",)
    hub(train=table(arrays(4), label=([3, 1, 3, 1], label)), test=table(arrays(2), label=([1, 2], label)))
    bundle = load("hf:x")
    assert bundle.classes is None and not bundle.test.tensors[1].any()
    assert bundle.notes == ("labels are left out: 'test' has the classes cat, and 'train' has not",)
    hub(train=table(arrays(3), label=([0, 1, -1], label)))
    assert load("hf:x").notes == ("labels are left out: some of the column 'label' are missing or negative",)
    parts = datasets.ClassLabel(names=["Test", "Train"])
    hub(train=table(arrays(4), label=([0, 1, 0, 1], parts)))
    refusal("hf:x", "'Train' and 'Test', classes of the column 'label', look like parts to train and to test on")


def test_pictures_of_a_hub_are_looked_at_as_files_are(hub, refusal):
    grey = [np.repeat(x[:, :, None], 3, axis=2) for x in arrays(4, 6, 5)]
    same = table(grey)
    hub(train=same, test=same)
    assert sorted(note.split(":")[0] for note in load("hf:x").notes) == [
        "4 of the 4 held-out examples are among those to train on too",
        "8 of 8 pictures are grey in three equal channels",
    ]
    deep = {"bytes": png(RNG.bytes(180), 5, 6, 2, bits=16), "path": None}
    hub(train=table([*arrays(2), deep]))
    refusal("hf:x", r"'train\[2\]' has mode 'RGB' at 16 bits")
