"""Losses of scores and slopes with their gradients in four and six passes, against double backward in fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genkernels import networks
from genkernels.networks import gradient_penalty, penalised, trace
from genkernels.networks.gradient_penalty import explained, why_not
from genkernels.nn import BiasLeakyReLU
from tests.losses import definitions
from tests.networks import nets

close = torch.testing.assert_close


def penalty(slopes):
    return (slopes.flatten(1).square().sum(1) + 1e-3).sqrt() * 0.7


def objective(scores, *others):
    others = others or (scores,)
    return F.softplus(scores[:2] - others[-1][-2:]).mean() + sum(s.square().mean() for s in (scores, *others))


#: Two batches that one loss couples: both penalised, or one.
TWO = [(objective, which) for which in ((True, True), (True, False), (False, True))]


def split(x, penalised):
    """The batch as one or as two, of which some are penalised."""
    batches = list(x.tensor_split(len(penalised)))
    return batches, [penalty if each else None for each in penalised]


def by_autograd(net, x, loss=None, penalised=(True,)):
    x = x.detach().requires_grad_()
    batches, penalties = split(x, penalised)
    pairs = [definitions.slopes(net, batch) for batch in batches]
    total = sum(p(slopes).sum() for (_, slopes), p in zip(pairs, penalties, strict=True) if p)
    total = total + (0 if loss is None else loss(*(scores for scores, _ in pairs)))
    return total, definitions.gradients(total, net, x)


def in_passes(net, x, loss=None, which=(True,)):
    x = x.detach().requires_grad_()
    found = penalised(trace(net, x), *split(x, which), loss)
    return found.total, definitions.gradients(found.total, net, x)


def agree(net, x, *how):
    before = [t.detach().clone() for t in (x, *net.state_dict().values())]
    total, ours = in_passes(net, x, *how)
    expected, theirs = by_autograd(net, x, *how)
    close(total, expected, rtol=1e-12, atol=1e-14)
    assert definitions.apart(ours, theirs) < 1e-10
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, rtol=1e-9, atol=1e-10)
    for now, then in zip((x, *net.state_dict().values()), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("together", [0, gradient_penalty.TOGETHER])
@pytest.mark.parametrize("name", definitions.NETWORKS)
def test_gradients_are_those_of_double_backward(name, together, monkeypatch):
    monkeypatch.setattr(gradient_penalty, "TOGETHER", together)
    net, sample = definitions.critic(name)
    x = definitions.draw(6, sample)
    for how in ((), (objective,), *TWO):
        agree(net, x, *how)
    agree(net, x[:5], *TWO[0])  # of unequal sizes
    agree(net, x[:1])


def fork(self, x):
    """Values that several steps read, under several shapes: what may be written over and what may not."""
    h = self.first(x)
    a = F.relu(h)
    b = F.leaky_relu(F.relu(a - 0.1), 0.2) + a
    c = self.second(b.view(-1, 4, 16).flatten(1)) + self.third(b)
    return self.last(F.relu(c) - h) + self.last(c + a) + x.mean(1, keepdim=True)


def residual(self, x):
    h = self.first(x)
    for _ in range(2):  # the same layer twice: its gradients add up
        h = h + self.second(F.relu(h))
    h = F.relu(h)
    return self.last(self.third(F.leaky_relu(h.reshape(-1, 8, 8).flatten(1), 0.3)) + self.third(h)) + self.last(-h)


class Arithmetic(nn.Module):
    """Scaled and shifted by parameters and buffers of its own, in every order."""

    def __init__(self, activation):
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.rand(3, 1, 1) + 0.5), nn.Parameter(torch.randn(4))
        self.divisor, self.number = nn.Parameter(torch.rand(5, 1) + 0.5), nn.Parameter(torch.tensor(0.7))
        self.register_buffer("mean", torch.randn(3, 1, 1))
        self.weight, self.bias = nn.Parameter(torch.randn(3, 3, 3, 3) / 5), nn.Parameter(torch.randn(3))
        self.activation = activation

    def forward(self, x):
        h = self.activation(((x - self.mean) / 0.5 * self.gain + self.shift) / self.divisor)
        h = 1 - 2 * F.conv2d(h, self.weight, self.bias, padding=1) * self.number - self.number
        h += self.shift
        return self.activation(torch.cat([h, torch.sub(x, self.shift, alpha=3)], 1)).flatten(1).sum(1) / self.number


@pytest.mark.parametrize("activation", [F.relu, torch.tanh])
def test_tensors_that_scale_and_shift(activation):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Arithmetic(activation).double()
    for how in ((), (objective,), *TWO):
        agree(net, definitions.draw(6, (3, 5, 4)), *how)


def of_64(function):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = {name: nn.Linear(64, 64) for name in ("first", "second", "third")}
        return nets.calls(function, **layers, last=nn.Linear(64, 1)).double()


@pytest.mark.parametrize("function", [fork, residual])
@pytest.mark.parametrize("together", [0, gradient_penalty.TOGETHER])
def test_what_several_steps_read_is_not_written_over(function, together, monkeypatch):
    monkeypatch.setattr(gradient_penalty, "TOGETHER", together)
    net = of_64(function)
    for how in ((), (objective,), *TWO):
        agree(net, definitions.draw(6, (64,)), *how)


def test_mixed_activations_take_six_passes_with_sources_where_they_bend():
    net = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 9), nn.SiLU(), nn.LeakyReLU(0.1), nn.Linear(9, 1))
    net.double()
    steps = trace(net, torch.zeros(1, 4))
    assert explained(steps) == "six passes: layer '3' (SiLU) has a second derivative"
    assert explained(steps, True) == "six passes, the loss among them: layer '3' (SiLU) has a second derivative"
    for how in ((), (objective,), *TWO):
        agree(net, definitions.draw(6, (4,)), *how)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
def test_frozen_weights_get_no_gradient_and_disturb_none(activation):
    net = nn.Sequential(nn.Linear(4, 8), activation(), nn.Linear(8, 8), activation(), nn.Linear(8, 1)).double()
    net[2].weight.requires_grad_(False)
    net[4].bias.requires_grad_(False)
    x = definitions.draw(6, (4,))
    trained = [p for p in net.parameters() if p.requires_grad]
    for loss in (None, objective):
        total = penalised(trace(net, x), [x], [penalty], loss).total
        ours = torch.autograd.grad(total, trained)
        at = x.clone().requires_grad_()
        scores, slopes = definitions.slopes(net, at)
        expected = penalty(slopes).sum() + (0 if loss is None else loss(scores))
        assert definitions.apart(ours, torch.autograd.grad(expected, trained, materialize_grads=True)) < 1e-10


def test_without_gradients_only_the_value_is_found():
    net, sample = definitions.critic("mlp SiLU")
    x = definitions.draw(5, sample)
    steps = trace(net, x)
    with torch.no_grad():
        found = penalised(steps, [x], [penalty], objective)
    expected, _ = by_autograd(net, x, objective)
    assert not any(t.requires_grad for t in (found.total, found.loss, *found.scores, *found.penalties))
    close(found.total, expected.detach(), rtol=1e-12, atol=0)
    close(found.total, found.loss + found.penalties[0].sum())
    for p in net.parameters():
        p.requires_grad_(False)
    assert not penalised(steps, [x], [penalty]).total.requires_grad


def test_a_patch_map_counts_by_its_mean():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 3)).double()
    agree(net, definitions.draw(3, (2, 7, 6)))


def test_nan_stays_nan():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    x = definitions.draw(2, (3,))
    net[0].weight.data[1, 2] = torch.nan
    total, gradients = in_passes(net, x)
    assert total.isnan() and gradients[2].isnan().any()


def test_inputs_of_any_strides():
    net, sample = definitions.critic("critic")
    x = definitions.draw(5, sample)
    expected = in_passes(net, x, objective)[1]
    scattered = torch.full((10, *sample[:-1], 9), torch.nan, dtype=x.dtype)[::2, ..., 1:]
    scattered.copy_(x)
    for other in (scattered, x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert definitions.apart(in_passes(net, other, objective)[1], expected) < 1e-12
    repeated = x[:1].expand(5, *sample)
    assert definitions.apart(in_passes(net, repeated)[1], in_passes(net, repeated.contiguous())[1]) < 1e-12


def test_the_gradient_is_scaled_with_the_loss_and_given_as_often_as_asked():
    net, sample = definitions.critic("mlp ReLU")
    x = definitions.draw(5, sample)
    total = penalised(trace(net, x), [x], [penalty], objective).total
    once = torch.autograd.grad(total, list(net.parameters()), retain_graph=True)
    eight = torch.autograd.grad(8 * total, list(net.parameters()))
    for a, b in zip(once, eight, strict=True):
        assert torch.equal(8 * a, b)


def test_a_second_derivative_is_refused():
    net, sample = definitions.critic("mlp ReLU")
    x = definitions.draw(5, sample)
    total = penalised(trace(net, x), [x], [penalty]).total
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(total, list(net.parameters()), create_graph=True)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nets.LipSwish(), "layer '1' (LipSwish) learns its beta"),
        (nn.LeakyReLU(-0.5), "layer '1' (LeakyReLU) has negative_slope = -0.5: below 0"),
        (nn.ELU(-1.0), "layer '1' (ELU) has alpha = -1.0: below 0"),
        (BiasLeakyReLU(4, gain=-1.0), "layer '1' (BiasLeakyReLU) has gain = -1.0: below 0"),
        (nn.ELU(), ""),
    ],
)
def test_what_has_no_rule_is_named(layer, reason):
    net = nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 1))
    steps = trace(net, torch.zeros(1, 3))
    found = why_not(steps, networks.parameters(steps))
    assert found.startswith(reason) and bool(found) == bool(reason)
