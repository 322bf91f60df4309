"""Squeeze: space to channels, so that channel splits and 1×1 convolutions see neighbouring pixels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from genkernels.nn._log_det import zero_log_det


class Squeeze(nn.Module):
    """``[N, C, H, W]`` to ``[N, C*factor², H/factor, W/factor]``; the log-determinant is 0.

    Equivalent to::

        z = torch.nn.functional.pixel_unshuffle(x, factor)

    Args:
        factor: side of the square of pixels that becomes channels.

    Raises:
        ValueError: height or width is no multiple of `factor`.

    Source: Dinh et al., "Density estimation using Real NVP", 2017.
    """

    def __init__(self, factor: int = 2):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if x.dim() != 4 or x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(
                f"Squeeze: x must be [N, C, H, W] with H and W multiples of {self.factor}, got {list(x.shape)}"
            )
        n, c, h, w = x.shape
        f = self.factor
        # torch hands an empty batch back in its old shape
        z = F.pixel_unshuffle(x, f) if n else x.reshape(n, c * f * f, h // f, w // f)
        return z, zero_log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if z.dim() != 4 or z.shape[1] % self.factor**2:
            raise ValueError(
                f"Squeeze: z must be [N, C, H, W] with C a multiple of {self.factor**2}, got {list(z.shape)}"
            )
        n, c, h, w = z.shape
        f = self.factor
        x = F.pixel_shuffle(z, f) if n else z.reshape(n, c // f**2, h * f, w * f)
        return x, zero_log_det(z)

    def extra_repr(self) -> str:
        return f"factor={self.factor}"


class EvenOdd(nn.Module):
    """Reorders features so that those with even index come first; NICE's partition, as a layer. The log-determinant is
    0.

    Shapes: x, z ``[N, D]``, D even.
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._swap(x, inner=2), zero_log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._swap(z, inner=z.shape[-1] // 2), zero_log_det(z)

    def _swap(self, x: Tensor, inner: int) -> Tensor:
        if x.dim() != 2 or x.shape[1] % 2:
            raise ValueError(f"EvenOdd: x must be [N, D] with D even, got {list(x.shape)}")
        return x.view(len(x), x.shape[1] // inner, inner).transpose(1, 2).reshape(x.shape)
