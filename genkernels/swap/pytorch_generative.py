"""pytorch-generative: PixelCNN and gated PixelCNN, drawn by one call, and their masked convolutions.

A network that looks at black and white pixels, 0 and 1, is told as stages of `genkernels.ops.autoregressive_sampling`,
which draws levels that it sees as −1 and 1, and to which what is beyond the border is 0. Two planes make up for it: the
image as pytorch-generative's network sees it, moved one row down, and moved one column to the right. Everything that
the network reads of rows above or to the left is read off these, one row or column nearer.

The library has no version: its classes are known by what their methods say.
"""

from __future__ import annotations

import torch
from pytorch_generative.models import base
from pytorch_generative.models.autoregressive import gated_pixel_cnn, pixel_cnn, pixel_snail
from pytorch_generative.nn import convolution
from torch import Tensor, nn

from genkernels.networks._plain import hooked
from genkernels.ops import Stage
from genkernels.swap._causal import NO_MASK, ZEROED, Planes, Zeroed, backwards, black_and_white, mask_type, upwards
from genkernels.swap._rules import Becomes, Library, left_alone, stays
from genkernels.swap._source import digest


class CausalConv2d(Zeroed, convolution.CausalConv2d):
    """`pytorch_generative.nn.CausalConv2d`."""


# The classes come by way of `abc.ABC`, which lets an object have no class with another first base: no mixins.


@torch.no_grad()
def _sample(self, n_samples=None, conditioned_on=None):
    """In one call: the draws are those of pixel after pixel, from the same stream of random numbers."""
    image = self._get_conditioned_on(n_samples, conditioned_on)
    stages = None if left_alone(self) else _stages(self, image)
    if stages is None:
        return base.AutoregressiveModel.sample(self, n_samples, conditioned_on)
    count, channels, height, width = image.shape
    noise = torch.rand(height, width, count, channels, dtype=image.dtype, device=image.device)
    drawn = black_and_white(stages, noise.permute(2, 3, 0, 1), image)
    return torch.where(image < 0, drawn, image)


def _stages(model, image: Tensor) -> list[Stage] | None:
    """None where pytorch-generative's own way is taken: it draws otherwise, or the network has been changed."""
    weights = [p.detach() for p in model.parameters()]
    fits = image.dim() == 4 and image.numel() and image.shape[1] == 1
    lowered = torch.is_autocast_enabled(image.device.type)
    if not fits or lowered or {(w.dtype, w.device) for w in weights} != {(image.dtype, image.device)}:
        return None
    if _why_not(model) or not ((image < 0) | (image == 0) | (image == 1)).all():
        return None
    if not all(w.isfinite().all() for w in weights):
        return None
    for layer in model.modules():
        if isinstance(layer, convolution.CausalConv2d):
            layer.weight.data *= layer.mask
    return model._gk_told(image)


def _image_planes(planes: Planes, image: Tensor) -> tuple[int, int, int]:
    """Three planes of one channel: the image one row down, the image one column to the right, and what is 0 in the
    first row and 1 in the others."""
    one, half = torch.ones_like(image), image.new_full((1, 1, 1, 1), 0.5)
    below, right = one.clone(), one.clone()
    below[:, :, 0], right[..., 0] = 0, 0
    above = planes.add((0, upwards(half, 1)), condition=below / 2, vertical=True)
    left = planes.add((0, backwards(half, 1)), condition=right / 2)
    rows = planes.add((0, upwards(0 * half, 1)), condition=below, vertical=True)
    return above, left, rows


class PixelCNN(pixel_cnn.PixelCNN):
    """`pytorch_generative.models.PixelCNN`."""

    sample = _sample

    def _gk_told(self, image: Tensor) -> list[Stage]:
        planes = Planes()
        above, left, _ = _image_planes(planes, image)
        first = self._input
        rows, columns = first.kernel_size[0] // 2, first.kernel_size[1] // 2
        looking_up = planes.add((above, upwards(first.weight[:, :, :rows], 0)), vertical=True)
        beside = backwards(first.weight[:, :, rows : rows + 1, :columns], 0)
        x = planes.add((left, beside), added=(looking_up,), bias=first.bias)
        for layer in self._causal_layers:
            x = planes.chain(x, layer._net, added=(x, x))
        planes.chain(x, self._head)
        return planes.stages


