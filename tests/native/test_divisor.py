"""csrc/common/divisor.h: the quotient of integers, for every divisor and every dividend of 63 bits."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.native.native_build import binding

LARGEST = 2**63 - 1
EDGES = sorted({max(1, min(LARGEST, 2**k + o)) for k in range(64) for o in (-1, 0, 1)})


@pytest.fixture(scope="module")
def module():
    return binding("plain")


def test_edges(module):
    for d in EDGES:
        for n in EDGES:
            multiple = n // d * d  # where an error of one unit shows
            for near in {0, n, multiple, max(0, multiple - 1), min(LARGEST, multiple + d - 1)}:
                assert module.divide(near, d) == near // d, (near, d)


@settings(max_examples=2000, deadline=None, derandomize=True)
@given(n=st.integers(0, LARGEST), d=st.integers(1, LARGEST), small=st.integers(1, 2**20))
def test_any(module, n, d, small):
    for divisor in (d, small):
        multiple = n // divisor * divisor
        for near in (n, multiple, max(0, multiple - 1), divisor - 1, divisor):
            assert module.divide(near, divisor) == near // divisor
