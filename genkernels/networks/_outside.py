"""What a compiled pass cannot hold is run outside of it, or while it is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Whether a compiled pass may ask a function of modules for a constant (`while_compiling`): older compilers stop there.
ASKS_OF_MODULES = torch.torch_version.TorchVersion(torch.__version__) >= "2.13"


def outside(run: Callable, *arguments) -> Any:
    """Calls what looks at modules or reads a buffer from within a compiled pass, whose graph breaks there."""
    return torch.compiler.disable(run)(*arguments)


outside._torchdynamo_disable = True  # what torch.compiler.disable sets, without importing Dynamo from the start


def while_compiling(run: Callable) -> Callable:
    """Marks a function of modules and constants, to constants, which a compiled pass holds the result of. What it read
    of the modules the pass is not bound to: whoever asks binds it, by a call of the module whose result is left."""
    run._dynamo_marked_constant = True  # what torch.compiler.assume_constant_result sets, likewise
    return run


def sample_of(x: Tensor) -> tuple[int, ...]:
    """The shape of a sample of x ``[N, ...]``, which a compiled pass of any shape is bound to by the lists."""
    return tuple(len(list(range(n))) for n in x.shape[1:])
