"""A toy case and providers, right and wrong, for the benchmark runner."""

import contextlib
from dataclasses import dataclass

import pytest
import torch

from genkernels.benchmarks.cases import Case
from genkernels.benchmarks.providers import LocalSession
from genkernels.benchmarks.runner import Effort


def scale(x, s):
    """y = x·exp(s), with the sum of s beside it."""
    return x * torch.exp(s), s.float().sum(1)


@dataclass
class Fake:
    """A provider around any function."""

    op: object
    name: str = "fake"
    ours: bool = True

    def open(self, problem):
        return LocalSession(problem, self.op, contextlib.nullcontext, self.ours)


@pytest.fixture
def fake():
    return Fake


@pytest.fixture
def effort():
    return Effort(seconds=0.002, samples=3)


@pytest.fixture
def toy():
    """Makes the toy case; keyword arguments replace fields."""

    def make(shape=(6, 40), dtype=torch.float32, direction="forward+backward", **fields):
        def inputs(rng):
            draw = {name: torch.randn(shape, generator=rng, device=rng.device).to(dtype) for name in ("x", "s")}
            return draw

        defaults = {
            "name": "toy/exp",
            "shape": shape,
            "dtype": dtype,
            "direction": direction,
            "inputs": inputs,
            "op": scale,
            "reference": scale,
            "outputs": ("y", "total"),
            "bytes": 1000,
            "flops": 10,
        }
        return Case(**{**defaults, **fields})

    return make
