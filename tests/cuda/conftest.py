"""Memory that comes filled with NaN, for the tests of this folder."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def poisoned_memory():
    """Fresh tensors start as NaN, also those that a C++ operator allocates: what no thread writes stays NaN."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill
