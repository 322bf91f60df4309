"""PixelCNN: a stack of masked convolutions (van den Oord et al. 2016)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from genkernels.models._model import Preset
from genkernels.models.autoregressive.base import Classes, PixelModel, check_width
from genkernels.nn import MaskedConv2d
from genkernels.ops import Stage


class PixelCNN(PixelModel):
    """A 7×7 masked convolution of type A, `layers` 3×3 ones of type B, each with a ReLU, and a 1×1 one to the logits.

    Its receptive field misses a wedge right above a pixel (the blind spot of masked stacks); `GatedPixelCNN` has none.

    Args:
        shape: ``(C, H, W)``; colours are drawn R, G, B. grey_levels: how many values a pixel can take.
        width: channels in between, a multiple of C. layers: 3×3 layers.
        residual: each 3×3 layer adds to its input. dropout: share of whole channels that are dropped before each 3×3
            layer, in training.
        num_classes: condition every layer on a class y.

    Example:
        >>> import torch, genkernels as gk
        >>> model = gk.models.PixelCNN(shape=(1, 8, 8), grey_levels=17, width=16, layers=2)
        >>> model.log_prob(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).shape
        torch.Size([2])

    Source: van den Oord et al., "Pixel recurrent neural networks", 2016. The paper trains with RMSProp; here Adam at
    1e-3. CIFAR-10: 3.14 bits/dim at 15 layers of 128 channels, which the preset ``cifar10`` has (its channels rounded
    to a multiple of 3), in batches of 16, as there.
    """

    presets: ClassVar = {
        "digits": Preset(
            {"shape": (1, 8, 8), "grey_levels": 17, "width": 48, "layers": 4, "residual": True, "dropout": 0.2}
        ),
        "photos32": Preset({"shape": (3, 32, 32), "width": 96, "layers": 6, "residual": True}),
        # the paper, section 5.2: batches of 16, which regularise
        "cifar10": Preset({"shape": (3, 32, 32), "width": 129, "layers": 15, "residual": True}, {"batch_size": 16}),
    }

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        grey_levels: int = 256,
        width: int = 64,
        layers: int = 8,
        residual: bool = False,
        dropout: float = 0.0,
        num_classes: int | None = None,
    ):
        super().__init__(shape=shape, grey_levels=grey_levels, num_classes=num_classes)
        channels = shape[0]
        check_width("PixelCNN", width, channels)
        self.residual = residual
        self.first = MaskedConv2d("A", channels, width, 7, channels, activation="relu")
        self.layers = nn.ModuleList(
            MaskedConv2d("B", width, width, 3, channels, activation="relu") for _ in range(layers)
        )
        self.last = MaskedConv2d("B", width, self.outputs, 1, channels)
        self.dropout = nn.Dropout2d(dropout)
        count = (layers + 1) if num_classes else 0
        self.classes = nn.ModuleList(Classes(num_classes, width) for _ in range(count))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        y = self._labels(y, len(x))
        biases = [classes(y) for classes in self.classes] or [None] * (len(self.layers) + 1)
        h = self.first(x, biases[0])
        for layer, bias in zip(self.layers, biases[1:], strict=True):
            h = layer(self.dropout(h), bias, h if self.residual else None)
        return self.last(h)

    def stages(self, y: Tensor | None = None) -> list[Stage]:
        biases = [classes(y) for classes in self.classes] or [None] * (len(self.layers) + 1)
        stages = []
        for plane, (layer, bias) in enumerate(zip([self.first, *self.layers], biases, strict=True)):
            source = ((plane, layer.masked_weight()),)
            residual = plane if self.residual and plane else None
            stages.append(Stage(source, bias=layer.bias, condition=bias, activation="relu", residual=residual))
        stages.append(Stage(((len(stages), self.last.masked_weight()),), bias=self.last.bias))
        return stages
