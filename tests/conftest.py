import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from one seed, so that a failure repeats."""
    torch.manual_seed(0)
