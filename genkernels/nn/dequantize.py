"""From integer pixels to densities and back: uniform dequantisation, and the logit that takes [0, 1] to the real
line."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkernels.nn._log_det import work_dtype, zero_log_det
from genkernels.nn._values import readable


class Dequantize(nn.Module):
    r"""Spreads each grey level evenly over its share of [0, 1): :math:`z = (i + u) / \text{levels},\ u \sim U[0, 1)`.

    The log-determinant is :math:`-D\log\text{levels}`, so that a density of z becomes one in units where a grey level
    has
    width 1: its mean over u is a lower bound of the log-probability of the integer image (Theis et al. 2016). The
    inverse rounds down and gives floats in [0, 1], exact levels i/(levels − 1).

    Args:
        levels: how many values a pixel takes, e.g. 256.

    Shapes:
        x: ``[N, ...]``, uint8 indices 0..levels − 1, or floats in [0, 1], index/(levels − 1). z: float. ldj: ``[N]``.

    Raises:
        TypeError: integers other than uint8. ValueError: values out of range; looked at on the CPU only, because a look
            at another device would stall it, and not inside ``torch.compile``.

    Source: Theis et al., "A note on the evaluation of generative models", 2016.
    """

    def __init__(self, levels: int = 256):
        super().__init__()
        if not isinstance(levels, int) or not 2 <= levels <= 65536:
            raise ValueError(f"Dequantize: levels must be an integer from 2 to 65536, got {levels!r}")
        self.levels = levels
        # follows the module's dtype and device, so that what comes out matches the layers beside it
        self.register_buffer("_like", torch.zeros(()), persistent=False)

    def forward(
        self, x: Tensor, context: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        self._check(x)
        work = work_dtype(self._like)
        index = (x * (self.levels - 1)).round_() if x.is_floating_point() else x
        u = uniform(x.shape, work, x.device, generator)
        return (u.add_(index).mul_(1 / self.levels)).to(self._like.dtype), self._log_det(x, work, 1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        index = (z.to(work_dtype(z)) * self.levels).floor().clamp(0, self.levels - 1)
        return index / (self.levels - 1), self._log_det(z, work_dtype(z), -1)

    def extra_repr(self) -> str:
        return f"levels={self.levels}"

    def _log_det(self, x: Tensor, dtype: torch.dtype, sign: int) -> Tensor:
        value = -sign * x.shape[1:].numel() * math.log(self.levels)
        return torch.full((x.shape[0],), value, dtype=dtype, device=x.device)

    def _check(self, x: Tensor) -> None:
        if not (x.is_floating_point() or x.dtype == torch.uint8):
            raise TypeError(f"Dequantize: x must be uint8 level indices or floats in [0, 1], got {x.dtype}")
        if not readable(x):
            return
        low, high = (bound.item() for bound in x.aminmax())
        top = self.levels - 1 if x.dtype == torch.uint8 else 1
        if low < 0 or high > top:  # false for NaN, which then shows in the result
            kind = f"level indices 0..{top}" if x.dtype == torch.uint8 else "floats in [0, 1]"
            raise ValueError(f"Dequantize: x must hold {kind}, got values from {low} to {high}")


class Logit(nn.Module):
    r"""Takes [0, 1] to the real line: :math:`z = \mathrm{logit}(\alpha + (1 - 2\alpha)x)`.

    Args:
        alpha: keeps the ends finite.

    Shapes: x, z ``[N, ...]``. ldj ``[N]``, nats.

    Source: Dinh et al., "Density estimation using Real NVP", 2017, §4.1 (α = 0.05).
    """

    def __init__(self, alpha: float = 0.05):
        super().__init__()
        if not 0 < alpha < 0.5:
            raise ValueError(f"Logit: alpha must lie between 0 and 0.5, got {alpha}")
        self.alpha = alpha

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        p = self.alpha + (1 - 2 * self.alpha) * x
        z = p.log() - torch.log1p(-p)
        return z, self._log_det(z)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (torch.sigmoid(z) - self.alpha) / (1 - 2 * self.alpha), -self._log_det(z)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"

    def _log_det(self, z: Tensor) -> Tensor:
        """dz/dx = (1 − 2α) / (p (1 − p)), and −log p(1 − p) = softplus(z) + softplus(−z)."""
        if z.numel() == 0:
            return zero_log_det(z)
        z = z.to(work_dtype(z))
        each = F.softplus(z) + F.softplus(-z) + math.log(1 - 2 * self.alpha)
        return each.flatten(1).sum(1)


def uniform(shape, dtype: torch.dtype, device, generator: torch.Generator | None) -> Tensor:
    """U[0, 1) noise on `device`, drawn where the generator lives."""
    if generator is None:
        return torch.rand(shape, dtype=dtype, device=device)
    return torch.rand(shape, dtype=dtype, device=generator.device, generator=generator).to(device)


def normal(shape, dtype: torch.dtype, device, generator: torch.Generator | None) -> Tensor:
    """N(0, 1) noise on `device`, drawn where the generator lives."""
    if generator is None:
        return torch.randn(shape, dtype=dtype, device=device)
    return torch.randn(shape, dtype=dtype, device=generator.device, generator=generator).to(device)
