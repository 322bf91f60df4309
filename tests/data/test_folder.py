import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from genkernels.data import Form, TensorPairs, images, load

Image = pytest.importorskip("PIL.Image")
RNG = np.random.default_rng(0)


def pixels(height=6, width=5, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def write(path, array=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = pixels() if array is None else array
    Image.fromarray(array).save(path, **options)
    return array


@pytest.fixture
def flat(tmp_path):
    """40 colour images without classes, name to pixels."""
    base = tmp_path / "pictures"
    return base, {f"{i:02d}.png": write(base / f"{i:02d}.png") for i in range(40)}


def by_bytes(arrays):
    return sorted(np.ascontiguousarray(array).tobytes() for array in arrays)


def hwc(x):
    return [image.permute(1, 2, 0).squeeze(-1).numpy() for image in x]


def test_pixels_arrive_and_parts_are_disjoint(flat):
    base, truth = flat
    bundle = load(f"folder:{base}")
    assert bundle.form == Form((3, 6, 5), 256, None)
    train, test = (hwc(part.tensors[0]) for part in (bundle.train, bundle.test))
    assert len(train) and len(test)
    assert by_bytes(train + test) == by_bytes(truth.values())
    assert not bundle.train.tensors[1].any() and bundle.train.tensors[0].is_contiguous()


def test_the_split_goes_by_name_alone(flat, tmp_path):
    base, _ = flat
    before = load(f"folder:{base}", seed=1)
    moved = tmp_path / "elsewhere" / "else"
    shutil.copytree(base, moved)
    after = load("folder:else", root=moved.parent, seed=2)
    assert torch.equal(before.test.tensors[0], after.test.tensors[0])
    assert torch.equal(before.train.tensors[0], after.train.tensors[0])
    for i in range(30):
        write(base / f"new{i}.png")
    more = load(f"folder:{base}")
    for split in ("train", "test"):
        old, new = (by_bytes(hwc(getattr(bundle, split).tensors[0])) for bundle in (before, more))
        assert set(old) <= set(new)


def test_subfolders_are_classes(tmp_path):
    truth = {}
    for label, name in enumerate(["ant", "bee", "cat"]):
        for i in range(20):
            truth[write(tmp_path / name / ("deep" if i % 2 else ".") / f"{i}.png").tobytes()] = label
    bundle = load(f"folder:{tmp_path}")
    assert bundle.form.num_classes == 3 and "3 classes" in bundle.description
    for part in (bundle.train, bundle.test):
        x, y = part.tensors
        assert [truth[np.ascontiguousarray(image).tobytes()] for image in hwc(x)] == y.tolist()
    assert set(bundle.take("train", 20)[1].tolist()) == {0, 1, 2}  # shuffled: the first n are a sample
    write(tmp_path / "loose.png")
    assert load(f"folder:{tmp_path}").form.num_classes is None


def test_one_subfolder_is_no_class(tmp_path):
    for i in range(5):
        write(tmp_path / "all" / f"{i}.png")
    assert load(f"folder:{tmp_path}").form.num_classes is None


@pytest.mark.parametrize("held", ["test", "val", "valid", "validation"])
def test_train_and_test_folders_are_honoured(tmp_path, held):
    train = [write(tmp_path / "train" / f"{i}.png") for i in range(7)]
    test = [write(tmp_path / held / f"{i}.png") for i in range(3)]
    write(tmp_path / "extra.png")
    bundle = load(f"folder:{tmp_path}")
    assert by_bytes(hwc(bundle.train.tensors[0])) == by_bytes(train)
    assert by_bytes(hwc(bundle.test.tensors[0])) == by_bytes(test)


def test_test_goes_before_val(tmp_path):
    for part, count in (("train", 4), ("test", 2), ("val", 3)):
        for i in range(count):
            write(tmp_path / part / f"{i}.png")
    assert len(load(f"folder:{tmp_path}").test) == 2


def test_classes_of_train_and_test_agree(tmp_path, refusal):
    for path in ("train/a/1", "train/b/1", "train/c/1", "test/c/1", "test/b/1"):
        write(tmp_path / f"{path}.png")
    bundle = load(f"folder:{tmp_path}")
    assert bundle.form.num_classes == 3 and sorted(bundle.test.tensors[1].tolist()) == [1, 2]
    write(tmp_path / "test" / "zebra" / "1.png")
    refusal(f"folder:{tmp_path}", "every class folder of test must be in train too, and 'zebra' is not")
    shutil.rmtree(tmp_path / "test")
    write(tmp_path / "test" / "1.png")
    assert load(f"folder:{tmp_path}").form.num_classes is None


@pytest.mark.parametrize("extension", ["png", "jpg", "jpeg", "webp", "bmp", "PNG", "JPG"])
def test_formats(tmp_path, extension):
    for i in range(4):
        write(tmp_path / f"{i}.{extension}", np.full((8, 8, 3), 40 * i + 20, dtype=np.uint8))
    bundle = load(f"folder:{tmp_path}")
    x = torch.cat([bundle.train.tensors[0], bundle.test.tensors[0]]).float()
    assert x.shape == (4, 3, 8, 8)
    assert (x.mean((1, 2, 3)).sort().values - torch.tensor([20.0, 60.0, 100.0, 140.0])).abs().max() <= 2


def test_grey_images_have_one_channel(tmp_path):
    truth = [write(tmp_path / f"{i}.png", pixels(channels=1)) for i in range(4)]
    Image.fromarray(pixels(channels=1)).convert("1").save(tmp_path / "bits.png")
    Image.fromarray(pixels(channels=1)).convert("LA").save(tmp_path / "alpha.png")
    bundle = load(f"folder:{tmp_path}")
    assert bundle.form.shape == (1, 6, 5)
    got = by_bytes(hwc(torch.cat([bundle.train.tensors[0], bundle.test.tensors[0]])))
    assert set(by_bytes(truth)) <= set(got)


def test_one_colour_image_makes_all_colour(tmp_path):
    grey = write(tmp_path / "a.png", pixels(channels=1))
    colour = write(tmp_path / "b.png")
    alpha = write(tmp_path / "c.png", np.concatenate([pixels(), pixels()[..., :1]], axis=2))
    palette = Image.fromarray(colour).quantize(8)
    palette.save(tmp_path / "d.png")
    bundle = load(f"folder:{tmp_path}")
    assert bundle.form.shape == (3, 6, 5)
    got = by_bytes(hwc(torch.cat([bundle.train.tensors[0], bundle.test.tensors[0]])))
    spread = np.repeat(grey[:, :, None], 3, axis=2)
    assert got == by_bytes([spread, colour, alpha[..., :3], np.asarray(palette.convert("RGB"))])


def test_sixteen_bit_images_are_refused(tmp_path, refusal):
    write(tmp_path / "a.png", pixels(channels=1))
    write(tmp_path / "b.png", pixels(channels=1).astype(np.uint16) * 256)
    refusal(f"folder:{tmp_path}", "must be 8 bits, grey or colour, but 'b.png' has mode 'I")


def test_sizes_must_agree_or_be_asked_for(flat, refusal):
    base, _ = flat
    write(base / "sub" / "x.png", pixels(9, 7))
    write(base / "20b.png", pixels(9, 8))
    refusal(f"folder:{base}", r"'20b.png' is 8x9 and '00.png' is 5x6 \(end the spec with \?size=S")
    bundle = load(f"folder:{base}?size=4")
    assert bundle.form.shape == (3, 4, 4) and len(bundle.train) + len(bundle.test) == 42


def test_resizing_scales_the_shorter_side_and_cuts_to_the_centre(tmp_path):
    # Three vertical bands: the middle one is as wide as the picture is high, so it alone survives.
    wide = np.zeros((32, 96, 3), dtype=np.uint8)
    wide[:, 32:64] = (10, 200, 30)
    for name, array in (("wide", wide), ("tall", wide.transpose(1, 0, 2)), ("also", wide)):
        write(tmp_path / f"{name}.png", np.ascontiguousarray(array))
    bundle = load(f"folder:{tmp_path}?size=16")
    for x in [*bundle.train.tensors[0], *bundle.test.tensors[0]]:
        assert x.shape == (3, 16, 16)
        inner = x[:, 2:-2, 2:-2].float()  # the filter reaches across the bands' edges
        assert (inner - torch.tensor([10.0, 200.0, 30.0])[:, None, None]).abs().max() <= 1


def test_resizing_to_the_own_size_changes_nothing(tmp_path):
    truth = [write(tmp_path / f"{i}.png", pixels(6, 6)) for i in range(3)]
    bundle = load(f"folder:{tmp_path}?size=6")
    got = hwc(torch.cat([bundle.train.tensors[0], bundle.test.tensors[0]]))
    assert by_bytes(got) == by_bytes(truth)


@pytest.mark.parametrize("extension", ["jpg", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_orientation_is_obeyed(tmp_path, orientation, extension):
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:, :16] = 255  # bright on the left
    turns = {1: 0, 3: 2, 6: 1, 8: 3}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for i in range(3):
        write(tmp_path / f"{i}.{extension}", np.ascontiguousarray(np.rot90(upright, turns)), exif=exif)
    bundle = load(f"folder:{tmp_path}")
    assert bundle.form.shape == (3, 16, 32)
    x = bundle.train.tensors[0][0].float()
    assert x[:, :, :14].min() > 200 and x[:, :, 18:].max() < 55


def test_hidden_files_other_files_and_links(tmp_path):
    base = tmp_path / "base"
    for i in range(3):
        write(base / f"{i}.png")
    write(base / ".hidden.png")
    write(base / ".cache" / "x.png")
    (base / "notes.txt").write_text("no image")
    write(tmp_path / "other" / "far.png")
    (base / "linked").symlink_to(tmp_path / "other")
    (base / "loop").symlink_to(base)
    bundle = load(f"folder:{base}")
    assert len(bundle.train) + len(bundle.test) == 4


def test_names_with_odd_characters(tmp_path, refusal):
    base = tmp_path / "what?now"
    names = ["a b.png", "né.png", "new\nline.png", os.fsdecode(b"\xff.png")]
    for name in names:
        write(base / name)
    assert len(load(f"folder:{base}").train) < 4
    assert load(f"folder:{base}?size=3").form.shape == (3, 3, 3)
    for name in names[2:]:
        (base / name).write_bytes(b"junk")
        refusal(f"folder:{base}", "cannot be read as an image").encode()  # printable on any terminal
        write(base / name)


def test_unreadable_folders(tmp_path, refusal, monkeypatch):
    refusal("folder:", "must name a folder")
    refusal(f"folder:{tmp_path}/none", "there is no folder")
    refusal(f"folder:{tmp_path}", "must hold images .*and holds none")
    (tmp_path / "f").write_text("x")
    refusal(f"folder:{tmp_path}/f", "must be a folder, and is a file")
    refusal(f"folder:{tmp_path}?size=big", "size must be a whole number of pixels from 1 to 4096, got 'big'")
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    write(tmp_path / "train" / "a.png")
    refusal(f"folder:{tmp_path}", "test' must hold images")
    write(tmp_path / "one" / "a.png")
    refusal(f"folder:{tmp_path}/one", "at least two different images, got 1")

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", denied)
    refusal(f"folder:{tmp_path}/one", "one' cannot be read .Permission denied")


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "bmp"])
@pytest.mark.parametrize("keep", [0, 10, 0.5])
@pytest.mark.parametrize("in_memory", [True, False])
def test_corrupt_images_are_named(tmp_path, refusal, extension, keep, in_memory, monkeypatch):
    for i in range(12):
        write(tmp_path / f"{i}.{extension}", pixels(40, 40))
    path = tmp_path / f"7.{extension}"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep == 0.5 else keep])
    said = rf"'7\.{extension}' cannot be read as an image"
    if in_memory:
        refusal(f"folder:{tmp_path}", said)
        return
    monkeypatch.setattr(images, "IN_MEMORY", 0)
    try:
        bundle = load(f"folder:{tmp_path}")
    except ValueError as error:  # where the header itself is damaged
        assert "7." in str(error)
        return
    with pytest.raises(ValueError, match=said):
        for part in (bundle.train, bundle.test):
            list(part)


