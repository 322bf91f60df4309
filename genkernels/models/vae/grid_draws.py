r"""Draws from a `GridPrior` without its passes: of each cell one column of every layer, many cells at once.

Through 3×3 taps, of which those to the right or below are dead, cell (r, c) sees none beyond (r − 1, c + 1), in any
number of layers: each tap that is live leads to a smaller r·2 + c, but the centre's, which stays. So the cells of one
r·2 + c are drawn together, a *wave*, from the columns that the waves before have left: w + 2 (h − 1) waves in place of
h·w passes over the grid.

Shapes: everything is kept as ``[N, cells, channels]``, the cells in the order of their waves, so that a wave is a
slice.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkernels.backends import current_backend
from genkernels.networks._plain import plain
from genkernels.nn import MaskedConv2d

#: Live taps of a 3×3 kernel, by row and column: those of mask A, and the centre, which B has beside.
TAPS = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))


def in_waves(layers: Sequence[nn.Module]) -> bool:
    """Whether `draw` may go past the calls of these layers: masked convolutions on which nobody has hung anything, and
    the definition is not asked for."""
    return current_backend() != "reference" and all(plain(layer, MaskedConv2d) for layer in layers)


def draw(
    noise: Tensor, conditions: Sequence[Tensor], first: MaskedConv2d, layers: Sequence[MaskedConv2d], last, bounded
) -> Tensor:
    """z as `GridPrior.draw` defines it, up to rounding; halves are computed in fp32.

    Args:
        noise: ``[N, channels, h, w]``. conditions: ``[N, width, h, w]``, what each layer but the last is given beside.
        first, layers, last: of the prior. bounded: from the last layer's outputs to mean and log-scale.
    """
    count, channels, *grid = noise.shape
    order, waves = _waves(*grid)
    order, device = order.to(noise.device), noise.device
    work = torch.promote_types(first.weight.dtype, torch.float32)

    def by_cell(plane: Tensor) -> Tensor:
        return plane.flatten(2)[:, :, order].transpose(1, 2).to(work).contiguous()

    columns = [_columns(layer, work) for layer in (first, *layers)]
    added = [by_cell(c) + layer.bias.to(work) for c, layer in zip(conditions, (first, *layers), strict=True)]
    end = last.masked_weight().flatten(1).to(work), last.bias.to(work)
    drawn_from, cells = by_cell(noise), len(order)
    # a cell more, which stays 0: outside the grid
    planes = [noise.new_zeros(count, cells + 1, n, dtype=work) for n in (channels, *[a.shape[2] for a in added])]
    z, *hidden = planes
    for begin, stop, taps in waves:
        at_a, at_b = (each.to(device) for each in taps)
        h = None
        for plane, into, weight, beside in zip(planes, hidden, columns, added, strict=False):
            seen = plane.index_select(1, at_a if h is None else at_b).view(count, stop - begin, weight.shape[1])
            y = torch.relu(F.linear(seen, weight) + beside[:, begin:stop])
            h = y if h is None else y + h
            into[:, begin:stop] = h
        mean, log_scale = bounded(F.linear(h, *end).transpose(1, 2))
        drawn = mean.transpose(1, 2) + log_scale.transpose(1, 2).exp() * drawn_from[:, begin:stop]
        z[:, begin:stop] = drawn.to(noise.dtype)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(cells, device=device))
    return z[:, back].transpose(1, 2).reshape(noise.shape).to(noise.dtype)


def _columns(layer: MaskedConv2d, dtype: torch.dtype) -> Tensor:
    """The weight at its live taps, ``[outputs, taps * inputs]``."""
    weight = layer.masked_weight().to(dtype)
    taps = TAPS if layer.mask_type == "B" else TAPS[:-1]
    return torch.stack([weight[:, :, i, j] for i, j in taps], 1).flatten(1)


@functools.lru_cache(maxsize=16)
def _waves(height: int, width: int) -> tuple[Tensor, list[tuple[int, int, list[Tensor]]]]:
    """The cells of a grid (row · width + column) in the order of their waves, and of each wave its slice of them and
    where the taps of its cells lie in that order, those of mask A and of B; h·w: outside."""
    wave_of = {(r, c): 2 * r + c for r in range(height) for c in range(width)}
    cells = sorted(wave_of, key=lambda cell: (wave_of[cell], cell))
    place = {cell: i for i, cell in enumerate(cells)}
    waves, begin = [], 0
    for _, wave in itertools.groupby(cells, wave_of.get):
        wave = list(wave)
        taps = [
            torch.tensor([place.get((r + i - 1, c + j - 1), len(cells)) for r, c in wave for i, j in used])
            for used in (TAPS[:-1], TAPS)
        ]
        waves.append((begin, begin + len(wave), taps))
        begin += len(wave)
    return torch.tensor([r * width + c for r, c in cells]), waves
