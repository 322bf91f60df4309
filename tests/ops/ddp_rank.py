"""One of two processes: gradients of every operator's tensors as parameters under DistributedDataParallel.

    python -m tests.ops.ddp_rank RANK STORE RESULT

Each process has a half of what would be the batch; DDP's gradients must be the mean of both halves', which a process
computes by itself too. RESULT: what is wrong, by sample and by DDP's option; empty where all is right.
"""

import datetime
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from tests.ops.samples import SAMPLES

HALVES = (1.0, 0.5)


class Layer(nn.Module):
    """The sum of squares of an operator's last output, of its first one too where `whole`, and a parameter that nothing
    uses."""

    def __init__(self, function, tensors, whole, idle):
        super().__init__()
        self.function, self.whole = function, whole
        self.own = nn.ParameterList([nn.Parameter(t.clone()) for t in tensors])
        self.idle = nn.Parameter(torch.ones(3)) if idle else None

    def forward(self, half):
        first, *rest = self.own
        outputs = self.function(first * half, *rest)
        return sum(o.square().sum() for o in (outputs if self.whole else outputs[-1:]))


def by_hook(_, bucket):
    """A mean over the processes, as a communication hook."""
    sent = dist.all_reduce(bucket.buffer() / len(HALVES), async_op=True)
    return sent.get_future().then(lambda done: done.value()[0])


OPTIONS = {
    "a communication hook": {},
    "static_graph": {"static_graph": True},
    "find_unused_parameters": {"find_unused_parameters": True},
}


def wrong(name, option, whole, rank) -> str:
    function, tensors = SAMPLES[name]()
    alone = [Layer(function, tensors, whole, idle=False) for _ in HALVES]
    for layer, half in zip(alone, HALVES, strict=True):
        layer(half).backward()
    # what an output does not depend on has no gradient alone, and a zero under DDP, which sends it
    of_each = [[torch.zeros_like(p) if p.grad is None else p.grad for p in layer.own] for layer in alone]
    expected = [torch.stack(grads).mean(0) for grads in zip(*of_each, strict=True)]
    idle = option == "find_unused_parameters"
    layer = nn.parallel.DistributedDataParallel(Layer(function, tensors, whole, idle), **OPTIONS[option])
    if option == "a communication hook":
        layer.register_comm_hook(None, by_hook)
    for _ in range(3):  # a static graph is learnt in the first pass
        layer.zero_grad()
        layer(HALVES[rank]).backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in layer.module.own]
    try:
        torch.testing.assert_close(found, expected)
    except AssertionError as error:
        return str(error)
    return ""


def all_wrong(rank: int) -> dict[str, str]:
    from tests.ops.test_operators import EXAMPLES, is_differentiable

    found = {}
    for name, option in itertools.product(filter(is_differentiable, EXAMPLES), OPTIONS):
        # one output alone reaches all parameters only where there is one: DDP asks for the option
        for whole in (True, False) if option == "find_unused_parameters" else (True,):
            found[f"{name}, {option}, {'all outputs' if whole else 'the last output'}"] = wrong(
                name, option, whole, rank
            )
    return found


def main(find: Callable[[int], dict[str, str]], rank: str, store: str, result: str) -> None:
    """Writes down what `find` says of this rank, in the group of both."""
    wait, rank = datetime.timedelta(seconds=60), int(rank)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=len(HALVES), timeout=wait)
    Path(result).write_text(json.dumps(find(rank)))
    dist.barrier()  # neither leaves while the other still talks to it
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive the group, and would end the interpreter's own exit with an abort


if __name__ == "__main__":
    main(all_wrong, *sys.argv[1:])
