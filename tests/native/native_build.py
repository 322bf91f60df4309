"""Compiles a pybind11 binding of ``csrc/common`` with the flags that setup.py gives the CPU library."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

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
def binding(source: str, variant: str):
    """The module made of ``tests/native/<source>.cpp`` for one CPU variant of setup.py, or without any (``plain``)."""
    import pybind11

    setup = build_flags()
    compiler = os.environ.get("CXX") or shutil.which("g++")
    flags = [*setup.COMMON_FLAGS, *setup.CPU_FLAGS, *setup.CPU_VARIANTS.get(variant, [])]
    stamp = hashlib.sha256(repr((flags, sysconfig.get_config_var("EXT_SUFFIX"))).encode())
    for path in (HERE / f"{source}.cpp", *sorted((ROOT / "csrc" / "common").iterdir())):
        stamp.update(path.read_bytes())
    name = f"{source}_{variant}_{stamp.hexdigest()[:12]}"
    folder = Path(tempfile.gettempdir()) / f"genkernels-tests-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    library = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        made = library.with_suffix(f".{os.getpid()}.tmp")
        command = [
            compiler,
            *flags,
            "-shared",
            f"-DMODULE_NAME={name}",
            "-I",
            str(ROOT / "csrc"),
            "-I",
            pybind11.get_include(),
            "-I",
            sysconfig.get_paths()["include"],
            str(HERE / f"{source}.cpp"),
            "-o",
            str(made),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source}.cpp does not compile:\n{done.stderr}")
        made.replace(library)
    return load_module(name, library)
