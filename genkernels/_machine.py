"""What a run takes place on: device, process, commit, versions."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from genkernels._version import __version__


def device_name(device: torch.device | str) -> str:
    """A GPU's or a processor's own name."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cpu_text() -> str:
    """How torch uses the processor: ``CPU, 2 threads, AVX512``."""
    return f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Runs a block on so many CPU threads; None leaves torch's choice."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def free_memory() -> int | None:
    """Bytes that a process can still take, by the system and by the control group it is in; None where neither says."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))))
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):
            most, now = (int(Path("/sys/fs/cgroup", name).read_text()) for name in (limit, used))
            found.append(most - now)
    with contextlib.suppress(ImportError, OSError):
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        found += [] if soft == resource.RLIM_INFINITY else [soft]
    return min(found, default=None)


def keep_freed_memory() -> bool:
    """Has glibc keep what tensors free for those that come next, in this process from now on.

    By itself it gives the end of the heap back to the system as soon as it is free, and the next call takes it anew,
    page by page: a third of some training steps, none of others in the same process. Blocks above 32 MiB come and go
    as before. Does nothing, and says False, where the environment says what glibc is to do, or where there is no glibc.
    """
    told = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
    if sys.platform != "linux" or any(name in os.environ for name in told):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    trim, mmap = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h, and the most that either takes
    return mallopt is not None and bool(mallopt(trim, 2**31 - 1)) and bool(mallopt(mmap, 32 << 20))


def is_main_process() -> bool:
    """Whether this is process 0: under DDP Fabric starts the others by running the same command again."""
    ranks = ("LOCAL_RANK", "NODE_RANK", "RANK", "SLURM_PROCID")
    return all(int(os.environ.get(name, "0") or 0) == 0 for name in ranks)


def versions(packages: Iterable[str] = ("triton", "lightning", "numpy")) -> dict[str, str]:
    """Of what a run's numbers depend on, and of `packages` where they are installed."""
    found = {"genkernels": __version__, "python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
