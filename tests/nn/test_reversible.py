"""FlowSequential(reversible=True): the stored path's gradients, in memory that does not grow with depth."""

import copy
import gc

import pytest
import torch

import genkernels as gk
from genkernels import nn as gnn
from genkernels.models.flows.nets import ConvNet
from tests.nn.flow_checks import Net, Watch, glow_steps, perturb


class Softened(torch.nn.Module):
    """A user's own layer, without a reverse_backward: z = x + a·tanh(x)/2, inverted by iteration."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, x, context=None):
        slope = self.a / 2 * (1 - torch.tanh(x) ** 2)
        return x + self.a / 2 * torch.tanh(x), torch.log1p(slope).flatten(1).sum(1)

    def inverse(self, z, context=None):
        x = z
        for _ in range(60):
            x = z - self.a / 2 * torch.tanh(x)
        return x, -self.forward(x)[1]


def checkerboards():
    return [
        gnn.AffineCoupling(Net(4, 8, 3), "checkerboard", "tanh"),
        gnn.AffineCoupling(Net(4, 8, 3), "checkerboard", "exp", flip=True, layout="interleaved"),
        gnn.AffineCoupling(Net(4, 4, 3), "checkerboard", additive=True),
    ]


CHAINS = {
    "glow": lambda: glow_steps(4, 3, 3),
    "tanh interleaved": lambda: glow_steps(4, 2, 3, scale_map="tanh", layout="interleaved"),
    "additive": lambda: glow_steps(4, 2, 3, additive=True),
    "checkerboard": checkerboards,
    "squeezed": lambda: [gnn.Squeeze(), *glow_steps(16, 2, 3)],
    "dense matrices": lambda: [gnn.ActNorm(4), gnn.InvertibleConv1x1(4, lu=False), gnn.ActNorm(4)],
    "a user's layer": lambda: [Softened(), *glow_steps(4, 1, 3), Softened()],
    "nested": lambda: [gnn.FlowSequential(*glow_steps(4, 2, 3), reversible=True), *glow_steps(4, 1, 3)],
    "the same layer twice": lambda: glow_steps(4, 1, 3) * 2,
    "a network that ignores its input": lambda: [gnn.AffineCoupling(Constant())],
}


class Constant(torch.nn.Module):
    def forward(self, x, context):
        return torch.ones(len(x), 4, *x.shape[2:], dtype=x.dtype)


def twins(layers, dtype=torch.float64, ready=True):
    """The same flow, stored and reversible."""
    stored = perturb(gnn.FlowSequential(*layers).to(dtype), 0.2)
    for module in stored.modules():
        if ready and isinstance(module, gnn.ActNorm):
            module._ready = True
            module.initialized.fill_(True)
    reversible = copy.deepcopy(stored)
    reversible.reversible = True
    return stored, reversible


def gradients(flow, x, context=None, loss=None):
    x = x.clone().requires_grad_()
    context = None if context is None else context.clone().requires_grad_()
    wanted = [x, *([] if context is None else [context]), *[p for p in flow.parameters() if p.requires_grad]]
    z, ldj = flow(x, context)
    loss = loss or (lambda z, ldj: z.sin().sum() + (ldj * torch.arange(1, len(ldj) + 1)).sum())
    return [z, ldj, *torch.autograd.grad(loss(z, ldj), wanted, allow_unused=True)]


def assert_same(mine, theirs, tolerance=1e-9):
    for a, b in zip(mine, theirs, strict=True):
        if a is None or b is None:
            assert a is b or (a if b is None else b).abs().max() == 0
        else:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients_are_those_of_the_stored_path(name, backend):
    stored, reversible = twins(CHAINS[name]())
    x, context = torch.randn(2, 4, 4, 2, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    with gk.use_backend(backend):
        assert_same(gradients(reversible, x, context), gradients(stored, x, context))


@pytest.mark.parametrize("part", ["z", "ldj"])
def test_a_loss_of_one_output_alone(part):
    stored, reversible = twins(glow_steps(4, 2))
    x = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    loss = (lambda z, _: z.exp().sum()) if part == "z" else (lambda _, ldj: ldj.exp().sum())
    assert_same(gradients(reversible, x, loss=loss), gradients(stored, x, loss=loss))


class Root(torch.nn.Module):
    """z = ±√|x|: its slope at 0 is infinite."""

    def forward(self, x, context=None):
        return x.sign() * x.abs().sqrt(), x.new_zeros(len(x))

    def inverse(self, z, context=None):
        return z * z.abs(), z.new_zeros(len(z))


class SteepVolume(torch.nn.Module):
    """The identity with a log-determinant whose slope at 0 is infinite."""

    def forward(self, x, context=None):
        return x.clone(), x.abs().sqrt().flatten(1).sum(1)

    def inverse(self, z, context=None):
        return z.clone(), -z.abs().sqrt().flatten(1).sum(1)


class RootNet(torch.nn.Module):
    def forward(self, x, context=None):
        return x.abs().sqrt()


#: The part that the loss takes, and the layers between two couplings whose other part has an infinite slope.
STEEP = {
    "z by a layer": ("ldj", lambda: [Root()]),
    "z by a coupling's network": ("ldj", lambda: [gnn.AffineCoupling(RootNet(), additive=True)]),
    "z by a checkerboard's network": ("ldj", lambda: [gnn.AffineCoupling(RootNet(), "checkerboard", additive=True)]),
    "z by layers that keep volumes": ("ldj", lambda: [gnn.Squeeze(), Root(), gnn.ActNorm(16), Root()]),
    "ldj": ("z", lambda: [SteepVolume(), gnn.AffineCoupling(Net(2, 4)), SteepVolume()]),
}


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
@pytest.mark.parametrize("name", STEEP)
def test_an_output_that_the_loss_does_not_use_multiplies_nothing(name, backend):
    part, between = STEEP[name]
    stored, reversible = twins([gnn.AffineCoupling(Net(2, 4)), *between()])
    x = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    x[0, :2] = 0  # the half that passes
    loss = (lambda z, _: z.exp().sum()) if part == "z" else (lambda _, ldj: ldj.exp().sum())
    with gk.use_backend(backend):
        mine, theirs = gradients(reversible, x, loss=loss), gradients(stored, x, loss=loss)
    assert_same(mine, theirs)
    assert all(grad.isfinite().all() for grad in mine[2:] if grad is not None)
    assert [grad is None for grad in mine] == [grad is None for grad in theirs]


def started(points, seed):
    """A stored, a reversible and an exact Glow of two dimensions, their ActNorms started from so many points."""
    torch.manual_seed(seed)
    stored = gk.models.Glow(shape=(2,), steps=16, hidden=8)
    stored.initialize(torch.randn(points, 2))
    reversible = copy.deepcopy(stored)
    reversible.flows[0].reversible = True
    return stored, reversible, copy.deepcopy(stored).double(), torch.randn(64, 2)


def gradient(model, x):
    loss = model.loss(x)
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize(("points", "seeds"), [(3, 24), (64, 6)])
def test_gradients_are_right_or_refused(points, seeds):
    """Of 3 points some directions are flat, and each ActNorm scales them up again, until fp32 holds nothing beside
    them: then the inverse is rounding alone. Either each parameter's gradient is that of fp64, as far as the stored
    path's is, or there is none."""
    refused = 0
    for seed in range(seeds):
        stored, reversible, exact, x = started(points, seed)
        right, plain = gradient(exact, x.double()), gradient(stored, x)
        misses = [(mine - true).norm() for mine, true in zip(plain, right, strict=True)]
        assert torch.stack(misses).norm() <= 1e-5 * torch.stack([true.norm() for true in right]).norm()
        try:
            found = gradient(reversible, x)
        except RuntimeError as error:
            assert "came back wrong by" in str(error) and "\n" not in str(error)
            refused += 1
            continue
        for mine, true, miss in zip(found, right, misses, strict=True):
            assert (mine - true).norm() <= 0.05 * true.norm() + 4 * miss, seed
    assert 0 < refused < seeds if points == 3 else refused == 0


