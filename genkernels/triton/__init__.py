"""Triton kernels, one file a hot path; they know nothing above them. Importing this package does not import Triton.

Every ``<op>.py`` here offers its launchers, with the operator's positional arguments, and ``sample_calls()``: calls of
them whose kernels ``tools/compile_triton.py`` compiles ahead of time, in the configurations that the launchers choose.
"""

from __future__ import annotations

import pkgutil
from typing import Any, NamedTuple


class KernelSpec(NamedTuple):
    """One kernel in one configuration, as `triton.compile` wants it."""

    label: str  #: what the configuration is, for a table
    kernel: Any  #: the `triton.jit` function
    signature: dict[str, str]  #: type of every argument; ``constexpr`` for those in `constants`
    constants: dict[str, Any]
    options: dict[str, Any]  #: num_warps and the like


def kernel_modules() -> list[str]:
    """Full names of the modules of this package that hold kernels, sorted; helpers begin with an underscore."""
    return sorted(f"{__name__}.{m.name}" for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
