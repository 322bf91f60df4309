"""One matrix applied to the channel vector of every pixel, without autocast and without TF32 convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from genkernels.backends import current_backend
from genkernels.ops import _autocast as autocast

#: Up to this many values a sample, one product over the whole batch beats a batch of small products on a CPU (measured
#: on 2 cores: 4×4×4 at batch 128, forward and backward, 76 µs against 140 µs, a 1×1 convolution taking 250 µs).
SMALL = 128


def pixelwise_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``weight @ x[n, :, pixel] + bias`` for every sample and pixel, in the dtype of `x`.

    Args:
        x: ``[N, C, *spatial]``; spatial may be absent.
        weight: ``[C, C]``. bias: ``[C]`` or None. Any float dtype.

    Returns:
        ``[N, C, *spatial]``, contiguous.
    """
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if not autocast.active(x):
        return _apply(x, weight, bias)
    with autocast.kept_out(x):
        return _apply(x, weight, bias)


def _apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dim() == 2:
        return F.linear(x, weight, bias)
    count, channels = x.shape[:2]
    pixels = x.shape[2:].numel()
    on_cpu = x.device.type == "cpu"
    if on_cpu and current_backend() == "reference" and x.dim() == 4:
        return F.conv2d(x, weight.view(*weight.shape, 1, 1), bias)
    # a product rather than a convolution: on a GPU a convolution may round to TF32 by default, and the inverse would
    # not match
    if on_cpu and channels * pixels <= SMALL:
        rows = x.transpose(0, 1).reshape(channels, count * pixels)
        out = weight @ rows if bias is None else torch.addmm(bias.unsqueeze(1), weight, rows)
        return out.view(channels, count, *x.shape[2:]).transpose(0, 1).contiguous()
    flat = x.reshape(count, channels, pixels)
    weight = weight.expand(count, channels, channels)
    out = torch.bmm(weight, flat) if bias is None else torch.baddbmm(bias.view(1, channels, 1), weight, flat)
    return out.view(x.shape)