def test_gradients_are_not_a_number_where_nobody_waits_to_look(monkeypatch):
    monkeypatch.setattr("genkernels.nn._values.readable", lambda x: False)
    stored, reversible, _, x = started(64, 0)
    assert_same(gradient(reversible, x), gradient(stored, x), 1e-4)
    _, reversible, _, x = started(3, 3)
    x.requires_grad_()
    reversible.loss(x).backward()
    for tensor in (x, *reversible.flows.parameters()):
        assert tensor.grad.isnan().all()


def test_what_is_not_finite_by_itself_is_not_refused():
    stored, reversible = twins(glow_steps(4, 2), torch.float32)
    x = torch.randn(5, 4)
    x[2, 1], x[3, 2] = float("nan"), 1e30  # which the loss squares
    for flow in (stored, reversible):
        leaf = x.clone().requires_grad_()
        z, ldj = flow(leaf)
        (z.square().sum(1) - ldj).mean().backward()
        assert leaf.grad[[0, 1, 4]].isfinite().all() and not leaf.grad[[2, 3]].isfinite().all()


def test_latents_that_overflow_are_refused_where_the_loss_does_not_use_them():
    stored, reversible = twins([*glow_steps(4, 1), gnn.ActNorm(4), gnn.ActNorm(4)], torch.float32)
    with torch.no_grad():
        for flow in (stored, reversible):
            flow[-1].log_scale.fill_(100)
    x = torch.randn(5, 4)
    found = gradients(stored, x, loss=lambda z, ldj: ldj.sum())
    assert found[0].isinf().any() and all(grad is None or grad.isfinite().all() for grad in found[2:])
    with pytest.raises(RuntimeError, match="came back wrong by"):
        gradients(reversible, x, loss=lambda z, ldj: ldj.sum())


