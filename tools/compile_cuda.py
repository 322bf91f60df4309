"""Compiles the CUDA library for every architecture it is meant for, no GPU needed, and judges what ptxas made of it.

    python tools/compile_cuda.py [--arch 9.0a …] [--all] [--output libgenkernels_cuda.so]

Same compiler and flags as setup.py, but that host code is optimised only where the library is kept: that changes no
kernel. Fails, with the kernels named, where ptxas reports a spill or a stack frame, where a kernel touches local
memory, or where a wide kernel (template argument ``kWide`` true) does not move its tensors in 16-byte accesses.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("8.0", "9.0a", "10.0")


@dataclass
class Kernel:
    """One kernel on one architecture: ptxas's figures, and its global and local memory instructions."""

    name: str
    arch: str
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    accesses: list[str] = field(default_factory=list)

    @property
    def family(self) -> str:
        return re.sub(r"<.*", "", self.name.split("(", 1)[0]).split("::")[-1].split()[-1]

    @property
    def wide(self) -> bool:
        """All tensors of one dtype, in 16-byte runs; half params beside fp32 rightly take 8 bytes."""
        types = re.search(r"<\(genkernels::Kernel\)\d+, ([\w:]+), ([\w:]+), true>", self.name)
        return bool(types) and types[1] == types[2]

    def faults(self) -> list[str]:
        found = []
        if self.spills or self.stack:
            found.append(f"{self.spills} bytes spilled, {self.stack} bytes of stack")
        if any(a.startswith(("LDL", "STL")) for a in self.accesses):
            found.append("uses local memory")
        if self.wide:
            # the one narrow load allowed is a sample's log-determinant gradient, the one narrow store its
            # log-determinant
            for kind, access in (("LDG", "loads"), ("STG", "stores")):
                mine = [a for a in self.accesses if a.startswith(kind)]
                wide = sum(a.endswith(".128") or ".128." in a for a in mine)
                if wide < 2 or len(mine) - wide > 1:
                    found.append(f"{wide} of {len(mine)} global {access} are 16 bytes wide")
        return found


def load_setup():
    spec = importlib.util.spec_from_file_location("genkernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(command: list[str], **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}".rstrip())
    return done.stdout + done.stderr


def demangle(names: list[str]) -> dict[str, str]:
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if not tool:
        raise SystemExit("compile_cuda: needs c++filt (binutils) to read the names of kernels")
    plain = run([tool], input="\n".join(names)).splitlines()
    return dict(zip(names, plain, strict=True))


