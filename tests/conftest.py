import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from one seed, so that a failure repeats."""
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """For thousands of tiny convolutions, which a second thread only slows down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
