"""FusedSequential against the layers that it joins."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from genkernels import nn as gnn
from genkernels.backends import use_backend
from genkernels.nn import fused_sequential
from genkernels.nn._rectified import LeakyReLU, ReLU
from genkernels.nn.fused_sequential import FusedSequential
from tests.checks import draw


@pytest.fixture(autouse=True)
def joins_whatever_the_size(monkeypatch):
    monkeypatch.setattr(fused_sequential, "LEAST", 0)
    monkeypatch.setattr(fused_sequential, "LEAST_HALF", 0)


@pytest.fixture
def calls(monkeypatch):
    """Shapes that went through the joined call."""
    found, joined = [], fused_sequential._joined

    def counted(norm, slope, x):
        found.append(tuple(x.shape))
        return joined(norm, slope, x)

    monkeypatch.setattr(fused_sequential, "_joined", counted)
    return found


def pair(*layers, dtype=torch.float64):
    """The layers in an ``nn.Sequential``, copies of them in ours, with weights that are not 1 and 0."""
    theirs = nn.Sequential(*layers).to(dtype)
    for i, parameter in enumerate(theirs.parameters()):
        parameter.data += draw(parameter.shape, dtype=torch.float64, seed=i)[0].to(dtype) * 0.3
    return FusedSequential(*copy.deepcopy(theirs)), theirs


def held_alike(ours, theirs, *inputs, tolerance=1e-11):
    """Outputs, gradients by inputs and parameters, and running averages of one pass of training."""
    results = []
    for net in (ours, theirs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = net(*leaves)
        weights = draw(y.shape, seed=9)[0].to(y.dtype)
        gradients = torch.autograd.grad((y * weights).sum(), [*leaves, *net.parameters()])
        results.append((y.detach(), *gradients, *net.buffers()))
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("activation", [nn.ReLU, ReLU, lambda: nn.LeakyReLU(0.2, inplace=True), lambda: LeakyReLU(0.1)])
@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (lambda: nn.BatchNorm2d(3), (4, 3, 5, 6)),
        (lambda: nn.BatchNorm2d(3, affine=False), (4, 3, 5, 6)),
        (lambda: nn.BatchNorm2d(3, momentum=None, eps=1e-3), (4, 3, 5, 6)),
        (lambda: nn.BatchNorm2d(3, track_running_stats=False), (1, 3, 5, 6)),
        (lambda: nn.BatchNorm1d(3), (4, 3, 7)),
        (lambda: nn.BatchNorm3d(3), (2, 3, 2, 3, 4)),
        (lambda: nn.InstanceNorm2d(3), (4, 3, 5, 6)),
        (lambda: nn.InstanceNorm2d(3, affine=True), (4, 3, 5, 6)),
        (lambda: nn.InstanceNorm1d(3), (4, 3, 8)),
    ],
)
def test_is_the_layers_one_after_the_other(calls, norm, shape, activation):
    ours, theirs = pair(norm(), activation())
    for step in range(3):
        (x,) = draw(shape, dtype=torch.float64, seed=step)
        held_alike(ours, theirs, x)
    assert calls == [shape] * 3
    if hasattr(theirs[0], "num_batches_tracked") and theirs[0].num_batches_tracked is not None:
        assert ours[0].num_batches_tracked == 3


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_halves_with_weights_of_either_kind(calls, half):
    (x,) = draw((4, 3, 5, 6), dtype=torch.float64)
    for dtype in (half, torch.float32):
        ours, theirs = pair(nn.BatchNorm2d(3), nn.ReLU(), dtype=dtype)
        held_alike(ours, theirs, x.to(half), tolerance=2e-2)
    assert len(calls) == 2


def test_under_autocast_a_convolutions_output_is_normalised_in_its_dtype(calls):
    net = FusedSequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(draw((4, 2, 6, 6), dtype=torch.float32)[0])
    assert y.dtype == torch.bfloat16 and calls == [(4, 3, 4, 4)]
    assert net[1].running_mean.dtype == torch.float32


def test_a_whole_generator_joins_what_stands_side_by_side(calls):
    layers = [
        *(nn.ConvTranspose2d(2, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Tanh()),
        *(nn.Conv2d(4, 2, 3, padding=1), nn.InstanceNorm2d(2), nn.LeakyReLU(0.2), nn.BatchNorm2d(2)),
    ]
    ours, theirs = pair(*layers)
    held_alike(ours, theirs, draw((3, 2, 4, 4), dtype=torch.float64)[0], tolerance=1e-9)
    assert calls == [(3, 4, 8, 8), (3, 2, 8, 8)]


class Own(nn.BatchNorm2d):
    pass


def _hook(layer):
    layer.register_forward_hook(lambda module, args, y: y + 1)
    return layer


def _parametrized(layer):
    return parametrize.register_parametrization(layer, "weight", nn.Softplus())


@pytest.mark.parametrize(
    "layers",
    [
        lambda: (nn.BatchNorm2d(3), nn.GELU()),
        lambda: (nn.BatchNorm2d(3), nn.LeakyReLU(-0.5)),
        lambda: (nn.BatchNorm2d(3).eval(), nn.ReLU()),
        lambda: (nn.InstanceNorm2d(3, track_running_stats=True), nn.ReLU()),
        lambda: (Own(3), nn.ReLU()),
        lambda: (_hook(nn.BatchNorm2d(3)), nn.ReLU()),
        lambda: (nn.BatchNorm2d(3), _hook(nn.ReLU())),
        lambda: (_parametrized(nn.BatchNorm2d(3)), nn.ReLU()),
        lambda: (nn.BatchNorm2d(3).eval(), nn.LeakyReLU(0.2)),
    ],
)
def test_what_is_not_to_be_joined_runs_by_itself(calls, layers):
    theirs = nn.Sequential(*layers()).double()
    ours = FusedSequential(*copy.deepcopy(theirs))
    held_alike(ours, theirs, draw((4, 3, 5, 6), dtype=torch.float64)[0])
    assert not calls


def test_strides_the_reference_small_inputs_and_a_compiler_keep_the_layers(calls, monkeypatch):
    ours, theirs = pair(nn.BatchNorm2d(3), nn.ReLU())
    (x,) = draw((4, 3, 5, 6), dtype=torch.float64)
    held_alike(ours, theirs, x.contiguous(memory_format=torch.channels_last))
    with use_backend("reference"):
        held_alike(ours, theirs, x)
    monkeypatch.setattr(fused_sequential, "LEAST", x.numel() + 1)
    held_alike(ours, theirs, x)
    assert not calls


def test_errors_are_torchs(calls):
    net = FusedSequential(nn.BatchNorm2d(3), nn.ReLU())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        net(torch.zeros(1, 3, 1, 1))
    with pytest.raises(ValueError, match="4D"):
        net(torch.zeros(4, 3, 5))
    with pytest.raises(RuntimeError, match="running_mean"):
        net(torch.zeros(4, 2, 5, 5))
    assert not calls


def test_an_empty_batch_leaves_the_running_averages_finite():
    net = FusedSequential(nn.BatchNorm2d(3), nn.ReLU())
    theirs = copy.deepcopy(nn.Sequential(*net))
    for one in (net, theirs):
        one(torch.zeros(0, 3, 4, 4))
    torch.testing.assert_close(list(net.buffers()), list(theirs.buffers()), equal_nan=True)


def test_state_is_that_of_nn_sequential_and_survives_a_copy_and_a_pickle():
    ours, theirs = pair(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    (x,) = draw((2, 2, 3, 3), dtype=torch.float64)
    for twin in (copy.deepcopy(ours), torch.load(buffer, weights_only=False)):
        torch.testing.assert_close(twin(x), nn.Sequential(*copy.deepcopy(theirs))(x))


def test_a_penalty_on_the_gradient_is_torchs(calls):
    ours, theirs = pair(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.LeakyReLU(0.2), nn.Conv2d(3, 1, 3))

    def by(net):
        (x,) = draw((3, 2, 6, 6), dtype=torch.float64)
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [x, *net.parameters()])

    torch.testing.assert_close(by(ours), by(theirs), rtol=1e-9, atol=1e-9)
    assert calls


def test_compiled_it_is_one_graph_with_the_same_numbers(calls):
    ours, theirs = pair(nn.BatchNorm2d(3), nn.ReLU())
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    (x,) = draw((4, 3, 5, 6), dtype=torch.float64)
    torch.testing.assert_close(compiled(x), theirs(x))
    assert not calls


def test_it_is_public():
    assert gnn.FusedSequential is FusedSequential
