"""The launches of affine_coupling: how a shape is cut into programs, and what lies around what they write. Values are
held in tests/ops/test_affine_coupling.py."""

import itertools

import pytest
import torch

from genkernels.triton import affine_coupling as kernels
from tests.checks import pairwise
from tests.implementations import INTERPRETED
from tests.ops.coupling import LAYOUTS, SPLITS, Case, draw, run_all
from tests.ops.test_affine_coupling import LARGE


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("shape", LARGE)
def test_large_samples_take_several_tiles(shape, split):
    for layout in range(len(LAYOUTS)):
        blocks = kernels._plan(shape, 4, 4, 1, 1.0, SPLITS.index(split), layout, False).sizes[-1]
        assert blocks > 1, "the shape no longer takes several tiles"


def test_small_samples_take_one_launch_and_large_ones_two():
    def blocks(*shape):
        return kernels._plan(shape, 4, 4, 0, 1.0, 0, 0, False).sizes[-1]

    assert [blocks(64, 12, 16, 16), blocks(64, 24, 8, 8), blocks(4096, 2), blocks(8, 8, 32, 32)] == [1, 1, 1, 1]
    assert blocks(64, 48, 32, 32) == 24


def test_partial_sums_of_many_tiles(device):
    """More tiles than the second kernel's tile is wide."""
    partial = torch.randn(3, 1300, dtype=torch.float64).to(device, torch.float32)
    ldj = torch.full((3,), float("nan"), device=device)
    assert kernels._sum_tile(1300)["COLS"] < 1300
    kernels._sum(partial, ldj)
    torch.testing.assert_close(ldj.double(), partial.double().sum(1), rtol=0, atol=2e-5)


FENCED = [(2, 4, 5, 7), (2, 4, 4, 8), (1, 4, 40, 64)]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("shape", FENCED)
def test_nothing_outside_the_tensors_is_read_or_written(device, monkeypatch, shape, split):
    """NaN lies around every input, a sentinel around every output."""
    guard, sentinel, nan = 64, 12345.0, float("nan")
    owners = []

    def fenced(t, fill, copy=True):
        owner = torch.full((t.numel() + 2 * guard,), fill, dtype=t.dtype, device=t.device)
        view = owner[guard : guard + t.numel()].view(t.shape)
        view.copy_(t) if copy else view.fill_(nan)
        return owner, view

    def allocate(t):
        owner, view = fenced(t, sentinel, copy=False)
        owners.append(owner)
        return view

    plain = torch.Tensor.new_empty
    monkeypatch.setattr(kernels, "_empty_like", allocate)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: allocate(plain(*a, **k)))
    options = [row for row in pairwise(LAYOUTS, (False, True), FENCED, SPLITS) if row[2:] == (shape, split)]
    for layout, flip, *_ in options if INTERPRETED else itertools.product(LAYOUTS, (False, True)):
        case = Case(shape, split, "exp", layout, flip)
        for t in run_all(kernels, case, draw(case, device).map(lambda t: fenced(t, nan)[1])).values():
            assert t.isfinite().all()
    assert len(owners) >= (len(options) if INTERPRETED else 4) * 11 > 0
    for owner in owners:
        assert (owner[:guard] == sentinel).all() and (owner[-guard:] == sentinel).all()
