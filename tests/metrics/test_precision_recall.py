"""Precision and recall on sets whose balls can be drawn by hand, and against the definition."""

import importlib
import math

import pytest
import torch

from genkernels.metrics import precision_recall


def line(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def by_definition(points, centres, k):
    within = 0
    for point in points:
        for i, centre in enumerate(centres):
            others = [math.dist(centre, other) for j, other in enumerate(centres) if j != i]
            if math.dist(point, centre) <= sorted(others)[k - 1]:
                within += 1
                break
    return within / len(points)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_against_the_definition(k):
    real, fake = torch.randn(23, 2, dtype=torch.float64), torch.randn(31, 2, dtype=torch.float64) * 1.5 + 0.7
    found = precision_recall(real, fake, k)
    real, fake = real.tolist(), fake.tolist()
    assert found.precision == by_definition(fake, real, k) and found.recall == by_definition(real, fake, k)
    assert 0 < found.precision < 1 and 0 < found.recall < 1


def test_by_hand_and_on_the_edge():
    real = line(0, 1, 2, 10)  # balls of radius 1, 1, 1, 8 for k = 1
    assert precision_recall(real, line(-1, -1.001, 3, 18), 1).precision == 0.75
    assert precision_recall(real, line(-1, -1.001, 18.001, 19), 1).precision == 0.25
    # balls of the samples 0, 0.5, reach [−0.5, 1]
    assert precision_recall(real, line(0, 0.5), 1).recall == 0.5


def test_equal_sets_cover_each_other_however_far_out():
    x = 1e6 + torch.randn(40, 5)
    assert precision_recall(x, x[torch.randperm(40)]) == (1, 1)


def test_modes_that_are_left_out_cost_recall_and_what_is_not_real_costs_precision():
    centres = torch.tensor([[0.0, 0], [100, 0], [0, 100], [100, 100]])
    real = (centres[:, None] + torch.randn(4, 50, 2)).flatten(0, 1)
    half = (centres[:2, None] + torch.randn(2, 100, 2)).flatten(0, 1)
    precision, recall = precision_recall(real, half)
    assert precision > 0.8 and 0.4 < recall <= 0.5
    precision, recall = precision_recall(real, torch.cat([real, real + 1e4]))
    assert precision == 0.5 and recall == 1


def test_points_that_many_equal_are_points():
    real = line(0, 0, 0, 0, 5)  # with k = 3 the zeros' radius is 0, that of 5 is 5
    assert precision_recall(real, line(0, -1e-9, 1, 11)).precision == 0.5
    copies = torch.tensor([[0.1, 0.2]]).expand(6, 2)
    assert precision_recall(copies, copies) == (1, 1) and precision_recall(copies, copies + 1e-6) == (0, 0)


def test_blocks_and_dtypes_change_nothing(monkeypatch):
    real, fake = torch.randn(30, 1, 2, 2), torch.randn(20, 1, 2, 2)
    whole = precision_recall(real, fake)
    assert precision_recall(real.double(), torch.stack([fake, fake], -1)[..., 0].double()) == whole
    monkeypatch.setattr(importlib.import_module("genkernels.metrics.precision_recall"), "MOST_VALUES", 70)
    assert precision_recall(real, fake) == whole


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_gives_nan(value):
    x = torch.randn(9, 2)
    x[3, 0] = value
    assert all(map(math.isnan, precision_recall(torch.randn(9, 2), x)))


@pytest.mark.parametrize(
    ("real", "fake", "k", "error", "words"),
    [
        (torch.zeros(3, 2), torch.zeros(9, 2), 3, ValueError, r"real must be .* at least 4 examples, got \[3, 2\]"),
        (torch.zeros(9, 2), torch.zeros(0, 2), 3, ValueError, r"fake must be .* at least 4 examples, got \[0, 2\]"),
        (torch.zeros(9, 2), torch.zeros(9, 3), 3, ValueError, "real and fake must hold examples of one shape"),
        (torch.zeros(9, 2), torch.zeros(9, 2), 0, ValueError, "k must be an integer of at least 1, got 0"),
        (torch.zeros(9, 2), torch.zeros(9, 2).byte(), 3, TypeError, "real and fake must be on one scale"),
    ],
)
def test_refusals(real, fake, k, error, words):
    with pytest.raises(error, match=f"^precision_recall: {words}"):
        precision_recall(real, fake, k)
