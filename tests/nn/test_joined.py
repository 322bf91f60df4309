"""Layers that a flow runs together: additive couplings on halves, ActNorms with shared sums, autoregressive transforms
in one call; the same numbers as one by one."""

import pytest
import torch
from torch.nn.utils import prune

import genkernels as gk
from genkernels import nn as gnn
from genkernels.models.flows.nets import MLP
from genkernels.nn.additive_run import AdditiveRun
from genkernels.nn.autoregressive_run import AutoregressiveRun
from genkernels.nn.joined_actnorms import JoinedActNorms
from tests.nn.flow_checks import Net, Watch, perturb


@pytest.fixture(autouse=True)
def not_forced():
    with gk.use_backend("auto"):
        yield


def one_by_one(flow, x, context=None, inverse=False):
    ldj = 0
    for layer in reversed(list(flow)) if inverse else flow:
        x, log_det = layer.inverse(x, context) if inverse else layer(x, context)
        ldj = ldj + log_det
    return x, ldj


def additive(couplings=4, features=6, context=0, dtype=torch.float64, reversible=False):
    nets = [MLP(features // 2, features // 2, 5, 1, context) for _ in range(couplings)]
    layers = [gnn.AffineCoupling(net, additive=True, flip=i % 3 == 1) for i, net in enumerate(nets)]
    flow = gnn.FlowSequential(gnn.EvenOdd(), *layers, gnn.ActNorm(features), reversible=reversible)
    return perturb(flow, 0.3).to(dtype).eval()


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_additive_couplings_on_halves_are_the_same_to_the_bit(inverse, context, dtype):
    flow = additive(context=context, dtype=dtype)
    x = torch.randn(5, 6, dtype=dtype, requires_grad=True)
    given = torch.randn(5, context, dtype=dtype) if context else None
    results = []
    for run in (
        lambda: flow.inverse(x, given) if inverse else flow(x, given),
        lambda: one_by_one(flow, x, given, inverse),
    ):
        z, ldj = run()
        grads = torch.autograd.grad(
            (z.sin() * torch.arange(6)).sum() + (ldj * torch.arange(5)).sum(), [x, *flow.parameters()]
        )
        results.append([z, ldj, *grads])
    steps = flow._steps()
    assert [len(step.layers) for step in steps if isinstance(step, AdditiveRun)] == [4] and len(steps) == 3
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


def test_additive_couplings_of_images():
    nets = [torch.nn.Conv2d(2, 2, 1) for _ in range(2)]
    flow = gnn.FlowSequential(*(gnn.AffineCoupling(net, additive=True, flip=bool(i)) for i, net in enumerate(nets)))
    x = torch.randn(2, 4, 3, 5)
    z, ldj = flow(x)
    expected, _ = one_by_one(flow, x)
    assert torch.equal(z, expected) and torch.equal(ldj, torch.zeros(2))
    torch.testing.assert_close(flow.inverse(z)[0], x)


def test_what_does_not_run_on_halves():
    flow = additive()
    hooked = flow[2]
    hooked.register_forward_hook(lambda *arguments: None)
    assert [len(step.layers) for step in flow._steps() if isinstance(step, AdditiveRun)] == [1, 2]
    for backend in ("reference", "cpu"):
        if backend == "reference" or not gk.backends.why_missing(backend):
            with gk.use_backend(backend):
                assert not any(isinstance(step, AdditiveRun) for step in flow._steps())
    affine = gnn.AffineCoupling(MLP(3, 6, 5, 1))
    checkerboard = gnn.AffineCoupling(torch.nn.Identity(), split="checkerboard", additive=True)
    assert not AdditiveRun.takes(affine) and not AdditiveRun.takes(checkerboard) and not AdditiveRun.takes(flow[0])


def test_a_reversible_flow_keeps_its_couplings_apart():
    """As one step they would hold the activations of all at once."""
    flow, plain = additive(reversible=True), additive()
    plain.load_state_dict(flow.state_dict())
    assert not any(isinstance(step, AdditiveRun) for step in flow._steps(runs=False))
    x = torch.randn(5, 6, dtype=torch.float64)
    for mine, theirs in zip(flow(x), plain(x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("net", "x", "sentence"),
    [
        (torch.nn.Linear(3, 2), torch.randn(2, 6), r"params must be \[N, C, ...\] = \[2, 3\]"),
        (torch.nn.Linear(3, 3), torch.randn(2, 7), r"even number of channels"),
        (torch.nn.Linear(3, 3).double(), torch.randn(2, 6), "dtype|Double"),
    ],
)
def test_additive_couplings_say_what_is_wrong(net, x, sentence):
    flow = gnn.FlowSequential(*(gnn.AffineCoupling(net, additive=True) for _ in range(2)))
    with pytest.raises((ValueError, TypeError, RuntimeError), match=sentence):
        flow(x)


def norms(dtype=torch.float64):
    shared = gnn.ActNorm(4)
    layers = [gnn.ActNorm(4), shared, gnn.Squeeze(), gnn.ActNorm(16), gnn.ActNorm(16), Narrow(), shared]
    return perturb(gnn.FlowSequential(*layers), 0.3).to(dtype).eval()


class Narrow(torch.nn.Module):
    """Keeps a fourth of the channels; no flow, but it changes the grid."""

    def forward(self, x, context=None):
        return x[:, :4].contiguous(), x.new_zeros(len(x))

    def inverse(self, z, context=None):
        return torch.cat([z, z, z, z], 1), z.new_zeros(len(z))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_actnorms_together(inverse, dtype):
    """z to the bit; the log-determinant in another order. One of them stands at two places, on grids of two sizes."""
    flow = norms(dtype)
    x = torch.randn(3, 4, 1, 3, dtype=dtype) if inverse else torch.randn(3, 4, 2, 6, dtype=dtype)
    x.requires_grad_()
    results = []
    for run in (lambda: flow.inverse(x) if inverse else flow(x), lambda: one_by_one(flow, x, None, inverse)):
        z, ldj = run()
        results.append(
            [z, ldj, *torch.autograd.grad(z.sin().sum() + (ldj * torch.arange(3)).sum(), [x, *flow.parameters()])]
        )
    assert torch.equal(results[0][0], results[1][0])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_actnorms_share_one_exponential_a_size():
    flow = norms().requires_grad_(False)
    with Watch() as watch:
        flow(torch.randn(3, 4, 2, 6, dtype=torch.float64))
    assert watch.calls["aten::_foreach_exp"] == 2 and watch.calls["aten::exp"] == 0
    with gk.use_backend("reference"), Watch() as watch:
        flow(torch.randn(3, 4, 2, 6, dtype=torch.float64))
    assert watch.calls["aten::exp"] == 5


def test_an_actnorm_without_its_start_or_with_hooks_runs_by_itself():
    fresh, hooked = gnn.ActNorm(4), gnn.ActNorm(4)
    hooked.register_forward_hook(lambda *arguments: None)
    assert (
        not JoinedActNorms.takes(fresh)
        and JoinedActNorms.takes(fresh.eval())
        and not JoinedActNorms.takes(hooked.eval())
    )
    flow = gnn.FlowSequential(gnn.ActNorm(4), gnn.ActNorm(4)).train()
    z, _ = flow(torch.randn(64, 4) * 3 + 1)
    assert all(layer.ready for layer in flow)
    torch.testing.assert_close(z.mean(0), torch.zeros(4), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"ActNorm: x must be \[N, 4, ...\], got \[2, 5\]"):
        flow(torch.zeros(2, 5))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("inverse", [False, True])
def test_a_scale_that_the_loss_does_not_use_may_be_infinite(inverse, backend):
    """The log-determinant alone: a coupling's depends on the ActNorm before it, and on none behind."""
    layers = [gnn.ActNorm(4), gnn.AffineCoupling(Net(2, 4)), gnn.ActNorm(4)]
    flow = gnn.FlowSequential(*(layers[::-1] if inverse else layers)).eval()
    with torch.no_grad():
        layers[2].log_scale.fill_(-100 if inverse else 100)
    with gk.use_backend(backend):
        z, ldj = flow.inverse(torch.ones(2, 4, 3)) if inverse else flow(torch.ones(2, 4, 3))
    assert z.isinf().all()
    used, bias, log_scale = torch.autograd.grad(
        ldj.sum(), [layers[0].log_scale, layers[2].bias, layers[2].log_scale], allow_unused=True
    )
    assert used.isfinite().all() and (used != (-6 if inverse else 6)).any()
    assert bias is None and torch.equal(log_scale, torch.full((4,), -6.0 if inverse else 6.0))


def test_actnorms_together_mapped_over_their_weights():
    flow = norms(torch.float32)
    weights = [torch.randn(3, *p.shape) for p in flow.parameters()]
    names = [name for name, _ in flow.named_parameters()]
    x = torch.randn(2, 4, 2, 6)

    def run(*values):
        return torch.func.functional_call(flow, dict(zip(names, values, strict=True)), (x,))

    each = [run(*values) for values in zip(*weights, strict=True)]
    for mapped, ones in zip(torch.func.vmap(run)(*weights), zip(*each, strict=True), strict=True):
        torch.testing.assert_close(mapped, torch.stack(ones))


needs_kernels = pytest.mark.skipif(gk.backends.why_missing("cpu") is not None, reason="the CPU library is not built")


def autoregressive(normed=True, tail=True, context=0, dtype=torch.float64, residual=False, features=5):
    """Three transforms in three orders, an ActNorm before each and one behind, or some of them; started."""
    layers = []
    for order in ("random", "natural", "reversed"):
        made = gnn.MADE(features, (9, 9, 9), residual=residual, order=order, context_features=context)
        layers += [gnn.ActNorm(features)] if normed else []
        layers.append(gnn.AutoregressiveTransform(made, scale_map="tanh"))
    flow = gnn.FlowSequential(*layers, *([gnn.ActNorm(features)] if tail else []))
    flow(torch.randn(20, features), torch.randn(20, context) if context else None)
    return perturb(flow, 0.2).to(dtype)


def steps(flow, x):
    return [type(step).__name__ for step in AutoregressiveRun.joined(flow._steps(), x)]


@needs_kernels
@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("normed,tail", [(True, True), (True, False), (False, True), (False, False)])
def test_autoregressive_transforms_in_one_call(normed, tail, residual, context):
    flow = autoregressive(normed, tail, context, residual=residual)
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    given = torch.randn(6, context, dtype=torch.float64, requires_grad=True) if context else None
    assert steps(flow, x) == ["AutoregressiveRun"] + ["ActNorm"] * (tail and not normed)
    leaves = [t for t in (x, given, *flow.parameters()) if t is not None]
    results = []
    for run in (lambda: flow(x, given), lambda: one_by_one(flow, x, given)):
        z, ldj = run()
        loss = (z.sin() * torch.arange(5)).sum() + (ldj * torch.arange(6)).sum()
        results.append([z, ldj, *torch.autograd.grad(loss, leaves)])
    with torch.no_grad():
        results.append([*flow(x, given), *results[0][2:]])
    for mine, theirs, quietly in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
        assert torch.equal(mine, quietly)
    z, ldj = flow(x, given)
    back, inverse_ldj = flow.inverse(z, given)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_ldj, -ldj)


@needs_kernels
def test_which_autoregressive_transforms_run_by_themselves():
    flow, x = autoregressive(), torch.randn(4, 5, dtype=torch.float64)
    whole = ["AutoregressiveRun"]
    assert steps(flow, x) == whole and steps(flow, x.bfloat16()) == [type(layer).__name__ for layer in flow]
    for backend in ("reference", "cpu"):
        with gk.use_backend(backend):
            expected = one_by_one(flow, x)
            for mine, theirs in zip(flow(x), expected, strict=True):
                torch.testing.assert_close(mine, theirs)
    seen = []
    hook = flow[3].made.layers[1].register_forward_hook(lambda *arguments: seen.append(1))
    assert steps(flow, x) == ["AutoregressiveRun", "AutoregressiveTransform", "AutoregressiveRun"]
    expected = flow(x)
    assert len(seen) == 1
    hook.remove()
    for mine, theirs in zip(flow(x), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    flow[2].register_forward_hook(lambda *arguments: None)  # an ActNorm in between
    assert steps(flow, x) == ["AutoregressiveRun", "ActNorm", "AutoregressiveTransform", "AutoregressiveRun"]
    prune.l1_unstructured(flow[1].made.layers[0], "weight", 0.5)
    assert steps(flow, x)[:2] == ["ActNorm", "AutoregressiveTransform"]
    iaf = gnn.FlowSequential(*(gnn.InverseAutoregressiveTransform(gnn.MADE(5, 9)) for _ in range(2)))
    assert "AutoregressiveRun" not in steps(iaf, x.float())


@needs_kernels
def test_an_autoregressive_run_of_a_wrong_input_says_what_is_wrong():
    flow = autoregressive(context=3)
    x, context = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"MADE: a context \[N, 3\] is needed, got None"):
        flow(x)
    with pytest.raises(ValueError, match="ActNorm"):
        flow(x[:, :4], context)
    flow[1].made.layers[1].weight = torch.nn.Parameter(torch.zeros(8, 9, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"made: biases\[1\] must be \[out\] = \[8\], got \[9\]"):
        flow(x, context)


@needs_kernels
@pytest.mark.parametrize("rows", [8, 400])
def test_autoregressive_transforms_under_autocast(rows):
    flow, x = autoregressive(dtype=torch.float32), torch.randn(rows, 5)
    exact = one_by_one(flow, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert (steps(flow, x) == ["AutoregressiveRun"]) == (rows == 8)
        mine = flow(x)
    for got, wanted in zip(mine, exact, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(
            got, wanted, **({"rtol": 1e-4, "atol": 1e-4} if rows == 8 else {"rtol": 0.1, "atol": 0.3})
        )
