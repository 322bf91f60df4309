"""What one of two processes asks of an importance-weighted bound under DistributedDataParallel (ddp_rank.py)."""

import itertools

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from genkernels.losses import importance_loss
from tests.losses import definitions
from tests.losses.latent_models import LinearGaussian
from tests.ops.ddp_rank import HALVES, by_hook


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
    """By case; each process has a half of the batch, whose mean gradient, found in one graph, DDP must give."""
    return {
        f"importance_loss, {estimator}{', a communication hook' * hook}": wrong(estimator, hook, rank)
        for estimator, hook in itertools.product(("iwae", "piwae:2"), (False, True))
    }
