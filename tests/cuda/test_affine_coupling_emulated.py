"""The CUDA C++ kernels of affine_coupling, compiled by g++ and run on the CPU, against the reference in fp64."""

from __future__ import annotations

import shutil

import emulation
import pytest
import torch
from coupling_checks import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    LAYOUTS,
    MAPS,
    SPLITS,
    Case,
    Kernels,
    cases,
    check_batch,
    check_empty,
    check_extremes,
    check_missing_gradients,
    check_one_misaligned,
    check_pass_through,
    check_repeat,
    check_values,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")


@pytest.fixture(scope="module")
def kernels():
    ops = emulation.load("affine_coupling")
    return Kernels("emulated", "cpu", ops.affine_coupling, ops.affine_coupling_backward, ops.affine_coupling_reverse)


@pytest.mark.parametrize("scale_map", MAPS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_values(kernels, poisoned_memory, scale_map, dtypes):
    for case in cases([scale_map], [dtypes]):
        check_values(kernels, case)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_misaligned_inputs(kernels, poisoned_memory, split, dtypes):
    for layout in ("halves", "interleaved"):
        check_values(kernels, Case((2, 4, 12, 16), split, "exp", layout, dtypes=dtypes), offset=1)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_one_misaligned_input(kernels, poisoned_memory, dtypes):
    check_one_misaligned(kernels, Case((2, 4, 4, 8), dtypes=dtypes))


@pytest.mark.parametrize("scale_map", MAPS)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("flip", [False, True])
def test_pass_through(kernels, poisoned_memory, scale_map, split, flip):
    for dtypes in DTYPES:
        for shape in ((2, 4, 6, 8), (3, 2, 5, 3)):
            check_pass_through(kernels, Case(shape, split, scale_map, flip=flip, dtypes=dtypes))


@pytest.mark.parametrize("scale_map", MAPS)
@pytest.mark.parametrize("split", SPLITS)
def test_missing_gradients(kernels, poisoned_memory, scale_map, split):
    for shape in ((2, 4, 6, 8), (3, 2, 5, 3)):
        check_missing_gradients(kernels, Case(shape, split, scale_map))


@pytest.mark.parametrize("scale_map", MAPS)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dtypes", [(F64, F64), (F32, F32), (BF16, BF16), (F16, F16)], ids=str)
def test_extremes(kernels, scale_map, split, dtypes):
    check_extremes(kernels, Case((1, 2), split, scale_map, dtypes=dtypes))


@pytest.mark.parametrize("shape", [(0, 4), (0, 2, 3, 3), (3, 0), (3, 4, 0), (3, 2, 0, 5)], ids=str)
@pytest.mark.parametrize("split", SPLITS)
def test_empty(kernels, poisoned_memory, shape, split):
    if split == "checkerboard" and len(shape) != 4:
        pytest.skip("the checkerboard split takes images")
    for dtypes in ((F32, F32), (BF16, BF16), (F64, F64)):
        check_empty(kernels, Case(shape, split, dtypes=dtypes))


def test_many_samples(kernels, poisoned_memory):
    """More samples than a grid's second dimension holds; they are dealt out 256 and fewer to a block."""
    check_values(kernels, Case((70_000, 2)))
    check_values(kernels, Case((66_001, 6), layout="interleaved"))


def test_repeated_runs_agree(kernels):
    check_repeat(kernels, Case((2, 12, 24, 16), scale_map="sigmoid"))


@pytest.mark.parametrize("shape", [(3, 12, 24, 16), (130, 6), (5, 4, 3, 3)], ids=str)
def test_a_sample_alone_gives_the_bits_it_gives_in_a_batch(kernels, shape):
    check_batch(kernels, Case(shape))


@st.composite
def any_case(draw):
    split = draw(st.sampled_from(list(SPLITS)))
    batch, channels = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    if split == "channel":
        plane = draw(st.lists(st.integers(1, 40), max_size=2))
        shape = (batch, 2 * channels, *plane)
    else:
        shape = (batch, channels, draw(st.integers(1, 40)), draw(st.integers(1, 40)))
    scale_map, layout = draw(st.sampled_from(list(MAPS))), draw(st.sampled_from(list(LAYOUTS)))
    return Case(shape, split, scale_map, layout, draw(st.booleans()), draw(st.sampled_from(DTYPES)))


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(case=any_case(), offset=st.integers(0, 9), seed=st.integers(0, 2**31))
def test_any_shape_option_and_address(kernels, poisoned_memory, case, offset, seed):
    check_values(kernels, case, offset, seed)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_no_access_outside_the_inputs(kernels, dtypes, after):
    """An access outside ends the process."""
    for case in cases(["exp", "additive"], [dtypes]):
        check_values(kernels, case, place=lambda i, t: emulation.beside_forbidden_memory(t, after))


def test_unknown_codes_are_refused(kernels):
    x = torch.zeros(2, 4)
    with pytest.raises(RuntimeError, match="scale_map must be 0 to 3, got 7"):
        kernels.forward(x, x, 7, 0, 0, False, False)


def test_a_wrong_pair_of_dtypes_is_named(kernels):
    x, params = torch.zeros(2, 4, dtype=BF16), torch.zeros(2, 4)
    with pytest.raises(RuntimeError, match="params must have x's dtype"):
        kernels.forward(x, params, 0, 0, 0, False, False)
