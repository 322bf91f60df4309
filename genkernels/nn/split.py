"""Split: half of the channels leave the flow early, as Gaussian latents (multi-scale architecture)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genkernels import ops
from genkernels.nn._log_det import zero_log_det
from genkernels.nn.conv_zeros import Conv2dZeros


class Split(nn.Module):
    r"""Keeps the first half of the channels and turns the second into latents that are to be standard normal.

    With ``learned=True`` the prior of the second half depends on the first, :math:`x_2 \sim N(\mu(x_1),
    e^{2\ell(x_1)})`, by one zero-initialised convolution; the latent is :math:`(x_2 - \mu)\,e^{-\ell}` and the
    log-determinant accounts for it. So every latent of a model is N(0, I), and a temperature that multiplies latents
    multiplies the prior's standard deviation.

    Equivalent to::

        kept, rest = x.chunk(2, 1)
        log_scale, mean = net(kept).chunk(2, 1)
        latent, ldj = (rest - mean) * (-log_scale).exp(), -log_scale.flatten(1).sum(1)

    Args:
        channels: of x, even.
        learned: False: the second half is the latent.

    Shapes:
        ``kept, latent, ldj = split(x)`` with x ``[N, C, H, W]``, kept and latent ``[N, C/2, H, W]``, ldj ``[N]``.
        ``x, ldj = split.inverse(kept, latent)``.

    Raises:
        ValueError: `channels` is odd, or x has others.

    Source: Dinh et al., "Density estimation using Real NVP", 2017, §3.6; the learned prior: Kingma & Dhariwal, "Glow",
    2018.
    """

    def __init__(self, channels: int, learned: bool = True):
        super().__init__()
        if channels % 2:
            raise ValueError(f"Split: channels must be even, got {channels}")
        self.channels = channels
        self.net = Conv2dZeros(channels // 2, channels) if learned else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if x.dim() < 2 or x.shape[1] != self.channels:
            raise ValueError(f"Split: x must be [N, {self.channels}, ...], got {list(x.shape)}")
        if self.net is None:
            kept, latent = x.chunk(2, dim=1)
            return kept, latent, zero_log_det(x)
        # x₂ = latent·e^ℓ + μ is the affine coupling; going towards the noise is its inverse
        z, ldj = ops.affine_coupling_inverse(x, self.net(x.chunk(2, dim=1)[0]))
        return *z.chunk(2, dim=1), ldj

    def inverse(self, kept: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        if kept.dim() < 2 or kept.shape != latent.shape or 2 * kept.shape[1] != self.channels:
            raise ValueError(
                f"Split: kept and latent must both be [N, {self.channels // 2}, ...], got {list(kept.shape)} and "
                f"{list(latent.shape)}"
            )
        z = torch.cat([kept, latent], dim=1)
        if self.net is None:
            return z, zero_log_det(z)
        return ops.affine_coupling(z, self.net(kept))

    def extra_repr(self) -> str:
        return str(self.channels)
