#!/usr/bin/env python3
"""Compiles every Triton kernel ahead of time, for several GPUs, on a machine that needs none.

    python tools/compile_triton.py [--targets 80 90 100] [--fp64-targets 90] [--pairs] [--only TEXT] [--jobs N]

Records what the sample calls of each module of `genkernels.triton` launch, compiles each configuration for each compute
capability and reads registers, spilled bytes and shared memory off the machine code. Exits with 1 if anything fails to
compile, spills a register, or forms an address by 32-bit arithmetic, unless it is one of the kernels in `NARROW`, which
count that way what stays small. Compiled kernels land in Triton's cache, so a second run is quick.

With ``--pairs`` it takes a part of the configurations, for a check of each commit: every kernel, and of each kernel
every type and constant of an argument, every option, and any two of them that come together at all. A release is
checked without.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a fresh clone, nothing installed

WARP_SIZE = 32
#: What may be counted in 32 bits, and the kernels that do: samples, and whatever is counted through them, never.
COUNTS = {
    "steps, layers and units of a network": "_extend_kernel _transposed_kernel",
    "rows and columns of weights": "_term_kernel forward_kernel push_kernel pull_kernel delta_kernel plain_kernel "
    "outer_kernel",
    "weights, and fields of a table of them": "left_kernel right_kernel finish_kernel inner_kernel gradient_kernel",
    "fields of a table of pointers": "_solve_kernel gradient_chain_kernel _write_kernel",
    "terms, and fields of a table of pointers": "_series_kernel _finish_kernel",
    "layers and features": "_planar_backward_kernel _planar_finish_kernel _radial_backward_kernel "
    "_radial_finish_kernel",
    "bins": "_spline_kernel _spline_backward_kernel",
    "places along one axis": "_filter_kernel",
}
NARROW = {kernel: count for count, kernels in COUNTS.items() for kernel in kernels.split()}


class Result(NamedTuple):
    kernel: str
    label: str
    target: int
    registers: int = 0
    spilled: int = 0  #: bytes of stack and local memory a thread
    shared: int = 0
    narrow: int = 0  #: addresses and offsets that would wrap beyond 2^31 elements
    error: str = ""


def load_specs(only: str) -> list:
    from genkernels.triton import kernel_modules
    from genkernels.triton._recording import kernel_specs

    specs = [spec for module in kernel_modules() for spec in kernel_specs(module)]
    return [spec for spec in specs if only in f"{spec.kernel.__name__} {spec.label}"]


def is_fp64(spec) -> bool:
    """Whether a configuration's tensors are in fp64, which takes longest to compile and is there for the tests; not
    where sums alone are kept so."""
    kinds = {kind for kind in spec.signature.values() if kind.startswith("*")}
    return "*fp64" in kinds and not kinds & {"*fp32", "*bf16", "*fp16"}


def compile_spec(spec, target: int):
    """The compiled kernel of one `KernelSpec`, with pointers known to be 16-byte aligned, as torch allocates them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = [i for i, kind in enumerate(spec.signature.values()) if kind.startswith("*")]
    source = ASTSource(
        fn=spec.kernel,
        signature=spec.signature,
        constexprs=spec.constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    return triton.compile(source, target=GPUTarget("cuda", target, WARP_SIZE), options=spec.options)


def resource_usage(cubin: bytes) -> dict[str, int]:
    """What `cuobjdump --dump-resource-usage` says of a cubin: REG, STACK, LOCAL, SHARED, …"""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    usage = {name: int(count) for name, count in re.findall(r"\b([A-Z]+):(\d+)", text)}
    if "REG" not in usage or "STACK" not in usage:
        raise RuntimeError(f"cuobjdump reported no registers: {text.strip()!r}")
    return usage


DEFINITION = re.compile(r"^\s*(%[\w#-]+)(?::\d+)? = (\S+) (.*?)(?: loc\(.*)?$", re.M)
SHAPE_OPS = {"tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "ttg.convert_layout"}


def _counts_blocks(name: str, definitions: dict) -> bool:
    """Whether a value is a block's own number, counted from either end: there are fewer than 2^31 of them."""
    op, rest = definitions.get(name, ("argument", ""))
    if op == "arith.subi":
        return all(_counts_blocks(operand, definitions) for operand in re.findall(r"%[\w#-]+", rest))
    return op in ("tt.get_program_id", "tt.get_num_programs", "arith.constant")


def narrow_products(ttir: str) -> tuple[list, list]:
    """(addresses formed from 32-bit offsets, 32-bit sums and products that are widened to 64 bits), both of which would
    wrap beyond 2^31 elements."""
    definitions = {name: (op, rest) for name, op, rest in DEFINITION.findall(ttir)}
    addresses = [rest for op, rest in definitions.values() if op == "tt.addptr"]
    # a constant, the place of a field in a record, is as wide as it is large
    narrow = [rest for rest in addresses if not re.search(r"(xi64>|, i64)\s*$|%c\d+_i32 :", rest)]
    widened = []
    for op, rest in definitions.values():
        if op not in ("arith.extsi", "arith.extui") or "i64" not in rest.split(" to ")[-1]:
            continue
        source = re.match(r"(%[\w#]+)", rest).group(1)
        while definitions.get(source, ("", ""))[0] in SHAPE_OPS:
            source = re.match(r"(%[\w#]+)", definitions[source][1]).group(1)
        made = definitions.get(source, ("argument", ""))[0]
        if made in ("arith.addi", "arith.muli", "arith.shli", "arith.subi") and not _counts_blocks(source, definitions):
            widened.append((source, *definitions[source]))
    return narrow, widened


def pairs(specs: list) -> list:
    """Of each kernel a part of its configurations in which any two settings are together that are so in one of all."""
    chosen = []
    for alike in _by_kernel(specs).values():
        found = {index: set(itertools.combinations(_settings(specs[index]), 2)) for index in alike}
        left = set().union(*found.values())
        taken = [alike[0]]  # a kernel without arguments has no pairs
        left -= found[alike[0]]
        while left:
            taken.append(max(alike, key=lambda index: len(found[index] & left)))
            left -= found[taken[-1]]
        chosen += taken
    return [specs[index] for index in sorted(chosen)]


def _by_kernel(specs: list) -> dict[object, list[int]]:
    kernels: dict[object, list[int]] = {}
    for index, spec in enumerate(specs):
        kernels.setdefault(spec.kernel, []).append(index)
    return kernels


def _settings(spec) -> list[tuple[str, str]]:
    """What a configuration is made of: each argument's type, or its value where that is compiled in, and each
    option."""
    arguments = spec.signature | {name: repr(value) for name, value in spec.constants.items()}
    return [*arguments.items(), *((f"option {name}", repr(value)) for name, value in spec.options.items())]


_specs: list = []  # worker processes are forked with it: to record them takes as long as to compile twenty


def _work(job: tuple[int, int]) -> Result:
    index, target = job
    spec = _specs[index]
    name = spec.kernel.__name__
    try:
        compiled = compile_spec(spec, target)
        usage = resource_usage(compiled.asm["cubin"])
    except Exception as error:  # whatever stops one kernel, the others are still to be seen
        return Result(name, spec.label, target, error=f"{type(error).__name__}: {error}")
    spilled = usage["STACK"] + usage.get("LOCAL", 0)
    narrow = sum(map(len, narrow_products(compiled.asm["ttir"])))
    return Result(name, spec.label, target, usage["REG"], spilled, compiled.metadata.shared, narrow)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 90, 100], help="compute capabilities, times ten")
    parser.add_argument("--fp64-targets", type=int, nargs="*", default=[90], help="those of configurations in fp64")
    parser.add_argument("--pairs", action="store_true", help="only a part in which any two settings still meet")
    parser.add_argument("--only", default="", help="only configurations whose name holds this text")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if os.environ.pop("TRITON_INTERPRET", "0") not in ("", "0"):
        print("TRITON_INTERPRET is ignored: compiling needs it off", file=sys.stderr)

    started = time.time()
    specs = load_specs(arguments.only)
    _specs[:] = pairs(specs) if arguments.pairs else specs
    jobs = [
        (index, target)
        for index, spec in enumerate(_specs)
        for target in (arguments.fp64_targets if is_fp64(spec) else arguments.targets)
    ]
    # whatever takes longest to compile comes first: at the end it would keep one process busy alone
    jobs.sort(key=lambda job: not is_fp64(_specs[job[0]]))
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("fork")) as pool:
        results = list(pool.map(_work, jobs))

    print(f"{'kernel':18} {'sm':>4} {'regs':>5} {'spill':>6} {'shared':>7}  configuration")
    for r in sorted(results):
        row = f"{r.kernel:18} {r.target:4} {r.registers:5} {r.spilled:6} {r.shared:7}  {r.label}"
        width = f"  32 bits: {NARROW.get(r.kernel, 'NOT LOOKED AT')}" if r.narrow else ""
        print(row + (f"  FAILED {r.error}" if r.error else "  SPILLS" * bool(r.spilled) + width))
    failed = sum(bool(r.error) for r in results)
    spilling = sum(bool(r.spilled) for r in results)
    narrow = [r.kernel for r in results if r.narrow]
    most = max((r.registers for r in results), default=0)
    print(
        f"{len(results)} kernels in {time.time() - started:.0f} s ({len(_specs)} of {len(specs)} configurations): "
        f"{failed} failed, {spilling} spill, "
        f"{len(narrow)} count something in 32 bits, {sum(k not in NARROW for k in narrow)} that must not, "
        f"at most {most} registers"
    )
    return 1 if failed or spilling or not NARROW.keys() >= set(narrow) or not results else 0


if __name__ == "__main__":
    sys.exit(main())
