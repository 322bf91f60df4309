r"""Masked convolution in plain PyTorch: the definition, the oracle and the fallback.

.. math::
    y = \mathrm{act}\big(x * (w \odot m) + b + c\big) + r

with m the causal mask that keeps an output from seeing its own pixel and later ones (van den Oord et al., "Pixel
recurrent neural networks", 2016; "Conditional image generation with PixelCNN decoders", 2016), c a condition and r a
residual.

Pixels follow one another in raster order; within a pixel the channels form `data_channels` equal blocks (R, then G,
then B), in the order of those blocks. A tap that the mask keeps is *live*:

============  =========================================================================================================
raster A      rows above, and to the left in the row; at the centre, blocks before the output's own
raster B      the same; at the centre, blocks up to the output's own
vertical A    rows above, all columns, all channels
vertical B    rows up to the centre's, all columns, all channels
horizontal    as raster, of the centre's row alone
============  =========================================================================================================

Activations: none, relu, or gate: :math:`\tanh(a)\,\mathrm{sigmoid}(b)` of the two halves of the channels, the blocks
being taken within each half.

Shapes: ``x [N, Cin, H, W]``, ``weight [Cout, Cin, kh, kw]`` (kh, kw odd), ``bias [Cout]``, ``condition [N, Cout]`` or
``[N, Cout, H, W]``, ``residual [N, Cout', H, W]``, Cout' = Cout, for the gate Cout/2. Zero padding keeps H and W.

Saved for backward: x, the weight, and what the activation's slope is read from. none: nothing. relu: the output
(positive where the pre-activation is); beside a residual, which hides it, the pre-activation. gate: the pre-activation,
both halves, as much as tanh and sigmoid would save by themselves; recomputing it would cost the whole convolution
again.

What dead taps of the weight hold plays no part, NaN included, and their gradient is exactly 0. A non-finite x at a dead
tap may show in the output here (0 · inf), and does not where only live taps are multiplied.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from genkernels._options import Activation, MaskType, Region

MASK_TYPES, REGIONS, ACTIVATIONS = MaskType.words(), Region.words(), Activation.words()


def causal_mask(
    out_channels: int,
    in_channels: int,
    kernel_size: int | tuple[int, int],
    mask_type: str,
    data_channels: int = 1,
    region: str = "raster",
    gate: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """Bool ``[out_channels, in_channels, kh, kw]``, True at live taps; the table at the head of this module."""
    height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    row = torch.arange(height, device=device).unsqueeze(1) - height // 2
    column = torch.arange(width, device=device) - width // 2
    if region == "vertical":
        taps = (row < 0 if mask_type == "A" else row <= 0) & (column == column)
        return taps.expand(out_channels, in_channels, height, width).clone()
    before = (row == 0) & (column < 0)
    if region == "raster":
        before = before | (row < 0)
    centre = (row == 0) & (column == 0)
    half = out_channels // 2 if gate else out_channels
    of_output = (torch.arange(out_channels, device=device) % half) // (half // data_channels)
    of_input = torch.arange(in_channels, device=device) // (in_channels // data_channels)
    seen = of_input < of_output.unsqueeze(1) if mask_type == "A" else of_input <= of_output.unsqueeze(1)
    return before | (centre & seen[:, :, None, None])


def masked_weight(weight: Tensor, mask_type: int, data_channels: int, region: int, activation: int) -> Tensor:
    """The weight with its dead taps exactly 0, whatever they held."""
    return weight.masked_fill(~_mask_of(weight, mask_type, data_channels, region, activation), 0)


def masked_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    condition: Tensor | None,
    residual: Tensor | None,
    mask_type: int,
    data_channels: int = 1,
    region: int = Region.RASTER,
    activation: int = Activation.NONE,
    keep: bool = False,
) -> tuple[Tensor, Tensor]:
    """`(output, pre)`: `pre` is the pre-activation where `keep` is set and `keeps_pre` says that the backward wants it,
    else empty."""
    padding = weight.shape[2] // 2, weight.shape[3] // 2
    pre = F.conv2d(x, masked_weight(weight, mask_type, data_channels, region, activation), bias, padding=padding)
    if condition is not None:
        pre = pre + (condition[:, :, None, None] if condition.dim() == 2 else condition)
    output = pre
    if activation == Activation.RELU:
        output = torch.relu(pre)
    elif activation == Activation.GATE:
        a, b = pre.chunk(2, dim=1)
        output = torch.tanh(a) * torch.sigmoid(b)
    if residual is not None:
        output = output + residual
    wants_pre = keep and keeps_pre(activation, residual is not None)
    return output.contiguous(), pre.contiguous() if wants_pre else x.new_empty(0)


def keeps_pre(activation: int, has_residual: bool) -> bool:
    """Whether the backward needs the pre-activation: see the head of this module."""
    return activation == Activation.GATE or (activation == Activation.RELU and has_residual)


def masked_conv_backward(
    grad_output: Tensor | None,
    grad_pre: Tensor | None,
    state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mask_type: int,
    data_channels: int,
    region: int,
    activation: int,
    condition_rank: int,
    want_x: bool,
    want_weight: bool,
    want_bias: bool,
    want_condition: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""`(grad_x, grad_weight, grad_bias, grad_condition)`, each empty where it is not wanted.

    With g the gradient of the pre-activation: :math:`g_x = g \star (w \odot m)`, :math:`g_w = (g \star x) \odot m`,
    :math:`g_b = \sum_{n,h,w} g`; the condition's is g, or g summed over the pixels.

    Args:
        grad_output: of the output; grad_pre: of the pre-activation that `masked_conv` gave (second order). None counts
            as zero.
        state: for relu the output or the pre-activation; for the gate the pre-activation; else None.
        condition_rank: 2, 4, or 0 for no condition.
    """
    g = pre_gradient(grad_output, grad_pre, state, activation)
    mask = _mask_of(weight, mask_type, data_channels, region, activation)
    nothing = x.new_empty(0)
    grad_x = grad_weight = nothing
    if want_x or want_weight:
        # plain integers: the second derivative of a convolution refuses symbolic ones
        padding = [int(weight.shape[2]) // 2, int(weight.shape[3]) // 2]
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            g,
            x,
            weight.masked_fill(~mask, 0),
            None,
            [1, 1],
            padding,
            [1, 1],
            False,
            [0, 0],
            1,
            [want_x, want_weight, False],
        )
        grad_x = grad_x.contiguous() if want_x else nothing
        grad_weight = grad_weight.masked_fill(~mask, 0).contiguous() if want_weight else nothing
    grad_bias = g.sum(dim=(0, 2, 3)) if want_bias else nothing
    if not want_condition:
        grad_condition = nothing
    else:
        grad_condition = g.sum(dim=(2, 3)) if condition_rank == 2 else g.clone()
    return grad_x, grad_weight, grad_bias, grad_condition


def pre_gradient(grad_output: Tensor | None, grad_pre: Tensor | None, state: Tensor | None, activation: int) -> Tensor:
    """The gradient of the pre-activation; a missing gradient counts as zero."""
    g = grad_pre
    if grad_output is not None:
        if activation == Activation.RELU:
            through = grad_output.masked_fill(state <= 0, 0)
        elif activation == Activation.GATE:
            a, b = state.chunk(2, dim=1)
            tanh, sigmoid = torch.tanh(a), torch.sigmoid(b)
            slope_b = sigmoid * (1 - sigmoid)
            through = torch.cat([grad_output * sigmoid * (1 - tanh * tanh), grad_output * tanh * slope_b], dim=1)
        else:
            through = grad_output
        g = through if g is None else g + through
    return g.contiguous()


def _mask_of(weight: Tensor, mask_type: int, data_channels: int, region: int, activation: int) -> Tensor:
    return causal_mask(
        weight.shape[0],
        weight.shape[1],
        (weight.shape[2], weight.shape[3]),
        MASK_TYPES[mask_type],
        data_channels,
        REGIONS[region],
        activation == Activation.GATE,
        weight.device,
    )
