"""A block's tensors packed for the GPU, its planes, and the launches of single maps."""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from genkernels.triton._block.curves import CLIPSWISH
from genkernels.triton._block.maps import forward_kernel, plain_kernel, pull_kernel


@triton.jit(do_not_specialize=("n0", "n1", "n2", "n3"))
def _write_kernel(p_to, n0, n1, n2, n3):
    """Four numbers' bits."""
    tl.store(p_to, n0.to(tl.int64))
    tl.store(p_to + 1, n1.to(tl.int64))
    tl.store(p_to + 2, n2.to(tl.int64))
    tl.store(p_to + 3, n3.to(tl.int64))


class Tiles(NamedTuple):
    BR: int
    BC: int
    BK: int
    num_warps: int
    num_stages: int
    #: ptxas alone settles for fewer registers, and spills
    maxnreg: int = 255


def power(n: int, low: int, high: int) -> int:
    return max(low, min(high, triton.next_power_of_2(n)))


def map_tiles(itemsize: int, columns: int, rows: int = 64) -> Tiles:
    """Of a launch for one map."""
    if itemsize == 8:
        return Tiles(32, power(columns, 16, 32), 16, 4, 1)
    return Tiles(rows, power(columns, 16, 64), 16, 4 if columns <= 32 else 8, 2)


#: Rows of a tile that holds more at once: of the gradient by z, and of [z, −z] transposed.
DELTA_ROWS = 32


def chain_tiles(itemsize: int) -> Tiles:
    """Of a program that goes through all maps."""
    return Tiles(16, 32, 16, 8, 1) if itemsize == 8 else Tiles(16, 64, 16, 8, 1)


class Map(NamedTuple):
    """One linear map; its matrices packed for W t and Wᵀ w."""

    inputs: int
    outputs: int
    taps: int
    push: Tensor
    pull: Tensor
    bias: Tensor  #: where it begins in `Network.biases`


