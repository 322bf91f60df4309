r"""Up-sampling by zeros, a separable filter and down-sampling in plain PyTorch: the definition, the oracle and the
fallback.

Along each axis, with u and d the factors, :math:`p_0` and :math:`p_1` the padding and k the filter's length,

.. math:: y_o = \sum_j h_j\, \tilde x_{o d + j - p_0},\qquad \tilde x_{i u} = x_i,\ 0 \text{ elsewhere},\qquad
    o < \lfloor (n u + p_0 + p_1 - k) / d\rfloor + 1

with h the filter reversed, so that it is a convolution, or as it is where it is *flipped* (Karras et al., "Alias-free
generative adversarial networks", 2021). A negative padding crops. The gain multiplies the result.

It is linear, and its transpose is one of its kind: the factors change places, the filter is reversed, and
:math:`p_0' = k - 1 - p_0`, :math:`p_1' = n u - n' d + p_0 - u + 1` for n' results (`transposed`).

Shapes: ``x [N, C, H, W]``; the filters ``[k]``, of fp32 (fp64 for fp64); the padding left, right, top, bottom, in
numbers after up-sampling. Half numbers are computed in fp32 and rounded once. Saved for backward: the filters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def length_of(length: int, taps: int, up: int, down: int, before: int, after: int) -> int:
    """How many results there are along an axis; 0 or less where there is no place for the filter."""
    return (length * up + before + after - taps) // down + 1


def transposed(length: int, taps: int, up: int, down: int, before: int, after: int) -> tuple[int, int]:
    """The padding of the transpose along an axis."""
    return taps - 1 - before, length * up - length_of(length, taps, up, down, before, after) * down + before - up + 1


def upfirdn2d(
    x: Tensor, filter_x: Tensor, filter_y: Tensor, up: int, down: int, padding: Sequence[int], gain: float, flip: bool
) -> Tensor:
    left, right, top, bottom = padding
    rows = _along(3, x.to(filter_x.dtype), gain * filter_x, up, down, left, right, flip)
    return _along(2, rows, filter_y, up, down, top, bottom, flip).to(x.dtype)


def _along(axis: int, x: Tensor, taps: Tensor, up: int, down: int, before: int, after: int, flip: bool) -> Tensor:
    """The sum of as many shifted copies of the spread axis as there are taps."""
    count = length_of(x.shape[axis], taps.shape[0], up, down, before, after)
    if up > 1:
        x = torch.stack([x, *[torch.zeros_like(x)] * (up - 1)], axis + 1).flatten(axis, axis + 1)
    x = F.pad(x, (*[0, 0] * (3 - axis), before, after))
    taps = taps if flip else taps.flip(0)
    return sum(taps[j] * _every(x, axis, j, count, down) for j in range(taps.shape[0]))


def _every(x: Tensor, axis: int, first: int, count: int, step: int) -> Tensor:
    """`count` numbers of an axis, `step` apart."""
    return x.narrow(axis, first, (count - 1) * step + 1)[(slice(None),) * axis + (slice(None, None, step),)]
