"""Gated PixelCNN: a vertical and a horizontal stack, without a blind spot (van den Oord et al. 2016)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from genkernels.models._model import Preset
from genkernels.models.autoregressive.base import Classes, PixelModel, check_width, class_bias
from genkernels.nn import MaskedConv2d
from genkernels.ops import Stage


class GatedPixelCNN(PixelModel):
    """Two stacks of gated masked convolutions: the vertical one sees all rows above, the horizontal one the row so far
    and the vertical one.

    Args:
        shape: ``(C, H, W)``; colours are drawn R, G, B. grey_levels: how many values a pixel can take.
        width: channels of each stack, a multiple of C for the categorical head. layers: gated layers after the first.
        kernel_size: of the layers after the first, odd. first_kernel: of the first, odd.
        head: ``categorical``: a softmax over the levels; ``logistic_mixture``: `mixtures` discretised logistics a
            pixel, whose coefficients tie its channels together (PixelCNN++). 1 or 3 channels.
        mixtures: how many logistics a pixel, for `logistic_mixture`.
        dropout: share of whole channels that are dropped before each gated layer, in training.
        num_classes: condition every layer on a class y.

    Example:
        >>> import torch, genkernels as gk
        >>> model = gk.models.GatedPixelCNN(shape=(1, 8, 8), grey_levels=17, width=16, layers=2)
        >>> model.sample(2, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2, 1, 8, 8])

    Source: van den Oord et al., "Conditional image generation with PixelCNN decoders", 2016 (CIFAR-10: 3.03 bits/dim);
    Salimans et al., "PixelCNN++", 2017 (2.92, with down-sampling and shortcuts that this model has not). The horizontal
    stack reads the vertical one behind its gate. Adam at 1e-3.
    """

    presets: ClassVar = {
        "digits": Preset({"shape": (1, 8, 8), "grey_levels": 17, "width": 32, "layers": 2, "dropout": 0.1}),
        "photos32": Preset({"shape": (3, 32, 32), "width": 48, "layers": 5, "head": "logistic_mixture"}),
        # the paper does not say how this size was trained
        "cifar10": Preset({"shape": (3, 32, 32), "width": 129, "layers": 15, "kernel_size": 5}),
    }

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        grey_levels: int = 256,
        width: int = 64,
        layers: int = 8,
        kernel_size: int = 3,
        first_kernel: int = 7,
        head: str = "categorical",
        mixtures: int = 10,
        dropout: float = 0.0,
        num_classes: int | None = None,
    ):
        super().__init__(shape=shape, grey_levels=grey_levels, num_classes=num_classes, head=head, mixtures=mixtures)
        channels, groups = shape[0], self.data_channels
        check_width("GatedPixelCNN", width, groups)
        sizes = [(channels, first_kernel, "A"), *[(width, kernel_size, "B")] * layers]
        self.blocks = nn.ModuleList(
            _Block(inputs, width, size, mask_type, groups, num_classes) for inputs, size, mask_type in sizes
        )
        self.hidden = MaskedConv2d("B", width, width, 1, groups, activation="relu")
        self.last = MaskedConv2d("B", width, self.outputs, 1, groups)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        y = self._labels(y, len(x))
        v = h = x
        for i, block in enumerate(self.blocks):
            residual = h if i else None
            if i:
                v, h = self.dropout(v), self.dropout(h)
            v, h = block(v, h, residual, y)
        return self.last(self.hidden(h))

    def stages(self, y: Tensor | None = None) -> list[Stage]:
        stages: list[Stage] = []
        v = h = 0
        for i, block in enumerate(self.blocks):
            stages += block.stages(v, h, h if i else None, len(stages), y)
            v, h = len(stages) - 2, len(stages)
        for layer, activation in ((self.hidden, "relu"), (self.last, "none")):
            stages.append(Stage(((len(stages), layer.masked_weight()),), bias=layer.bias, activation=activation))
        return stages


class _Block(nn.Module):
    """One layer of both stacks: ``v' = gate(V v)``, ``h' = R gate(H h + L v') + h``, V, H masked, L and R 1×1."""

    def __init__(self, inputs: int, width: int, size: int, mask_type: str, groups: int, num_classes: int | None):
        super().__init__()
        self.vertical = MaskedConv2d(mask_type, inputs, 2 * width, size, region="vertical", activation="gate")
        self.horizontal = MaskedConv2d(
            mask_type, inputs, 2 * width, (1, size), groups, region="horizontal", activation="gate"
        )
        # what is in the vertical stack comes from rows above: every group of channels may see it, and no tap is masked;
        # around a plain convolution among operators of ours, Inductor turns what it is given channels-last and back
        self.link = MaskedConv2d("B", width, 2 * width, 1, bias=False)
        self.out = MaskedConv2d("B", width, width, 1, groups)
        self.vertical_classes = Classes(num_classes, 2 * width) if num_classes else None
        self.horizontal_classes = Classes(num_classes, 2 * width) if num_classes else None

    def forward(self, v: Tensor, h: Tensor, residual: Tensor | None, y: Tensor | None) -> tuple[Tensor, Tensor]:
        v = self.vertical(v, class_bias(self.vertical_classes, y))
        condition = self.link(v)
        if self.horizontal_classes is not None:
            beside = self.horizontal_classes(y)
            condition = condition + beside.view(*beside.shape, *[1] * (4 - beside.dim()))
        return v, self.out(self.horizontal(h, condition), None, residual)

    def stages(self, v: int, h: int, residual: int | None, before: int, y: Tensor | None) -> list[Stage]:
        """Three stages: planes ``before + 1`` (vertical), ``before + 2`` (horizontal, gated), ``before + 3``
        (horizontal)."""
        vertical, horizontal, out = self.vertical, self.horizontal, self.out
        own, beside = class_bias(self.vertical_classes, y), class_bias(self.horizontal_classes, y)
        linked = (before + 1, self.link.weight)
        return [
            Stage(
                ((v, vertical.masked_weight()),), bias=vertical.bias, condition=own, activation="gate", vertical=True
            ),
            Stage(((h, horizontal.masked_weight()), linked), bias=horizontal.bias, condition=beside, activation="gate"),
            Stage(((before + 2, out.masked_weight()),), bias=out.bias, residual=residual),
        ]
