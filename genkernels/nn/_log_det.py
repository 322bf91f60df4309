"""Log-determinants as layers give them: ``[N]``, nats, fp32 (fp64 for fp64)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

_WANTED = ContextVar("log-determinants are wanted", default=True)


@contextlib.contextmanager
def no_log_det() -> Iterator[None]:
    """Within, nobody looks at a log-determinant: a layer that must estimate it may give zeros."""
    token = _WANTED.set(False)
    try:
        yield
    finally:
        _WANTED.reset(token)


def wanted() -> bool:
    return torch.compiler.is_compiling() or _WANTED.get()


def work_dtype(x: Tensor) -> torch.dtype:
    """fp32, or wider where x is."""
    return torch.promote_types(x.dtype, torch.float32)


def zero_log_det(x: Tensor) -> Tensor:
    """The log-determinant of a map that keeps volumes."""
    return x.new_zeros(x.shape[0], dtype=work_dtype(x))


def per_sample(log_det_per_pixel: Tensor, x: Tensor) -> Tensor:
    """A log-determinant that each pixel adds alike, the same for every sample."""
    return (x.shape[2:].numel() * log_det_per_pixel.to(work_dtype(x))).expand(x.shape[0])


def check_log_det(layer, log_det: Tensor, z: Tensor) -> None:
    """A layer's log-determinant must be ``[N]``: ``[N, 1]`` or a scalar would broadcast into a plausible number."""
    if not isinstance(log_det, Tensor) or log_det.dim() != 1 or log_det.shape[0] != z.shape[0]:
        got = list(log_det.shape) if isinstance(log_det, Tensor) else type(log_det).__name__
        raise ValueError(
            f"FlowSequential: the log-determinant of {type(layer).__name__} must be [N] = [{z.shape[0]}], got {got}"
        )
