"""Log-determinants as layers give them: ``[N]``, nats, fp32 (fp64 for fp64)."""

from __future__ import annotations

import torch
from torch import Tensor


def work_dtype(x: Tensor) -> torch.dtype:
    """fp32, or wider where x is."""
    return torch.promote_types(x.dtype, torch.float32)


def zero_log_det(x: Tensor) -> Tensor:
    """The log-determinant of a map that keeps volumes."""
    return x.new_zeros(x.shape[0], dtype=work_dtype(x))


def per_sample(log_det_per_pixel: Tensor, x: Tensor) -> Tensor:
    """A log-determinant that each pixel adds alike, the same for every sample."""
    return (x.shape[2:].numel() * log_det_per_pixel.to(work_dtype(x))).expand(x.shape[0])
