"""Compiles the CUDA sources for the CPU (emulation.h says how) and loads them as ``torch.ops.genkernels_emulated``."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

from tests.compiled import compile_once

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
#: Undefined behaviour (misaligned access, index out of bounds, signed overflow) ends the process with a message.
FLAGS = [
    *("-std=c++20", "-Og", "-fPIC", "-shared", "-fno-strict-aliasing"),
    # not all of `undefined`: the checks of every pointer for null take a third of the compiler's time
    *("-fsanitize=alignment,bounds,signed-integer-overflow,integer-divide-by-zero,shift", "-fno-sanitize-recover=all"),
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
_LIBRARY = None  # keeps the schemas alive


@functools.cache
def build(operator: str) -> Path:
    """The library made of ``csrc/cuda/<operator>.cu``."""
    source, torch_at = ROOT / "csrc" / "cuda" / f"{operator}.cu", Path(torch.__file__).parent
    included = [path for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()]

    def command(name: str, output: Path) -> list[str]:
        sources = ["-I", str(torch_at / "include"), "-x", "c++", "-include", str(HERE / "emulation.h"), str(source)]
        libraries = ["-L", str(torch_at / "lib"), "-ltorch", "-ltorch_cpu", "-lc10"]
        return [os.environ.get("CXX", "g++"), *FLAGS, *sources, "-o", str(output), *libraries]

    inputs = [*included, HERE / "emulation.h", torch_at / "version.py"]
    return compile_once(f"{operator}_emulated", ".so", inputs, command)


@functools.cache
def load(operator: str):
    """The operators of ``csrc/cuda/<operator>.cu``, with the schemas that the real ones have."""
    global _LIBRARY
    import genkernels.ops  # defines the schemas of torch.ops.genkernels

    _LIBRARY = _LIBRARY or torch.library.Library("genkernels_emulated", "DEF")
    for name in genkernels.ops.OPERATORS[operator].torch_ops:
        schema = str(getattr(torch.ops.genkernels, name).default._schema)
        _LIBRARY.define(schema.removeprefix("genkernels::"))
    torch.ops.load_library(str(build(operator)))
    return torch.ops.genkernels_emulated


def registers(operator: str, torch_op: str) -> bool:
    """Whether the source has a kernel of that name; read off the source, so that asking compiles nothing."""
    text = (ROOT / "csrc" / "cuda" / f"{operator}.cu").read_text()
    return f'm.impl("{torch_op}"' in text