class GatedPixelCNN(gated_pixel_cnn.GatedPixelCNN):
    """`pytorch_generative.models.GatedPixelCNN`. Its vertical stack reaches into a pixel's own row, of which only the
    rows below make use: it is kept one row down, as the image is."""

    sample = _sample

    def _gk_told(self, image: Tensor) -> list[Stage]:
        planes = Planes()
        vertical, horizontal, rows = _image_planes(planes, image)

        def bias(*layers: nn.Conv2d) -> tuple[int, Tensor]:  # none in the first row, which is beyond the border
            return rows, sum(layer.bias for layer in layers)[:, None, None, None]

        skips: tuple[int, ...] = ()
        for k, layer in enumerate([self._input, *self._gated_layers]):
            wide, high, beside = layer._vstack_1xN, layer._vstack_Nx1, layer._hstack_1xN
            flat = planes.add((vertical, wide.weight), bias(wide), vertical=True)
            seen = planes.add((flat, upwards(high.weight, 0)), bias=high.bias, vertical=True)
            vertical = planes.add(
                (flat, upwards(high.weight, 1)), (vertical, layer._vstack_1x1.weight), bias(high, layer._vstack_1x1),
                activation="gate", vertical=True,
            )  # fmt: skip
            gated = planes.add(
                (horizontal, backwards(beside.weight, 0)), (seen, layer._link.weight),
                bias=beside.bias + layer._link.bias, activation="gate",
            )  # fmt: skip
            skip, out = layer._hstack_skip, layer._hstack_residual
            skips = (planes.add((gated, skip.weight), bias=skip.bias, added=skips),)
            horizontal = planes.add((gated, out.weight), bias=out.bias, added=(horizontal,) if k else ())
        planes.chain(*skips, self._head)
        return planes.stages


# ---------------------------------------------------------------------------------------------------------------- rules

#: What the methods say that the swaps stand for: `digest` of each, of commit d1f0a5c.
KNOWN = {
    "AutoregressiveModel._get_conditioned_on": "60de3e88fd8cc412",
    "AutoregressiveModel.sample": "c9238959fa449bb8",
    "CausalConv2d.forward": "18e5e50d9547988d",
    "CausalResidualBlock.forward": "22f86fc7233c7902",
    "GatedActivation.forward": "18a1ae94d0888518",
    "GatedPixelCNN.forward": "7852649e228dc2de",
    "GatedPixelCNNLayer.forward": "98cc271d8577a72d",
    "PixelCNN.forward": "51677193283c147d",
    "_default_sample_fn": "912258b2f5b5bba1",
}


def _changed(*functions) -> str:
    """Which of the library's functions is not the one that is known."""
    for function in functions:
        if digest(function) != KNOWN.get(function.__qualname__):
            return f"{function.__qualname__} is not that of pytorch-generative's commit d1f0a5c"
    return ""


_BASE = (
    base._default_sample_fn,
    base.AutoregressiveModel.__dict__["sample"],
    base.AutoregressiveModel._get_conditioned_on,
    convolution.CausalConv2d.forward,
    convolution.GatedActivation.forward,
)
_PIXEL_CNN = (pixel_cnn.PixelCNN.forward, pixel_cnn.CausalResidualBlock.forward)
_GATED = (gated_pixel_cnn.GatedPixelCNN.forward, gated_pixel_cnn.GatedPixelCNNLayer.forward)

#: The modules that a network may consist of.
PARTS = {
    convolution.CausalConv2d, CausalConv2d, convolution.GatedActivation, pixel_cnn.CausalResidualBlock,
    gated_pixel_cnn.GatedPixelCNNLayer, nn.Conv2d, nn.ReLU, nn.Sequential, nn.ModuleList,
}  # fmt: skip


