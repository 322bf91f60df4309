"""Builds the compiled kernels beside the Python package.

``GENKERNELS_BUILD`` says what: ``auto`` (default: whatever can be built, and why the rest cannot), ``none`` (pure
Python), ``cpu``, ``cuda`` (the CPU library as well). An explicit wish that cannot be met fails and names the missing
thing.

The libraries are not Python extensions: they register operators through torch's stable ABI when torch loads them, so
one build serves every Python and every torch from 2.10 on. They land in ``genkernels/_lib``:

    libgenkernels_cpu_avx512.so, libgenkernels_cpu_avx2.so   x86-64, chosen at load by the processor
    libgenkernels_cpu_generic.so                             any other processor
    libgenkernels_cuda.so                                    TORCH_CUDA_ARCH_LIST, default 8.0;9.0a;10.0+PTX
    built.json                                               what was built, by which compilers, from which commit

A wheel is tagged ``manylinux_2_28`` where its libraries ask for no symbol that came later (csrc/common/portable.h sees
to it), and for the machine that it was built on where they do.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
WISHES = ("auto", "none", "cpu", "cuda")
COMMON_FLAGS = ["-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
# Vectorised selects need no-trapping-math; NaN and infinity keep their meaning: -ffast-math is out of the question.
CPU_FLAGS = ["-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wall"]
CPU_VARIANTS = {"avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"], "avx2": ["-march=x86-64-v3"]}
PORTABLE_SOURCES = [CSRC / "common" / "portable.cpp"]
PORTABLE = "-include", str(CSRC / "common" / "portable.h")
#: What the libraries may ask of the system: glibc 2.28 is that of Debian 10, RHEL 8 and Ubuntu 20.04 or later, with the
#: C++ library of GCC 8.
OLDEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (8, 0)}
CUDA_FLAGS = ["--expt-relaxed-constexpr", "--extended-lambda", "-DUSE_CUDA", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
DEFAULT_ARCHITECTURES = "8.0;9.0a;10.0+PTX"


def torch_folder() -> Path | None:
    """Where torch's headers and libraries lie, without importing it (importing takes a second and a half)."""
    found = importlib.util.find_spec("torch")
    return Path(found.origin).parent if found and found.origin else None


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return str(Path(home) / "bin" / "nvcc")
    default = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(default) if default.exists() else None)


def cuda_home(compiler: str) -> Path:
    """The toolkit's root, asked of nvcc itself: what is on PATH may be a wrapper script elsewhere."""
    shown = subprocess.run(
        [compiler, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull], capture_output=True, text=True
    )
    for line in shown.stderr.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.split("=", 1)[1].strip()).resolve()
    return Path(compiler).resolve().parent.parent


def architecture_flags(wanted: str | None = None) -> list[str]:
    """``8.0;9.0a;10.0+PTX`` as nvcc's ``-gencode`` flags."""
    wanted = wanted or os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES
    flags = []
    for entry in wanted.replace(",", ";").replace(" ", ";").split(";"):
        if not entry:
            continue
        number = entry.removesuffix("+PTX").replace(".", "")
        if not number.rstrip("af").isdigit():
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST must list numbers such as 9.0a, got {entry!r}")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def cpu_variants() -> dict[str, list[str]]:
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return CPU_VARIANTS if on_x86 else {"generic": []}


def symbols(library: Path) -> dict[str, tuple[int, ...]]:
    """The newest version of each system library's symbols that a library asks for: ``{"GLIBC": (2, 28), …}``."""
    shown = subprocess.run(["objdump", "-T", str(library)], capture_output=True, text=True, check=True).stdout
    newest: dict[str, tuple[int, ...]] = {}
    for line in shown.splitlines():
        if found := re.search(r"\*UND\*.*\(?\b([A-Z]+)_(\d[\d.]*)\)?", line):
            version = tuple(map(int, found[2].strip(".").split(".")))
            newest[found[1]] = max(newest.get(found[1], ()), version)
    return newest


def too_new(library: Path) -> list[str]:
    """Symbol versions that a library asks for and `OLDEST` does not have; empty where it runs on every such system."""
    return [
        f"{name}_{'.'.join(map(str, version))}"
        for name, version in symbols(library).items()
        if version > OLDEST.get(name, ())
    ]


