"""The trace of a block: the exact first term of the series, and its gradients."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from genkernels.triton._block.gradients import added, outer_tiles, splits
from genkernels.triton._block.network import Network, map_tiles
from genkernels.triton._block.sums import outer_kernel, trace_kernel


def class_tile_count(net: Network, classes: int, tile: int) -> list[int]:
    """Tiles of each class of pixels."""
    if classes == 1:
        return [triton.cdiv(net.rows, tile)]
    lines, columns = (1, net.height - 2, 1), (1, net.width - 2, 1)
    return [triton.cdiv(net.samples * a * b, tile) for a in lines for b in columns]


def trace_sums(net: Network, d: list[Tensor], trace_map: Tensor, coefficient: Tensor) -> Tensor:
    """``[column tiles, rows]``: of each pixel d₂ᵀ M d₁ times a coefficient."""
    outputs, inputs = trace_map.shape[1:]
    tiles = map_tiles(net.parameters.element_size(), outputs)
    sums = d[0].new_empty((triton.cdiv(outputs, tiles.BC), net.rows))
    _trace(net, d[0], trace_map.transpose(1, 2), d[1], None, coefficient, sums, inputs, outputs, len(trace_map))
    return sums


def trace_gradients(net: Network, d, trace_map: Tensor, each: Tensor, coefficient: Tensor, by) -> Tensor:
    """Fills what the trace adds to the slopes' gradients; the gradient by the map."""
    classes, outputs, inputs = trace_map.shape
    _trace(net, d[0], trace_map.transpose(1, 2), None, each, coefficient, by[1], inputs, outputs, classes)
    _trace(net, d[1], trace_map, None, each, coefficient, by[0], outputs, inputs, classes)
    tiles = outer_tiles(net.parameters.element_size(), inputs, outputs)
    grid = (triton.cdiv(inputs, tiles.BK), triton.cdiv(outputs, tiles.BC))
    most = max(class_tile_count(net, classes, tiles.BR))
    parts, steps = splits(most * tiles.BR, math.prod(grid) * classes, tiles.BR)
    sums = d[0].new_empty((classes, parts, inputs, outputs))
    sizes = (net.rows, net.samples, inputs, outputs, net.height, net.width, classes, 0, steps)
    outer_kernel[(*grid, classes * parts)](
        d[0],
        d[1],
        each,
        coefficient,
        sums,
        None,
        *sizes,
        TAPS=1,
        CLASSES=True,
        **tiles._asdict(),
        enable_fp_fusion=True,
    )
    return added(sums, torch.empty_like(trace_map), inputs, outputs, 1, parts)


def _trace(net, d, matrix, other, each, coefficient, out, inputs, outputs, classes) -> None:
    """`matrix` is ``[classes, in, out]``."""
    tiles = map_tiles(net.parameters.element_size(), outputs)
    grid = (sum(class_tile_count(net, classes, tiles.BR)), triton.cdiv(outputs, tiles.BC))
    packed = matrix.to(net.dtype).contiguous()
    sizes = (net.samples, net.rows, inputs, outputs, net.height, net.width, classes)
    trace_kernel[grid](
        *(d, packed, other, each, coefficient, out, *sizes),
        SUMS=other is not None,
        **tiles._asdict(),
        enable_fp_fusion=True,
    )
