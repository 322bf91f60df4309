"""What a module's launchers launch, recorded while they run on tensors without storage: no GPU, no list kept by hand.

`sample_calls()` of a module gives labelled calls of its launchers with tensors on torch's meta device. Launchers choose
by shape, dtype and options alone, so what they pass to a kernel there is what they pass on a GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from genkernels.triton import KernelSpec

_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


def kernel_specs(module: str) -> list[KernelSpec]:
    """The configurations of every kernel that the module's sample calls launch, each once, under the first label."""
    specs: dict[str, KernelSpec] = {}
    for label, call in importlib.import_module(module).sample_calls():
        with _recorder() as launches:
            call()
        if not launches:
            raise RuntimeError(f"{module}: the sample call {label!r} launched no kernel")
        for kernel, arguments, options in launches:
            spec = _spec(label, kernel, arguments, options)
            specs.setdefault(repr((kernel.__name__, spec.signature, spec.constants, spec.options)), spec)
    return list(specs.values())


@contextmanager
def _recorder() -> Iterator[list[tuple]]:
    """Stands in for every launch: (kernel, its arguments by name, options)."""
    launches = []

    def record(self, *arguments, grid, warmup, **named):
        if not all(1 <= blocks < 2**31 for blocks in grid):
            raise ValueError(f"{self.__name__}: a grid must have 1 to 2^31 - 1 blocks, got {grid}")
        given = dict(zip(self.arg_names, arguments, strict=False))
        options = {name: value for name, value in named.items() if name not in self.arg_names}
        given |= {name: value for name, value in named.items() if name in self.arg_names}
        if missing := [name for name in self.arg_names if name not in given]:
            raise TypeError(f"{self.__name__}: {', '.join(missing)} must be given")
        launches.append((self, {name: given[name] for name in self.arg_names}, options))

    plain = JITFunction.run
    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = plain


def _spec(label: str, kernel: JITFunction, arguments: dict, options: dict) -> KernelSpec:
    signature, constants = {}, {}
    for parameter in kernel.params:
        value = arguments[parameter.name]
        signature[parameter.name] = kind = "constexpr" if parameter.is_constexpr else _type(value)
        if kind == "constexpr":
            constants[parameter.name] = value.value if isinstance(value, triton.language.constexpr) else value
        elif isinstance(value, int) and not parameter.do_not_specialize:
            raise TypeError(f"{kernel.__name__}: {parameter.name} must be in do_not_specialize or tl.constexpr")
    return KernelSpec(label, kernel, signature, constants, options)


def _type(value) -> str:
    if value is None:
        return "constexpr"
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor for a sample call."""
    return torch.empty(shape, dtype=dtype, device="meta")


SampleCalls = list[tuple[str, Callable[[], object]]]
