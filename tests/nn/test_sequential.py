"""FlowSequential as a list of layers, and what it asks of them."""

import math

import pytest
import torch

import genkernels as gk
from genkernels import nn as gnn
from tests.nn.flow_checks import Net, glow_steps


@pytest.mark.parametrize("reversible", [False, True])
def test_parts_and_sums_are_flows(reversible):
    flow = gnn.FlowSequential(*glow_steps(4, 2), reversible=reversible)
    x = torch.randn(8, 4)
    whole, _ = flow(x)
    part = flow[1:4]
    assert type(part) is gnn.FlowSequential and part.reversible == reversible and list(part) == list(flow)[1:4]
    for sum_ in (flow[:2] + flow[2:], gnn.FlowSequential(*flow[:2], reversible=reversible) + flow[2:]):
        assert type(sum_) is gnn.FlowSequential and sum_.reversible == reversible
        torch.testing.assert_close(sum_(x)[0], whole)
    for twice in (flow * 2, 2 * flow):
        assert type(twice) is gnn.FlowSequential and len(twice) == 12 and twice.reversible == reversible
        torch.testing.assert_close(twice(x)[0], flow(whole)[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(twice.inverse(twice(x)[0])[0], x, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="can be repeated at least once, got 0 times"):
        flow * 0


def test_what_has_no_inverse_is_refused_wherever_it_enters():
    flow = gnn.FlowSequential(*glow_steps(4, 1))
    relu = torch.nn.ReLU()
    ways = [
        lambda: gnn.FlowSequential(relu),
        lambda: flow.append(relu),
        lambda: flow.insert(0, relu),
        lambda: flow.extend([relu]),
        lambda: flow.__setitem__(0, relu),
        lambda: flow + torch.nn.Sequential(relu),
    ]
    for way in ways:
        with pytest.raises(TypeError, match="every layer must have an inverse, got ReLU at position"):
            way()
    assert len(flow) == 3


class Scaled(torch.nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def forward(self, x, context=None):
        return 2 * x, torch.full(self.shape, x[0].numel() * math.log(2))

    def inverse(self, z, context=None):
        return z / 2, torch.full(self.shape, -z[0].numel() * math.log(2))


@pytest.mark.parametrize("shape", [(6, 1), (1,), (), (1, 6)])
@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("beside", [0, 1])
def test_a_log_determinant_has_an_entry_for_each_sample(shape, reversible, beside):
    flow = gnn.FlowSequential(Scaled(shape), *glow_steps(4, beside), reversible=reversible)
    for run in (flow, flow.inverse):
        with pytest.raises(ValueError, match=r"the log-determinant of Scaled must be \[N\] = \[6\], got"):
            run(torch.randn(6, 4))


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("rows", [1, 5, None])
def test_a_context_has_a_row_for_each_sample(reversible, rows):
    context = torch.randn(3) if rows is None else torch.randn(rows, 3)
    flow = gnn.FlowSequential(*glow_steps(4, 2, 3), reversible=reversible)
    coupling = gnn.AffineCoupling(Net(2, 4, 3))
    for run in (flow, flow.inverse, coupling, coupling.inverse):
        with pytest.raises(ValueError, match="must have a row for each of the N = 6 samples, got"):
            run(torch.randn(6, 4), context)


@pytest.mark.parametrize("name", ["actnorm", "conv", "coupling", "made"])
def test_a_transposed_batch_is_refused(name):
    layer = {
        "actnorm": lambda: gnn.ActNorm(4),
        "conv": lambda: gnn.InvertibleConv1x1(4),
        "coupling": lambda: gnn.AffineCoupling(Net(2, 4)),
        "made": lambda: gnn.AutoregressiveTransform(gnn.MADE(4, 8)),
    }[name]()
    for run in (layer, layer.inverse):
        with pytest.raises((ValueError, RuntimeError)):
            run(torch.randn(2, 7, 4))


def test_latents_are_counted():
    model = gk.models.Glow(shape=(3, 8, 8), scales=2, steps=1, hidden=8).eval()
    z = [torch.zeros(2, *shape) for shape in model.latent_shapes]
    for wrong in ((torch.zeros_like(z[0]), *z), (z[0], torch.zeros_like(z[0]), z[1]), z[1:], (z[0][:1], z[1])):
        with pytest.raises(ValueError, match=r"latents must be a tuple of shapes \[N, 6, 4, 4\], \[N, 24, 2, 2\], got"):
            model.decode(tuple(wrong))
    with pytest.raises(TypeError, match="latents must be a tuple of tensors, got Tensor"):
        model.decode(z[1])
