"""Blocks of FrEIA, swapped and not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genkernels.swap import _coupling, swap_
from tests.swap.checks import DTYPES, check_swap, draw

pytest.importorskip("FrEIA", reason="needs the extra bench")

from FrEIA import modules


@pytest.fixture
def not_on_a_cpu(monkeypatch):
    """Blocks that are left alone on a CPU are not."""
    from genkernels.swap import freia

    monkeypatch.setattr(freia, "_on_cpu", lambda block: False)


def linear(into, out):
    return nn.Linear(into, out)


def both_ways(x, *conditions):
    def run(model):
        (z,), log_det = model((x,), list(conditions))
        (back,), minus = model((x.flip(0),), list(conditions), rev=True)
        return {"z": z, "log-det": log_det, "x": back, "minus": minus}

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [4, 5])
@pytest.mark.parametrize("clamp_activation", ["ATAN", "TANH"])
@pytest.mark.parametrize("kind", ["GLOWCouplingBlock", "RNVPCouplingBlock"])
@pytest.mark.parametrize("large", [True, False])
def test_two_sided(not_on_a_cpu, monkeypatch, large, kind, clamp_activation, channels, dtype):
    monkeypatch.setattr(_coupling, "SMALL", -1 if large else 1 << 16)
    options = {"subnet_constructor": linear, "clamp": 1.3, "clamp_activation": clamp_activation}
    make = lambda: getattr(modules, kind)([(channels,)], **options)  # noqa: E731
    x = (2 if dtype == torch.float64 else 0.5) * draw(5, channels, dtype=dtype)
    check_swap(make, both_ways(x), dtype, swapped=1)
    make = lambda: getattr(modules, kind)([(channels,)], [(2,)], **options)  # noqa: E731
    check_swap(make, both_ways(x, draw(5, 2, dtype=dtype, seed=1)), dtype, swapped=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{}, {"learned_householder_permutation": 2}, {"reverse_permutation": True}], ids=str
)
def test_all_in_one(not_on_a_cpu, options, dtype):
    for channels in (4, 5):
        make = lambda n=channels: modules.AllInOneBlock([(n,)], subnet_constructor=linear, **options)  # noqa: E731
        check_swap(make, both_ways(3 * draw(5, channels, dtype=dtype)), dtype, swapped=1, copies=not options)


def test_images():
    net = lambda i, o: nn.Conv2d(i, o, 3, padding=1)  # noqa: E731
    make = lambda: modules.GLOWCouplingBlock([(4, 3, 3)], subnet_constructor=net)  # noqa: E731
    check_swap(make, both_ways(draw(2, 4, 3, 3, dtype=torch.float64)), torch.float64, swapped=1)


def test_what_stays_and_a_clamp_that_changes():
    blocks = [
        modules.GLOWCouplingBlock([(4,)], subnet_constructor=linear, clamp_activation="SIGMOID"),
        modules.GLOWCouplingBlock([(4,)], subnet_constructor=linear, clamp_activation=torch.sin),
        modules.AllInOneBlock([(4,)], subnet_constructor=linear, gin_block=True),
        modules.NICECouplingBlock([(4,)], subnet_constructor=linear),
        modules.RNVPCouplingBlock([(4,)], subnet_constructor=linear),
        modules.AllInOneBlock([(4,)], subnet_constructor=linear),
        modules.GLOWCouplingBlock([(4,)], subnet_constructor=linear),
    ]
    report = swap_(nn.ModuleList(blocks))
    assert [bool(entry.became) for entry in report.entries] == [False] * 6 + [True]
    assert report.entries[5].reason.startswith("on a CPU it is no faster")
    block, x = blocks[6], draw(5, 4, dtype=torch.float32)
    for change in ({"clamp": 0.5}, {"f_clamp": torch.tanh}, {"f_clamp": torch.sin}):
        for name, value in change.items():
            setattr(block, name, value)
        found = block((x,))
        expected = modules.GLOWCouplingBlock.forward(block, (x,))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(3,), (2, 4, 3)])
def test_a_residual_block(size, dtype):
    """The same probes, so the same numbers, in both directions; the gradient of z is FrEIA's, that of the
    log-determinant is none there."""

    def make():
        block = modules.IResNetLayer([size], internal_size=6, hutchinson_samples=3, jacobian_iterations=12)
        with torch.no_grad():
            for layer in block.layers:
                layer.weight /= 4
        return block

    def run(block):
        found = {}
        for rev in (False, True):
            torch.manual_seed(4)
            (z,), log_det = block([x.clone()], rev=rev)
            found |= {f"z {rev=}": z, f"log-det {rev=}": log_det.detach() + 0 * z.sum()}
        return found

    x = draw(5, *size, dtype=dtype)
    report = check_swap(make, run, dtype, swapped=1)
    assert "has a gradient" in report.entries[0].reason
    ours, theirs = make(), make()
    theirs.load_state_dict(ours.state_dict())
    swap_(ours)
    assert ours([x.float()])[1].requires_grad
    with torch.no_grad():
        found, expected = (block([x.float()], jac=False) for block in (ours, theirs))
    assert found[1] is None and torch.equal(found[0][0], expected[0][0])


def test_the_gradient_of_a_residual_blocks_log_determinant():
    torch.manual_seed(0)
    block = modules.IResNetLayer([(2,)], internal_size=5, hutchinson_samples=4000).double()
    with torch.no_grad():
        for layer in block.layers:
            layer.weight *= 0.7
    swap_(block)
    x = draw(1, 2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: v + block.residual(v), x[0], create_graph=True)
    expected = torch.autograd.grad(jacobian.logdet(), [layer.weight for layer in block.layers])
    found = torch.autograd.grad(block([x])[1].sum(), [layer.weight for layer in block.layers])
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 0.05 * b.norm()
    block.layers[0].weight.data *= 1e3  # expands: the steps of FrEIA go nowhere, and no other answer is made up
    with torch.no_grad():
        (found,), _ = block([x], rev=True, jac=False)
        expected = modules.IResNetLayer.forward(block, [x], rev=True, jac=False)[0][0]
    torch.testing.assert_close(found, expected, equal_nan=True)
