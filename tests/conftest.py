import os

import pytest
import torch


def pytest_collection_modifyitems(config, items):
    """``GENKERNELS_TEST_SHARD=k/n``: the k-th of n processes takes every n-th test. What takes long on a GPU is to
    compile, on one core."""
    if shard := os.environ.get("GENKERNELS_TEST_SHARD"):
        k, n = map(int, shard.split("/"))
        mine = items[k - 1 :: n]
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % n != k - 1])
        items[:] = mine


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from one seed, so that a failure repeats."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _whole_fp32(monkeypatch):
    """cuDNN's convolutions round fp32 to TF32 unless told, and for some shapes do not: what is held against fp64 is
    fp32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def one_thread():
    """For thousands of tiny convolutions, which a second thread only slows down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
