"""A pass with its probes and their gradients, and those of the maps."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from genkernels.triton._block.chains import gradient_chain_kernel
from genkernels.triton._block.curves import CLIPSWISH
from genkernels.triton._block.maps import delta_kernel, push_kernel
from genkernels.triton._block.network import DELTA_ROWS, Network, Tiles, chain_tiles, power
from genkernels.triton._block.sums import add_parts_kernel, outer_kernel

BLOCK = 512


class Passed(NamedTuple):
    """What a pass leaves for gradients: planes of the maps' inputs (x first), of z and of the slopes, flat and each."""

    inputs: tuple[Tensor, list[Tensor]]
    z: tuple[Tensor, list[Tensor]]
    d: tuple[Tensor, list[Tensor]]


class Probed(NamedTuple):
    """Of probes: planes of the tangents that maps read (the probes first), of z's tangents, of the cotangents of what
    maps give (last those of g) and of the activations' outputs; and what to add to the slopes' gradients."""

    tangents: tuple[Tensor, list[Tensor]]
    t: tuple[Tensor, list[Tensor]]
    cotangents: tuple[Tensor, list[Tensor]]
    beta: tuple[Tensor, list[Tensor]]
    count: int
    by: tuple[Tensor, list[Tensor]] | None


def room_for_pass(net: Network) -> Passed:
    found = Passed(net.planes(net.in_widths), net.planes(net.out_widths[:-1]), net.planes(net.slope_widths))
    net.enter(found.inputs[1][0], net.x)
    return found


def room_for_probes(net: Network, count: int, traced: bool) -> Probed:
    return Probed(
        net.planes(net.in_widths, count),
        net.planes(net.out_widths[:-1], count),
        net.planes(net.out_widths, count),
        net.planes(net.slope_widths, count),
        count,
        net.planes(net.slope_widths) if traced else None,
    )


def run_pass(net: Network, at: Passed) -> None:
    """z, activations and slopes from x."""
    if not net.image:
        _chain(net, at, None, None, None, None, FORWARD=True)
        return
    for i in range(net.layers - 1):
        net.forward(i, at.inputs[1][i], at.z[1][i], at.inputs[1][i + 1], at.d[1][i])


def run_probes(net: Network, at: Passed, probed: Probed) -> None:
    if not net.image:
        _chain(net, at, probed, None, None, None, PROBES=True)
        return
    rows, size = net.rows * probed.count, (net.height, net.width)
    for i in range(net.layers - 1):
        m = net.maps[i]
        arguments = (probed.tangents[1][i], m.push, at.d[1][i], probed.t[1][i], probed.tangents[1][i + 1])
        arguments += (net.rows, probed.count, m.inputs, m.outputs, *size)
        net.launch(push_kernel, m, m.outputs, rows, arguments, ACTIVATION=net.activation)
    outs = probed.cotangents[1]
    for i in range(net.layers - 1, 0, -1):
        net.pull_back(i, outs[i], at.d[1][i - 1], probed.beta[1][i - 1], outs[i - 1], probed.count)


def run_deltas(net: Network, at: Passed, probed: Probed | None, deltas: tuple[Tensor, list[Tensor]]) -> tuple:
    """``(gradient by x, by the parameters)``; fills the planes of `deltas` but the last, the gradient by g."""
    grad = net.x.new_empty((net.rows, net.features), dtype=net.dtype)
    if not net.image:
        tiles = chain_tiles(grad.element_size())
        parts = grad.new_empty((net.layers - 1, triton.cdiv(net.rows, tiles.BR)))
        _chain(net, at, probed, deltas, grad, parts, DELTA=True)
        return grad, parts.sum(1)
    by = []
    for i in range(net.layers - 1, 0, -1):
        m, h = net.maps[i], net.out_widths[i - 1]
        parts = grad.new_empty((net.delta_tiles(h),))
        beta, t = (None, None) if probed is None else (probed.beta[1][i - 1], probed.t[1][i - 1])
        traced = None if probed is None or probed.by is None else probed.by[1][i - 1]
        arguments = (deltas[1][i], m.pull, net.parameters, at.z[1][i - 1], at.d[1][i - 1], beta, t, traced)
        arguments += (deltas[1][i - 1], parts, net.rows, 1 if probed is None else probed.count)
        arguments += (i - 1, m.outputs, h, net.height, net.width)
        net.launch(delta_kernel, m, h, net.rows, arguments, DELTA_ROWS, ACTIVATION=net.activation)
        by.insert(0, parts.sum())
    net.pull_out(deltas[1][0], grad)
    return grad, torch.stack(by)


