"""When a layer may look at the values that it is handed."""

from __future__ import annotations

import torch
from torch import Tensor


def readable(x: Tensor) -> bool:
    """Whether values can be checked for free: on the CPU, and not while ``torch.compile`` traces, which would break the
    graph there. A look at another device would stall it."""
    return x.device.type == "cpu" and x.numel() > 0 and not torch.compiler.is_compiling()
