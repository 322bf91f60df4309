"""Clusters that samples reach: counted on points whose places are known."""

import math

import pytest
import torch

from genkernels.data import load
from genkernels.metrics import modes

CENTRES = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]], dtype=torch.float64)
#: Around a centre, of mean 0 and variance 1 in each coordinate.
CROSS = math.sqrt(2) * torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)


def clusters():
    return (CENTRES[:, None] + CROSS).flatten(0, 1), torch.arange(3).repeat_interleave(4)


def test_a_sample_counts_within_three_standard_deviations():
    x = torch.tensor([[2.99, 0.0], [3.01, 0.0], [10.0, -2.9], [5.0, 5.0]])
    assert modes(x, *clusters()) == (3, 2, 0.5)
    assert modes(x, *clusters(), radius=3.1) == (3, 2, 0.75)
    real, labels = clusters()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert modes(x, real[order], 7 - 2 * labels[order]) == (3, 2, 0.5)


def test_a_mode_is_found_by_a_tenth_of_its_share():
    real, labels = clusters()
    x = CENTRES[[0] * 58 + [2] * 2]  # a tenth of its twenty
    assert modes(x, real, labels) == (3, 2, 1.0)
    assert modes(CENTRES[[0] * 59 + [2]], real, labels) == (3, 1, 1.0)


def test_no_samples_and_samples_that_are_none():
    real, labels = clusters()
    assert modes(real[:0], real, labels) == (3, 0, 0.0)
    assert modes(torch.full((4, 2), torch.nan), real, labels) == (3, 0, 0.0)


@pytest.mark.parametrize(
    ("name", "count"), [("eight_gaussians", 8), ("moons", None), ("rings", None), ("spirals", None)]
)
def test_which_points_are_in_clusters(name, count):
    bundle = load(name)
    found = modes(bundle.take("train", 2000)[0], *bundle.take("test", 2000))
    assert found is None if count is None else found[:2] == (count, count) and found.share > 0.975
    assert modes(*[bundle.take("test", 10)[0]] * 2, torch.zeros(10)) is None


def test_shapes_are_refused():
    real, labels = clusters()
    with pytest.raises(
        ValueError, match=r"modes: x, real and labels must be \[N, D\], \[M, D\] and \[M\], got \[4, 3\]"
    ):
        modes(torch.zeros(4, 3), real, labels)
    with pytest.raises(ValueError, match=r"got \[4, 2\], \[12, 2\] and \[3\]"):
        modes(torch.zeros(4, 2), real, labels[:3])
