"""The launch of autoregressive_sampling. Draws are held in tests/ops/test_autoregressive_sampling.py."""

import torch

from genkernels.triton import autoregressive_sampling as kernels


def test_samples_a_program():
    cpu = torch.device("cpu")
    assert [kernels._rows_of(n, cpu) for n in (1, 4, 5, 8, 9, 16, 1000)] == [1, 1, 2, 2, 4, 4, 4]
