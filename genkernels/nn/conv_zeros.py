"""Glow's last convolution of a coupling network: zero at the start, with a learned log-scale for each output
channel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv2dZeros(nn.Conv2d):
    r"""A 3×3 convolution whose result is multiplied by :math:`e^{3\ell}`, with weight, bias and ℓ zero at the start.

    A flow built on it starts as the identity, up to its scale map; the factor 3 speeds ℓ up. The scale is multiplied
    into the weights, which are smaller than the result.

    Equivalent to::

        torch.nn.functional.conv2d(x, weight, bias, padding=1) * (3 * log_scale).exp().view(-1, 1, 1)

    Shapes: x ``[N, in_channels, H, W]`` to ``[N, out_channels, H, W]``.

    Source: Kingma & Dhariwal, "Glow", 2018, §3.3 and its code.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.log_scale = nn.Parameter(torch.zeros(out_channels))
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.scaled()
        return F.conv2d(x, weight, bias, padding=self.padding)

    def scaled(self) -> tuple[Tensor, Tensor]:
        """Weight and bias with the scale multiplied in."""
        scale = (3 * self.log_scale).exp()
        return self.weight * scale.view(-1, 1, 1, 1), self.bias * scale
