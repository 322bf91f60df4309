"""What the losses of a critic are, by autograd alone, and critics to take them of."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.networks import nets

#: Networks of every step that has a rule: those with activations that learn have none, and one's output is constant.
NETWORKS = [name for name in nets.NETWORKS if "LipSwish" not in name and name not in ("3-1-3", "dense", "functional")]
LOSSES = {
    "logistic": lambda r, f: F.softplus(-r).mean() + F.softplus(f).mean(),
    "hinge": lambda r, f: (1 - r).clamp(min=0).mean() + (1 + f).clamp(min=0).mean(),
    "wasserstein": lambda r, f: f.mean() - r.mean(),
    "relativistic": lambda r, f: F.softplus(f - r).mean(),
    "least_squares": lambda r, f: ((r - 1) ** 2).mean() / 2 + (f**2).mean() / 2,
}


def critic(name, dtype=torch.float64):
    """A network of `nets` that ends in one score, and the shape of its samples."""
    net, sample = nets.build(name)
    shape = net(torch.zeros(2, *sample, dtype=torch.float64)).shape
    if len(shape) > 1:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            net = nn.Sequential(net, nn.Flatten(), nn.Linear(shape[1:].numel(), 1)).train(net.training)
    return net.to(dtype), sample


def draw(n, sample, dtype=torch.float64, seed=0):
    return torch.randn(n, *sample, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def slopes(net, x):
    """The scores of x, and their slopes, which can be differentiated."""
    scores = net(x).reshape(len(x), -1).mean(1)
    return scores, torch.autograd.grad(scores.sum(), x, create_graph=True)[0].reshape(len(x), -1)


def penalty(net, x, target=1.0, one_sided=False):
    beyond = slopes(net, x)[1].norm(dim=1) - target
    return (beyond.clamp(min=0) if one_sided else beyond).square().mean()


def step(net, real, fake, loss, r1, r2):
    (r, g), (f, h) = slopes(net, real), slopes(net, fake)
    return LOSSES[loss](r, f) + r1 / 2 * g.square().sum(1).mean() + r2 / 2 * h.square().sum(1).mean()


def gradients(value, net, *inputs):
    """By all parameters and the inputs; zeros where there is none."""
    return torch.autograd.grad(value, [*net.parameters(), *inputs], materialize_grads=True)


@torch.no_grad()
def apart(ours, theirs):
    """Between two lists of gradients, relative to all of the second."""
    norm = sum(t.double().square().sum() for t in theirs).sqrt()
    return float(sum((a.double() - b.double()).square().sum() for a, b in zip(ours, theirs, strict=True)).sqrt() / norm)
