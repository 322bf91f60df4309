"""The masked convolution as a layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkernels import ops
from genkernels.backends import current_backend
from genkernels.nn._buffers import Derived, renew
from genkernels.nn._layout import BF16_UNITS
from genkernels.ops import checks
from genkernels.ops.masked_conv import check_options
from genkernels.reference.masked_conv import causal_mask


class MaskedConv2d(Derived, nn.Conv2d):
    r"""A convolution that sees only what comes before each pixel; a `torch.nn.Conv2d` with padding fixed so that H and
    W stay.

    Equivalent to::

        y = F.conv2d(x, weight * layer.mask, bias, padding=(kh // 2, kw // 2)) + condition
        y = activation(y) + residual

    Its parameters and state dict are those of a plain ``Conv2d``: ``weight [out_channels, in_channels, kh, kw]`` and
    ``bias``. Dead taps start as 0 and get a gradient of exactly 0; loaded ones may hold anything and play no part, but
    for a norm over all taps that ``torch.nn.utils.parametrizations.weight_norm`` or ``spectral_norm`` takes of them.

    Args:
        mask_type: ``A`` (first layer: a pixel does not see itself) or ``B``.
        in_channels, out_channels: with the gate, half of `out_channels` leave the layer.
        kernel_size: odd, one number or ``(kh, kw)``.
        data_channels: C blocks of channels in order, within a pixel (R, then G, then B); divides both numbers of
            channels.
        region: ``raster``, ``vertical`` or ``horizontal``. activation: ``none``, ``relu`` or ``gate``.
        bias: whether there is one. stride, dilation: only 1. device, dtype: as for `torch.nn.Conv2d`.

    Shapes:
        x: ``[N, in_channels, H, W]``. condition: ``[N, out_channels]`` or ``[N, out_channels, H, W]``, added before the
            activation.
        residual: like the result, added after it. Result: ``[N, out_channels, H, W]``, with the gate half as many
            channels.

    Raises:
        ValueError: an option is unknown or not offered, the kernel is even, channels do not divide, or no tap is live.

    Source: van den Oord et al., "Pixel recurrent neural networks", 2016; "Conditional image generation with PixelCNN
    decoders", 2016.
    """

    def __init__(
        self,
        mask_type: str,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        data_channels: int = 1,
        *,
        region: str = "raster",
        activation: str = "none",
        bias: bool = True,
        stride: int = 1,
        dilation: int = 1,
        device=None,
        dtype=None,
    ):
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            checks.integer("MaskedConv2d", name, value, 1)
        pair = tuple(kernel_size) if isinstance(kernel_size, list | tuple) else (kernel_size,) * 2
        if len(pair) != 2:
            raise ValueError(f"MaskedConv2d: kernel_size must be one number or (kh, kw), got {kernel_size!r}")
        height, width = (checks.integer("MaskedConv2d", "kernel_size", side, 1) for side in pair)
        for name, value in (("stride", stride), ("dilation", dilation)):
            if value not in (1, (1, 1)):
                raise ValueError(f"MaskedConv2d: {name} must be 1, for every pixel has an output, got {value}")
        check_options(
            "MaskedConv2d", mask_type, data_channels, region, activation, (out_channels, in_channels), (height, width)
        )
        super().__init__(
            in_channels,
            out_channels,
            (height, width),
            padding=(height // 2, width // 2),
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.mask_type, self.data_channels, self.region, self.activation = mask_type, data_channels, region, activation
        self.register_buffer("mask", self._causal_mask().to(self.weight.device), persistent=False)
        with torch.no_grad():
            self.weight.copy_(self.masked_weight())

    def forward(self, x: Tensor, condition: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        tensors = (x, self.weight, self.bias, condition, residual)
        if _on_bf16_units(tensors) and self._shapes_fit(x, condition, residual):
            return self._plain(*(t if t is None else t.to(torch.bfloat16) for t in tensors))
        return ops.masked_conv(
            x,
            self.weight,
            self.bias,
            mask_type=self.mask_type,
            data_channels=self.data_channels,
            region=self.region,
            condition=condition,
            residual=residual,
            activation=self.activation,
        )

    def _shapes_fit(self, x: Tensor, condition: Tensor | None, residual: Tensor | None) -> bool:
        """Whether all is as it must be; where it is not, the operator says what is wrong."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            return False
        count, _, *sides = x.shape
        leaving = self.out_channels // (2 if self.activation == "gate" else 1)
        conditions = [[count, self.out_channels], [count, self.out_channels, *sides]]
        return (condition is None or list(condition.shape) in conditions) and (
            residual is None or list(residual.shape) == [count, leaving, *sides]
        )

    def _plain(self, x, weight, bias, condition, residual) -> Tensor:
        """torch's own convolution of the masked weight, channels-last."""
        y = F.conv2d(
            x.contiguous(memory_format=torch.channels_last),
            torch.where(self.mask, weight, 0),
            bias,
            padding=self.padding,
        )
        if condition is not None:
            y = y + (condition[:, :, None, None] if condition.dim() == 2 else condition)
        if self.activation == "relu":
            y = F.relu(y, inplace=True)
        elif self.activation == "gate":
            a, b = y.chunk(2, dim=1)
            y = torch.tanh(a) * torch.sigmoid(b)
        if residual is not None:
            return y + residual
        # a network's last layer: losses over its channels want each channel in one piece
        return y.contiguous() if self.activation == "none" else y

    def masked_weight(self) -> Tensor:
        """The weight with its dead taps exactly 0, differentiable."""
        return torch.where(self.mask, self.weight, 0)

    def _causal_mask(self) -> Tensor:
        """On the CPU."""
        return causal_mask(
            self.out_channels,
            self.in_channels,
            self.kernel_size,
            self.mask_type,
            self.data_channels,
            self.region,
            self.activation == "gate",
            torch.device("cpu"),
        )

    def _derive(self) -> None:
        renew(self, "mask", self._causal_mask())

    def extra_repr(self) -> str:
        parts = [repr(self.mask_type), super().extra_repr(), f"data_channels={self.data_channels}"]
        return ", ".join([*parts, f"region={self.region!r}", f"activation={self.activation!r}"])


def _on_bf16_units(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether these are to be convolved in bf16 on a CPU with matrix units for it.

    The operator also leaves bf16 to torch there, but in NCHW: under autocast a step of PixelCNN (preset ``digits``, one
    core) then took 1.05 times the reference's time, channels-last 0.79 times.
    """
    if not BF16_UNITS or current_backend() != "auto":
        return False
    present = [t for t in tensors if t is not None]
    if not all(isinstance(t, Tensor) and t.is_floating_point() and t.device.type == "cpu" for t in present):
        return False
    if torch.is_autocast_enabled("cpu"):
        halves = torch.get_autocast_dtype("cpu") == torch.bfloat16
        return halves and not any(t.dtype == torch.float64 for t in present)
    return all(t.dtype == torch.bfloat16 for t in present)