def parse_ptxas(log: str) -> dict[tuple[str, str], Kernel]:
    """What ``-Xptxas -v`` printed, by mangled name and architecture."""
    kernels: dict[tuple[str, str], Kernel] = {}
    kernel = None
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)' for '(\w+)'", line):
            kernel = kernels[entry[1], entry[2]] = Kernel(entry[1], entry[2])
        elif kernel and (memory := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", line)):
            kernel.stack, kernel.spills = int(memory[1]), int(memory[2]) + int(memory[3])
        elif kernel and (used := re.search(r"Used (\d+) registers", line)):
            kernel.registers = int(used[1])
            kernel.shared = int(shared[1]) if (shared := re.search(r"(\d+) bytes smem", line)) else 0
            kernel = None
    return kernels


def cuobjdump() -> str | None:
    """The toolkit's, or the one inside Triton's package."""
    if tool := shutil.which("cuobjdump"):
        return tool
    found = importlib.util.find_spec("triton")
    folders = found.submodule_search_locations if found else []
    inside = [Path(f) / "backends" / "nvidia" / "bin" / "cuobjdump" for f in folders]
    return next((str(p) for p in inside if p.exists()), None)


def read_sass(tool: str, library: Path, kernels: dict[tuple[str, str], Kernel]) -> None:
    """Adds each kernel's memory instructions."""
    kernel, arch = None, ""
    for line in run([tool, "--dump-sass", str(library)]).splitlines():
        if code := re.match(r"\s*code for (\w+)", line):
            arch = code[1]
        elif function := re.match(r"\s*Function : (\S+)", line):
            kernel = kernels.get((function[1], arch))
        elif kernel and (access := re.search(r"\b((?:LDG|STG|LDL|STL)(?:\.\w+)*) ", line)):
            kernel.accesses.append(access[1])


def check_loads(library: Path) -> str:
    """Loads the library into a fresh torch and returns the operators that it registers; fails where it registers
    none."""
    script = (
        "import sys, torch, genkernels.ops\n"
        "from genkernels.ops import OPERATORS\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "names = [n for o in OPERATORS.values() for n, op in o.torch_ops.items() if op.has('cuda')]\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "print(*[n if has(f'genkernels_cuda::{n}', 'CUDA') else n + '!' for n in names])\n"
    )
    names = run([sys.executable, "-c", script, str(library)], cwd=ROOT).strip()
    missing = [name[:-1] for name in names.split() if name.endswith("!")]
    if missing or not names:
        raise SystemExit(
            f"compile_cuda: the library loads but does not register {', '.join(missing) or 'any operator'}"
        )
    return names


def show(kernels: list[Kernel], every: bool) -> None:
    groups = defaultdict(list)
    for k in kernels:
        groups[(k.name if every else k.family), k.arch].append(k)
    width = max(len(name) for name, _ in groups)
    print(f"{'kernels':{width}}  {'arch':8} {'count':>5} {'registers':>9} {'spills':>6} {'stack':>5} {'shared':>6}")
    for (name, arch), group in sorted(groups.items()):
        top = [max(getattr(k, what) for k in group) for what in ("registers", "spills", "stack", "shared")]
        print(f"{name:{width}}  {arch:8} {len(group):5} {top[0]:9} {top[1]:6} {top[2]:5} {top[3]:6}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, help="compute capabilities, e.g. 9.0a")
    parser.add_argument("--all", action="store_true", help="one row a kernel instead of one a family")
    parser.add_argument("--output", type=Path, help="keep the linked library here")
    options = parser.parse_args()

    setup = load_setup()
    compiler, torch_at = setup.nvcc(), setup.torch_folder()
    if not compiler or not torch_at:
        raise SystemExit("compile_cuda: needs nvcc (on PATH or in CUDA_HOME) and torch")
    include, link = setup.torch_flags(torch_at)
    architectures = setup.architecture_flags(";".join(options.arch))
    sources = setup.longest_first(list((ROOT / "csrc" / "cuda").glob("*.cu")))
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        library = options.output or Path(folder) / "libgenkernels_cuda.so"
        # nvcc's -O is for host code alone, which nothing runs here
        common = setup.COMMON_FLAGS if options.output else [f.replace("-O3", "-O0") for f in setup.COMMON_FLAGS]
        flags = [*common, *setup.CUDA_FLAGS, "-Xptxas", "-v", *architectures, *include]
        objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
        commands = [[compiler, *flags, "-c", str(s), "-o", o] for s, o in zip(sources, objects, strict=True)]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            log = "\n".join(pool.map(run, commands))
        run([compiler, "-shared", *objects, "-o", str(library), *link])
        seconds, size = time.perf_counter() - begin, library.stat().st_size
        by_mangled = parse_ptxas(log)
        registered = check_loads(library.resolve())
        if disassembler := cuobjdump():
            read_sass(disassembler, library, by_mangled)
    names = demangle(sorted({name for name, _ in by_mangled}))
    kernels = list(by_mangled.values())
    for kernel in kernels:
        kernel.name = names[kernel.name]

    show(kernels, options.all)
    warnings = sorted({line for line in log.splitlines() if "warning" in line})
    print(*warnings, sep="\n", end="\n" if warnings else "")
    print(
        f"{len(sources)} source(s), {len(kernels)} kernels, {size / 2**20:.1f} MiB, compiled and linked in "
        f"{seconds:.0f} s"
    )
    print(f"loads and registers {registered}")
    if disassembler:
        wide = [k for k in kernels if k.wide]
        if not wide or not all(k.accesses for k in wide):
            raise SystemExit("compile_cuda: the disassembly lacks the wide kernels; the check has lost its object")
        print(f"{len(wide)} wide kernels disassembled")
        faults = [(k, fault) for k in kernels for fault in k.faults()]
    else:
        print("no cuobjdump here (the CUDA toolkit and Triton's package have one): access widths were not checked")
        faults = [(k, f"{k.spills} bytes spilled") for k in kernels if k.spills]
    for kernel, fault in faults:
        print(f"FAULT {kernel.arch} {kernel.name.split('(genkernels::Coupling')[0]}: {fault}")
    return 1 if faults or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
