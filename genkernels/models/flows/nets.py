"""The networks inside coupling layers: ``net(x_half[, context])``. Each starts as zero, so that a flow starts near the
identity."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genkernels.networks._plain import plain
from genkernels.nn import Conv2dZeros, _small_grid
from genkernels.nn._layout import convolution_layout
from genkernels.nn._log_det import zero_log_det
from genkernels.nn._rectified import relu


class ConvNet(nn.Module):
    """Glow's coupling network: 3×3, ReLU, 1×1, ReLU, zero-initialised 3×3.

    Args:
        in_channels, out_channels: of the result. hidden: channels in between.
        context_features: size of the context vector ``[N, context_features]``, added after the first convolution; 0:
            none.

    Shapes: x ``[N, in_channels, H, W]`` to ``[N, out_channels, H, W]``.
    """

    def __init__(self, in_channels: int, out_channels: int, hidden: int, context_features: int = 0):
        super().__init__()
        self.hidden = hidden
        self.first = _relu_init(nn.Conv2d(in_channels, hidden, 3, padding=1))
        self.second = _relu_init(nn.Conv2d(hidden, hidden, 1))
        self.last = Conv2dZeros(hidden, out_channels)
        self.context = nn.Linear(context_features, hidden, bias=False) if context_features else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if self._as_written() and _small_grid.suits(
            x, self.second.out_channels * max(self.first.in_channels, self.last.out_channels)
        ):
            return self._dense(x, context)
        h = _first(self.first, x, self.hidden)
        if self.context is not None:
            h = h + self.context(context)[:, :, None, None]
        h = relu(self.second(relu(h)))
        return self.last(h)

    def _as_written(self) -> bool:
        """Whether the layers are what their weights say, so that a product may read those and go past the layers."""
        return plain(self.first, nn.Conv2d) and plain(self.second, nn.Conv2d) and plain(self.last, Conv2dZeros)

    def _dense(self, x: Tensor, context: Tensor | None) -> Tensor:
        """The same as three products; hidden values are laid out (sample, pixel, channel)."""
        n, channels, height, width = x.shape
        pixels, hidden = height * width, self.second.out_channels
        weight = _small_grid.dense_weight(self.first.weight, height, width, (False, True))
        h = torch.addmm(self.first.bias.repeat(pixels), x.reshape(n, channels * pixels), weight)
        if self.context is not None:
            h = (h.view(n, pixels, hidden) + self.context(context).unsqueeze(1)).view(n, pixels * hidden)
        h = relu(h, inplace=True).view(n * pixels, hidden)
        h = relu(torch.addmm(self.second.bias, h, self.second.weight.view(hidden, hidden).t()), inplace=True)
        weight, bias = self.last.scaled()
        weight = _small_grid.dense_weight(weight, height, width, (True, False))
        out = torch.addmm(bias.repeat_interleave(pixels), h.view(n, pixels * hidden), weight)
        return out.view(n, self.last.out_channels, height, width)


class ResidualNet(nn.Module):
    """RealNVP's coupling network: a 3×3 convolution, `blocks` pre-activation residual blocks, a zero-initialised 3×3.

    Without batch normalisation, whose statistics would tie the samples of a batch together; each block's second
    convolution is zero at the start instead, which keeps deep networks trainable.

    Args, Shapes: as for `ConvNet`; blocks: residual blocks of two 3×3 convolutions.
    """

    def __init__(self, in_channels: int, out_channels: int, hidden: int, blocks: int, context_features: int = 0):
        super().__init__()
        self.hidden = hidden
        self.first = _relu_init(nn.Conv2d(in_channels, hidden, 3, padding=1))
        self.blocks = nn.ModuleList(_Block(hidden) for _ in range(blocks))
        self.last = Conv2dZeros(hidden, out_channels)
        self.context = nn.Linear(context_features, hidden, bias=False) if context_features else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = _first(self.first, x, self.hidden)
        if self.context is not None:
            h = h + self.context(context)[:, :, None, None]
        for block in self.blocks:
            h = block(h)
        return self.last(relu(h))


class MLP(nn.Module):
    """Linear layers with ReLU between them, the last one zero at the start.

    Args:
        in_features, out_features: of the result. hidden: units of each hidden layer. layers: hidden layers, at least 1.
        context_features: size of the context vector, added before the first ReLU; 0: none.

    Shapes: x ``[N, in_features]`` to ``[N, out_features]``.
    """

    def __init__(self, in_features: int, out_features: int, hidden: int, layers: int, context_features: int = 0):
        super().__init__()
        sizes = [in_features, *[hidden] * layers]
        self.hidden = nn.ModuleList(_relu_init(nn.Linear(a, b)) for a, b in zip(sizes, sizes[1:], strict=False))
        self.last = nn.Linear(hidden, out_features)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.context = nn.Linear(context_features, hidden, bias=False) if context_features else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        for i, layer in enumerate(self.hidden):
            x = layer(x)
            if i == 0 and self.context is not None:
                x = x + self.context(context)
            x = relu(x)
        return self.last(x)


class _Block(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.first = _relu_init(nn.Conv2d(hidden, hidden, 3, padding=1))
        self.second = nn.Conv2d(hidden, hidden, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(relu(self.first(relu(x))))


def _first(layer: nn.Module, x: Tensor, channels: int) -> Tensor:
    """A network's first layer, in the layout that suits the others: x of one channel has either, its result has not."""
    return convolution_layout(layer(convolution_layout(x, channels)), channels)


def _relu_init(layer):
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer


class Flatten(nn.Module):
    """``[N, *shape]`` to ``[N, D]`` and back."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.flatten(1), zero_log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z.reshape(len(z), *self.shape), zero_log_det(z)


class Shuffle(nn.Module):
    """A fixed random permutation of the D features of ``[N, D]``, drawn when it is made and kept with the state."""

    def __init__(self, features: int):
        super().__init__()
        self.register_buffer("order", torch.randperm(features))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x[:, self.order], zero_log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z[:, self.order.argsort()], zero_log_det(z)