def test_an_inverse_that_is_none_is_refused():
    class Wrong(Root):
        def inverse(self, z, context=None):
            return 1.1 * z, z.new_zeros(len(z))

    flow = gnn.FlowSequential(Wrong(), gnn.ActNorm(4), reversible=True).eval()
    with pytest.raises(RuntimeError, match="x, of a mean size of .*, came back wrong by"):
        flow(torch.randn(5, 4, requires_grad=True))[0].sum().backward()


def test_64_layers_in_fp32():
    stored, reversible = twins([m for _ in range(16) for m in glow_steps(4, 1) + glow_steps(4, 1)[2:]], torch.float32)
    assert len(stored) == 64
    x = torch.randn(16, 4, 4, 4)
    for mine, theirs in zip(gradients(reversible, x), gradients(stored, x), strict=True):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm()


def test_frozen_parameters_and_a_constant_input():
    stored, reversible = twins(glow_steps(4, 2))
    for flow in (stored, reversible):
        for index, parameter in enumerate(flow.parameters()):
            parameter.requires_grad_(index % 3 == 0)
    x = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    assert_same(gradients(reversible, x), gradients(stored, x))
    for flow in (stored, reversible):
        z, ldj = flow(x)  # x needs no gradient
        (z.sum() + ldj.sum()).backward()
    assert [p.grad is None for p in reversible.parameters()] == [not p.requires_grad for p in reversible.parameters()]
    assert_same([p.grad for p in reversible.parameters()], [p.grad for p in stored.parameters()])
    for parameter in reversible.parameters():
        parameter.requires_grad_(False)
    assert not reversible(x)[0].requires_grad


