"""PlanarFlow and RadialFlow: the operator with parameters of their own, near the identity at the start, no inverse."""

import pytest
import torch

from genkernels import nn as gnn
from genkernels import ops
from tests.nn.flow_checks import brute_log_det, perturb

KINDS = [gnn.PlanarFlow, gnn.RadialFlow]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_operator_and_its_log_determinant_that_of_the_jacobian(kind):
    layer = perturb(kind(3, 4).double())
    z = torch.randn(5, 3, dtype=torch.float64)
    out, ldj = layer(z)
    flow = {gnn.PlanarFlow: ops.planar_flow, gnn.RadialFlow: ops.radial_flow}[kind]
    torch.testing.assert_close((out, ldj), flow(z, *layer.parameters()), rtol=0, atol=0)
    torch.testing.assert_close(ldj, brute_log_det(lambda v: layer(v)[0], z), rtol=0, atol=1e-8)
    samples, by_samples = layer(z.view(5, 1, 3).expand(5, 2, 3))
    torch.testing.assert_close((samples[:, 1], by_samples[:, 1]), (out, ldj), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dim", [1, 2, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_near_the_identity_and_every_parameter_learns(kind, dim):
    torch.manual_seed(0)
    layer, z = kind(dim, 8), torch.randn(100, dim)
    out, ldj = layer(z)
    assert 0 < (out - z).abs().max() < 0.3 and 0 < ldj.abs().max() < 0.3
    (out.square().sum() - ldj.sum()).backward()
    assert all(
        p.grad.isfinite().all() and p.grad.abs().flatten(1 if p.dim() > 1 else 0).any() for p in layer.parameters()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_dtypes_and_no_layers(kind):
    layer = perturb(kind(2, 3))
    other = kind(2, 3)
    other.load_state_dict(layer.state_dict())
    z = torch.randn(4, 2)
    torch.testing.assert_close(other(z), layer(z), rtol=0, atol=0)
    out, ldj = layer(z.bfloat16())
    assert out.dtype == torch.bfloat16 and ldj.dtype == torch.float32
    out, ldj = kind(2, 0)(z)
    assert torch.equal(out, z) and not ldj.any()
    flow = gnn.FlowSequential(layer, gnn.ActNorm(2)).eval()
    torch.testing.assert_close(flow(z), layer(z))


@pytest.mark.parametrize("kind", KINDS)
def test_mistakes_are_answered_in_one_sentence(kind):
    layer, z, name = kind(2, 3), torch.zeros(4, 2), kind.__name__
    for call, error, words in (
        (lambda: layer.inverse(z), NotImplementedError, "no inverse in closed form is offered"),
        (lambda: layer(z, torch.zeros(4, 1)), ValueError, r"it takes no context, got \[4, 1\]"),
        (lambda: layer(torch.zeros(4, 3)), ValueError, r"z must be \[N, 2\] or \[N, S, 2\], got \[4, 3\]"),
        (lambda: layer(torch.zeros(2)), ValueError, r"z must be \[N, 2\] or \[N, S, 2\], got \[2\]"),
        (lambda: layer(z.long()), TypeError, "z must be float64, .* got torch.int64"),
        (lambda: kind(0, 3), ValueError, "dim must be an integer of at least 1, got 0"),
        (lambda: kind(2, -1), ValueError, "layers must be an integer of at least 0, got -1"),
    ):
        with pytest.raises(error, match=f"^{name}: .*{words}") as caught:
            call()
        assert "\n" not in str(caught.value)
