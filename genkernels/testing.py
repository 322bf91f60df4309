"""Checks that a user runs on networks of their own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from genkernels.losses import gradient_penalty

WHO = "check_penalty"


class PenaltyCheck(NamedTuple):
    """What `check_penalty` returns.

    Args:
        penalty, by_autograd: the same number, found both ways. difference: between both gradients by the critic's
            parameters, all together, relative to autograd's: ‖ours − autograd's‖ / ‖autograd's‖; absolute where that
            is 0. way: the sentence of ``gradient_penalty(explain=True)``.
    """

    penalty: float
    by_autograd: float
    difference: float
    way: str


def check_penalty(critic: nn.Module, x: Tensor, target: float = 1.0) -> PenaltyCheck:
    """Takes a critic's gradient penalty at x by `genkernels.losses.gradient_penalty` and by autograd, and prints both.

    Nothing is left behind: no gradient is written, and buffers (the vectors of a spectral norm, statistics) are put
    back.

    Args:
        critic: as for `gradient_penalty`. x: ``[N, ...]``. target: of the slopes.

    Returns:
        both penalties, how far the gradients by the parameters are apart, and which way was taken. In fp32 some 1e-6
        is to be expected, in fp64 1e-14.

    Raises: as `gradient_penalty`; TypeError: the critic is no module.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from genkernels.testing import check_penalty
        >>> critic = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> _ = critic[0].weight.data.copy_(torch.tensor([[0.0, 3.0]]))
        >>> found = check_penalty(critic, torch.randn(4, 2))
        penalty              4
        by autograd          4
        gradients differ by  0.0e+00 (relative)
        way                  four passes: every step is piecewise linear
    """
    if not isinstance(critic, nn.Module):
        raise TypeError(f"{WHO}: critic must be a torch.nn.Module, got {type(critic).__name__}")
    penalty, ours, way = _found(critic, critic, x, target)
    by_autograd, theirs, _ = _found(critic, lambda point: critic(point), x, target)
    norm = theirs.norm().item()
    difference = (ours - theirs).norm().item() / (norm or 1.0)
    print(f"penalty              {penalty:.8g}")
    print(f"by autograd          {by_autograd:.8g}")
    print(f"gradients differ by  {difference:.1e} ({'relative' if norm else 'absolute'})")
    print(f"way                  {way}")
    return PenaltyCheck(penalty, by_autograd, difference, way)


def _found(critic: nn.Module, called, x: Tensor, target: float) -> tuple[float, Tensor, str]:
    """The penalty, its gradient by all parameters in one row of fp64, and the way that was taken."""
    kept = [(buffer, buffer.clone()) for buffer in critic.buffers()]
    parameters = [p for p in critic.parameters() if p.requires_grad]
    try:
        # what a critic draws, its dropout, it draws both times alike
        with torch.enable_grad(), torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
            penalty, way = gradient_penalty(called, x.detach(), x.detach(), target=target, explain=True)
            gradients = []
            if parameters and penalty.requires_grad:
                gradients = torch.autograd.grad(penalty, parameters, materialize_grads=True)
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)
    row = torch.cat([x.new_zeros(0, dtype=torch.float64), *(g.double().flatten() for g in gradients)])
    return penalty.item(), row, way
