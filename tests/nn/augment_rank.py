"""One of two processes whose augmentation follows the scores of both.

    python -m tests.nn.augment_rank RANK STORE RESULT

Each sees scores of its own, of another number, alone and in a pass of DistributedDataParallel that hands on no buffers;
p and what was counted must be those of one process that sees all of them. RESULT: what is wrong, by case.
"""

import math
import sys

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import genkernels as gk
from tests.ops.ddp_rank import main

COUNTS = (6, 3)
TARGET, IMAGES, EVERY = 0.5, 400, 3


class Loss(nn.Module):
    """An augmentation beside a critic, as a model has it."""

    def __init__(self, augment):
        super().__init__()
        self.critic, self.augment = nn.Linear(1, 1), augment

    def forward(self, scores):
        self.augment.update(scores)
        return self.critic(scores[:, None]).mean()


def scores_of(step: int, rank: int) -> torch.Tensor:
    """High where the second process looks, low where the first one does: by itself each would go another way."""
    noise = torch.randn(COUNTS[rank], generator=torch.Generator().manual_seed(2 * step + rank))
    return noise + (2.5 if rank else 0.8)


def expected(steps: list[torch.Tensor]) -> tuple[float, float]:
    """p after these scores of all processes, and how many images were counted since its last move."""
    p, signs, seen = 0.0, 0.0, 0
    for i, scores in enumerate(steps, start=1):
        signs, seen = signs + scores.sign().sum().item(), seen + len(scores)
        if i % EVERY == 0:
            p, signs, seen = p + math.copysign(seen / IMAGES, signs / seen - TARGET), 0.0, 0
            p = min(max(p, 0.0), 0.8)
    return p, seen


def wrong(within: bool, rank: int) -> str:
    augment = gk.nn.AdaptiveAugment(TARGET, images=IMAGES, every=EVERY)
    update = DistributedDataParallel(Loss(augment), broadcast_buffers=False) if within else augment.update
    steps = [[scores_of(step, r) for r in range(2)] for step in range(8)]
    found = [update(each[rank]) for each in steps]
    p, seen = expected([torch.cat(each) for each in steps])
    if abs(augment.p.item() - p) > 1e-6 or augment.counted[1].item() != seen or not p:
        return f"p is {augment.p.item()} and not {p}, {augment.counted[1].item()} images were counted and not {seen}"
    r = torch.cat(steps[-1]).sign().mean()
    return "" if within or abs(found[-1] - r) < 1e-6 else f"r is {found[-1]} and not {r}"


def all_wrong(rank: int) -> dict[str, str]:
    return {"alone": wrong(False, rank), "within DistributedDataParallel": wrong(True, rank)}


if __name__ == "__main__":
    main(all_wrong, *sys.argv[1:])
