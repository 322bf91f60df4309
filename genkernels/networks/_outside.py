"""What a compiled pass cannot hold is run outside of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def outside(run: Callable, *arguments) -> Any:
    """Calls what looks at modules or reads a buffer from within a compiled pass, whose graph breaks there."""
    return torch.compiler.disable(run)(*arguments)


outside._torchdynamo_disable = True  # what torch.compiler.disable sets, without importing Dynamo from the start
