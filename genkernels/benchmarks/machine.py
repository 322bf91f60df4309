"""The machine a run took place on: what it is, and how fast it moved bytes and multiplied in that same run.

Two ceilings give every row its share of the peak: a copy of a buffer larger than the last-level cache (bytes read plus
bytes written) and a square matrix product, each the best of several tries, at the start of the run and again at its
end. A row's share is the larger of (bytes/s ÷ copy) and (flop/s ÷ product), for a half type the faster of its own
product and fp32's, into which it may be widened: processors without half arithmetic multiply it a hundred times slower.
A share can pass 100 % where a row's tensors stay in the cache or are written past it.
"""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from genkernels import backends
from genkernels._machine import device_name, versions
from genkernels._version import commit

_PACKAGES = ("triton", "nflows", "normflows", "FrEIA", "zuko")
_GUESSED_CACHE = 32 << 20
_HALVES = {torch.bfloat16, torch.float16}


def cache_bytes(device: torch.device) -> int:
    """The last cache before memory: a GPU's L2, a processor's largest."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [_GUESSED_CACHE]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text or 0))
    return max(sizes)


def spare_bytes(device: torch.device) -> int:
    """How much memory a row's rotating inputs may take: a sixteenth of what is free, 1 GiB (GPU: 4 GiB) at most."""
    if device.type == "cuda":
        return min(torch.cuda.mem_get_info(device)[0] // 16, 4 << 30)
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        free = 4 << 30
    return min(max(free, 1 << 30) // 16, 1 << 30)


@dataclass
class Ceilings:
    """Bytes and flops a second that this machine reached in this run; `measure` may be called again and keeps the
    best."""

    device: torch.device
    copy: float = 0.0
    product: dict[str, float] = field(default_factory=dict)

    def measure(self, dtypes: Iterable[torch.dtype], seconds: float = 0.4) -> None:
        self.copy = max(self.copy, self._copy(seconds))
        wanted = set(dtypes)
        if wanted & _HALVES:
            wanted.add(torch.float32)
        for dtype in wanted:
            name = str(dtype).removeprefix("torch.")
            self.product[name] = max(self.product.get(name, 0.0), self._product(dtype, seconds))

    def share(self, nbytes: int, flops: int, dtype: str, seconds: float) -> float | None:
        shares = [nbytes / seconds / self.copy] if self.copy else []
        takes = (dtype, "float32") if getattr(torch, dtype) in _HALVES else (dtype,)
        if product := max(self.product.get(name, 0.0) for name in takes):
            shares.append(flops / seconds / product)
        return max(shares, default=None)

    def _copy(self, seconds: float) -> float:
        each = max(64 << 20, min(cache_bytes(self.device), spare_bytes(self.device) // 2))
        if self.device.type == "cuda":
            each = max(each, min(1 << 30, spare_bytes(self.device) // 2))
        source = torch.ones(each // 4, device=self.device)
        target = torch.empty_like(source)
        return 2 * each / self._best(lambda: target.copy_(source), seconds)

    def _product(self, dtype: torch.dtype, seconds: float) -> float:
        # from small to large: some types have no fast product here, and one large try of those would take minutes
        best = 0.0
        for size in (512, 2048, 8192):
            a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
            took = self._best(lambda a=a, b=b: a @ b, seconds / 2)
            best = max(best, 2 * size**3 / took)
            if took * 64 > seconds:
                break
        return best

    def _best(self, run: Callable[[], object], seconds: float) -> float:
        # several at once on a GPU, so that waiting for it does not count as its work
        several = 10 if self.device.type == "cuda" else 1
        run()
        best, spent = float("inf"), 0.0
        while spent < seconds:
            self._settle()
            began = time.perf_counter()
            for _ in range(several):
                run()
            self._settle()
            took = time.perf_counter() - began
            best, spent = min(best, took / several), spent + took
        return best

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def describe(device: torch.device, ceilings: Ceilings, quick: bool) -> dict:
    """Everything about a run that is not a row, plain values for JSON."""
    return {
        "device": device_name(device),
        "device_type": device.type,
        "cpu_variant": backends.cpu_variant(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cache_bytes": cache_bytes(device),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(_PACKAGES),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "quick": quick,
        "copy_bytes_per_s": ceilings.copy,
        "product_flops_per_s": dict(ceilings.product),
    }
