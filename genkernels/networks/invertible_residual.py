"""The inverse of y = x + g(x) for any g that contracts, and its gradient by the implicit function theorem: the equation
that the gradient solves is of the same form, with the transposed Jacobian in g's place.

`solve` is the accelerated fixed-point iteration of `genkernels.reference._fixed_point`.

Source: Behrmann et al., "Invertible residual networks", 2019; Bai et al., "Deep equilibrium models", 2019 (implicit
gradient).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from genkernels.reference._fixed_point import INTERVAL, Solution, solve

__all__ = ["INTERVAL", "Solution", "attach", "solve"]


class _ThroughInverse(torch.autograd.Function):
    """x where z = y − g(x) equals x: the gradient by z is w = (I + Jᵀ)⁻¹ times that by x."""

    @staticmethod
    def forward(ctx, z, x, value, options):
        ctx.x, ctx.value, ctx.options = x, value, options
        return x.detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows_of = ctx.value.shape[0]

        def pulled(w: Tensor, rows: Tensor | None) -> Tensor:
            full = w if rows is None else w.new_zeros(rows_of, *w.shape[1:]).index_copy_(0, rows, w)
            (back,) = torch.autograd.grad(ctx.value, ctx.x, full, retain_graph=True)
            return back if rows is None else back[rows]

        # a loss may be of any scale: what was asked of x, relative to the gradient
        options = ctx.options | {"rtol": ctx.options.get("rtol", 1e-6) + ctx.options.get("atol", 1e-6), "atol": 0.0}
        return solve(pulled, grad, **options).x, None, None, None


def attach(g: Callable[[Tensor], Tensor], y: Tensor, x: Tensor, **options) -> Tensor:
    """x of `solve` as a function of y and of what g holds: its gradient solves the transposed equation."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        value = g(leaf)
        z = y - value  # by which the gradient reaches what g holds; what reaches `leaf` is of no use
    return _ThroughInverse.apply(z, leaf, value, options) if y.requires_grad or _has_parameters(value, leaf) else x


def _has_parameters(value: Tensor, leaf: Tensor) -> bool:
    """Whether the graph of `value` ends anywhere but at `leaf`."""
    seen, left = set(), [value.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and variable is not leaf:
            return True
        left += [parent for parent, _ in node.next_functions]
    return False