def _why_not(model) -> str:
    if model._sample_fn is not base._default_sample_fn:
        return "its sample_fn is the caller's own"
    for name, part in model.named_modules():
        if part is model:
            continue
        if type(part) not in PARTS or hooked(part):
            return f"{name} is a {type(part).__name__} of another kind, or has hooks"
        if isinstance(part, convolution.GatedActivation) and part._activation_fn is not torch.tanh:
            return f"{name} is a gate of another function"
    gated = isinstance(model, gated_pixel_cnn.GatedPixelCNN)
    first = model._input._vstack_1xN if gated else model._input
    if not _is_chain(model._head, "rcrc") or not (_gated_layers if gated else _residual_layers)(model):
        return "its layers are not those of the constructor"
    if first.in_channels != 1 or model._head[3].out_channels != 1:
        return "its pixels have several channels, which are drawn at once"
    return ""


def _residual_layers(model) -> bool:
    first = model._input
    known = isinstance(first, convolution.CausalConv2d) and mask_type(first, first.mask) == "A"
    return known and all(_is_chain(layer._net, "rcrmrc") for layer in model._causal_layers)


def _gated_layers(model) -> bool:
    layers = [model._input, *model._gated_layers]
    return all(_layer_is_known(layer, hidden=layer is model._input) for layer in layers)


def _is_chain(layers: nn.Sequential, letters: str) -> bool:
    """Whether layers are what the letters say: r a ReLU, c a 1×1 convolution, m a masked one that sees its pixel."""
    return len(layers) == len(letters) and all(_is(layer, a) for layer, a in zip(layers, letters, strict=True))


def _is(layer: nn.Module, letter: str) -> bool:
    if letter == "r":
        return type(layer) is nn.ReLU
    if letter == "m":
        return isinstance(layer, convolution.CausalConv2d) and mask_type(layer, layer.mask) == "B"
    return type(layer) is nn.Conv2d and _convolves(layer, (1, 1), (0, 0))


def _convolves(layer: nn.Conv2d, kernel: tuple[int, int], padding: tuple[int, int]) -> bool:
    """Whether a convolution has a bias, this kernel and this padding, with zeros, and nothing out of the ordinary."""
    plain = layer.stride == layer.dilation == (1, 1) and layer.groups == 1 and layer.padding_mode == "zeros"
    return plain and layer.bias is not None and (layer.kernel_size, layer.padding) == (kernel, padding)


def _layer_is_known(layer: nn.Module, hidden: bool) -> bool:
    size = layer._vstack_1xN.kernel_size[1]
    half = size // 2
    ones = layer._vstack_1x1, layer._link, layer._hstack_residual, layer._hstack_skip
    return (
        size % 2 == 1
        and layer._padding == half
        and bool(layer._mask_center) == hidden
        and _convolves(layer._vstack_1xN, (1, size), (0, half))
        and _convolves(layer._vstack_Nx1, (half + 1, 1), (half + 1, 0))
        and _convolves(layer._hstack_1xN, (1, half + 1), (0, half + hidden))
        and all(_is(one, "c") for one in ones)
    )


def _convolution(thing) -> Becomes | str:
    if why := _changed(convolution.CausalConv2d.forward):
        return why
    return NO_MASK if mask_type(thing, thing.mask) is None else Becomes(CausalConv2d, ZEROED)


def _drawn(to: type, *functions):
    def rule(thing) -> Becomes | str:
        return _changed(*_BASE, *functions) or _why_not(thing) or Becomes(to, DRAWN)

    return rule


DRAWN = "sample is one call; on a CPU it draws what it drew before, on a GPU from the same distribution"

LIBRARY = Library(
    "pytorch_generative",
    (),
    {
        convolution.CausalConv2d: _convolution,
        pixel_cnn.PixelCNN: _drawn(PixelCNN, *_PIXEL_CNN),
        gated_pixel_cnn.GatedPixelCNN: _drawn(GatedPixelCNN, *_GATED),
        pixel_snail.PixelSNAIL: stays("its attention looks back at every pixel"),
    },
)
