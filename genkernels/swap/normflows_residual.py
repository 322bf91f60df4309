"""normflows' residual blocks: its networks as the operators of residual blocks take them, and its estimators.

The networks begin with an activation: an identity before it makes them an alternation of maps and activations. Their
weights are normalised once a call, not once a pass.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from normflows import nets
from normflows.flows import residual
from normflows.nets import lipschitz
from torch import Tensor, nn

from genkernels import ops
from genkernels.networks import NativeBlock
from genkernels.networks._plain import hooked
from genkernels.swap._rules import Becomes, left_alone

DTYPES = (torch.float32, torch.float64)
#: Terms before the roulette in evaluation, whatever the block's own number is.
IN_EVALUATION = 20


class ResidualBlock(residual.iResBlock):
    """`normflows.flows.residual.iResBlock`: the same draws, all terms in one call; the inverse ends sample by sample
    where it is found to within 1e-5, which normflows tests squared."""

    def _inverse_fixed_point(self, y, atol=1e-5, rtol=1e-5):
        block = None if left_alone(self) else _block(self.nnet, y)
        if block is not None:
            found = ops.invertible_residual(y, *block, atol=atol, rtol=rtol)
            if found.converged.all():
                return found.x
        return super()._inverse_fixed_point(y, atol, rtol)

    def _logdetgrad(self, x):
        whole = (self.brute_force or not self.training) and x.dim() == 2 and x.shape[1] == 2
        ours = whole or not (self.exact_trace or self.training and not self.neumann_grad)
        block = _block(self.nnet, x) if ours and not left_alone(self) else None
        if block is None:
            return super()._logdetgrad(x)
        if whole:
            value, log_det, _ = ops.log_det_series(x, *block, probes=None)
            return value, log_det.view(-1, 1)
        counts, terms = self._gk_terms()
        probes = torch.randn_like(x)[None]
        if self.training:
            value, log_det = _surrogate(x, block, probes, terms)
        else:
            value, log_det, _ = ops.log_det_series(x, *block, probes=probes, terms=terms)
            log_det = log_det.detach()
        if self.training and self.n_power_series is None:
            estimate = log_det.detach()
            self.last_n_samples.copy_(torch.from_numpy(counts).to(self.last_n_samples))
            self.last_firmom.copy_(estimate.mean().to(self.last_firmom))
            self.last_secmom.copy_(estimate.square().mean().to(self.last_secmom))
        return value, log_det.view(-1, 1)

    def _gk_terms(self) -> tuple[np.ndarray | None, list[float]]:
        """The roulette's draws, by numpy as there, and the weight of each term."""
        if self.training and self.n_power_series is not None:
            return None, [1.0] * self.n_power_series
        if self.n_dist == "geometric":
            p, draw, survival = torch.sigmoid(self.geom_p).item(), residual.geometric_sample, residual.geometric_1mcdf
        else:
            p, draw, survival = self.lamb.item(), residual.poisson_sample, residual.poisson_1mcdf
        first = self.n_exact_terms if self.training else IN_EVALUATION
        counts = draw(p, self.n_samples)
        reached = [np.mean(counts >= k - first) for k in range(1, int(counts.max()) + first + 1)]
        return counts, [float(share / survival(p, k, first)) for k, share in enumerate(reached, 1)]


def _surrogate(x: Tensor, block: NativeBlock, probes: Tensor, terms: list[float]) -> tuple[Tensor, Tensor]:
    """What normflows has for a log-determinant in training, a number whose gradient is that of the log-determinant:
    ``sum_k (-1)^k c_k v J^(k+1) v`` with c_0 = 1, a term more than the series."""
    weights = [1.0, *terms]
    with torch.no_grad():
        _, number, _ = ops.log_det_series(x, *block, probes=probes, terms=[k * c for k, c in enumerate(weights, 1)])
    value, log_det, _ = ops.log_det_series(x, *block, probes=probes, terms=weights)
    return value, log_det + (number - log_det).detach()


def _block(net: nn.Module, x: Tensor) -> NativeBlock | None:
    if why_not(net) or x.dtype not in DTYPES or x.dim() != net.net[1].weight.dim() or not x.numel():
        return None
    maps = net.net[1::2]
    if not all(getattr(layer, "initialized", True) for layer in maps):
        return None
    channels = maps[0].weight.shape[1]
    if x.shape[1] != channels or maps[-1].weight.shape[0] != channels or maps[0].weight.dtype != x.dtype:
        return None
    identity = torch.eye(channels, dtype=x.dtype, device=x.device).view(channels, channels, *[1] * (x.dim() - 2))
    weights = [layer.compute_weight(update=False) for layer in maps]
    steepness = torch.cat([F.softplus(swish.beta) for swish in net.net[0::2]])
    return NativeBlock([identity, *weights], [None, *(layer.bias for layer in maps)], "lipswish", steepness)


def why_not(net: nn.Module) -> str:
    if type(net) not in (nets.LipschitzMLP, nets.LipschitzCNN) or type(net.net) is not nn.Sequential:
        return "its network is none of normflows' Lipschitz networks"
    kind = lipschitz.InducedNormLinear if type(net) is nets.LipschitzMLP else lipschitz.InducedNormConv2d
    swishes, maps = net.net[0::2], net.net[1::2]
    if any(type(part) is not lipschitz.Swish for part in swishes) or any(type(part) is not kind for part in maps):
        return "a layer of its network is of another class"
    if kind is lipschitz.InducedNormConv2d and not all(map(_keeps_size, maps)):
        return "a convolution of its network is neither 1×1 nor 3×3 with zeros around"
    return "there are hooks on its network" if any(hooked(part) for part in net.modules()) else ""


def _keeps_size(layer: nn.Module) -> bool:
    side = layer.kernel_size[0]
    return (
        side in (1, 3)
        and layer.kernel_size == (side, side)
        and layer.stride == (1, 1)
        and (layer.padding == (side // 2, side // 2))
    )


def rule(thing) -> Becomes | str:
    if thing.exact_trace and not thing.brute_force:
        return "it takes the whole Jacobian for each of its traces"
    return why_not(thing.nnet) or Becomes(ResidualBlock, NOTE)


NOTE = (
    "its inverse is within 1e-5, where normflows stops at 3e-3; in training each sample's log-determinant has its own "
    "gradient, where normflows with reduce_memory gives all that of the first"
)
