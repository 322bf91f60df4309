"""What operators do with mixed dtypes under ``torch.autocast``: products take its lower dtype, sums the wider one."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def active(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device; asked of the meta device, which has none, torch raises."""
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def lowered(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast all in its dtype, as torch has it for convolutions and linear layers; nothing is changed where
    one is fp64."""
    first = tensors[0]
    if not active(first) or any(t is not None and t.dtype == torch.float64 for t in tensors):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(t if t is None else t.to(dtype) for t in tensors)


def widest(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that holds all of them."""
    dtypes = [t.dtype for t in tensors if t is not None]
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    return dtype


def work_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What log-determinants, norms and bounds are computed in: the widest of all, fp32 at least."""
    return torch.promote_types(widest(*tensors), torch.float32)


def kept_out(tensor: Tensor):
    """A context in which autocast does not reach the products: for what is computed in fp32 at least."""
    return torch.autocast(tensor.device.type, enabled=False) if active(tensor) else contextlib.nullcontext()