def test_a_vanished_or_changed_file_is_named(flat, monkeypatch):
    base, _ = flat
    monkeypatch.setattr(images, "IN_MEMORY", 0)
    part = load(f"folder:{base}").train
    (base / part.source.name(0)).unlink()
    write(base / part.source.name(1), pixels(9, 9))
    with pytest.raises(ValueError, match="cannot be read as an image"):
        part[0]
    with pytest.raises(ValueError, match="was 5x6 at load and is now 9x9"):
        part[1]


def test_what_does_not_fit_in_memory_is_decoded_on_demand(tmp_path, monkeypatch):
    for i in range(30):
        write(tmp_path / "ab"[i % 2] / f"{i}.png", pixels(6 + i % 3, 8))
    spec = f"folder:{tmp_path}?size=6"
    held = load(spec)
    count = len(held.train) + len(held.test)
    monkeypatch.setattr(images, "IN_MEMORY", count * 3 * 6 * 6)
    assert isinstance(load(spec).train, TensorPairs)
    monkeypatch.setattr(images, "IN_MEMORY", count * 3 * 6 * 6 - 1)
    lazy = load(spec)
    assert not isinstance(lazy.train, TensorPairs)
    for split in ("train", "test"):
        n = len(getattr(held, split))
        assert len(getattr(lazy, split)) == n
        for got, want in zip(lazy.take(split, n), held.take(split, n), strict=True):
            assert torch.equal(got, want)
        with pytest.raises(IndexError):
            getattr(lazy, split)[n]
    assert torch.equal(lazy.train[-1][0], held.train[-1][0])
    again = pickle.loads(pickle.dumps(lazy.test))
    assert torch.equal(again[0][0], lazy.test[0][0])
    x, y = next(iter(DataLoader(lazy.train, batch_size=4, num_workers=1)))
    assert torch.equal(x, held.take("train", 4)[0]) and torch.equal(y, held.take("train", 4)[1])
    assert lazy.take("test", 0)[0].shape == (0, 3, 6, 6)
