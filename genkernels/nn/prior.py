"""What a flow's latents follow: a normal or a logistic distribution, with a learned mean and scale for each class if
asked."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkernels.networks._plain import renew_weights
from genkernels.nn._log_det import work_dtype
from genkernels.nn.dequantize import normal, uniform

KINDS = ("normal", "logistic")


class Prior(nn.Module):
    r"""An independent location-scale distribution, :math:`z = \mu_y + e^{\ell_y}\,\varepsilon`, ε standard normal or
    logistic.

    Args:
        channels: size of dimension 1 of the latents; μ and ℓ are shared by all pixels of a channel.
        kind: ``normal`` or ``logistic`` (density :math:`e^{-z}/(1 + e^{-z})^2`, as in NICE).
        learned: learn μ and ℓ, zero at the start. Without it, and without classes, they are 0.
        num_classes: learn a μ and an ℓ for each class; `log_prob` and `sample` then need `y`.

    Source: Kingma & Dhariwal, "Glow", 2018 (the top prior); Dinh et al., "NICE", 2015 (the logistic one).
    """

    def __init__(self, channels: int, kind: str = "normal", learned: bool = False, num_classes: int | None = None):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"Prior: kind must be one of {', '.join(KINDS)}, got {kind!r}")
        self.channels, self.kind, self.num_classes = channels, kind, num_classes
        rows = num_classes or 1
        self.table = nn.Parameter(torch.zeros(rows, 2 * channels)) if learned or num_classes else None

    def log_prob(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """``[N]``, nats, of ``z [N, channels, *spatial]``; y ``[N]``, class indices, where there are classes.

        Raises:
            ValueError: z has other channels or no batch, y is missing or has not N entries.
        """
        self._check("z", z.shape)
        z = z.to(work_dtype(z))
        extra = 0.0
        if self.table is not None:
            mean, log_scale = self._location_scale(z, y)
            z = (z - mean) * (-log_scale).exp()
            extra = z.shape[2:].numel() * log_scale.sum(dim=list(range(1, log_scale.dim())))
        axes = list(range(1, z.dim()))
        if self.kind == "normal":
            each = -0.5 * z.square().sum(axes) - 0.5 * math.log(2 * math.pi) * z.shape[1:].numel()
        else:
            each = -(F.softplus(z) + F.softplus(-z)).sum(axes)
        return each - extra

    def sample(
        self,
        shape: tuple[int, ...],
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        y: Tensor | None = None,
        like: Tensor | None = None,
    ) -> Tensor:
        """Latents of `shape` ``[N, channels, *spatial]``; `temperature` multiplies the standard deviation.

        Raises:
            ValueError: `shape` has other channels or no batch, y is missing or has not N entries.
        """
        self._check("shape", shape)
        like = self.table if like is None else like
        dtype = torch.get_default_dtype() if like is None else work_dtype(like)
        device = torch.device("cpu") if like is None else like.device
        if self.kind == "normal":
            noise = normal(shape, dtype, device, generator)
        else:
            noise = torch.logit(uniform(shape, dtype, device, generator), eps=torch.finfo(dtype).eps / 2)
        z = noise * temperature
        if self.table is not None:
            mean, log_scale = self._location_scale(z, y)
            z = z * log_scale.exp() + mean
        return z if like is None else z.to(like.dtype)

    def extra_repr(self) -> str:
        return f"{self.channels}, kind={self.kind!r}, learned={self.table is not None}, num_classes={self.num_classes}"

    def _check(self, name: str, shape) -> None:
        if len(shape) < 2 or shape[1] != self.channels:
            raise ValueError(f"Prior: {name} must be [N, {self.channels}, ...], got {list(shape)}")

    def _location_scale(self, z: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        renew_weights(self)
        if self.num_classes:
            if not isinstance(y, Tensor) or list(y.shape) != [z.shape[0]] or y.is_floating_point():
                got = f"{list(y.shape)} {y.dtype}" if isinstance(y, Tensor) else repr(y)
                raise ValueError(f"Prior: y must be integers [N] = [{z.shape[0]}], one class each, got {got}")
            rows = F.embedding(y, self.table)
        else:
            rows = self.table
        shape = (rows.shape[0], self.channels, *[1] * (z.dim() - 2))
        mean, log_scale = rows.to(z.dtype).chunk(2, dim=1)
        return mean.reshape(shape), log_scale.reshape(shape)