class Network:
    """A block's tensors, packed in the type that is computed in, and the sizes of its planes for `samples` samples.

    Buffers of planes come flat; a plane begins at `pitch` (rows, rounded up for the sake of alignment) times the widths
    before it.
    """

    def __init__(self, x: Tensor, weights, biases, parameters: Tensor, activation: int):
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        self.x, self.activation = x, int(activation)
        self.parameters = parameters.to(self.dtype)
        self.image = x.dim() == 4
        self.samples, self.features = x.shape[0], x.shape[1]
        self.height, self.width = x.shape[2:] if self.image else (1, 1)
        self.rows = self.samples * self.height * self.width
        self.pitch = (self.rows + 3) // 4 * 4
        both = 2 if activation == CLIPSWISH.value else 1
        self.in_widths = [w.shape[1] for w in weights]
        self.out_widths = [w.shape[0] for w in weights]
        self.slope_widths = [both * h for h in self.out_widths[:-1]]
        self.maps, rows = self._pack(weights, biases)
        self.layers = len(self.maps)
        self.table = None if self.image else _table(str(x.device), tuple(rows))

    def _pack(self, weights, biases) -> tuple[list[Map], list[tuple[int, ...]]]:
        at, places, bias_at = 0, [], 0
        for w in weights:
            places.append(at)
            at += (w.numel() + 3) // 4 * 4
        new = self.x.new_empty
        self.push, self.pull = new((at,), dtype=self.dtype), new((at,), dtype=self.dtype)
        each = (self.samples,) if any(b.dim() == 2 for b in biases) else ()
        self.biases = new((*each, sum((len(w) + 3) // 4 * 4 for w in weights)), dtype=self.dtype)
        self.bias_pitch = self.biases.shape[1] if each else None
        maps, rows, in_at, out_at = [], [], 0, 0
        for w, b, place in zip(weights, biases, places, strict=True):
            outputs, inputs = w.shape[:2]
            kernel = w.reshape(outputs, inputs, -1)
            taps = kernel.shape[2]
            push, pull = (t[place : place + w.numel()] for t in (self.push, self.pull))
            push.view(taps, inputs, outputs).copy_(kernel.permute(2, 1, 0))
            pull.view(taps, outputs, inputs).copy_((kernel.flip(2) if taps > 1 else kernel).permute(2, 0, 1))
            bias = self.biases[..., bias_at : bias_at + outputs]
            bias.copy_(b)
            maps.append(Map(inputs, outputs, taps, push, pull, bias))
            rows.append((inputs, outputs, place, place, bias_at, in_at, out_at))
            bias_at += (outputs + 3) // 4 * 4
            in_at, out_at = in_at + inputs, out_at + outputs
        return maps, rows

    # planes

    def planes(self, widths: list[int], probes: int = 1) -> tuple[Tensor, list[Tensor]]:
        """A buffer, and its planes ``[probes · rows, width]``."""
        pitch, count, at = self.pitch * probes, self.rows * probes, 0
        flat, found = self.x.new_empty((pitch * sum(widths),), dtype=self.dtype), []
        for width in widths:
            found.append(flat[pitch * at : pitch * at + count * width].view(count, width))
            at += width
        return flat, found

    def enter(self, plane: Tensor, t: Tensor) -> Tensor:
        """Fills a plane with ``[..., N, C]`` or ``[..., N, C, H, W]``."""
        if self.image:
            t = t.reshape(-1, *t.shape[-3:]).permute(0, 2, 3, 1)
            plane.view(t.shape).copy_(t)
        else:
            plane.copy_(t.reshape(-1, t.shape[-1]))
        return plane

    def leave(self, plane: Tensor, like: Tensor) -> Tensor:
        """A plane as a tensor of another's shape and type."""
        if not self.image:
            return plane.view(like.shape).to(like.dtype)
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        whole = out.view(-1, *like.shape[-3:])
        whole.copy_(plane.view(len(whole), self.height, self.width, -1).permute(0, 3, 1, 2))
        return out

    # launches of a map

    def launch(self, kernel, map_: Map, columns: int, rows: int, arguments: tuple, tile: int = 64, **options) -> None:
        """`columns`: that a program's tiles go over."""
        tiles = map_tiles(self.parameters.element_size(), columns, tile)
        grid = (triton.cdiv(rows, tiles.BR), triton.cdiv(columns, tiles.BC))
        kernel[grid](*arguments, TAPS=map_.taps, **tiles._asdict(), **options, enable_fp_fusion=True)

    def column_tiles(self, columns: int) -> int:
        return triton.cdiv(columns, map_tiles(self.parameters.element_size(), columns).BC)

    def delta_tiles(self, columns: int) -> int:
        tiles = map_tiles(self.parameters.element_size(), columns, DELTA_ROWS)
        return triton.cdiv(self.rows, tiles.BR) * triton.cdiv(columns, tiles.BC)

    def forward(self, i: int, into: Tensor, z: Tensor | None, a: Tensor, d: Tensor | None, done=None) -> None:
        m = self.maps[i]
        sizes = (self.rows, self.samples, i, m.inputs, m.outputs, self.height, self.width)
        arguments = (into, m.push, m.bias, self.bias_pitch, self.parameters, z, a, d, done, *sizes)
        self.launch(forward_kernel, m, m.outputs, self.rows, arguments, ACTIVATION=self.activation)

    def pull_back(self, i: int, w: Tensor, d: Tensor, beta: Tensor | None, out: Tensor, probes: int, done=None) -> None:
        """Through map i and the activation before it."""
        m, h = self.maps[i], self.out_widths[i - 1]
        sizes = (self.rows, self.samples, probes, m.outputs, h, self.height, self.width)
        arguments = (w, m.pull, d, beta, out, done, *sizes)
        tile = DELTA_ROWS if self.activation == CLIPSWISH.value else 64
        self.launch(pull_kernel, m, h, self.rows * probes, arguments, tile, ACTIVATION=self.activation)

    def value(self, into: Tensor, out: Tensor, target=None, x=None, done=None) -> None:
        """The last map; target − x − it."""
        m = self.maps[-1]
        sizes = (self.rows, self.samples, m.inputs, m.outputs, self.height, self.width)
        arguments = (into, m.push, m.bias, self.bias_pitch, target, x, out, done, *sizes)
        self.launch(plain_kernel, m, m.outputs, self.rows, arguments)

    def pull_out(self, w: Tensor, out: Tensor, target=None, x=None, done=None) -> None:
        """The transposed first map; target − x − it."""
        m = self.maps[0]
        sizes = (self.rows, self.samples, m.outputs, m.inputs, self.height, self.width)
        self.launch(plain_kernel, m, m.inputs, self.rows, (w, m.pull, None, None, target, x, out, done, *sizes))


_KEPT: dict[tuple, Tensor] = {}


def _table(device: str, rows: tuple[tuple[int, ...], ...]) -> Tensor:
    """Made once for a list of shapes, and kept: graphs captured with it may be replayed at any time."""
    if (device, rows) not in _KEPT:
        _KEPT[device, rows] = torch.tensor(rows, dtype=torch.int64).to(device)
    return _KEPT[device, rows]


def numbers(values: list[float], device: torch.device) -> Tensor:
    """fp64 on a device, without waiting for it; while a graph is captured as kernels' arguments, for a copy from the
    host would be made anew at each replay."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.float64, device=device)
    if not torch.cuda.is_current_stream_capturing():
        return torch.tensor(values, dtype=torch.float64, pin_memory=True).to(device, non_blocking=True)
    return written(values, torch.empty((len(values) + 3) // 4 * 4, dtype=torch.int64, device=device))


def written(values: list[float], table: Tensor) -> Tensor:
    bits = [struct.unpack("q", struct.pack("d", value))[0] for value in values]
    bits += [0] * (len(table) - len(bits))
    for begin in range(0, len(bits), 4):
        _write_kernel[(1,)](table[begin:], *bits[begin : begin + 4])
    return table.view(torch.float64)[: len(values)]
