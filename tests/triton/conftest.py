"""The maths that kernels share, run by Triton's interpreter or on a GPU, and what the compiler makes of the kernels.

The interpreter must be chosen before Triton is imported, so it takes a pytest process of its own:

    TRITON_INTERPRET=1 python -m pytest tests/ops tests/triton

Tests that run kernels take `device`; they are left out where there is neither the interpreter nor a GPU. Those that
only compile take `compiler`; they are left out under the interpreter, which replaces the compiler in its whole process.
"""

import warnings

import pytest
import torch

from tests.conftest import leave_out
from tests.implementations import INTERPRETED

pytest.importorskip("triton", reason="Triton is not installed")


def pytest_collection_modifyitems(config, items):
    mine = [item for item in items if item.path.is_relative_to(config.rootpath / "tests" / "triton")]
    theirs = [item for item in items if item not in set(mine)]
    if not INTERPRETED and not torch.cuda.is_available():
        leave_out(config, mine, lambda item: "device" in item.fixturenames, "they run Triton kernels")
    if INTERPRETED:
        leave_out(config, mine, lambda item: "device" not in item.fixturenames, "they compile, or run no kernel")
    items[:] = theirs + mine


@pytest.fixture
def device():
    """Where kernels run."""
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def compiler():
    """For tests that compile."""


@pytest.fixture(autouse=True)
def _quiet_numpy():
    """The interpreter computes in numpy, which warns of each overflow that a GPU passes over."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning)
        yield
