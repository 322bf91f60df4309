"""Channels in several parts of several tiles each, which inputs of a test's size are too small for as they come."""

import pytest
import torch

from genkernels.reference import batch_norm_leaky_relu as reference
from genkernels.triton import batch_norm_leaky_relu as kernels
from tests.checks import assert_as_accurate
from tests.ops.test_batch_norm_leaky_relu import RESULTS, exact, inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("shape", [(3, 2, 30, 31), (300, 5), (33, 3, 7), (1, 2, 1001), (40, 5, 2, 2)], ids=str)
def test_parts_of_several_tiles_are_put_together(device, monkeypatch, shape, dtype):
    for name, value in {"MOST_PARTS": 2, "MERGED": 1, "TILE": 1024, "WHOLE": 1024}.items():
        monkeypatch.setattr(kernels, name, value)
    x, grad, weight, bias = inputs(shape, dtype, device)
    assert kernels._plan(x).parts > 1
    statistics = reference.moments(x)
    forward, backward = (x, weight, bias, 1e-5, 0.2), (grad, x, weight, bias, *statistics, 1e-5, 0.2)
    ours, same = (
        [*f.batch_norm_leaky_relu(*forward), *f.batch_norm_leaky_relu_backward(*backward)] for f in (kernels, reference)
    )
    summed = grad.double().abs().sum().item()
    for i, values in enumerate(zip(ours, same, exact(grad, x, weight, bias, 1e-5, 0.2), strict=True)):
        assert_as_accurate(RESULTS[i], *values, beside=2, size=summed if i > 3 else None)
