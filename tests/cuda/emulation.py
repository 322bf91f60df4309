"""Compiles the CUDA sources for the CPU (emulation.h says how) and loads them as ``torch.ops.genkernels_emulated``."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
#: Undefined behaviour (misaligned access, index out of bounds, signed overflow) ends the process with a message.
FLAGS = [
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-shared",
    "-fno-strict-aliasing",
    "-fsanitize=undefined",
    "-fno-sanitize-recover=undefined",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
_LIBRARY = None  # keeps the schemas alive


@functools.cache
def build(operator: str) -> Path:
    """The library made of ``csrc/cuda/<operator>.cu``; rebuilt only when a source that it may include has changed."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if not compiler:
        raise FileNotFoundError("there is no C++ compiler (g++) on PATH")
    sources = [
        *sorted((ROOT / "csrc" / "cuda").iterdir()),
        *sorted((ROOT / "csrc" / "common").iterdir()),
        HERE / "emulation.h",
    ]
    stamp = hashlib.sha256(repr((FLAGS, torch.__version__, operator)).encode())
    for source in sources:
        stamp.update(source.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"genkernels-tests-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    library = folder / f"{operator}-{stamp.hexdigest()[:16]}.so"
    if not library.exists():
        torch_at = Path(torch.__file__).parent
        made = library.with_suffix(f".{os.getpid()}.tmp")
        command = [
            compiler,
            *FLAGS,
            "-I",
            str(torch_at / "include"),
            "-x",
            "c++",
            "-include",
            str(HERE / "emulation.h"),
            str(ROOT / "csrc" / "cuda" / f"{operator}.cu"),
            "-o",
            str(made),
            "-L",
            str(torch_at / "lib"),
            "-ltorch",
            "-ltorch_cpu",
            "-lc10",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{operator}.cu does not compile for the CPU:\n{done.stderr}")
        made.replace(library)
    return library


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


def beside_forbidden_memory(tensor: torch.Tensor, after: bool) -> torch.Tensor:
    """A copy of `tensor` that ends (or else begins) where a page begins (ends) that nobody may touch.

    A read or write outside it on that side ends the process. The memory is never given back.
    """
    page = mmap.PAGESIZE
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // page) * page
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    room = libc.mmap(None, pages + page, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if libc.mprotect(room + pages if after else room, page, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    begin = room + pages - size if after else room + page
    copy = torch.frombuffer((ctypes.c_char * size).from_address(begin), dtype=tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)
