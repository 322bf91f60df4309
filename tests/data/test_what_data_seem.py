"""Data that are not what they seem are told or refused; data that changed have another digest."""

import io
import shutil

import numpy as np
import pytest
import torch

from genkernels.data import images, load
from tests.data.pngs import chunk, png

Image = pytest.importorskip("PIL.Image")
RNG = np.random.default_rng(0)


def pixels(height=6, width=5, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def write(path, array=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels() if array is None else array).save(path, **options)


def fill(base, **counts):
    """Pictures in folders, ``a__b=3``: three in ``a/b``."""
    for name, count in counts.items():
        for i in range(count):
            write(base / name.replace("__", "/") / f"{i}.png")
    return f"folder:{base}"


@pytest.fixture
def save(tmp_path):
    def saved(**arrays):
        np.savez(tmp_path / "a.npz", **arrays)
        return f"npz:{tmp_path}/a.npz"

    return saved


# --- folders that are parts, and folders that are classes -----------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "test"),
    [
        *(("Train", "Test"), ("TRAIN", "VAL"), ("train", "Test"), ("training", "testing"), ("train", "eval")),
        *(("train", "dev"), ("train", "validate"), ("train", "holdout"), ("train_images", "test_images")),
        *(("Training Set", "held-out"), ("train2017", "val2017")),
    ],
)
@pytest.mark.parametrize("loose", [False, True])
def test_parts_are_known_by_many_names(tmp_path, train, test, loose):
    spec = fill(tmp_path, **{train: 5, test: 3})
    if loose:
        write(tmp_path / "loose.png")
    bundle = load(spec)
    assert (len(bundle.train), len(bundle.test), bundle.form.num_classes) == (5, 3, None)
    assert bundle.notes == ((f"{train!r} and {test!r} alone are read, and not loose.png",) if loose else ())


@pytest.mark.parametrize(
    ("folders", "named"),
    [
        (["trainA", "testA"], "'trainA' and 'testA'"),
        (["trainset", "testset"], "'trainset' and 'testset'"),
        (["Train", "train", "test"], "'Train' and 'test'"),
        (["train", "test", "Test"], "'train' and 'Test'"),
        (["cat__train", "cat__test", "dog__train", "dog__test"], "'train' and 'test', in '.*cat'"),
        (["mnist__Train", "mnist__Test"], "'Train' and 'Test', in '.*mnist'"),
        (["x_train", "x_test"], "'x_train' and 'x_test'"),
        (["test", "val"], "'test' and 'val'"),
    ],
)
def test_what_looks_like_parts_is_never_taken_for_classes(tmp_path, refusal, folders, named):
    spec = fill(tmp_path, **dict.fromkeys(folders, 2))
    refusal(spec, f"{named}.* look like parts to train and to test on and not like classes")


def test_classes_may_be_called_train_among_others(tmp_path):
    spec = fill(tmp_path, bicycle=3, car=3, train=3, test_tube=3, zeppelin=3)
    assert load(spec).classes == ("bicycle", "car", "test_tube", "train", "zeppelin")


def test_a_folder_above_the_classes_is_passed_over(tmp_path):
    bundle = load(fill(tmp_path, train__cat=20, train__dog=20))
    assert bundle.classes == ("cat", "dog") and "2 classes (cat, dog)" in bundle.description
    assert len(bundle.train) + len(bundle.test) == 40
    bundle = load(fill(tmp_path / "two", train__data__cat=3, train__data__dog=3, test__data__dog=2))
    assert bundle.classes == ("cat", "dog") and bundle.test.tensors[1].tolist() == [1, 1]


def test_a_loose_file_that_takes_the_classes_away_is_named(tmp_path):
    spec = fill(tmp_path, cat=3, dog=3)
    write(tmp_path / "loose.png")
    bundle = load(spec)
    assert bundle.classes is None and bundle.notes == ("no classes: 'loose.png' lies in no class folder",)


