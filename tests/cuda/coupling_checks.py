"""Checks of affine-coupling kernels against the reference in fp64, for any device and any backend.

The GPU tests run them on Triton and on CUDA C++; the emulated tests run them on the CUDA source compiled for the CPU. A
check takes the three operator-level functions, so that it sees the kernels themselves and nothing above them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from genkernels.reference import affine_coupling as reference
from genkernels.reference.affine_coupling import transformed_pixels

MAPS = {"exp": 0, "sigmoid": 1, "tanh": 2, "additive": 3}
SPLITS = {"channel": 0, "checkerboard": 1}
LAYOUTS = {"halves": 0, "interleaved": 1}
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F64, F64), (F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (F32, F16)]
_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


@dataclass(frozen=True)
class Kernels:
    """The operators of one backend, with the positional arguments of the torch operators of that name."""

    name: str
    device: str
    forward: Callable
    backward: Callable
    reverse: Callable


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    split: str = "channel"
    scale_map: str = "exp"
    layout: str = "halves"
    flip: bool = False
    dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32)

    @property
    def codes(self) -> tuple[int, int, int, bool]:
        return MAPS[self.scale_map], SPLITS[self.split], LAYOUTS[self.layout], self.flip

    @property
    def params_shape(self) -> tuple[int, ...]:
        moved = self.shape[1] if self.split == "checkerboard" else self.shape[1] // 2
        return (self.shape[0], moved if self.scale_map == "additive" else 2 * moved, *self.shape[2:])

    def __str__(self) -> str:
        x, params = (str(d).removeprefix("torch.") for d in self.dtypes)
        flip = "-flip" if self.flip else ""
        shape = "x".join(map(str, self.shape))
        return f"{self.split}-{self.scale_map}-{self.layout}{flip}-{x}-{params}-{shape}"


#: Shapes that meet every path: one element a sample, wide and odd runs, rows that no run fits, several chunks a sample.
SHAPES = {
    "channel": [(5, 2), (3, 8), (2, 6, 5), (3, 4, 2, 2), (2, 6, 5, 7), (2, 10, 3, 4), (2, 12, 24, 16), (1, 2, 51, 61)],
    "checkerboard": [
        (1, 1, 1, 1),
        (2, 1, 4, 4),
        (3, 2, 6, 4),
        (2, 3, 5, 7),
        (2, 2, 1, 9),
        (2, 4, 9, 1),
        (2, 1, 28, 28),
        (2, 5, 20, 24),
    ],
}


def cases(scale_maps=tuple(MAPS), dtypes=tuple(DTYPES)) -> Iterator[Case]:
    """Every option with every dtype, on every shape of its split."""
    for split, scale_map, layout, flip, pair in itertools.product(SPLITS, scale_maps, LAYOUTS, (False, True), dtypes):
        if scale_map == "additive" and layout == "interleaved":
            continue  # one kind of parameter: nothing to interleave
        for shape in SHAPES[split]:
            yield Case(shape, split, scale_map, layout, flip, pair)


def contiguous_at(values: Tensor, offset: int) -> Tensor:
    """A contiguous copy of `values` that starts `offset` elements into its storage, NaN around it."""
    room = values.new_full((values.numel() + 2 * offset,), float("nan"))
    view = room[offset : offset + values.numel()].view(values.shape)
    view.copy_(values)
    return view


@dataclass
class Inputs:
    x: Tensor  #: the input, or the output when inverting
    params: Tensor
    grad: Tensor
    grad_ldj: Tensor

    def __iter__(self):
        return iter((self.x, self.params, self.grad, self.grad_ldj))

    def wide(self) -> Inputs:
        return Inputs(*(t.detach().cpu().double() for t in self))


def draw(case: Case, device: str, seed: int = 0, offset: int = 0) -> Inputs:
    """Random inputs of a case, drawn on the CPU; `offset` elements away from an aligned address."""
    generator = torch.Generator().manual_seed(seed)
    dtype, params_dtype = case.dtypes
    work = torch.promote_types(dtype, F32)

    def normal(shape, dtype):
        values = torch.randn(shape, generator=generator, dtype=F64).to(dtype).to(device)
        return contiguous_at(values, offset) if offset else values

    return Inputs(
        normal(case.shape, dtype),
        normal(case.params_shape, params_dtype),
        normal(case.shape, dtype),
        normal(case.shape[:1], work),
    )


def run_all(kernels: Kernels, case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Every output of every operator."""
    x, params, grad, grad_ldj = inputs
    named = {}
    for inverse, way in ((False, "forward"), (True, "inverse")):
        named[f"{way} output"], named[f"{way} ldj"] = kernels.forward(x, params, *case.codes, inverse)
        named[f"{way} grad_input"], named[f"{way} grad_params"] = kernels.backward(
            grad, grad_ldj, x, params, *case.codes, inverse
        )
    rebuilt = kernels.reverse(grad, grad_ldj, x, params, *case.codes)
    named["reverse input"], named["reverse grad_input"], named["reverse grad_params"] = rebuilt
    return named


