"""Every backend that runs on this machine, each with its device: operator tests take the fixture `backend`."""

import pytest
import torch

from genkernels import backends

DEVICES = {"reference": "cpu", "cpu": "cpu", "triton": "cuda", "cuda": "cuda"}


@pytest.fixture(params=list(DEVICES))
def backend(request):
    name = request.param
    if reason := backends.why_missing(name):
        pytest.skip(f"{name}: {reason}")
    with backends.use_backend(name):
        yield name


@pytest.fixture
def device(backend):
    return DEVICES[backend]


@pytest.fixture
def compiled_backend(backend):
    if backend == "reference":
        pytest.skip("the reference goes through no registered operator")
    return backend


@pytest.fixture
def poisoned_memory():
    """Fresh tensors start as NaN, those that C++ asks torch for too: an element that a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
