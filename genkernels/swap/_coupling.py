"""`genkernels.ops.affine_coupling` for layers that know their options: these are read once, not in each call."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from genkernels import ops
from genkernels._options import SCALE_CONSTANTS, Layout, ScaleMap, Split
from genkernels.ops.affine_coupling import COUPLING


class Coupling(NamedTuple):
    """A scale map with its constant, and how log-scales and shifts lie in params."""

    scale_map: ScaleMap
    constant: float
    layout: Layout

    def __call__(
        self, x: Tensor, params: Tensor, split: Split, flip: bool = False, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        fits = x.dtype == params.dtype and params.dim() == x.dim() and x.shape[0] == params.shape[0]
        if (
            fits
            and params.shape[1] == x.shape[1] * (2 if split == Split.NONE else 1)
            and params.shape[2:] == x.shape[2:]
        ):
            return COUPLING(x, params, self.scale_map, self.constant, split, self.layout, flip, inverse)
        function = ops.affine_coupling_inverse if inverse else ops.affine_coupling  # says what is wrong
        words = {"scale_map": self.scale_map, "split": split, "layout": self.layout}
        words = {name: value.name.lower() for name, value in words.items()}
        return function(x, params, **words, **self.options, flip=flip)

    @property
    def options(self) -> dict[str, float]:
        """The constant, where the scale map has one."""
        return {"scale_constant": self.constant} if self.scale_map in SCALE_CONSTANTS else {}
