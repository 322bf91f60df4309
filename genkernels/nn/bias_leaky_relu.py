"""Leaky ReLU that has the bias of the layer before it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from genkernels import ops
from genkernels.ops import checks


class BiasLeakyReLU(nn.Module):
    """A bias a channel and a leaky ReLU in one pass, behind a layer without a bias of its own.

    Equivalent to::

        y = gain * F.leaky_relu(x + bias.view(-1, *[1] * (x.dim() - 2)), negative_slope)

    Args:
        channels: C.
        negative_slope: 0 or more. gain: above 0.
        clamp: y is held between −clamp and clamp, for training in half types; None for no clamp.
        device, dtype: of the bias.

    Shapes:
        x ``[N, C, ...]`` → like x. ``bias [C]`` begins at 0.

    Raises:
        ValueError: an option is wrong; the operator says which, on the first call.

    Source: Karras et al., "Analyzing and improving the image quality of StyleGAN", 2020.
    """

    genkernels_layer = "bias_leaky_relu"  #: what `genkernels.networks` takes it for

    def __init__(
        self,
        channels: int,
        negative_slope: float = 0.2,
        gain: float = math.sqrt(2),
        clamp: float | None = None,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        checks.integer("BiasLeakyReLU", "channels", channels, 1)
        self.negative_slope, self.gain, self.clamp = negative_slope, gain, clamp
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        options = {"negative_slope": self.negative_slope, "gain": self.gain, "clamp": self.clamp}
        return ops.bias_leaky_relu(x, self.bias, **options)

    def extra_repr(self) -> str:
        return f"{len(self.bias)}, negative_slope={self.negative_slope}, gain={self.gain:.4g}, clamp={self.clamp}"
