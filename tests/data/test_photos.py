import numpy as np
import pytest
import torch

from genkernels.data import load
from genkernels.data.photos import STRIPES, PhotoCrops, splitmix64

sklearn_datasets = pytest.importorskip("sklearn.datasets")
pytest.importorskip("PIL")

SIZES = [32, 64]


@pytest.fixture(scope="module")
def photographs():
    return [sklearn_datasets.load_sample_image(name) for name in STRIPES]


def coverage(part, size, shape):
    """Which pixels of each photograph some crop shows, from coordinates alone: int [2, H, W] counts."""
    corners = np.zeros((2, shape[0] + 1, shape[1] + 1), dtype=np.int64)
    photo, top, left, _ = part.crops.T
    for down, right, sign in ((0, 0, 1), (0, size, -1), (size, 0, -1), (size, size, 1)):
        np.add.at(corners, (photo, top + down, left + right), sign)
    return corners.cumsum(1).cumsum(2)[:, :-1, :-1]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", [0, 1])
def test_no_pixel_is_shown_by_both_parts(size, seed, photographs):
    bundle = load(f"photos{size}", seed=seed)
    shape = photographs[0].shape[:2]
    train, test = coverage(bundle.train, size, shape), coverage(bundle.test, size, shape)
    assert train.sum() == len(bundle.train) * size**2 and test.sum() == len(bundle.test) * size**2
    assert not (train.astype(bool) & test.astype(bool)).any()
    for photo, (low, high) in enumerate(STRIPES.values()):
        assert not train[photo, :, low:high].any()
        assert not test[photo, :, :low].any() and not test[photo, :, high:].any()
    # Everything else is in use, but for the far corners that few crops reach.
    outside = np.ones_like(train, dtype=bool)
    for photo, (low, high) in enumerate(STRIPES.values()):
        outside[photo, :, low:high] = False
    assert train[outside].astype(bool).mean() > 0.999


@pytest.mark.parametrize("size", SIZES)
def test_parts_are_disjoint_across_seeds(size, photographs):
    """A model trained under one seed may be evaluated under another."""
    shape = photographs[0].shape[:2]
    train = coverage(load(f"photos{size}", seed=3).train, size, shape)
    test = coverage(load(f"photos{size}", seed=4).test, size, shape)
    assert not (train.astype(bool) & test.astype(bool)).any()


@pytest.mark.parametrize("size", SIZES)
def test_training_set_holds_no_held_out_pixel(size, photographs):
    bundle = load(f"photos{size}")
    for part, inside in ((bundle.train, False), (bundle.test, True)):
        for photo, first, pixels in part.strips:
            low, high = list(STRIPES.values())[photo]
            columns = set(range(first, first + pixels.shape[2]))
            assert columns <= set(range(low, high)) if inside else columns.isdisjoint(range(low, high))
            assert pixels.untyped_storage().nbytes() == pixels.numel()  # not a view into the whole photograph


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_crops_are_the_pixels_at_their_coordinates(size, split, photographs):
    part = getattr(load(f"photos{size}", seed=2), split)
    for i in [*range(200), len(part) - 1]:
        photo, top, left, mirrored = part.crops[i]
        want = photographs[photo][top : top + size, left : left + size]
        want = want[:, ::-1] if mirrored else want
        x, y = part[i]
        assert y == 0 and x.is_contiguous() and np.array_equal(x.permute(1, 2, 0).numpy(), want)


def test_only_training_crops_are_mirrored():
    bundle = load("photos32")
    assert not bundle.test.crops[:, 3].any()
    assert abs(bundle.train.crops[:, 3].mean() - 0.5) < 5 * 0.5 / len(bundle.train) ** 0.5


def test_an_item_is_a_copy():
    part = load("photos32").test
    x, _ = part[0]
    before = x.clone()
    x.zero_()
    assert torch.equal(part[0][0], before)


def test_crops_depend_on_seed_and_index_alone():
    a, b, c = (load("photos32", seed=seed) for seed in (7, 7, 8))
    for split in ("train", "test"):
        one, same, other = (getattr(bundle, split).crops for bundle in (a, b, c))
        assert np.array_equal(one, same)
        assert (one[:, :3] == other[:, :3]).all(1).mean() < 0.01
    # A longer epoch begins with the shorter one.
    strips = a.train.strips
    short, long = (PhotoCrops(strips, 32, n, start=123, mirror=True) for n in (10, 1000))
    assert np.array_equal(short.crops, long.crops[:10])


def test_crops_are_pinned():
    # A change here means that a resumed run sees other crops than the run it continues.
    bundle = load("photos32")
    assert bundle.train.crops[:3].tolist() == [[1, 49, 322, 1], [1, 150, 103, 0], [0, 48, 41, 1]]
    assert bundle.test.crops[:3].tolist() == [[0, 349, 574, 0], [0, 26, 545, 0], [0, 0, 574, 0]]


def test_every_position_is_equally_likely():
    part = load("photos32").train
    places = [(photo, first, pixels.shape[2] - 31) for photo, first, pixels in part.strips]
    total = sum(width for *_, width in places)
    photo, top, left, _ = part.crops.T
    for which, first, width in places:
        inside = (photo == which) & (left >= first) & (left < first + width)
        share = width / total
        assert abs(inside.mean() - share) < 5 * (share * (1 - share) / len(part)) ** 0.5
        for values, count in ((top[inside], 427 - 31), (left[inside] - first, width)):
            assert values.min() >= 0 and values.max() <= count - 1
            error = (count**2 / 12 / inside.sum()) ** 0.5
            assert abs(values.mean() - (count - 1) / 2) < 5 * error


def test_splitmix64_matches_its_published_numbers():
    want = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert splitmix64(1234567, 4).tolist() == want
