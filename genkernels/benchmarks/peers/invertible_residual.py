"""The inverse of a residual block by others, with the case's weights, to the case's residual.

- **normflows**: the plain iteration, until all of the batch's steps are small. It squares the step but not the
  tolerance; it is given the square, and so compares what it says it compares.
- **torchdeq**: its Anderson solver, ``stop_mode="abs"``: the norm of what is left over the whole batch; it is given the
  case's residual.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from genkernels.benchmarks.peers import Adapter

PEERS = ("normflows", "torchdeq")


def unsupported(peer: str, case) -> str:
    return ""


def adapter(peer: str, settings: dict, direction: str, shape: list[int]) -> Adapter:
    count, activation = settings["maps"], settings["activation"]

    def network(parameters, weights, biases):
        def g(x):
            for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
                if i and activation == "leaky_relu":
                    x = torch.where(x > 0, x, parameters[i - 1] * x)
                elif i:
                    x = x * torch.sigmoid(parameters[i - 1] * x) / 1.1
                x = (
                    F.linear(x, weight, bias)
                    if x.dim() == 2
                    else F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
                )
            return x

        return g

    solve = {"normflows": _normflows, "torchdeq": _torchdeq}[peer](settings["atol"], settings["most"])

    def op(y, parameters, *both):
        return solve(network(parameters, both[:count], both[count:]), y)

    return Adapter(op, lambda *tensors: tensors)


def _normflows(atol: float, most: int):
    from normflows.flows.residual import iResBlock

    block = iResBlock(torch.nn.Identity())

    def solve(g, y):
        block.nnet = g
        return block._inverse_fixed_point(y, atol=atol * atol, rtol=0.0)

    del block._modules["nnet"]  # a plain attribute, so that a function can stand in
    return solve


def _torchdeq(atol: float, most: int):
    from torchdeq import get_deq

    deq = get_deq(f_solver="anderson", f_max_iter=most, f_tol=atol, f_stop_mode="abs").eval()

    def solve(g, y):
        return deq(lambda x: y - g(x), torch.zeros_like(y))[0][-1]

    return solve