REFERENCE = Kernels(
    "reference", "cpu", reference.affine_coupling, reference.affine_coupling_backward, reference.affine_coupling_reverse
)


def sum_of_magnitudes(case: Case, wide: Inputs) -> Tensor:
    """Largest Σ|log σ| of a sample: what the rounding of a sum is relative to. Here log σ is read off a gradient of
    ones."""
    scale, _ = reference.affine_coupling_backward(
        torch.ones_like(wide.x), None, wide.x, wide.params, *case.codes, False
    )
    return scale.log().abs().reshape(case.shape[0], -1).sum(1).max()


def check_values(
    kernels: Kernels, case: Case, offset: int = 0, seed: int = 0, place: Callable[[int, Tensor], Tensor] | None = None
) -> None:
    """Every output is dense, fresh, complete and at most twice as far from fp64 as the reference in the same dtype.

    `place(i, tensor)` may move the i-th input somewhere else in memory.
    """
    inputs = draw(case, kernels.device, seed, offset)
    if place:
        inputs = Inputs(*(place(i, t) for i, t in enumerate(inputs)))
    before = [t.clone() for t in inputs]
    found = run_all(kernels, case, inputs)
    for t, copy in zip(inputs, before, strict=True):
        assert torch.equal(t, copy), f"{case}: an input was written"
    addresses = {t.untyped_storage().data_ptr() for t in inputs}
    on_cpu = Inputs(*(t.cpu() for t in inputs))
    same, exact = run_all(REFERENCE, case, on_cpu), run_all(REFERENCE, case, inputs.wide())
    sums = sum_of_magnitudes(case, inputs.wide())
    for name, value in found.items():
        where = f"{case}: {name}"
        assert value.shape == same[name].shape and value.dtype == same[name].dtype, where
        assert value.is_contiguous() and value.device == inputs.x.device, where
        assert value.untyped_storage().data_ptr() not in addresses, f"{where} shares memory with an input"
        truth = exact[name]
        error = (value.cpu().double() - truth).abs()
        assert not error.isnan().any(), f"{where}: {int(error.isnan().sum())} elements are NaN"
        size = sums if name.endswith("ldj") else truth.abs().max()
        # in fp64 the truth is a fp64 computation too, some units in the last place off itself
        slack = (8 if value.dtype == F64 else 1) * torch.finfo(value.dtype).eps * size
        allowed = 2 * (same[name].double() - truth).abs().max() + slack
        assert error.max() <= allowed, f"{where}: off by {error.max():.3g}, {allowed:.3g} allowed"


def check_one_misaligned(kernels: Kernels, case: Case) -> None:
    """Each input in turn an element off, all others aligned."""
    for which in range(3):
        check_values(kernels, case, place=lambda i, t, which=which: contiguous_at(t, 1) if i == which else t)


def moved_mask(case: Case) -> Tensor:
    """Bool of x's shape: True where the case transforms."""
    mask = torch.zeros(case.shape, dtype=torch.bool)
    if case.split == "checkerboard":
        return mask | transformed_pixels(*case.shape[-2:], case.flip, mask.device)
    half = case.shape[1] // 2
    mask[:, slice(0, half) if case.flip else slice(half, None)] = True
    return mask


def bits(t: Tensor) -> Tensor:
    return t.cpu().contiguous().view(_BITS[t.element_size()])


def check_pass_through(kernels: Kernels, case: Case) -> None:
    """Non-finite values pass bit for bit, and neither the other half nor a sum ever sees them or their parameters."""
    clean = draw(case, kernels.device)
    moved = moved_mask(case)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0], dtype=F64)
    junk = odd.repeat(moved.numel() // 4 + 1)[: moved.numel()].view(case.shape)
    dirty = draw(case, kernels.device)
    for t in (dirty.x, dirty.grad):
        t.copy_(torch.where(moved, t.cpu().double(), junk).to(t.dtype))
    pixels = None
    if case.split == "checkerboard":
        pixels = moved[:1, :1].expand(case.params_shape)  # of params; the others are ignored
        dirty.params.copy_(torch.where(pixels, dirty.params.cpu().double(), float("nan")).to(dirty.params.dtype))
    expected, found = run_all(kernels, case, clean), run_all(kernels, case, dirty)
    for name, value in found.items():
        where = f"{case}: {name}"
        if name.endswith("ldj"):
            assert torch.equal(bits(value), bits(expected[name])), where
        elif name.endswith("grad_params"):
            assert torch.equal(bits(value), bits(expected[name])), where
            if pixels is not None:
                assert (bits(value)[~pixels] == 0).all(), f"{where} is not +0 at pass-through pixels"
        else:
            source = dirty.grad if "grad" in name else dirty.x
            assert torch.equal(bits(value)[moved], bits(expected[name])[moved]), where
            assert torch.equal(bits(value)[~moved], bits(source)[~moved]), f"{where} does not pass bit for bit"


def check_missing_gradients(kernels: Kernels, case: Case) -> None:
    """None among the gradients is a zero, not a read of anything."""
    x, params, grad, grad_ldj = draw(case, kernels.device)
    for g, g_ldj in ((None, grad_ldj), (grad, None), (None, None)):
        full = torch.zeros_like(grad) if g is None else g, torch.zeros_like(grad_ldj) if g_ldj is None else g_ldj
        for inverse in (False, True):
            found = kernels.backward(g, g_ldj, x, params, *case.codes, inverse)
            expected = kernels.backward(*full, x, params, *case.codes, inverse)
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a, b), f"{case}: {g is None=} {g_ldj is None=} {inverse=}"
        found = kernels.reverse(g, g_ldj, x, params, *case.codes)
        for a, b in zip(found, kernels.reverse(*full, x, params, *case.codes), strict=True):
            assert torch.equal(a, b), f"{case}: reverse, {g is None=} {g_ldj is None=}"


