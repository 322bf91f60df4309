"""Triton kernels run by Triton's interpreter, or on a GPU where there is one.

The interpreter must be chosen before Triton is imported, so it takes a pytest process of its own:

    TRITON_INTERPRET=1 python -m pytest tests/triton

In any other process, on a machine without a GPU, tests that run kernels skip themselves; those that only compile run.
"""

import os
import warnings

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture
def device():
    """Where kernels run."""
    if INTERPRETED:
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("kernels run on a GPU, or with TRITON_INTERPRET=1 set before the process starts")
    return "cuda"


@pytest.fixture
def compiler():
    """For tests that compile: the interpreter replaces the compiler in its whole process."""
    if INTERPRETED:
        pytest.skip("nothing is compiled with TRITON_INTERPRET=1")


@pytest.fixture
def poisoned():
    """Uninitialised memory holds NaN: what a kernel leaves unwritten shows."""
    filled, deterministic = (
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.are_deterministic_algorithms_enabled(),
    )
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture(autouse=True)
def _quiet_numpy():
    """The interpreter computes in numpy, which warns of each overflow that a GPU passes over."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning)
        yield
