"""Cases of affine_coupling and their inputs, for the tests of every implementation and for those that need a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from genkernels._options import SCALE_CONSTANTS, Layout, ScaleMap, Split
from genkernels.reference.affine_coupling import transformed_pixels
from tests.checks import assert_as_accurate, off_address
from tests.implementations import reference_of

reference = reference_of("affine_coupling")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F64, F64), (F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (F32, F16)]
#: What this library's own layers use, each with each; and those that are there for the layers of other libraries.
SCALE_MAPS, SPLITS, LAYOUTS = (
    ("exp", "sigmoid", "tanh", "additive"),
    ("channel", "checkerboard"),
    ("halves", "interleaved"),
)
OTHERS = [
    ("sigmoid_floor", "none", "shift_halves", False),
    ("softplus_floor", "none", "interleaved", False),
    ("sigmoid_inverse", "channel", "shift_interleaved", True),
    ("atan", "channel", "halves", True),
    ("soft_clip", "none", "shift_interleaved", False),
    ("softplus_floor", "checkerboard", "shift_halves", False),
    ("additive", "none", "shift_interleaved", False),
    ("exp", "none", "halves", True),
    ("sigmoid_floor", "alternate", "shift_halves", False),
    ("tanh", "alternate", "interleaved", True),
    ("additive", "alternate", "halves", False),
]
OPTIONS = list(itertools.product(SCALE_MAPS, SPLITS, LAYOUTS, (False, True)))


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    split: str = "channel"
    scale_map: str = "exp"
    layout: str = "halves"
    flip: bool = False
    dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32)
    spread: float = 1.0

    @property
    def codes(self) -> tuple[int, float, int, int, bool]:
        scale_map, split, layout = (
            ScaleMap[self.scale_map.upper()],
            Split[self.split.upper()],
            Layout[self.layout.upper()],
        )
        return int(scale_map), SCALE_CONSTANTS.get(scale_map, 1.0), int(split), int(layout), self.flip

    @property
    def options(self) -> dict:
        return {"scale_map": self.scale_map, "split": self.split, "layout": self.layout, "flip": self.flip}

    @property
    def params_shape(self) -> tuple[int, ...]:
        moved = self.shape[1] // 2 if self.split in ("channel", "alternate") else self.shape[1]
        return (self.shape[0], moved if self.scale_map == "additive" else 2 * moved, *self.shape[2:])

    def __str__(self) -> str:
        x, params = (str(d).removeprefix("torch.") for d in self.dtypes)
        flip = "-flip" if self.flip else ""
        shape = "x".join(map(str, self.shape))
        return f"{self.split}-{self.scale_map}-{self.layout}{flip}-{x}-{params}-{shape}"

    def moved(self) -> Tensor:
        """Bool of x's shape: True where the case transforms."""
        mask = torch.zeros(self.shape, dtype=torch.bool)
        if self.split == "checkerboard":
            return mask | transformed_pixels(*self.shape[-2:], self.flip, mask.device)
        if self.split == "none":
            return ~mask
        if self.split == "alternate":
            mask[:, 0 if self.flip else 1 :: 2] = True
            return mask
        half = self.shape[1] // 2
        mask[:, slice(0, half) if self.flip else slice(half, None)] = True
        return mask


@dataclass
class Inputs:
    x: Tensor  #: the input, or the output when inverting
    params: Tensor
    grad: Tensor
    grad_ldj: Tensor

    def __iter__(self):
        return iter((self.x, self.params, self.grad, self.grad_ldj))

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        return Inputs(*map(function, self))

    def wide(self) -> Inputs:
        return self.map(lambda t: t.detach().cpu().double())


def draw(case: Case, device: str = "cpu", seed: int = 0, offset: int = 0) -> Inputs:
    """Random inputs of a case, drawn on the CPU; `offset` elements away from an aligned address."""
    generator = torch.Generator().manual_seed(seed)
    dtype, params_dtype = case.dtypes

    def normal(shape, dtype, spread=1.0):
        values = (torch.randn(shape, generator=generator, dtype=F64) * spread).to(dtype).to(device)
        return off_address(values, offset) if offset else values

    return Inputs(
        normal(case.shape, dtype, case.spread),
        normal(case.params_shape, params_dtype, case.spread),
        normal(case.shape, dtype),
        normal(case.shape[:1], torch.promote_types(dtype, F32)),
    )


def run_all(functions, case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Every output of every operator; `functions` holds them by the torch operators' names."""
    x, params, grad, grad_ldj = inputs
    named = {}
    for inverse, way in ((False, "forward"), (True, "inverse")):
        named[f"{way} z"], named[f"{way} ldj"] = functions.affine_coupling(x, params, *case.codes, inverse)
        grads = functions.affine_coupling_backward(grad, grad_ldj, x, params, *case.codes, inverse)
        named[f"{way} grad_x"], named[f"{way} grad_params"] = grads
    rebuilt = functions.affine_coupling_reverse(grad, grad_ldj, x, params, *case.codes)
    return named | dict(zip(("reverse x", "reverse grad_x", "reverse grad_params"), rebuilt, strict=True))


def sum_of_magnitudes(case: Case, wide: Inputs) -> Tensor:
    """Largest Σ|log σ| of a sample: what the rounding of a sum is relative to. Here log σ is read off a gradient of
    ones."""
    ones = torch.ones_like(wide.x)
    scale, _ = reference.affine_coupling_backward(ones, None, wide.x, wide.params, *case.codes, False)
    return scale.log().abs().reshape(case.shape[0], -1).sum(1).max()


def check_values(
    implementation, case: Case, offset: int = 0, seed: int = 0, place: Callable[[int, Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Every output is dense, fresh, complete and as accurate as the reference in the same dtype; nothing is written
    into an input or around it.

    `place(i, tensor)` may move the i-th input somewhere else in memory.
    """
    inputs = draw(case, implementation.device, seed, offset)
    if place:
        inputs = Inputs(*(place(i, t) for i, t in enumerate(inputs)))
    rooms = [t.new_empty(0).set_(t.untyped_storage()) for t in inputs]
    before = [room.clone() for room in rooms]
    found = run_all(implementation.functions, case, inputs)
    for room, copy in zip(rooms, before, strict=True):
        assert torch.equal(room.nan_to_num(7.0), copy.nan_to_num(7.0)), f"{case}: an input was written, or beside it"
    addresses = {t.untyped_storage().data_ptr() for t in inputs}
    same, exact = run_all(reference, case, inputs.map(Tensor.cpu)), run_all(reference, case, inputs.wide())
    sums = sum_of_magnitudes(case, inputs.wide())
    for name, value in found.items():
        where = f"{case}: {name}"
        assert value.device == inputs.x.device, where
        assert value.untyped_storage().data_ptr() not in addresses, f"{where} shares memory with an input"
        if value.dtype == F64:  # the truth is a fp64 computation too, some units in the last place off itself
            luck = {"beside": 4 if implementation.name == "cpu" else 8}
        else:
            luck = {"cpu": {"beside": 2}, "cuda": {"beside": 1}, "triton": {"beside": 0, "floor": 2}}
            luck = luck[implementation.name.split()[0]]
        size = sums if name.endswith("ldj") else None
        assert_as_accurate(where, value.cpu(), same[name], exact[name], **luck, size=size)
    return found
