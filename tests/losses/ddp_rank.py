"""One of two processes: the gradients of a critic's penalty and of its step, and of an importance-weighted bound, under
DistributedDataParallel.

    python -m tests.losses.ddp_rank RANK STORE RESULT

Each process has a half of the batch; DDP's gradients, through a communication hook or without one, must be the mean of
both halves', which a process computes by itself too, by double backward. RESULT: what is wrong, by case.
"""

import itertools
import sys

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from genkernels.losses import critic_step, gradient_penalty
from tests.losses import definitions, importance_rank
from tests.ops.ddp_rank import HALVES, by_hook, main

NETWORKS = ("critic", "mlp SiLU", "mlp LipSwish")
WAYS = {"critic": "four passes", "mlp SiLU": "six passes", "mlp LipSwish": "double backward"}
LOSSES = ("the penalty", "the step")


class Loss(nn.Module):
    """A critic's loss, as a model has it."""

    def __init__(self, critic, name):
        super().__init__()
        self.critic, self.name = critic, name

    def forward(self, real, fake):
        return loss_of(self.critic, self.name, real, fake)[0]


def loss_of(critic, name, real, fake):
    if name == "the penalty":
        return gradient_penalty(critic, real, real, explain=True)
    return critic_step(critic, real, fake, r1=0.5, r2=0.5, explain=True)


def expected(net, name, real, fake):
    real, fake = real.clone().requires_grad_(), fake.clone().requires_grad_()
    if name == "the penalty":
        return definitions.penalty(net, real)
    return definitions.step(net, real, fake, "logistic", 0.5, 0.5)


def wrong(network, name, wrapped, hook, rank, compiled=False) -> str:
    net, sample = definitions.critic(network)
    halves = [
        (definitions.draw(3, sample, seed=i), definitions.draw(3, sample, seed=9 + i)) for i in range(len(HALVES))
    ]
    each = [definitions.gradients(expected(net, name, *half), net) for half in halves]
    mean = [torch.stack(grads).mean(0) for grads in zip(*each, strict=True)]
    whole = net if wrapped else Loss(net, name)
    parallel = DistributedDataParallel(torch.compile(whole, backend="aot_eager") if compiled else whole)
    before = parallel.module
    if hook:
        parallel.register_comm_hook(None, by_hook)
    for _ in range(2):
        parallel.zero_grad()
        if wrapped:
            loss, way = loss_of(parallel, name, *halves[rank])
            assert way.startswith(WAYS[network]), way
        else:
            loss = parallel(*halves[rank])
        loss.backward()
    assert parallel.module is before
    if any(p.grad is None for p in net.parameters()):
        return "no gradient"
    difference = definitions.apart([p.grad for p in net.parameters()], mean)
    return "" if difference < 1e-10 else f"gradients differ by {difference}"


def all_wrong(rank: int) -> dict[str, str]:
    found = {}
    for network, name, wrapped, hook in itertools.product(NETWORKS, LOSSES, (False, True), (False, True)):
        if WAYS[network] == "double backward" and name == "the penalty":
            continue  # which gives the last bias no gradient, and DDP waits for one
        case = (network, name, *["a wrapped critic"] * wrapped, *["a communication hook"] * hook)
        found[", ".join(case)] = wrong(network, name, wrapped, hook, rank)
    for network, name in itertools.product(("critic", "mlp LipSwish"), LOSSES):
        if WAYS[network] == "double backward" and name == "the penalty":
            continue
        found[f"{network}, {name}, a wrapped critic, compiled"] = wrong(network, name, True, True, rank, compiled=True)
    return found | importance_rank.all_wrong(rank)


if __name__ == "__main__":
    main(all_wrong, *sys.argv[1:])
