"""Convolutions on tiny grids as dense products: the same function and gradients as conv2d."""

import pytest
import torch
import torch.nn.functional as F

import genkernels as gk
from genkernels.models.flows.nets import ConvNet
from genkernels.nn import Conv2dZeros, _small_grid
from tests.nn.flow_checks import Watch, perturb


@pytest.fixture(autouse=True)
def not_forced():
    with gk.use_backend("auto"):
        yield


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (2, 2), (3, 2), (4, 4), (2, 8), (16, 1)])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_dense_weight_is_the_convolution(grid, kernel):
    weight = torch.randn(3, 2, kernel, kernel, dtype=torch.float64)
    x = torch.randn(4, 2, *grid, dtype=torch.float64)
    dense = _small_grid.dense_weight(weight, *grid, (False, False))
    expected = F.conv2d(x, weight, padding=kernel // 2)
    torch.testing.assert_close((x.flatten(1) @ dense).view_as(expected), expected, rtol=1e-12, atol=1e-12)
    dense = _small_grid.dense_weight(weight, *grid, (True, True))
    rows = x.movedim(1, -1).reshape(4, -1)
    torch.testing.assert_close((rows @ dense).view(4, *grid, 3).movedim(-1, 1), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grid", [(4, 4), (2, 2), (1, 3)])
@pytest.mark.parametrize("context", [0, 5])
def test_coupling_network_gives_the_same_values_and_gradients(grid, context):
    net = perturb(ConvNet(2, 4, 8, context).double())
    x = torch.randn(6, 4, *grid, dtype=torch.float64)[:, :2].requires_grad_()  # a half, as couplings hand it over
    given = [torch.randn(6, context, dtype=torch.float64, requires_grad=True)] if context else []
    results = []
    for backend in ("auto", "reference"):
        with gk.use_backend(backend), Watch() as watch:
            out = net(x, *given)
            grads = torch.autograd.grad(out.sin().sum(), [x, *given, *net.parameters()])
        results.append([out, *grads])
        assert bool(watch.calls["aten::convolution"]) == (backend == "reference")
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def test_zero_convolution_on_a_tiny_grid():
    layer = perturb(Conv2dZeros(3, 5).double())
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    expected = F.conv2d(x, layer.weight, layer.bias, padding=1) * (3 * layer.log_scale).exp().view(-1, 1, 1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    large = F.pad(x, (0, 2, 0, 2))
    expected = F.conv2d(large, layer.weight, layer.bias, padding=1) * (3 * layer.log_scale).exp().view(-1, 1, 1)
    torch.testing.assert_close(layer(large), expected, rtol=1e-12, atol=1e-12)


def test_where_it_is_not_used():
    x = torch.zeros(32, 3, 4, 4)
    assert _small_grid.suits(x, 64)
    assert not _small_grid.suits(torch.zeros(32, 3, 5, 4), 64)  # a larger grid
    assert not _small_grid.suits(x, 64 * 64)  # a matrix that costs more than it saves
    assert not _small_grid.suits(x[:1], 64) and not _small_grid.suits(x[:0], 64)
    assert not _small_grid.suits(x.to("meta"), 64)
    with gk.use_backend("reference"):
        assert not _small_grid.suits(x, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not _small_grid.suits(x, 64)
