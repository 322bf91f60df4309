"""ActNorm and 1×1 convolution as one product: the same numbers, gradients and parameters as layer by layer."""

import pytest
import torch

import genkernels as gk
from genkernels import nn as gnn
from genkernels.nn.folding import FoldedPair
from tests.nn.flow_checks import Watch, glow_steps, perturb


@pytest.fixture(autouse=True)
def not_forced():
    with gk.use_backend("auto"):
        yield


def chain(lu=True, dtype=torch.float64):
    layers = [
        gnn.ActNorm(4),
        gnn.InvertibleConv1x1(4, lu=lu),
        gnn.ActNorm(4),
        gnn.InvertibleConv1x1(4, lu=lu),
        gnn.Squeeze(),
        gnn.ActNorm(16),
        gnn.InvertibleConv1x1(16, lu=not lu),
        gnn.InvertibleConv1x1(16),
        gnn.ActNorm(16),
    ]
    return perturb(gnn.FlowSequential(*layers), 0.2).to(dtype).eval()


def unfolded(flow, x, inverse=False):
    ldj = 0
    for layer in reversed(list(flow)) if inverse else flow:
        x, log_det = layer.inverse(x) if inverse else layer(x)
        ldj = ldj + log_det
    return x, ldj


@pytest.mark.parametrize("lu", [True, False])
@pytest.mark.parametrize("inverse", [False, True])
def test_folded_equals_layer_by_layer(lu, inverse):
    flow = chain(lu)
    x = torch.randn(3, 16, 1, 3, dtype=torch.float64) if inverse else torch.randn(3, 4, 2, 6, dtype=torch.float64)
    x.requires_grad_()
    results = []
    for run in (lambda: flow.inverse(x) if inverse else flow(x), lambda: unfolded(flow, x, inverse)):
        z, ldj = run()
        grads = torch.autograd.grad((z.sin().sum() + (ldj * torch.arange(3)).sum()), [x, *flow.parameters()])
        results.append([z, ldj, *grads])
    assert sum(isinstance(step, FoldedPair) for step in flow._steps()) == 3
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_pairs_of_one_size_on_different_grids():
    """Their log-determinants count different numbers of pixels, though their matrices are assembled together."""
    layers = [
        gnn.ActNorm(4),
        gnn.InvertibleConv1x1(4),
        gnn.Squeeze(),
        Unsqueezed(),
        gnn.ActNorm(4),
        gnn.InvertibleConv1x1(4),
    ]
    flow = perturb(gnn.FlowSequential(*layers)).double().eval()
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(flow(x), unfolded(flow, x), rtol=1e-12, atol=1e-12)


class Unsqueezed(torch.nn.Module):
    """Keeps a fourth of the channels; no flow, but it changes the grid."""

    def forward(self, x, context=None):
        return x[:, :4].contiguous(), x.new_zeros(len(x))

    def inverse(self, z, context=None):
        raise NotImplementedError


def test_reference_backend_runs_layer_by_layer():
    flow = chain()
    with gk.use_backend("reference"):
        assert flow._steps() == list(flow)


def test_an_actnorm_that_waits_for_data_is_not_folded():
    flow = gnn.FlowSequential(*glow_steps(4, 2))
    assert not any(isinstance(step, FoldedPair) for step in flow._steps())
    flow(torch.randn(4, 4, 2, 2))
    assert sum(isinstance(step, FoldedPair) for step in flow._steps()) == 2


def test_hooks_and_subclasses_are_honoured():
    """Who watches or changes a layer is not bypassed."""
    flow = gnn.FlowSequential(gnn.ActNorm(4), gnn.InvertibleConv1x1(4)).eval()
    seen = []
    handle = flow[0].register_forward_hook(lambda *_: seen.append(1))
    flow(torch.randn(2, 4))
    assert seen == [1]
    handle.remove()
    assert isinstance(flow._steps()[0], FoldedPair)

    class Mine(gnn.ActNorm):
        pass

    assert not FoldedPair.fits(Mine(4).eval(), flow[1])
    assert not FoldedPair.fits(gnn.ActNorm(3).eval(), flow[1])


def test_parameters_and_state_do_not_know_of_the_folding():
    flow = chain()
    before = {key: value.clone() for key, value in flow.state_dict().items()}
    flow(torch.randn(2, 4, 2, 2, dtype=torch.float64))
    assert all(torch.equal(value, before[key]) for key, value in flow.state_dict().items())
    assert list(before) == list(torch.nn.Sequential(*flow).state_dict())


def test_many_pairs_are_assembled_in_as_many_operations_as_one():
    counts = []
    for pairs in (1, 8):
        flow = gnn.FlowSequential(*[m for _ in range(pairs) for m in (gnn.ActNorm(6), gnn.InvertibleConv1x1(6))]).eval()
        with Watch() as watch, torch.no_grad():
            flow(torch.randn(4, 6))
        counts.append(sum(watch.calls[name] for name in ("aten::baddbmm", "aten::tril", "aten::exp", "aten::sum")))
    assert counts[0] == counts[1] > 0


def test_folded_fp32_is_as_exact_as_layer_by_layer():
    flow = chain(dtype=torch.float32)
    exact = chain()
    exact.load_state_dict(flow.state_dict())
    x = torch.randn(16, 4, 4, 4)
    truth = unfolded(exact, x.double())[0]
    error = (flow(x)[0] - truth).abs().max()
    assert error <= 2 * (unfolded(flow, x)[0] - truth).abs().max()
