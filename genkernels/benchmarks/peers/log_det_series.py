"""**normflows**' residual block with the case's weights, probes and number of terms.

Its ``neumann_grad`` without ``grad_in_forward``, which takes the first sample's weight for all of them: another
gradient than that of what it returns. What this estimator returns is a number with the right gradient but
another value (its terms are not divided by k): the value is put in its place, outside the clock.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from genkernels.benchmarks.peers import Adapter

PEERS = ("normflows",)


def unsupported(peer: str, case) -> str:
    return "has no exact first term" if case.settings["first_term"] == "exact" else ""


def adapter(peer: str, settings: dict, direction: str, shape: list[int]) -> Adapter:
    from normflows.flows import residual

    kernels = settings["kernels"]
    net = Network(kernels)
    block = residual.iResBlock(net, n_power_series=settings["terms"], neumann_grad=True, grad_in_forward=False).train()
    given = {}
    terms = settings["terms"]
    residual.torch.randn_like = lambda x: given["probes"]  # this process has no other use for it

    def op(x, probes, parameters, *both):
        half = len(both) // 2
        given["probes"] = probes.detach()[0]
        net.given = both[:half], both[half:], parameters.detach()
        value, log_det = block._logdetgrad(x)
        found = log_det[:, 0]
        return value, found - found.detach() + given["log_det"]

    def arrange(x, probes, parameters, *both):
        half = len(both) // 2
        net.given = both[:half], both[half:], parameters
        at = x.detach().requires_grad_()
        value, w, total = net(at), probes[0], 0
        for k in range(1, terms + 1):
            (w,) = torch.autograd.grad(value, at, w, retain_graph=True)
            total = total + (-1) ** (k + 1) / k * (w * probes[0]).flatten(1).sum(1)
        given["log_det"] = total.detach()
        return x, probes, parameters, *both

    return Adapter(op, arrange)


class Network(torch.nn.Module):
    """LipSwish between the ready maps, as normflows' own ``Swish`` computes it."""

    def __init__(self, kernels):
        super().__init__()
        self.kernels, self.given = kernels, None

    def forward(self, x):
        weights, biases, parameters = self.given
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            if i:
                x = (x * torch.sigmoid_(x * parameters[i - 1])).div_(1.1)
            x = (
                F.linear(x, weight, bias)
                if self.kernels is None
                else F.conv2d(x, weight, bias, padding=self.kernels[i] // 2)
            )
        return x
