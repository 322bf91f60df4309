r"""Spectral norm of many weights at once on the GPU: 3 launches for any number of them, 2 for their gradients.

.. math:: a = A v,\quad u = a / \lVert a\rVert,\quad b = A^\top u,\quad v = b / \lVert b\rVert,\quad
    \sigma = \lVert b\rVert,\quad \hat W = f W,\qquad
    \nabla_W = f G + s D,\quad s = g_\sigma - \langle G, \hat W\rangle / \sigma

A is what a weight W does to one sample, as a matrix or as a convolution; D is u vᵀ or the correlation of u and v at
each tap. Miyato et al. 2018; Behrmann et al. 2019. `genkernels.reference.spectral_norm` has the maths.

Launches: `left_kernel` (a) and `right_kernel` (b) once an iteration, `finish_kernel` (σ, Ŵ, u, v) at last; backward
`inner_kernel` (⟨G, Ŵ⟩) and `gradient_kernel`. A program finds its layer in `owners`, one number a program; sizes,
places in the workspace and how to gather stand in a table of 64-bit integers that is made once for a list of shapes,
addresses in another that is made each call and copied without waiting (while a CUDA graph is captured, where a copy
would read the host's memory again at each replay, written by small kernels).

Matrices: one read of W for both products. A program takes 8 rows: a of them, then, W coming out of a cache, what these
rows give to b, scaled by their largest \|a\| so that no square of σ arises; `right_kernel` adds up.
Convolutions: a, b and D are products ``[rows, depth]`` by ``[depth, columns]`` whose right factor is gathered from a
vector. Column and depth are numbers written in radices of three axes (positions or taps) with a channel on top, and

    place = column digit · by_column + depth digit · by_depth + offset,  at = (place + image · period) / divisor

along each axis, with a 0 where that is no place of the vector; circular padding has images. So zero padded, circular,
strided, dilated, grouped and transposed convolutions and all three products are one piece of code.

Norms: each program leaves the largest magnitude of its numbers and their sum of squares in units of it; the next
launch's programs combine them in one order. u and v are divided where they are read. A norm that is 0 or not finite
leaves them what they were, and then `right_kernel` reads W once more.

No atomics, sums in an order that depends on the layer's shape alone: the same bits each run and in any company. Offsets
are 64-bit, but those in a vector. Bytes: forward two reads and one write of the weights and a quarter of partial sums,
backward three reads and one write. Addresses from a table come without a promise of alignment, so accesses are of one
number each.
"""

from __future__ import annotations

from functools import partial

import torch
import triton.language as tl
from torch import Tensor

from genkernels.triton._recording import SampleCalls, meta
from genkernels.triton._spectral_norm.kernels import (
    finish_kernel,
    gradient_kernel,
    inner_kernel,
    left_kernel,
    right_kernel,
)
from genkernels.triton._spectral_norm.layers import FINISH, GRADIENT, INNER, LEFT, RIGHT
from genkernels.triton._spectral_norm.tables import Tables, addresses_of, tables_of, write

_TYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _split(coefficient: float) -> tuple[float, float]:
    """Two fp32 numbers, as which kernels take a number."""
    high = torch.tensor(coefficient, dtype=torch.float32).item()
    return high, coefficient - high


def _run(kernel, launch: int, tables: Tables, addresses: Tensor, *arguments, dtype: torch.dtype) -> None:
    owners = tables.owners[launch]
    # a product's factors stand in registers, which they fit into; ptxas alone settles for 128 and may spill
    kernel[(owners.numel(),)](
        owners, tables.sizes, addresses, *arguments, T=_TYPES[dtype], num_warps=8, maxnreg=255, enable_fp_fusion=True
    )


def spectral_norm(weights, u, v, plan, iterations: int, coefficient: float, at_most: bool) -> list[Tensor]:
    """The normalised weights, every u, every v and the norms, of contiguous tensors on one GPU; the caller has checked
    them."""
    dtype = weights[0].dtype
    work = torch.promote_types(dtype, torch.float32)
    out = [[torch.empty_like(t) for t in some] for some in (weights, u, v)]
    sigma = weights[0].new_empty((len(weights),), dtype=work)
    with torch.cuda.device_of(weights[0]):
        tables = tables_of(weights, u, v, plan)
        addresses = addresses_of([list(row) for row in zip(weights, u, v, *out, strict=True)])
        room = weights[0].new_empty((tables.room,), dtype=work)
        for turn in range(max(1, iterations)):
            _run(left_kernel, LEFT.value, tables, addresses, room, turn, int(iterations == 0), dtype=dtype)
            if iterations:
                _run(right_kernel, RIGHT.value, tables, addresses, room, turn, dtype=dtype)
        options = iterations, *_split(coefficient), int(at_most)
        _run(finish_kernel, FINISH.value, tables, addresses, room, sigma, *options, dtype=dtype)
    return [*out[0], *out[1], *out[2], sigma]


def spectral_norm_backward(
    grads, grad_sigma, weights, u, v, sigma, plan, coefficient: float, at_most: bool
) -> list[Tensor]:
    """The gradients by the weights. Conditions as for `spectral_norm`."""
    dtype = weights[0].dtype
    out = [torch.empty_like(w) for w in weights]
    with torch.cuda.device_of(weights[0]):
        tables = tables_of(weights, u, v, plan)
        addresses = addresses_of([list(row) for row in zip(grads, weights, u, v, out, strict=True)])
        sums = sigma.new_empty((tables.sums,))
        options = *_split(coefficient), int(at_most)
        _run(inner_kernel, INNER.value, tables, addresses, sums, sigma, *options, dtype=dtype)
        _run(gradient_kernel, GRADIENT.value, tables, addresses, sums, sigma, grad_sigma, *options, dtype=dtype)
    return out


# ------------------------------------------------------------------------------------------ ahead-of-time compilation


def sample_calls() -> SampleCalls:
    """Every type, with and without a gradient of σ: shapes, geometries and iterations are not compiled in."""
    plan = [0, 0, 1, 0, *(1, 1, 1), *(0, 0, 0), *(1, 1, 1), 1, 0, 1, 0, *(1, 1, 1), *(0, 1, 1), *(1, 1, 1)]
    calls = []
    for dtype in _TYPES:
        tensor = partial(meta, dtype=dtype)
        weights = [tensor(64, 48), tensor(8, 4, 3, 3)]
        u, v = [tensor(64), tensor(8, 6, 6)], [tensor(48), tensor(4, 6, 6)]
        sigma = meta(2, dtype=torch.promote_types(dtype, torch.float32))
        label = str(dtype).removeprefix("torch.")
        calls.append((label, partial(spectral_norm, weights, u, v, plan, 1, 1.0, False)))
        for grad_sigma in (sigma, None):
            backward = (weights, grad_sigma, weights, u, v, sigma, plan, 1.0, True)
            name = f"{label}{'' if grad_sigma is None else ' with a gradient of sigma'}"
            calls.append((name, partial(spectral_norm_backward, *backward)))
    calls.append(("while a graph is captured", partial(write, meta(8, dtype=torch.int64), list(range(8)))))
    return calls
