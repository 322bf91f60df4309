"""One of two processes: the gradients of a critic's penalty and of its step under DistributedDataParallel.

    python -m tests.losses.ddp_rank RANK STORE RESULT

Each process has a half of the batch; DDP's gradients, through a communication hook or without one, must be the mean of
both halves', which a process computes by itself too, by double backward. RESULT: what is wrong, by case.
"""

import itertools
import sys

import torch
from torch import nn

from genkernels.losses import critic_step, gradient_penalty
from tests.losses import definitions
from tests.ops.ddp_rank import HALVES, by_hook, main

NETWORKS = ("critic", "mlp SiLU")


class Penalty(nn.Module):
    def __init__(self, critic):
        super().__init__()
        self.critic = critic

    def forward(self, real, fake):
        return gradient_penalty(self.critic, real, real)


class Step(Penalty):
    def forward(self, real, fake):
        return critic_step(self.critic, real, fake, r1=0.5, r2=0.5)


def expected(case, net, real, fake):
    real, fake = real.clone().requires_grad_(), fake.clone().requires_grad_()
    if case == "the penalty":
        return definitions.penalty(net, real)
    return definitions.step(net, real, fake, "logistic", 0.5, 0.5)


def wrong(name, case, hook, rank) -> str:
    net, sample = definitions.critic(name)
    halves = [
        (definitions.draw(3, sample, seed=i), definitions.draw(3, sample, seed=9 + i)) for i in range(len(HALVES))
    ]
    each = [definitions.gradients(expected(case, net, *half), net) for half in halves]
    mean = [torch.stack(grads).mean(0) for grads in zip(*each, strict=True)]
    parallel = nn.parallel.DistributedDataParallel(
        {"the penalty": Penalty, "the step": Step, "the step of a wrapped critic": nn.Sequential}[case](net)
    )
    if hook:
        parallel.register_comm_hook(None, by_hook)
    for _ in range(2):
        parallel.zero_grad()
        if case == "the step of a wrapped critic":
            critic_step(parallel, *halves[rank], r1=0.5, r2=0.5).backward()
        else:
            parallel(*halves[rank]).backward()
    if any(p.grad is None for p in net.parameters()):
        return "no gradient"
    difference = definitions.apart([p.grad for p in net.parameters()], mean)
    return "" if difference < 1e-10 else f"gradients differ by {difference}"


def all_wrong(rank: int) -> dict[str, str]:
    cases = itertools.product(NETWORKS, ("the penalty", "the step", "the step of a wrapped critic"), (False, True))
    return {
        f"{name}, {case}{', a communication hook' if hook else ''}": wrong(name, case, hook, rank)
        for name, case, hook in cases
    }


if __name__ == "__main__":
    main(all_wrong, *sys.argv[1:])