def test_files_left_out_are_counted(tmp_path, refusal):
    spec = fill(tmp_path, **{"a": 3})
    for name in ("b.jfif", "c.tif", "d.TIF", "e.gif", "README", ".hidden"):
        (tmp_path / "a" / name).write_bytes(b"")
    (note,) = load(spec).notes
    assert note == f"files of {str(tmp_path)!r} left out for their suffix: 2 .tif, 1 .gif, 1 .jfif, 1 no suffix"
    for path in (tmp_path / "a").glob("*.png"):
        path.unlink()
    refusal(spec, r"and holds none \(left out for their suffix: 2 .tif")


# --- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("colour", "channels", "mode"), [(2, 3, "RGB"), (4, 2, "(LA|RGBA)"), (6, 4, "RGBA"), (0, 1, "I;16")]
)
def test_sixteen_bits_are_refused_whatever_the_colour(tmp_path, refusal, colour, channels, mode):
    write(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(png(RNG.bytes(2 * channels * 30), 5, 6, colour, bits=16))
    refusal(f"folder:{tmp_path}", f"must be 8 bits, grey or colour, but 'b.png' has mode '{mode}' at 16 bits")


def exif_chunk(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return chunk(b"eXIf", exif.tobytes()[6:])


@pytest.mark.parametrize("where", ["before", "after", "none"])
def test_a_png_is_turned_as_its_exif_block_says(tmp_path, where):
    upright = np.zeros((4, 8, 3), dtype=np.uint8)
    upright[:, :4] = 255  # bright on the left
    stored = upright if where == "none" else np.ascontiguousarray(np.rot90(upright))
    chunks = {} if where == "none" else {where: chunk(b"tEXt", b"Software\0x") + exif_chunk(6)}
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(stored.tobytes(), stored.shape[1], stored.shape[0], 2, **chunks))
    bundle = load(f"folder:{tmp_path}")
    assert bundle.form.shape == (3, 4, 8)
    assert torch.equal(bundle.train.tensors[0][0], torch.from_numpy(upright).permute(2, 0, 1))


def test_transparency_of_every_kind_is_dropped_and_told(tmp_path):
    colour, grey = np.full((6, 5, 3), (10, 200, 30), dtype=np.uint8), np.full((6, 5), 77, dtype=np.uint8)
    clear = np.zeros((6, 5, 1), dtype=np.uint8)
    for name in "abcdef":
        write(tmp_path / "colour" / f"{name}.png", pixels())
    write(tmp_path / "colour" / "rgba.png", np.concatenate([colour, clear], axis=2))
    write(tmp_path / "colour" / "rgb.png", colour, transparency=(10, 200, 30))
    palette = Image.fromarray(colour).quantize(4)
    palette.save(tmp_path / "colour" / "palette.png", transparency=0)
    Image.fromarray(np.stack([grey, clear[..., 0]], axis=2)).save(tmp_path / "grey.png")
    bundle = load(f"folder:{tmp_path}/colour")
    assert bundle.notes == (
        "3 of 9 pictures have an alpha channel or a transparent colour, which is dropped: the colours beneath are kept",
    )
    x = torch.cat([bundle.train.tensors[0], bundle.test.tensors[0]])
    assert (x == torch.tensor([10, 200, 30], dtype=torch.uint8)[:, None, None]).flatten(1).all(1).sum() == 3
    for name in ("1", "2"):
        write(tmp_path / "grey" / f"{name}.png", grey)
    shutil.move(tmp_path / "grey.png", tmp_path / "grey" / "la.png")
    write(tmp_path / "grey" / "l.png", grey, transparency=77)
    bundle = load(f"folder:{tmp_path}/grey")
    assert bundle.form.shape[0] == 1 and "2 of 4 pictures have an alpha channel" in bundle.notes[0]
    assert (bundle.train.tensors[0] == 77).all()


@pytest.mark.parametrize("extension", ["png", "webp"])
def test_of_several_frames_the_first_is_taken_and_told(tmp_path, extension):
    frames = [Image.fromarray(np.full((8, 8, 3), level, dtype=np.uint8)) for level in (0, 120, 240)]
    for i in range(3):
        frames[0].save(tmp_path / f"{i}.{extension}", save_all=True, append_images=frames[1:], lossless=True)
    bundle = load(f"folder:{tmp_path}")
    assert "3 of 3 pictures have several frames: the first is taken" in bundle.notes
    assert not bundle.train.tensors[0].any()


def test_few_bits_and_enlarged_pictures_are_told(tmp_path):
    for i in range(3):
        Image.fromarray(pixels(6, 6, 1)).convert("1").save(tmp_path / f"{i}.png")
        (tmp_path / f"four{i}.png").write_bytes(png(RNG.bytes(18), 6, 6, 0, bits=4))
    assert load(f"folder:{tmp_path}").notes == (
        "6 of 6 pictures have fewer than 8 bits a pixel: bits/dim count 256 grey levels all the same",
    )
    write(tmp_path / "big.png", pixels(9, 9, 1))
    assert (
        "6 of 7 pictures have less than 8 pixels a side and are enlarged: bits/dim do not compare with those of real "
        "ones"
    ) in load(f"folder:{tmp_path}?size=8").notes


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("how", ["rgb", "palette", "one colour", "colour"])
def test_grey_pictures_in_three_channels_are_told(tmp_path, monkeypatch, how, in_memory):
    for i in range(10):
        picture = Image.fromarray(pixels(channels=1))
        picture = picture.convert("P" if how == "palette" else "RGB" if how == "rgb" else "L")
        picture.save(tmp_path / f"{i}.png")
    for i in range({"one colour": 1, "colour": 11}.get(how, 0)):
        write(tmp_path / f"colour{i}.png")
    if not in_memory:
        monkeypatch.setattr(images, "IN_MEMORY", 0)
    bundle = load(f"folder:{tmp_path}")
    assert bundle.form.shape == (3, 6, 5)
    many = {"one colour": 11, "colour": 21}.get(how, 10)
    said = f"10 of {many} pictures are grey in three equal channels: bits/dim do not compare with those of one channel"
    assert [said in note for note in bundle.notes] == ([] if how == "colour" else [True])


def test_held_out_pictures_that_are_trained_on_too_are_counted(tmp_path, save):
    spec = fill(tmp_path, train=6, test=4)
    assert load(spec).notes == ()
    for i in range(2):
        shutil.copy(tmp_path / "train" / f"{i}.png", tmp_path / "test" / f"again{i}.png")
    assert load(spec).notes == ("2 of the 6 held-out examples are among those to train on too",)
    x = RNG.normal(size=(30, 2))
    assert load(save(train=x[:20], test=x[17:])).notes == (
        "3 of the 13 held-out examples are among those to train on too",
    )


# --- archives -------------------------------------------------------------------------------------------------------

GREY = RNG.integers(0, 256, (520, 8, 8), dtype=np.uint8)


@pytest.mark.parametrize(
    ("labels", "names", "told"),
    [
        (np.arange(1, 27), [str(i) for i in range(1, 27)], "26 classes (1, 2, 3, 4, …, 26)"),
        ([3, 700], ["3", "700"], "2 classes (3, 700)"),
        ([5, 2 * 10**9], ["5", "2000000000"], "2 classes (5, 2000000000)"),
        ([4], ["4"], "1 class (4)"),
        ([0, 1, 2], ["0", "1", "2"], "3 classes;"),
    ],
)
def test_classes_are_the_labels_that_occur(save, labels, names, told):
    y = np.resize(np.array(labels), 520)
    bundle = load(save(x=GREY, y=y))
    assert list(bundle.classes) == names and bundle.form.num_classes == len(names) and told in bundle.description
    where = {row.tobytes(): str(label) for row, label in zip(GREY, y, strict=True)}
    for part in (bundle.train, bundle.test):
        x, numbers = part.tensors
        assert [where[row.numpy().tobytes()] for row in x] == [names[k] for k in numbers]


def test_a_class_that_only_the_test_part_has_is_refused(save, refusal):
    y = np.arange(520) % 3
    refusal(
        save(x_train=GREY, x_test=GREY[:4], y_train=y, y_test=[0, 1, 2, 7]),
        "every class of y_test must be in y_train too, and 7 is not",
    )


def test_a_class_that_is_held_out_whole_is_known(save):
    bundle = load(save(x=GREY, y=np.arange(520)))
    assert set(bundle.untrained) == {bundle.classes[k] for k in bundle.test.tensors[1]}


STAMPS = 1.7e9 + RNG.random(5000) * 60


@pytest.mark.parametrize(
    ("column", "counts"),
    [
        (STAMPS, r"of 5,000 distinct values of column 1 of x, .* leaves 1:"),
        (1e8 + np.arange(4509.0), r"of 4,509 .* leaves 56\d:"),
        (RNG.random(5000) * 1e-60, r"of 5,000 .* leaves 1:"),
        (np.repeat(1.7e9 + 60 * np.arange(500.0), 10), r"of 500 .* leaves 23\d:"),
    ],
)
def test_columns_that_float32_merges_are_refused(save, refusal, column, counts):
    x = np.stack([RNG.normal(size=len(column)), column], axis=1)
    refusal(save(x=x), counts)
    refusal(save(train=x[:, :1].repeat(2, 1), test=x), "column 1 of test")


@pytest.mark.parametrize(
    "column",
    [
        RNG.normal(size=100_000),
        1000 + RNG.normal(size=50_000),
        np.round(RNG.normal(size=20_000) * 5000),
        1e6 + RNG.normal(size=50_000) * 1e4,
        np.append(RNG.normal(size=5000), 1e30),
        STAMPS - 1.7e9,
        STAMPS.astype(np.float32),
    ],
)
def test_columns_that_float32_holds_pass(save, column):
    x = np.stack([RNG.normal(size=len(column)).astype(column.dtype), column], axis=1)
    assert load(save(x=x)).form.shape == (2,)


def test_columns_without_a_density_are_told(save):
    x = RNG.normal(size=(1000, 3))
    x[:, 1] = 2.5
    (note,) = load(save(x=x)).notes
    assert note.startswith("column 1 of x has 1 distinct value: such data have no density")
    x[:, 0] = RNG.integers(0, 17, 1000)
    assert (
        load(save(train=x, test=x[:5] + 9))
        .notes[0]
        .startswith("column 0 of train has 17 distinct values, and 1 more have few: such data")
    )
    assert load(save(x=RNG.normal(size=(1000, 3)))).notes == ()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_one_picture_is_not_many_grey_ones(save, refusal, channels):
    sentence = refusal(
        save(x=RNG.integers(0, 256, (48, 64, channels), dtype=np.uint8)), f"one picture of {channels} channels"
    )
    assert f"got uint8 [48, 64, {channels}]" in sentence and "x[None]" in sentence


def test_pixels_that_use_few_of_the_levels_are_told(save):
    x = GREY % 17
    assert load(save(x=x, grey_levels=17)).notes == ()
    said = "{} has no pixel above 16 of 0 to 255: bits/dim count 256 grey levels"
    assert load(save(x=x)).notes[0].startswith(said.format("x"))
    (note,) = load(save(train=GREY, test=x)).notes
    assert note.startswith(said.format("test"))


# --- digests --------------------------------------------------------------------------------------------------------


def test_a_digest_knows_examples_labels_and_order(save):
    y = np.arange(520) % 3
    whole = load(save(x=GREY, y=y)).digest
    assert load(save(x=GREY[::-1], y=y[::-1])).digest == whole, "x alone comes in the order of its hashes"
    for x, labels in ((GREY[1:], y[1:]), (GREY, (y + 1) % 3), (GREY[:, ::-1], y)):
        other = load(save(x=x, y=labels)).digest
        assert other != whole
    parts = {"x_train": GREY[:400], "x_test": GREY[400:]}
    before = load(save(**parts)).digest
    after = load(save(**parts | {"x_train": GREY[399::-1]})).digest
    assert after["train"] != before["train"] and after["test"] == before["test"]
    assert load("moons").digest is None and load("moons").classes == ("0", "1")


def test_the_digest_of_a_folder_follows_its_pictures(tmp_path, monkeypatch):
    spec = fill(tmp_path / "a", cat=20, dog=20)
    before = load(spec).digest
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert load(f"folder:{tmp_path}/b").digest == before
    monkeypatch.setattr(images, "IN_MEMORY", 0)
    assert load(spec).digest == before
    (tmp_path / "b" / "cat").rename(tmp_path / "b" / "zebra")
    assert load(f"folder:{tmp_path}/b").digest != before
    path = tmp_path / "a" / "dog" / "7.png"
    Image.open(path).rotate(180).save(path)
    assert load(spec).digest != before
    write(path, pixels())
    again = load(spec).digest
    write(tmp_path / "a" / "dog" / "new.png")
    assert load(spec).digest != again


def test_large_files_are_known_by_their_size_and_their_ends(tmp_path):
    def held(picture):
        file = io.BytesIO()
        picture.save(file, "png")
        return file.getvalue()

    noise = pixels(80, 80)
    other = noise.copy()
    other[40, 40, 0] ^= 1  # in the midst: what a PNG tells of its pixels at its end changes
    for name in "ab":
        write(tmp_path / f"{name}.png", pixels(80, 80))
    digests = []
    for picture in (noise, other):
        (tmp_path / "c.png").write_bytes(held(Image.fromarray(picture)))
        assert (tmp_path / "c.png").stat().st_size > 3 * 4096
        digests.append(load(f"folder:{tmp_path}").digest)
    assert digests[0] != digests[1]


# --- and others of the kind -----------------------------------------------------------------------------------------


def test_what_comes_first_may_not_be_the_examples(save):
    (note,) = load(save(x=RNG.normal(size=(2, 500)))).notes
    assert note == "x is read as 2 examples of 500 numbers: do the examples come first?"
    (note,) = load(save(x=RNG.integers(0, 256, (28, 28, 60), dtype=np.uint8))).notes
    assert note == "x is read as 28 examples of 28x60: do the examples come first?"
    for x in (RNG.normal(size=(3, 3)), RNG.integers(0, 256, (28, 28, 28), dtype=np.uint8)):
        assert load(save(x=x)).notes == ()


def test_parts_in_other_units(save):
    train, test = 100 + 10 * RNG.normal(size=(500, 2)), 100 + 10 * RNG.normal(size=(50, 2))
    assert load(save(train=train, test=test)).notes == ()
    for unlike in ((test - 100) / 10, test / 255, test * 10):
        (note,) = load(save(train=train, test=np.stack([test[:, 0], unlike[:, 1]], axis=1))).notes
        assert note.startswith("column 1 of test (mean ") and note.endswith("): are both in the same units?")


def test_a_class_folder_that_is_another_ones_link(tmp_path):
    spec = fill(tmp_path, cat=3, dog=3)
    (tmp_path / "wolf").symlink_to(tmp_path / "dog")
    bundle = load(spec)
    assert bundle.classes == ("cat", "dog")
    assert bundle.notes == (f"'{tmp_path}/wolf' links to a folder that is read already, and is passed over",)


def test_a_test_folder_that_is_a_link_to_train(tmp_path):
    spec = fill(tmp_path, train=4)
    (tmp_path / "test").symlink_to(tmp_path / "train")
    assert load(spec).notes == ("4 of the 4 held-out examples are among those to train on too",)
