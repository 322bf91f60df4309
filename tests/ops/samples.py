"""One small example call of each operator, for the tests that every operator must pass."""

import torch

from genkernels import ops


def affine_coupling(device="cpu", dtype=torch.float64):
    """`(function of tensors, tensors)`; the function returns a tuple of tensors."""
    generator = torch.Generator().manual_seed(1)
    x, params = (torch.randn(3, 4, 2, 3, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(2))
    return lambda a, b: ops.affine_coupling(a, b, scale_map="sigmoid"), (x, params)


SAMPLES = {"affine_coupling": affine_coupling}
