r"""The network of a residual block on the GPU: products with its maps and what follows them, for both operators of it.

.. math:: g(x) = W_L\,\varphi(\dots \varphi(W_1 x + b_1) \dots) + b_L

Layout. Inside everything is rows of channels in fp32 (fp64 for fp64): a sample is one row, or a row for each pixel of
an image, so fully connected maps and convolutions differ in nothing but the taps. A buffer holds a *plane*
``[rows, channels]`` for each map, one behind the other: `inputs` those that the maps read (the first is x), `outputs`
those of what they give or of its cotangents (the last is that of g). Maps lie packed twice, as ``[taps · in, out]``
and, mirrored, as ``[taps · out, in]``: W t and Wᵀ w are one code, which reads either along its rows. The biases of all
maps are one row; where any of them is each sample's own, one for each sample.

A *tile* is BR rows by BC channels of one map: the product over taps and channels, then in registers bias, activation
and slope, or a product with slopes, or the gradient of the activation. [z, −z] takes a tile twice, once for each half.

Fully connected blocks: a program takes BR samples through all maps of all steps, tile after tile, with barriers of its
threads between maps; what it wrote it finds in the caches. Convolutions: a launch for each map.

The gradient of a map is a product over rows, cut into parts by shape alone and added up in order: no atomics, the same
bits each run. fp32 products are exact to fp32. Offsets are 64-bit.
"""

from __future__ import annotations

from genkernels.triton._block.chains import forward_chain, pull_chain
from genkernels.triton._block.curves import CLIPSWISH, ELU
from genkernels.triton._block.gradients import (
    map_gradients,
    room_for_pass,
    room_for_probes,
    run_all,
    run_deltas,
    run_pass,
    splits,
)
from genkernels.triton._block.maps import plain_kernel
from genkernels.triton._block.network import Network, chain_tiles, numbers, written
from genkernels.triton._block.table import BIAS_AT, IN, IN_AT, OUT, OUT_AT, PUSH_AT, SIZES, field
from genkernels.triton._block.tiles import bias_tile, product
from genkernels.triton._block.trace import class_tile_count, trace_gradients, trace_sums

__all__ = [
    "BIAS_AT",
    "CLIPSWISH",
    "ELU",
    "IN",
    "IN_AT",
    "Network",
    "OUT",
    "OUT_AT",
    "PUSH_AT",
    "SIZES",
    "bias_tile",
    "chain_tiles",
    "class_tile_count",
    "field",
    "forward_chain",
    "map_gradients",
    "numbers",
    "plain_kernel",
    "product",
    "pull_chain",
    "room_for_pass",
    "room_for_probes",
    "run_all",
    "run_deltas",
    "run_pass",
    "splits",
    "trace_gradients",
    "trace_sums",
    "written",
]