def check_repeat(kernels: Kernels, case: Case, times: int = 3) -> None:
    """The same bits on every run."""
    inputs = draw(case, kernels.device)
    first = run_all(kernels, case, inputs)
    for _ in range(times - 1):
        for name, value in run_all(kernels, case, inputs).items():
            assert torch.equal(bits(value), bits(first[name])), f"{case}: {name} differs between runs"


def check_batch(kernels: Kernels, case: Case) -> None:
    """A sample's log-determinant does not depend on the batch that it comes in."""
    inputs = draw(case, kernels.device)
    _, together = kernels.forward(inputs.x, inputs.params, *case.codes, False)
    for n in range(case.shape[0]):
        x, params = inputs.x[n : n + 1].clone(), inputs.params[n : n + 1].clone()
        _, alone = kernels.forward(x, params, *case.codes, False)
        assert torch.equal(bits(alone)[0], bits(together)[n]), f"{case}: sample {n}"


def check_extremes(kernels: Kernels, case: Case) -> None:
    """NaN and infinities appear where the reference has them and nowhere else.

    Where the reference in this dtype and the one in fp64 disagree (an intermediate value that underflows or overflows
    in the narrow one), either will do.
    """
    values = [
        float("nan"),
        float("inf"),
        -float("inf"),
        0.0,
        -0.0,
        1e-40,
        -1e-40,
        88.0,
        -88.0,
        104.0,
        -104.0,
        3e4,
        -3e4,
    ]
    if case.scale_map == "tanh" and case.dtypes[0] == F64:
        # the reference's slope 1 − tanh² is 0 there, where the true one is 4·e^−176 and the product with inf is inf
        values = [v for v in values if abs(v) not in (88.0, 104.0)]
    pairs = torch.tensor(list(itertools.product(values, repeat=2)), dtype=F64)
    count = len(pairs)
    shape = (1, 2, count) if case.split == "channel" else (1, 1, 1, 2 * count)
    case = Case(shape, case.split, case.scale_map, "halves", case.flip, case.dtypes)
    x = torch.ones(shape, dtype=F64)
    params = torch.zeros(case.params_shape, dtype=F64)
    if case.split == "channel":
        params[0, 0], x[0, 0 if case.flip else 1] = pairs.T
    else:
        first = 0 if case.flip else 1  # the transformed pixels of the only row
        params[0, 0, 0, first::2], x[0, 0, 0, first::2] = pairs.T
    dtype, params_dtype = case.dtypes
    ones = torch.ones(shape, dtype=dtype)
    ldj = torch.ones(1, dtype=torch.promote_types(dtype, F32))
    inputs = Inputs(x.to(dtype), params.to(params_dtype), ones, ldj)
    same, exact = run_all(REFERENCE, case, inputs), run_all(REFERENCE, case, inputs.wide())
    found = run_all(kernels, case, Inputs(*(t.to(kernels.device) for t in inputs)))
    for name, value in found.items():
        if "ldj" in name:
            continue  # one sum over all pairs: NaN
        value, narrow, wide = value.cpu(), same[name], exact[name].to(value.dtype)
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            wrong = (kind(value) != kind(narrow)) & (kind(value) != kind(wide))
            if wrong.any():
                at = wrong.nonzero()[0].tolist()
                got, a, b = (t[tuple(at)].item() for t in (value, narrow, wide))
                raise AssertionError(f"{case}: {name} at {at} is {got}, reference {a}, in fp64 {b}")


def check_empty(kernels: Kernels, case: Case) -> None:
    """No samples, or samples without elements: empty outputs, and a log-determinant of zero for each sample."""
    inputs = draw(case, kernels.device)
    for name, value in run_all(kernels, case, inputs).items():
        wanted = run_all(REFERENCE, case, Inputs(*(t.cpu() for t in inputs)))[name]
        assert value.shape == wanted.shape and value.dtype == wanted.dtype, f"{case}: {name}"
        assert torch.equal(value.cpu(), wanted), f"{case}: {name}"
