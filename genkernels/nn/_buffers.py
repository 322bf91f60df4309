"""Buffers that follow from a layer's sizes and are in no state dict."""

from __future__ import annotations

from torch import Tensor, nn


def renew(module: nn.Module, name: str, value: Tensor) -> None:
    """Gives a buffer its value again, for a module that was made without storage (on "meta", ``to_empty``) and is being
    loaded.

    In place where it has storage there: what holds on to the buffer, a captured CUDA graph for one, sees the value too.
    """
    held = getattr(module, name)
    if held.device == value.device:
        held.copy_(value)
    else:
        setattr(module, name, value)
