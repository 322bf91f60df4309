"""What tests of kernels share: one rule of accuracy, places in memory where a wrong access shows, and few combinations
of many options."""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def assert_as_accurate(
    name, ours: Tensor, same_dtype: Tensor, exact: Tensor, beside=1.0, floor=0.0, size: Tensor | float | None = None
) -> None:
    """Our largest error against fp64 is at most twice that of the reference in our dtype.

    On few numbers the reference is exact by luck, and in fp64 neither side is exact: units in the last place of the
    largest value, or of `size`, which for a sum is the magnitude of what is summed, are allowed `beside` that, or as a
    `floor` in its stead.
    """
    assert (ours.dtype, ours.shape, ours.device) == (same_dtype.dtype, same_dtype.shape, same_dtype.device), name
    assert ours.is_contiguous(), f"{name}: not contiguous"
    if not ours.numel():
        return
    exact = exact.to(ours.device)
    error, its = ((t.double() - exact).abs().max().item() for t in (ours, same_dtype))
    unit = torch.finfo(ours.dtype).eps * float(exact.abs().max() if size is None else size)
    allowed = max(2 * its + beside * unit, floor * unit)
    assert error <= allowed, f"{name}: error {error:.3e} beyond {allowed:.3e}"  # NaN is no error that is small enough


@functools.cache
def _pairwise(sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    def pairs(row):
        return set(itertools.combinations(enumerate(row), 2)) or {(value,) for value in enumerate(row)}

    every = {row: pairs(row) for row in itertools.product(*map(range, sizes))}
    left, rows = set().union(*every.values()), []  # what no row has met
    while left:
        rows.append(max(every, key=lambda row: len(every[row] & left)))
        left -= every[rows[-1]]
    return sorted(rows)


def pairwise(*axes: Sequence) -> list[tuple]:
    """Combinations of one value an axis in which each value meets each value of every other axis at least once.

    For where a case costs a second: some 25 of the 576 combinations of axes of 4, 2, 2, 2, 6 and 3 values.
    """
    return [tuple(axis[i] for axis, i in zip(axes, row, strict=True)) for row in _pairwise(tuple(map(len, axes)))]


def behind(rows: Sequence[tuple], *head) -> list:
    """The last values of those rows that begin with the others, `head`."""
    return [row[-1] for row in rows if row[:-1] == head]


def draw(*shapes: Sequence[int], dtype=torch.float64, device="cpu", seed=0) -> list[Tensor]:
    """Normal numbers, the same whatever the dtype that they are rounded to."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]


def bits(t: Tensor) -> Tensor:
    """The numbers' bit patterns, so that NaN equals NaN and -0 does not equal 0."""
    return t.cpu().contiguous().view(_BITS[t.element_size()]) if t.is_floating_point() else t.cpu()


def off_address(values: Tensor, offset: int) -> Tensor:
    """A contiguous copy that starts `offset` elements into its storage, NaN around it."""
    room = values.new_full((values.numel() + 2 * offset,), float("nan"))
    view = room[offset : offset + values.numel()].view(values.shape)
    return view.copy_(values)


def strided(values: Tensor, offset: int, step: int) -> Tensor:
    """The same values in a storage with gaps of NaN: a view with an offset and a step on the last dimension."""
    *lead, last = values.shape
    store = values.new_full((*lead, offset + last * step), float("nan"))
    view = store[..., offset::step][..., :last]
    return view.copy_(values)


def beside_forbidden_memory(tensor: Tensor, after: bool) -> Tensor:
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


def opcheck_backward(op, arguments: Sequence) -> None:
    """``torch.library.opcheck`` of an operator whose gradient is its reference's: traced at the sizes given.

    By symbolic sizes tracing a whole reference and its derivative takes torch up to half a minute; that the kit's way
    through a reference bears them is tested once, on a small operator (`tests/ops/test_operator_kit.py`).
    """
    kinds = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(op, tuple(arguments), test_utils=kinds)
