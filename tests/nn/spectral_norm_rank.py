"""One of two processes that train a critic with spectral norm under DistributedDataParallel.

    python -m tests.nn.spectral_norm_rank RANK STORE RESULT

Ranks start from different weights and vectors, have different data, and one of them looks at its critic outside DDP in
between. RESULT: the state dict at the end.
"""

import datetime
import sys

import torch
import torch.distributed as dist

from genkernels import nn as gnn


def main(rank: int, store: str, result: str) -> None:
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=wait)
    torch.manual_seed(rank)
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 3, 3), torch.nn.Flatten())
    critic = torch.nn.parallel.DistributedDataParallel(gnn.spectral_norm_(net))
    optimizer = torch.optim.Adam(critic.parameters(), 0.01)
    for step in range(4):
        optimizer.zero_grad()
        real, fake = torch.randn(2, 3, 2, 7, 7, generator=torch.Generator().manual_seed(10 * step + rank))
        (critic(real).square().mean() + critic(fake).mean()).backward()
        optimizer.step()
        if rank == 0:
            net.eval()(real)
            net.train()
    torch.save(net.state_dict(), result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
