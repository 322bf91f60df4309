"""Tensors of tests are small: where small ones are left to PyTorch, they are made to count as large."""

from __future__ import annotations

import pytest

from genkernels.swap import _coupling, _made
from genkernels.swap import torch as spectral


@pytest.fixture(autouse=True)
def everything_pays(monkeypatch):
    monkeypatch.setattr(_coupling, "SMALL", -1)
    monkeypatch.setattr(_made, "SMALL_PRODUCTS", 0)
    monkeypatch.setattr(spectral, "FEW", 0)