def said(command: list[str]) -> str | None:
    """The first line that a command prints, the last of nvcc's; None where it cannot be run."""
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip().splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (lines[-1] if "nvcc" in command[0] else lines[0]) if lines else None


def commit() -> str | None:
    spec = importlib.util.spec_from_file_location("genkernels_version", ROOT / "genkernels" / "_version.py")
    version = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(version)
    return version.commit()


def torch_flags(torch_at: Path) -> tuple[list[str], list[str]]:
    """Flags to compile against and to link with torch's stable ABI."""
    include = ["-I", str(torch_at / "include"), "-I", str(CSRC)]
    return include, ["-L", str(torch_at / "lib"), "-ltorch", "-ltorch_cpu", "-lc10"]


def included(*sources: Path) -> list[Path]:
    """These files and all of csrc that they include, themselves or through another."""
    seen: set[Path] = set()
    left = [*sources]
    while left:
        path = left.pop().resolve()
        if path not in seen and path.exists():
            seen.add(path)
            left += [path.parent / name for name in re.findall(r'^#include "(.+)"', path.read_text(), re.M)]
    return sorted(seen)


def longest_first(sources: list[Path]) -> list[Path]:
    """By the bytes of all that is compiled of csrc: compiled last, a long one would leave the other cores idle."""
    return sorted(sources, key=lambda source: sum(path.stat().st_size for path in included(source)), reverse=True)


def compile_once(job: tuple[str, list[str]]) -> None:
    """`run`, unless the object lies there already, made by the same command from the same sources and headers."""
    _, command = job
    made = Path(command[command.index("-o") + 1])
    digest = hashlib.sha256(repr(command).encode())
    given = [Path(file) for flag, file in zip(command, command[1:], strict=False) if flag in ("-c", "-include")]
    for path in included(*given):
        digest.update(path.read_bytes())
    stamp = made.with_suffix(".stamp")
    if made.exists() and stamp.exists() and stamp.read_text() == digest.hexdigest():
        return
    stamp.unlink(missing_ok=True)
    run(job)
    stamp.write_text(digest.hexdigest())


def run(job: tuple[str, list[str]]) -> None:
    """Runs one compiler call; `job` names what it makes."""
    made, command = job
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildFailed(f"{command[0]} could not be started: {error.strerror}") from None
    if done.stdout or done.stderr:
        print((done.stdout + done.stderr).rstrip(), flush=True)
    if done.returncode:
        raise BuildFailed(f"{Path(command[0]).name} failed on {made} (its messages stand above)")


class BuildFailed(Exception):
    pass


class Missing(Exception):
    """A library cannot be built here; the message names what is missing."""


