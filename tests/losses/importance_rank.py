"""One of two processes: the gradients of an importance-weighted bound under DistributedDataParallel.

    python -m tests.losses.importance_rank RANK STORE RESULT

Each process has a half of the batch; DDP's gradients, through a communication hook or without one, must be the mean of
both halves', which a process computes by itself too, in one graph. RESULT: what is wrong, by case.
"""

import itertools
import sys

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from genkernels.losses import importance_loss
from tests.losses import definitions
from tests.losses.latent_models import LinearGaussian
from tests.ops.ddp_rank import HALVES, by_hook, main


class Model(nn.Module):
    """A model whose forward pass is its loss."""

    def __init__(self, estimator):
        super().__init__()
        self.net, self.estimator = LinearGaussian(), estimator

    def forward(self, x, chunk):
        options = {"k": 4, "chunk": chunk, "estimator": self.estimator, "seed": 1}
        return importance_loss(self.net.encode(x), self.net.weigher(x), **options).loss


def wrong(estimator, hook, rank) -> str:
    halves = [definitions.draw(3, (5,), seed=i) for i in range(len(HALVES))]
    single, each = Model(estimator), []
    for half in halves:
        single(half, 3)  # in chunks, for its noise
        single.net.given, single.net.drawn = [torch.cat(single.net.drawn[:2], 1)], []
        each.append(torch.autograd.grad(single(half, None), list(single.parameters())))
        single.net.drawn = []
    mean = [torch.stack(grads).mean(0) for grads in zip(*each, strict=True)]
    parallel = DistributedDataParallel(Model(estimator))
    if hook:
        parallel.register_comm_hook(None, by_hook)
    for _ in range(2):
        parallel.zero_grad()
        parallel(halves[rank], 3).backward()
    difference = definitions.apart([p.grad for p in parallel.parameters()], mean)
    return "" if difference < 1e-10 else f"gradients differ by {difference}"


def all_wrong(rank: int) -> dict[str, str]:
    return {
        f"{estimator}{', a communication hook' * hook}": wrong(estimator, hook, rank)
        for estimator, hook in itertools.product(("iwae", "piwae:2"), (False, True))
    }


if __name__ == "__main__":
    main(all_wrong, *sys.argv[1:])
