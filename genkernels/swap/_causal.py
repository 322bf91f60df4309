"""What PixelCNNs of other libraries share: convolutions by a mask of zeros and ones, and images of black and white that
are drawn pixel by pixel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genkernels import ops
from genkernels.nn._seen import Seen
from genkernels.ops import Stage
from genkernels.reference.masked_conv import causal_mask
from genkernels.swap._rules import left_alone


def mask_type(conv: nn.Conv2d, mask: Tensor) -> str | None:
    """``A`` or ``B`` where a convolution by `mask` is the operator's, of one block of channels; None where it is none:
    the mask is another one, H and W do not stay, there are groups, or the border is not of zeros."""
    height, width = conv.kernel_size
    stays = conv.padding in ("same", (height // 2, width // 2)) and conv.stride == conv.dilation == (1, 1)
    if not stays or conv.groups != 1 or conv.padding_mode != "zeros" or not height % 2 or not width % 2:
        return None
    if mask.shape != conv.weight.shape:
        return None
    for kind in "AB":
        if torch.equal(mask.cpu(), _mask(conv, kind).to(mask.dtype)) and mask.any():
            return kind
    return None


def _mask(conv: nn.Conv2d, kind: str) -> Tensor:
    return causal_mask(
        conv.out_channels, conv.in_channels, conv.kernel_size, kind, 1, "raster", False, torch.device("cpu")
    )


class Masked:
    """A convolution with a buffer ``mask``, looked at again when it has changed."""

    def _gk_kind(self) -> str | None:
        if not hasattr(self, "_gk_seen"):
            self._gk_seen = Seen()
        if not self._gk_seen.holds(self.mask):
            self._gk_type = mask_type(self, self.mask)
            self._gk_seen.note(self.mask)
        return self._gk_type

    def _gk_convolved(self, x: Tensor) -> Tensor | None:
        """None where the other library's way is taken."""
        if x.dim() != 4 or x.dtype != self.weight.dtype or x.shape[1] != self.in_channels or 0 in x.shape:
            return None
        kind = self._gk_kind()
        return None if kind is None else ops.masked_conv(x, self.weight, self.bias, mask_type=kind)


class Multiplied(Masked):
    """Of a convolution by ``weight * mask``: dead taps are left out."""

    def forward(self, input):
        convolved = None if left_alone(self) else self._gk_convolved(input)
        return super().forward(input) if convolved is None else convolved


class Zeroed(Masked):
    """Of one that sets its dead taps to 0 in each call, where the weight gets no gradient. Where it gets one, dead taps
    have theirs, which the next pass throws away, but which a norm of gradients counts: there it stays as it is."""

    def forward(self, x):
        learns = torch.is_grad_enabled() and self.weight.requires_grad
        if learns or left_alone(self) or self.weight.device.type == "meta":
            return super().forward(x)
        self.weight.data *= self.mask
        convolved = self._gk_convolved(x)
        return super().forward(x) if convolved is None else convolved


#: What there is to know of `Zeroed`, and why a convolution stays.
ZEROED = "where its weight gets no gradient; elsewhere it stays, for dead taps have one there"
NO_MASK = "its mask, its padding or its groups are not those of a masked convolution here"


class Planes:
    """Stages of a network as they are put down; each makes the plane whose number it gives."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []

    def add(self, *inputs: tuple[int, Tensor], **options) -> int:
        self.stages.append(Stage(tuple(inputs), **options))
        return len(self.stages)

    def chain(self, plane: int, layers, added: tuple[int, ...] = ()) -> int:
        """1×1 convolutions, `Masked` ones of type B, and ReLUs, one after the other; `added` goes to the last."""
        layers = list(layers)
        while layers:
            layer = layers.pop(0)
            if type(layer) is nn.ReLU:
                plane = self.add(added=(plane,), activation="relu")
                continue
            rectified = bool(layers) and type(layers[0]) is nn.ReLU
            options = {"activation": "relu"} if rectified else {} if layers else {"added": added}
            plane = self.add((plane, layer.weight), bias=layer.bias, **options)
            layers = layers[rectified:]
        return plane


def upwards(weight: Tensor, above: int) -> Tensor:
    """A weight whose last row looks `above` rows up, as one around its centre."""
    return _reaching(weight, 2, above)


def backwards(weight: Tensor, left: int) -> Tensor:
    """A weight whose last column looks `left` columns back, as one around its centre."""
    return _reaching(weight, 3, left)


def _reaching(weight: Tensor, dim: int, away: int) -> Tensor:
    shape = list(weight.shape)
    shape[dim] += 2 * away + shape[dim] - 1
    whole = weight.new_zeros(shape)
    whole.narrow(dim, 0, weight.shape[dim]).copy_(weight)
    return whole


def black_and_white(stages: list[Stage], noise: Tensor, image: Tensor) -> Tensor:
    """Zeros and ones ``[N, 1, H, W]``, each one with the probability of its logit, the last plane.

    Args:
        noise: uniform in [0, 1), like the result: a pixel is one where it is below the probability.
        image: like the result, kept where it is 0 or 1 and drawn where it is below.
    """
    last = stages[-1]
    ((plane, weight),) = last.inputs
    both = torch.cat([torch.zeros_like(weight), weight])
    bias = None if last.bias is None else torch.cat([torch.zeros_like(last.bias), last.bias])
    stages = [*stages[:-1], Stage(((plane, both),), bias=bias)]
    known = image >= 0
    noise = (1 - noise).clamp(max=1 - 2.0**-24)  # levels are drawn from below, 0 first
    return ops.autoregressive_sampling(stages, noise, levels=2, image=image.clamp(min=0).long(), known=known).to(image)