def run_all(net: Network, at: Passed, probed: Probed | None, deltas) -> tuple[Tensor, Tensor]:
    """All of it, where possible by one launch: ``(gradient by x, by the parameters)``.

    [z, −z] takes its own launches beside a probe: all of it does not fit into the registers.
    """
    fits = probed is None or (probed.count == 1 and probed.by is None and net.activation != CLIPSWISH.value)
    if net.image or not fits:
        run_pass(net, at)
        if probed is not None:
            run_probes(net, at, probed)
        return run_deltas(net, at, probed, deltas)
    grad = net.x.new_empty((net.rows, net.features), dtype=net.dtype)
    parts = grad.new_empty((net.layers - 1, triton.cdiv(net.rows, chain_tiles(grad.element_size()).BR)))
    _chain(net, at, probed, deltas, grad, parts, FORWARD=True, PROBES=probed is not None, DELTA=True)
    return grad, parts.sum(1)


def _chain(net, at, probed, deltas, grad, parts, FORWARD=False, PROBES=False, DELTA=False) -> None:
    tiles = chain_tiles(net.parameters.element_size())
    both = (None,) * 5
    if probed is not None:
        flat = [p[0] for p in (probed.tangents, probed.t, probed.cotangents, probed.beta)]
        both = (*flat, None if probed.by is None else probed.by[0])
    grid = (triton.cdiv(net.rows, tiles.BR), probed.count if PROBES else 1)
    gradient_chain_kernel[grid](
        net.table,
        net.push,
        net.pull,
        net.biases,
        net.bias_pitch if FORWARD else None,
        net.parameters,
        at.inputs[0],
        at.z[0],
        at.d[0],
        *both,
        None if deltas is None else deltas[0],
        grad,
        parts,
        net.rows,
        net.pitch,
        1 if probed is None else probed.count,
        net.layers,
        ACTIVATION=net.activation,
        FORWARD=FORWARD,
        PROBES=PROBES,
        DELTA=DELTA,
        SLOPES=DELTA and probed is not None,
        **tiles._asdict(),
        enable_fp_fusion=True,
    )


def splits(rows: int, programs: int, tile: int) -> tuple[int, int]:
    """(parts, steps a part): about 512 programs in all, each with at least 8 steps; by shape alone."""
    steps = max(1, triton.cdiv(rows, tile))
    parts = max(1, min(triton.cdiv(512, programs), steps // 8))
    each = triton.cdiv(steps, parts)
    return triton.cdiv(steps, each), each


def outer_tiles(itemsize: int, depth: int, columns: int) -> Tiles:
    if itemsize == 8:
        return Tiles(16, 16, 16, 4, 1)
    return Tiles(16, power(columns, 16, 64), power(depth, 16, 32), 8 if columns > 32 else 4, 2)


def map_gradients(net: Network, at: Passed, probed: Probed | None, deltas, weights, biases) -> list[Tensor]:
    """Those of each weight, then those of each bias, like these."""
    by_weights, by_biases = [], []
    for i, m in enumerate(net.maps):
        pairs = [(at.inputs[1][i], deltas[1][i], 1)]
        if probed is not None:
            pairs.append((probed.tangents[1][i], probed.cotangents[1][i], probed.count))
        depth = m.inputs * m.taps
        tiles = outer_tiles(net.parameters.element_size(), depth, m.outputs)
        grid = (triton.cdiv(depth, tiles.BK), triton.cdiv(m.outputs, tiles.BC))
        cuts = [splits(net.rows * probes, math.prod(grid), tiles.BR) for *_, probes in pairs]
        total = sum(parts for parts, _ in cuts)
        sums = net.x.new_empty((total, depth, m.outputs), dtype=net.dtype)
        own = biases[i].dim() == 2
        bias_sums = None if own else net.x.new_empty((cuts[0][0], m.outputs), dtype=net.dtype)
        first = 0
        for (inputs, g, probes), (parts, steps) in zip(pairs, cuts, strict=True):
            sizes = (net.rows * probes, net.samples * probes, m.inputs, m.outputs, net.height, net.width, 1)
            bias = bias_sums if first == 0 else None
            arguments = (inputs, g, None, None, sums, bias, *sizes, first, steps)
            outer_kernel[(*grid, parts)](
                *arguments, TAPS=m.taps, CLASSES=False, **tiles._asdict(), enable_fp_fusion=True
            )
            first += parts
        by_weights.append(added(sums, torch.empty_like(weights[i]), m.inputs, m.outputs, m.taps, total))
        if own:
            by_biases.append(deltas[1][i].view(net.samples, -1, m.outputs).sum(1).to(biases[i].dtype))
        else:
            by_biases.append(added(bias_sums, torch.empty_like(biases[i]), 1, m.outputs, 1, cuts[0][0]))
    return [*by_weights, *by_biases]


def added(sums: Tensor, out: Tensor, inputs: int, columns: int, taps: int, parts: int) -> Tensor:
    grid = (triton.cdiv(out.numel(), BLOCK),)
    add_parts_kernel[grid](sums, out, inputs, columns, taps, parts, out.numel(), BLOCK=BLOCK)
    return out
