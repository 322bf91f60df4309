"""Buffers that follow from a layer's sizes and are in no state dict."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Derived:
    """Beside ``nn.Module``: such buffers are made again wherever the module's storage may be new, and what a new one
    holds anything: moved, ``to_empty`` (of "meta", by ``skip_init``), loaded."""

    def _derive(self) -> None:
        """Gives the buffers the values that they have."""
        raise NotImplementedError

    def _apply(self, *arguments, **options):
        super()._apply(*arguments, **options)
        self._derive()
        return self

    def _load_from_state_dict(self, *arguments):
        super()._load_from_state_dict(*arguments)
        self._derive()


def renew(module: nn.Module, name: str, value: Tensor, device: torch.device | None = None) -> None:
    """Gives a buffer its value again, on `device`, or where the module's parameters are.

    In place where it has storage there: what holds on to the buffer, a captured CUDA graph for one, sees the value too.
    """
    held = getattr(module, name)
    if device is None:
        device = next(module.parameters(), held).device
    if held.device == device and not held.is_inference():
        held.copy_(value)
    else:
        setattr(module, name, value.to(device))


def follow_assigned(module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Lets buffers ``_like``, which have the module's dtype and device and are in no state dict, follow what
    ``load_state_dict(assign=True)`` puts in the parameters' place."""
    assigned = next((t for t in state_dict.values() if t.is_floating_point()), None)
    for part in module.modules() if assigned is not None else ():
        if "_like" in part._buffers:
            part._like = torch.zeros((), dtype=assigned.dtype, device=assigned.device)
