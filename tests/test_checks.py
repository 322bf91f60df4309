"""`tests.checks.pairwise`, by which tests take few of many combinations."""

import itertools

import pytest

from tests.checks import behind, pairwise


@pytest.mark.parametrize("sizes", [(3,), (1, 5, 1), (2, 2, 2, 3), (7, 4, 3), (4, 2, 2, 2, 6, 3)], ids=str)
def test_each_value_of_an_axis_meets_each_of_every_other(sizes):
    axes = [[f"{name}{i}" for i in range(size)] for name, size in zip("abcdef", sizes, strict=False)]
    rows = pairwise(*axes)
    assert set(rows) <= set(itertools.product(*axes)) and len(rows) == len(set(rows))
    assert {value for row in rows for value in row} == {value for axis in axes for value in axis}
    for one, other in itertools.combinations(range(len(sizes)), 2):
        assert {(row[one], row[other]) for row in rows} == set(itertools.product(axes[one], axes[other]))
    least = [1, *sorted(sizes)][-2] * max(sizes)
    assert least <= len(rows) <= least + 2
    assert sorted((*head, last) for head in {row[:-1] for row in rows} for last in behind(rows, *head)) == sorted(rows)
