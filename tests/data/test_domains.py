"""Two domains as one data set: who comes with whom, what is held out, what is refused."""

import numpy as np
import pytest
import torch

from genkernels.data import TensorPairs, load
from genkernels.data.domains import Domains

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def two(tmp_path):
    """Twelve grey pictures in ``a``, dark, and thirty in ``b``, bright."""
    rng = np.random.default_rng(0)
    for name, count, low in (("a", 12, 0), ("b", 30, 128)):
        (tmp_path / name).mkdir()
        for i in range(count):
            pixels = rng.integers(low, low + 128, (5, 6), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i:02d}.png")
    return tmp_path


def test_an_image_of_each_and_the_smaller_domain_again():
    a, b = (TensorPairs(torch.full((n, 1, 2, 2), n, dtype=torch.uint8) + torch.arange(n).byte().view(n, 1, 1, 1))
            for n in (2, 5))  # fmt: skip
    pairs = Domains(a, b)
    assert len(pairs) == 5 and [y for _, y in pairs] == [0] * 5
    assert [x[:, 0, 0].tolist() for x, _ in pairs] == [[2, 5], [3, 6], [2, 7], [3, 8], [2, 9]]
    assert torch.equal(pairs[-1][0], pairs[4][0])
    with pytest.raises(IndexError):
        pairs[5]


def test_folders_of_two_domains(two):
    bundle = load("folder:a,b", root=two)
    assert bundle.form.shape == (2, 5, 6) and bundle.form.grey_levels == 256 and bundle.form.num_classes is None
    assert "12 in 'a' and 30 in 'b'" in bundle.description
    for part in (bundle.train, bundle.test):
        for x, _ in part:
            assert x.dtype == torch.uint8 and x[0].max() < 128 <= x[1].min()
    seen = [{x[c].numpy().tobytes() for x, _ in part} for part in (bundle.train, bundle.test) for c in (0, 1)]
    assert not seen[0] & seen[2] and not seen[1] & seen[3]
    assert len(seen[0] | seen[2]) == 12 and len(seen[1] | seen[3]) == 30
    assert load("folder:a,b", root=two).digest == bundle.digest != load("folder:b,a", root=two).digest
    assert load("folder:a,b?size=4", root=two).form.shape == (2, 4, 4)


def test_grey_beside_colour_is_colour(two):
    Image.fromarray(np.zeros((5, 6, 3), np.uint8)).save(two / "b" / "colour.png")
    assert load("folder:a,b", root=two).form.shape == (6, 5, 6)


def test_a_folder_whose_name_has_a_comma_is_one(two):
    (two / "a").rename(two / "x,y")
    assert load("folder:x,y", root=two).form.shape == (1, 5, 6)


def test_refused_in_one_sentence(two, refusal):
    refusal("folder:a,c", "there is no folder '.*c'", root=two)
    refusal("folder:a,b,a", "two folders must be given as two domains, got 3", root=two)
    refusal("folder:a,", "two folders must be given as two domains, got one without a name", root=two)
    (two / "none").mkdir()
    refusal("folder:a,none", "none' must hold images", root=two)
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(two / "none" / "large.png")
    refusal("folder:a,none", r"one size, but 'none/large.png' is 9x9 and 'a/00.png' is 6x5", root=two)
    refusal("folder:a,none?size=4", "a held-out part needs at least two different images in 'none', got 1", root=two)


def test_the_photographs_are_two_domains_of_their_own():
    pytest.importorskip("sklearn.datasets")
    bundle, mixed = load("two_photos32"), load("photos32")
    assert bundle.form.shape == (6, 32, 32) and len(bundle.train) == len(mixed.train)
    for part in (bundle.train, bundle.test):
        assert not part.first.crops[:, 0].any() and not part.second.crops[:, 0].any()
        assert len(part.first.strips) in (1, 2)
    x = torch.stack([bundle.train[i][0] for i in range(64)]).float()
    assert (x[:, 2].mean() - x[:, 5].mean()).abs() > 20  # the temple's sky is blue, the flower's ground is not
    assert torch.equal(load("two_photos32", seed=1).test[3][0], load("two_photos32", seed=1).test[3][0])
    assert not torch.equal(load("two_photos32", seed=1).test[3][0], bundle.test[3][0])
