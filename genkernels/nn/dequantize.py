"""From integer pixels to densities and back: uniform dequantisation, and the logit that takes [0, 1] to the real
line."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkernels.nn._log_det import work_dtype, zero_log_det
from genkernels.nn._values import check_batched, level_indices
from genkernels.ops._stream import Stream

#: what is cut off an fp32 to round it towards 0 in a half type
_DROPPED_BITS = {torch.bfloat16: -(1 << 16), torch.float16: -(1 << 13)}
#: values that a half type must have within a grey level, or the noise is none
_STEPS = 8


class Dequantize(nn.Module):
    r"""Spreads each grey level evenly over its share of [0, 1): :math:`z = (i + u) / \text{levels},\ u \sim U[0, 1)`.

    The log-determinant is :math:`-D\log\text{levels}`, so that a density of z becomes one in units where a grey level
    has
    width 1: its mean over u is a lower bound of the log-probability of the integer image (Theis et al. 2016). The
    inverse rounds down and gives floats in [0, 1], exact levels i/(levels − 1).

    Args:
        levels: how many values a pixel takes, e.g. 256.

    Shapes:
        x: ``[N, D]`` or ``[N, C, H, W]`` (or more), uint8 indices 0..levels − 1, or floats in [0, 1], index/(levels −
            1), others being rounded with a warning. z: float. ldj: ``[N]``.

    Raises:
        TypeError: integers other than uint8. ValueError: values out of range; looked at on the CPU only, because a look
            at another device would stall it, and not inside ``torch.compile``. A shape; a module cast to a half type
            too coarse for the noise within a level (bf16 beyond 32 levels, fp16 beyond 256).
        RuntimeError: x asks for a gradient, which the rounding makes 0.

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
        check_batched("Dequantize", x)
        index = level_indices("Dequantize", x, self.levels, "the layers behind it take x as it is")
        work = work_dtype(self._like)
        z = (uniform(x.shape, work, x.device, generator) + index) * (1 / self.levels)
        # where the sum or the product rounds up, z would be of the next level
        z = torch.where(self._level(z) > index, z * (1 - 4 * torch.finfo(work).eps), z)
        return self._narrowed(z, index), self._log_det(x, work, 1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_batched("Dequantize", z)
        # no graph: its gradients would be 0
        index = self._level(z.detach()).clamp(0, self.levels - 1)
        return index / (self.levels - 1), self._log_det(z, work_dtype(z), -1)

    def extra_repr(self) -> str:
        return f"levels={self.levels}"

    def _log_det(self, x: Tensor, dtype: torch.dtype, sign: int) -> Tensor:
        value = -sign * x.shape[1:].numel() * math.log(self.levels)
        return torch.full((x.shape[0],), value, dtype=dtype, device=x.device)

    def _narrowed(self, z: Tensor, index: Tensor) -> Tensor:
        """z in the module's dtype, no value leaving its level."""
        dtype = self._like.dtype
        if dtype not in _DROPPED_BITS:
            return z.to(dtype)
        if self.levels > 1 / (_STEPS * torch.finfo(dtype).eps / 2):
            raise ValueError(
                f"Dequantize: {dtype} has less than {_STEPS} values within a level of {self.levels}, too few for "
                "uniform noise: keep the model in float32, under autocast if need be"
            )
        nearest = z.to(dtype)
        below = (z.view(torch.int32) & _DROPPED_BITS[dtype]).view(torch.float32).to(dtype)
        return torch.where(self._level(nearest) > index, below, nearest)

    def _level(self, z: Tensor) -> Tensor:
        return (z.to(work_dtype(z)) * self.levels).floor()


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


def normal(shape, dtype: torch.dtype, device, generator: torch.Generator | Stream | None) -> Tensor:
    """N(0, 1) noise on `device`, drawn where the generator lives."""
    if isinstance(generator, Stream):
        return generator.normal(shape, dtype).to(device)
    if generator is None:
        return torch.randn(shape, dtype=dtype, device=device)
    return torch.randn(shape, dtype=dtype, device=generator.device, generator=generator).to(device)
