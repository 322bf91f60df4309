"""Affine coupling as a layer: a network reads one half of x and gives the scale and shift of the other."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor, nn

from genkernels import ops
from genkernels.backends import current_backend
from genkernels.nn._conditioned import Conditioned
from genkernels.ops.affine_coupling import LAYOUTS, SCALE_MAPS, scale_constant_of
from genkernels.reference import affine_coupling as reference
from genkernels.reference.affine_coupling import Layout, ScaleMap, Split, transformed_pixels

#: Up to so many values of x a call of the operator inside ``torch.compile`` costs more than it saves. Measured on one
#: core, forward and backward between two elementwise neighbours: 64×64 201 µs against 183 µs inlined, 64×12×16×16
#: 1.3 ms against 1.9 ms.
INLINED_VALUES = 4096


class AffineCoupling(Conditioned):
    r"""One half of x passes; the other is scaled and shifted by what `net` makes of the first.

    Equivalent to (channel split, ``scale_map="exp"``)::

        x1, x2 = x.chunk(2, 1)
        s, t = net(x1).chunk(2, 1)
        z, ldj = torch.cat([x1, x2 * s.exp() + t], 1), s.flatten(1).sum(1)

    Args:
        net: ``net(x_half)``, or ``net(x_half, context)`` where a context is given. Channel split: `x_half` is the half
            that passes, ``[N, C/2, *spatial]``, and the result ``[N, C, *spatial]``. Checkerboard: `x_half` is x ``[N,
            C, H, W]`` with 0 at the pixels that are transformed, and the result ``[N, 2*C, H, W]``. Additive: half as
            many channels.
        split: ``channel`` or ``checkerboard`` (pixels with even h + w pass).
        scale_map: ``exp``: σ = exp(s); ``sigmoid``: σ = sigmoid(s + 2); ``tanh``: σ = exp(c·tanh(s)); or another of
            `genkernels.ops.affine_coupling`.
        additive: shift only (NICE); the log-determinant is 0 and `scale_map` plays no part.
        flip: swaps the half that passes and the half that is transformed.
        layout: ``halves``: the result's first half is the log-scale, its second the shift; ``interleaved``: they
            alternate; ``shift_halves``, ``shift_interleaved``: the same, the shift first.
        scale_constant: c of the scale maps that have one, as for `genkernels.ops.affine_coupling`.

    A network that works in place on its input (``nn.ReLU(inplace=True)`` first) is given a copy.

    Raises:
        ValueError: an option is unknown, x does not suit the split, `net` gives another shape, or the context has not a
            row a sample.
        RuntimeError: `net` changed its input in place by an operation that no layer's ``inplace`` announces.

    Source: Dinh et al., "NICE", 2015, and "Density estimation using Real NVP", 2017.
    """

    def __init__(
        self,
        net: nn.Module,
        split: str = "channel",
        scale_map: str = "exp",
        additive: bool = False,
        flip: bool = False,
        layout: str = "halves",
        scale_constant: float | None = None,
    ):
        super().__init__(net)
        for name, value, options in (
            ("split", split, ("channel", "checkerboard")),
            ("scale_map", scale_map, SCALE_MAPS),
            ("layout", layout, LAYOUTS),
        ):
            if value not in options:
                raise ValueError(f"AffineCoupling: {name} must be one of {', '.join(options)}, got {value!r}")
        self.options = {
            "scale_map": "additive" if additive else scale_map,
            "split": split,
            "layout": layout,
            "flip": bool(flip),
        }
        code = ScaleMap[self.options["scale_map"].upper()]
        self._codes = code, scale_constant_of("AffineCoupling", code, scale_constant)
        if scale_constant is not None:
            self.options["scale_constant"] = scale_constant

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._couple(x, self.params(self.seen(x), context), inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._couple(z, self.params(self.seen(z), context), inverse=True)

    @torch.no_grad()
    def reverse_backward(
        self, z: Tensor, context: Tensor | None, grad_z: Tensor | None, grad_ldj: Tensor | None, wanted: list[Tensor]
    ):
        """Input and gradients from the output alone, with one pass through `net`: the half that it reads is part of z.

        Args:
            z, grad_z: ``[N, C, *spatial]``. grad_ldj: ``[N]``. A gradient is None where the loss does not depend on
                that output.
            context: as for forward.
            wanted: the parameters whose gradients are asked for.

        Returns:
            ``(x, grad_x, grad_context, grads)``, a gradient being None where nothing depends on it.
        """
        with torch.enable_grad():
            source = z if self.options["split"] == "checkerboard" else self.seen(z)
            leaf = source.detach().requires_grad_()
            seen = self.seen(leaf) if source is z else leaf
            leaves = [leaf]
            if context is not None:
                context = context.detach().requires_grad_(context.is_floating_point())
                leaves += [context] if context.requires_grad else []
            params = self.params(seen, context)
        x, grad_x, grad_params = ops.affine_coupling_reverse(grad_z, grad_ldj, z, params.detach(), **self.options)
        constant = self.options["scale_map"] == "additive"  # its log-determinant
        if not params.requires_grad or (grad_z is None and (constant or grad_ldj is None)):
            return x, None if grad_z is None else grad_x, None, [None] * len(wanted)
        grads = torch.autograd.grad(params, leaves + wanted, grad_params, allow_unused=True)
        if grads[0] is not None:
            self._passing(grad_x).add_(grads[0])
        elif grad_z is None:
            grad_x = None
        grad_context = grads[1] if len(leaves) == 2 else None
        return x, grad_x, grad_context, list(grads[len(leaves) :])

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self.options.items())

    @property
    def _seen_is_new(self) -> bool:
        return self.options["split"] == "checkerboard"

    def _couple(self, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        options = self.options
        if self._inlined(x, params):
            return reference.affine_coupling(
                x,
                params,
                *self._codes,
                Split[options["split"].upper()],
                Layout[options["layout"].upper()],
                options["flip"],
                inverse,
            )
        return (ops.affine_coupling_inverse if inverse else ops.affine_coupling)(x, params, **options)

    def _inlined(self, x: Tensor, params: Tensor) -> bool:
        """Whether ``torch.compile`` had better see plain PyTorch, to fuse it with what stands around it: small
        couplings on a CPU. What is wrong in shape or dtype is left to the operator, which says so."""
        if not torch.compiler.is_compiling() or x.device.type != "cpu" or current_backend() != "auto":
            return False
        count, channels, *sides = x.shape
        shifts = channels if self.options["split"] == "checkerboard" else channels // 2
        expected = [count, shifts if self.options["scale_map"] == "additive" else 2 * shifts, *sides]
        dtypes = x.dtype == params.dtype or (x.dtype == torch.float32 and params.dtype == torch.bfloat16)
        return x.numel() <= INLINED_VALUES and list(params.shape) == expected and dtypes

    def seen(self, x: Tensor) -> Tensor:
        """What the network may look at."""
        if self.options["split"] == "checkerboard":
            if x.dim() != 4:
                raise ValueError(
                    f"AffineCoupling: x must be [N, C, H, W] for the checkerboard split, got {list(x.shape)}"
                )
            # filled, not multiplied: a NaN in the transformed pixels stays out
            return x.masked_fill(_transformed(x, self.options["flip"]), 0)
        self.check(x)
        return self._passing(x)

    def check(self, x: Tensor) -> None:
        """That x can be split into halves of its channels."""
        if x.dim() < 2 or x.shape[1] % 2:
            raise ValueError(
                "AffineCoupling: x must be [N, C, ...] with an even number of channels for the channel split, "
                f"got {list(x.shape)}"
            )

    def _passing(self, x: Tensor) -> Tensor:
        """The half that passes, as a view (checkerboard: all of x)."""
        if self.options["split"] == "checkerboard":
            return x
        half = x.shape[1] // 2
        return x.narrow(1, half if self.options["flip"] else 0, half)


def _transformed(x: Tensor, flip: bool) -> Tensor:
    """`transformed_pixels` of x, on a CPU made once for each size: there the making costs more than the use."""
    height, width = x.shape[2:]
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return transformed_pixels(height, width, flip, x.device)
    return torch.from_numpy(_checkerboard(height, width, flip))


@functools.lru_cache(maxsize=64)
def _checkerboard(height: int, width: int, flip: bool) -> np.ndarray:
    """An array: a cached tensor might be a fake one."""
    return transformed_pixels(height, width, flip, torch.device("cpu")).numpy().copy()