class BuildLibraries(build_ext):
    """Compiles ``csrc`` by calling g++ and nvcc directly: a handful of files, one process a core."""

    def run(self) -> None:
        wish = os.environ.get("GENKERNELS_BUILD", "auto") or "auto"
        if wish not in WISHES:
            raise SystemExit(f"GENKERNELS_BUILD must be one of {', '.join(WISHES)}, got {wish!r}")
        target = (ROOT if self.inplace or self.editable_mode else Path(self.build_lib)) / "genkernels" / "_lib"
        work = Path(self.build_temp)
        work.mkdir(parents=True, exist_ok=True)
        target.mkdir(parents=True, exist_ok=True)
        for stale in (*target.glob("libgenkernels_*.so"), target / "built.json"):
            stale.unlink(missing_ok=True)
        built: dict = {}
        for kind, build in (("cpu", self.build_cpu), ("cuda", self.build_cuda)):
            if wish == "none" or (wish == "cpu" and kind == "cuda"):
                continue
            try:
                built[kind] = build(target, work)
            except (Missing, BuildFailed) as problem:
                sentence = f"genkernels: the {kind.upper()} library was not built: {problem}"
                if wish == kind or (wish == "cuda" and kind == "cpu"):
                    raise SystemExit(sentence) from None
                print(sentence, file=sys.stderr, flush=True)
        if built:
            facts = {"commit": commit(), "torch": importlib.metadata.version("torch"), **built}
            (target / "built.json").write_text(json.dumps(facts, indent=2) + "\n")

    def _torch(self) -> Path:
        folder = torch_folder()
        if folder is None:
            raise Missing(
                "torch is not importable while building; install torch first, then pip install --no-build-isolation"
            )
        return folder

    def _sources(self, folder: str, suffix: str) -> list[Path]:
        sources = sorted((CSRC / folder).glob(f"*{suffix}"))
        if not sources:
            raise Missing(f"there are no sources in csrc/{folder}")
        return sources

    def _make(self, jobs: list[tuple[str, list[str]]], links: dict[Path, list[str]]) -> None:
        """Compiles, then links each library under another name and renames it: a process that has the old one loaded
        keeps it."""
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(compile_once, jobs))
            list(pool.map(run, [(to.name, [*command, "-o", f"{to}.new"]) for to, command in links.items()]))
        for to in links:
            os.replace(f"{to}.new", to)

    def build_cpu(self, target: Path, work: Path) -> dict:
        """What was built, for built.json."""
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
        if not compiler:
            raise Missing("there is no C++ compiler (g++) on PATH")
        include, link = torch_flags(self._torch())
        jobs, objects = [], {variant: [] for variant in cpu_variants()}
        for source in longest_first([*self._sources("cpu", ".cpp"), *PORTABLE_SOURCES]):
            for variant, flags in cpu_variants().items():
                objects[variant].append(str(work / f"{source.stem}.{variant}.o"))
                options = [*COMMON_FLAGS, *CPU_FLAGS, *flags, *PORTABLE, *include]
                command = [compiler, *options, "-c", str(source), "-o", objects[variant][-1]]
                jobs.append((source.name, command))
        links = {
            target / f"libgenkernels_cpu_{variant}.so": [compiler, "-shared", *sorted(made), *link]
            for variant, made in objects.items()
        }
        self._make(jobs, links)
        print(f"genkernels: built the CPU library ({', '.join(cpu_variants())})", flush=True)
        return {"variants": list(cpu_variants()), "compiler": said([compiler, "--version"])}

    def build_cuda(self, target: Path, work: Path) -> dict:
        compiler = nvcc()
        if not compiler:
            raise Missing("there is no CUDA compiler (nvcc) on PATH or in CUDA_HOME")
        include, link = torch_flags(self._torch())
        include += ["-I", str(cuda_home(compiler) / "include")]
        objects, jobs, flags = [], [], architecture_flags()
        for source in longest_first([*self._sources("cuda", ".cu"), *PORTABLE_SOURCES]):
            objects.append(str(work / f"{source.stem}.cuda.o"))
            options = [*COMMON_FLAGS, *CUDA_FLAGS, *flags, *PORTABLE, *include]
            command = [compiler, *options, "-c", str(source), "-o", objects[-1]]
            jobs.append((source.name, command))
        library = target / "libgenkernels_cuda.so"
        self._make(jobs, {library: [compiler, "-shared", *objects, *link]})
        print(f"genkernels: built the CUDA library ({' '.join(flags)})", flush=True)
        return {"architectures": flags, "compiler": said([compiler, "--version"])}


class BinaryDistribution(Distribution):
    """Makes setuptools run build_ext and tag the wheel for this platform, though no Extension is declared."""

    def has_ext_modules(self) -> bool:
        return True


class PlatformWheel(bdist_wheel):
    """Tags the wheel for any Python 3, of which the libraries know nothing, and for every Linux that has what they ask
    for, else for this platform. What was built stands in its metadata too, as ``built.json``."""

    ran = False  # an editable install asks for the metadata alone, before anything is built

    def run(self) -> None:
        self.ran = True
        super().run()

    def write_wheelfile(self, wheelfile_base: str, *rest: str) -> None:
        super().write_wheelfile(wheelfile_base, *rest)
        built = Path(self.get_finalized_command("build").build_lib) / "genkernels" / "_lib" / "built.json"
        if self.ran and built.exists():
            shutil.copy(built, wheelfile_base)

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()[2]
        libraries = [*Path(self.get_finalized_command("build").build_lib).glob("genkernels/_lib/*.so")]
        if tag == "linux_x86_64" and libraries and shutil.which("objdump") and not any(map(too_new, libraries)):
            tag = f"manylinux_{'_'.join(map(str, OLDEST['GLIBC']))}_x86_64"
        return "py3", "none", tag


if __name__ == "__main__":
    setup(cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel}, distclass=BinaryDistribution)