def test_under_autocast():
    """The networks run in bf16 in backward as they did in forward, also when backward runs outside of the region."""
    stored, reversible = (
        f.train() for f in twins([gnn.AffineCoupling(ConvNet(2, 4, 8)) for _ in range(3)], torch.float32)
    )
    x = torch.randn(4, 4, 6, 6)
    found = []
    for flow in (stored, reversible):
        leaf = x.clone().requires_grad_()
        dtypes = []
        flow[1].net.register_forward_hook(lambda *a, log=dtypes: log.append(a[2].dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z, ldj = flow(leaf)
        grads = torch.autograd.grad(z.square().mean() - ldj.mean(), [leaf, *flow.parameters()])
        assert z.dtype == torch.float32 and set(dtypes) == {torch.bfloat16}
        found.append([z, *grads])
    assert len(dtypes) == 2
    for mine, theirs in zip(*found, strict=True):
        assert (mine - theirs).norm() <= 1e-2 * theirs.norm()


def test_autocast_shares_no_cast_between_passes():
    """Forward and backward, twice, inside one autocast region: a weight's cast from one pass has no graph in the
    next."""
    net = ConvNet(2, 4, 8)
    flow = perturb(
        gnn.FlowSequential(gnn.AffineCoupling(net), gnn.AffineCoupling(net, flip=True), reversible=True), 0.05
    )
    x = torch.randn(2, 4, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [torch.autograd.grad(flow(x)[1].sum(), net.first.weight)[0] for _ in range(2)]
        outside = net.first(x[:, :2])
    assert torch.equal(*found) and found[0].abs().sum() > 0
    assert torch.autograd.grad(outside.float().sum(), net.first.weight)[0].abs().sum() > 0


def test_first_training_batch_initialises():
    stored, reversible = twins(glow_steps(4, 3), ready=False)
    x = torch.randn(32, 4, 2, 2, dtype=torch.float64) * 3 + 1
    assert_same(gradients(reversible, x), gradients(stored, x))
    assert all(m.ready for m in reversible.modules() if isinstance(m, gnn.ActNorm))
    assert_same(reversible.state_dict().values(), stored.state_dict().values())
    assert_same(gradients(reversible, x), gradients(stored, x))


def test_backward_keeps_to_the_backend_of_forward():
    _, flow = twins(glow_steps(4, 2))
    x = torch.randn(2, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    with gk.use_backend("reference"):
        z, _ = flow(x)
    with Watch() as watch:
        z.sum().backward()
    assert not [name for name in watch.calls if name.startswith("genkernels::")]


def test_one_pass_through_each_network_in_backward(monkeypatch):
    _, flow = twins(glow_steps(4, 3))
    monkeypatch.setattr(gnn.AffineCoupling, "inverse", None)  # never asked for
    calls = []
    for layer in flow:
        if isinstance(layer, gnn.AffineCoupling):
            layer.net.register_forward_hook(lambda *_: calls.append(1))
    z, ldj = flow(torch.randn(2, 4, 2, 2, dtype=torch.float64))
    assert len(calls) == 3
    (z.sum() + ldj.sum()).backward()
    assert len(calls) == 6


def test_backward_twice_over_a_retained_graph():
    _, flow = twins(glow_steps(4, 2))
    x = torch.randn(2, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    loss = flow(x)[0].square().sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, x)[0], first)


def test_what_it_cannot_do_raises():
    _, flow = twins(glow_steps(4, 1))
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again .* use reversible=False"):
        torch.autograd.grad(flow(x)[0].sum(), x, create_graph=True)

    loss = flow(x)[0].sum()
    with torch.no_grad():
        flow[0].bias.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()

    z, _ = flow(x)
    with torch.no_grad():
        z.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()

    with pytest.raises(TypeError, match="context must be a tensor or None, got tuple"):
        flow(x, (x,))

    noisy = gnn.FlowSequential(
        gnn.AffineCoupling(torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Dropout(0.5))), reversible=True
    )
    with pytest.raises(RuntimeError, match="active Dropout; use reversible=False"):
        noisy(x.float())
    noisy.eval()(x.float())


def deep(steps, reversible):
    layers = [[gnn.ActNorm(8), gnn.InvertibleConv1x1(8), gnn.AffineCoupling(ConvNet(4, 8, 16))] for _ in range(steps)]
    flow = gnn.FlowSequential(*sum(layers, []), reversible=reversible)
    x = torch.randn(8, 8, 8, 8)
    with torch.no_grad():
        flow(x)
    return flow, x


def test_memory_of_a_training_step_is_flat_in_depth():
    """Peak of live bytes of a step, parameter gradients apart: 32 steps need what 4 need; stored, they need far
    more."""
    peaks = {}
    for reversible in (True, False):
        for steps in (4, 32):
            flow, x = deep(steps, reversible)
            with Watch(x, *flow.parameters(), *flow.buffers()) as watch:
                z, ldj = flow(x)
                (z.square().mean() - ldj.mean()).backward()
            grads = sum(p.grad.nbytes for p in flow.parameters())
            peaks[reversible, steps] = watch.peak - grads
    assert peaks[True, 32] <= 1.1 * peaks[True, 4]
    assert peaks[False, 32] > 4 * peaks[True, 32]


def test_only_the_last_output_is_saved():
    saved = {}
    for steps in (2, 16):
        flow, x = deep(steps, True)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, log=sizes: log.append(t.nbytes) or t, lambda t: t):
            flow(x)
        saved[steps] = sizes
    assert saved[2] == saved[16] == [x.nbytes]


def test_nothing_outlives_the_step():
    """No cycle, no context: activations are gone as soon as the outputs are, without the garbage collector."""
    flow, x = deep(6, True)
    with Watch():
        flow(x)[0].sum().backward()  # what is imported at first use leaves cycles of its own
    flow.zero_grad()
    gc.collect()
    gc.disable()
    try:
        with Watch(x, *flow.parameters(), *flow.buffers()) as watch:
            z, ldj = flow(x)
            (z.square().mean() - ldj.mean()).backward()
            del z, ldj
            assert watch.live == sum(p.grad.nbytes for p in flow.parameters())
            flow.zero_grad()
            z, ldj = flow(x)  # never differentiated
            del z, ldj
            assert watch.live == 0
    finally:
        gc.enable()
