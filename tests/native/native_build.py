"""Compiles a pybind11 binding of ``csrc/common`` with the flags that setup.py gives the CPU library."""

from __future__ import annotations

import functools
import importlib.util
import os
import sysconfig
from pathlib import Path

from tests.compiled import compile_once

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


def load_module(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def build_flags():
    """setup.py, for its flags; importing it builds nothing."""
    return load_module("genkernels_setup", ROOT / "setup.py")


@functools.cache
def binding(variant: str):
    """The module made of ``bindings.cpp`` for one CPU variant of setup.py, or without any (``plain``)."""
    import pybind11

    setup = build_flags()
    flags = [*setup.COMMON_FLAGS, *setup.CPU_FLAGS, *setup.CPU_VARIANTS.get(variant, [])]
    include = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
    own, bound = sorted(HERE.glob("*.h")), sorted((ROOT / "csrc" / "common").rglob("*"))
    inputs = [HERE / "bindings.cpp", *own, *(path for path in bound if path.is_file())]

    def command(name: str, output: Path) -> list[str]:
        sources = [f"-DMODULE_NAME={name}", *(f"-I{folder}" for folder in include), str(HERE / "bindings.cpp")]
        return [os.environ.get("CXX", "g++"), *flags, "-shared", *sources, "-o", str(output)]

    library = compile_once(f"bindings_{variant}", sysconfig.get_config_var("EXT_SUFFIX"), inputs, command)
    return load_module(library.name.removesuffix(sysconfig.get_config_var("EXT_SUFFIX")), library)
