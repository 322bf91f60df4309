r"""ActNorm: a scale and a bias for each channel, set from the first batch (Kingma & Dhariwal, "Glow", 2018).

.. math:: z = (x + b)\,e^{a},\qquad \mathrm{ldj} = H W \sum_c a_c
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from genkernels.nn._log_det import per_sample, work_dtype


class ActNorm(nn.Module):
    r"""Per-channel affine map whose first training batch comes out with mean 0 and variance 1.

    Equivalent to::

        z = (x + bias.view(1, -1, 1, 1)) * log_scale.exp().view(1, -1, 1, 1)
        ldj = x[0, 0].numel() * log_scale.sum()

    The first forward in training mode sets ``bias`` and ``log_scale`` from its batch (from all ranks' batches where
    ``torch.distributed`` is initialised). Until then they are zero, so that a forward in evaluation mode, and the
    inverse, are the identity. A channel without variance keeps scale 1, and non-finite data leave a channel as it was.
    The flag ``initialized`` travels with the state dict; forward reads only its mirror in Python, never the device.

    Args:
        channels: size of dimension 1 of the input.

    Shapes:
        x, z: ``[N, channels]`` or ``[N, channels, *spatial]``. ldj: ``[N]``, nats, fp32 or wider.

    Source: Kingma & Dhariwal, "Glow: Generative flow with invertible 1x1 convolutions", 2018.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        self.bias = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        self._ready = False

    @property
    def ready(self) -> bool:
        """Whether the data-dependent start has happened; what ``initialized`` holds, without reading the device."""
        return self._ready

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check(x)
        if self.training and not self._ready:
            self.initialize(x)
        bias, log_scale = self._broadcast(x)
        return (x + bias) * log_scale.exp(), per_sample(self.log_scale.sum(), x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check(z)
        bias, log_scale = self._broadcast(z)
        return z * (-log_scale).exp() - bias, per_sample(-self.log_scale.sum(), z)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Sets bias and scale so that this batch comes out with mean 0 and variance 1. An empty batch changes
        nothing."""
        axes = [0, *range(2, x.dim())]
        work = x.detach().to(work_dtype(x))
        shared = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if x.numel() == 0 and not shared:
            return
        count = x.numel() // self.channels
        if shared:
            total = torch.cat([work.sum(axes), work.new_full((1,), count)])
            dist.all_reduce(total)
            mean, count = total[:-1] / total[-1], total[-1]
        else:
            mean = work.mean(axes)
        squares = (work - mean.view(-1, *[1] * (x.dim() - 2))).square().sum(axes)
        if shared:
            dist.all_reduce(squares)
        std = (squares / count).sqrt()
        # below this a channel's spread is rounding noise of its mean, and 1/std would blow the noise up
        spread = std > 1e-6 * (1 + mean.abs())
        finite = torch.isfinite(mean) & torch.isfinite(std)
        self.bias.copy_(torch.where(finite, -mean, self.bias))
        self.log_scale.copy_(torch.where(finite & spread, -std.log(), self.log_scale))
        self.initialized.fill_(True)
        self._ready = True

    def check(self, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[1] != self.channels:
            raise ValueError(f"ActNorm: x must be [N, {self.channels}, ...], got {list(x.shape)}")

    def extra_repr(self) -> str:
        return str(self.channels)

    def _broadcast(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (x.dim() - 2))
        return self.bias.view(shape).to(x.dtype), self.log_scale.view(shape).to(x.dtype)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        flag = state_dict.get(prefix + "initialized")
        if flag is not None and not flag.is_meta:
            self._ready = bool(flag)
