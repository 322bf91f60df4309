r"""x from y = x + g(x) on the GPU; `genkernels.reference._fixed_point` has the iteration, `_block` the maps.

Fully connected: one launch. A program takes BR samples through the maps, looks at what is left of y, takes Anderson's
step, and goes on until all its samples have converged, are NaN or have had their iterations; no sample waits for those
of another program. Convolutions: a launch for each map and one for the step, a program a sample; how far each sample is
stays on the device, and tiles of samples that are done read and multiply nothing. Every INTERVAL iterations the host
looks whether all are done, at what was so INTERVAL iterations before: by then it is known, and the GPU waits for
nothing. While a graph is captured it does not look, and launches all iterations.

A step: differences of x and r join the history, of DEPTH each, oldest overwritten; their scaled Gram matrix is added up
and solved in fp64, in registers, for a sample at a time. Where r has grown by a bold step, the history is emptied.

Bytes, a sample and iteration: what the maps read and write, and 4 · (DEPTH + 4) numbers of x's size for the step; fully
connected they lie in the caches. Flops: 2 h for the maps, (DEPTH + 1)² + 5 · DEPTH times x's size for the step.

The gradient solves w = ∇ − Jᵀw in the same way, from slopes that are computed once, and passes −w on to g as the
gradient of `log_det_series` does.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from genkernels._options import INTERVAL
from genkernels.triton import _block
from genkernels.triton._block import CLIPSWISH, ELU, IN, IN_AT, OUT, OUT_AT, SIZES, Network
from genkernels.triton._recording import SampleCalls, meta

#: Of the history, and the columns of a tile that holds it and r.
DEPTH = tl.constexpr(5)
SLOTS = tl.constexpr(8)

# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _column(b_row, J: tl.constexpr):
    """Number J of rows ``[BR, SLOTS]``."""
    o = tl.arange(0, SLOTS)
    return tl.sum(tl.where((o == J)[None, :], b_row, 0.0), axis=1)


@triton.jit
def _load_history(p_from, o_n, m_n, o_c, m_c, features, samples, held):
    """``[BR, SLOTS, BC]``: differences of the steps that are held."""
    o = tl.arange(0, SLOTS)
    o_slot = o.to(tl.int64) * (samples.to(tl.int64) * features)
    m = (m_n[:, None, None] & (o < held)[None, :, None]) & m_c[None, None, :]
    o_all = (o_n[:, None] * features)[:, :, None] + o_slot[None, :, None] + o_c[None, None, :]
    return tl.load(p_from + o_all, m, other=0.0)


@triton.jit
def _without(b_row, b_pivot, J: tl.constexpr, I: tl.constexpr):  # noqa: E741
    """Row I with column J eliminated by the pivot's row."""
    return b_pivot if I == J else b_row - _column(b_row, J)[:, None] * b_pivot


@triton.jit
def _eliminate(b_0, b_1, b_2, b_3, b_4, b_row, J: tl.constexpr):
    b_pivot = b_row / _column(b_row, J)[:, None]
    return (
        _without(b_0, b_pivot, J, 0),
        _without(b_1, b_pivot, J, 1),
        _without(b_2, b_pivot, J, 2),
        _without(b_3, b_pivot, J, 3),
        _without(b_4, b_pivot, J, 4),
    )


@triton.jit
def _scaled(b_row, b_scale, J: tl.constexpr):
    """A row of the Gram matrix, of columns of length 1, with the ridge."""
    o = tl.arange(0, SLOTS)
    b_row = b_row / (b_scale * _column(b_scale, J)[:, None])
    return tl.where((o == J)[None, :], b_row + 1e-10, b_row)


@triton.jit
def _gamma(b_0, b_1, b_2, b_3, b_4):
    """The weights ``[BR, SLOTS]`` of the history from the rows of its Gram matrix, whose column DEPTH are products
    with r; 0 where they are not numbers."""
    o = tl.arange(0, SLOTS)[None, :]
    b_square = tl.where(o == 0, b_0, 0.0) + tl.where(o == 1, b_1, 0.0) + tl.where(o == 2, b_2, 0.0)
    b_square += tl.where(o == 3, b_3, 0.0) + tl.where(o == 4, b_4, 0.0)
    m = (b_square > 0) & (b_square < float("inf"))
    b_scale = tl.where(m, tl.sqrt(tl.where(m, b_square, 1.0)), 1.0)
    b_0 = _scaled(b_0, b_scale, 0)
    b_1 = _scaled(b_1, b_scale, 1)
    b_2 = _scaled(b_2, b_scale, 2)
    b_3 = _scaled(b_3, b_scale, 3)
    b_4 = _scaled(b_4, b_scale, 4)
    b_0, b_1, b_2, b_3, b_4 = _eliminate(b_0, b_1, b_2, b_3, b_4, b_0, 0)
    b_0, b_1, b_2, b_3, b_4 = _eliminate(b_0, b_1, b_2, b_3, b_4, b_1, 1)
    b_0, b_1, b_2, b_3, b_4 = _eliminate(b_0, b_1, b_2, b_3, b_4, b_2, 2)
    b_0, b_1, b_2, b_3, b_4 = _eliminate(b_0, b_1, b_2, b_3, b_4, b_3, 3)
    b_0, b_1, b_2, b_3, b_4 = _eliminate(b_0, b_1, b_2, b_3, b_4, b_4, 4)
    b_gamma = tl.where(o == 0, _column(b_0, DEPTH)[:, None], 0.0)
    b_gamma += tl.where(o == 1, _column(b_1, DEPTH)[:, None], 0.0)
    b_gamma += tl.where(o == 2, _column(b_2, DEPTH)[:, None], 0.0)
    b_gamma += tl.where(o == 3, _column(b_3, DEPTH)[:, None], 0.0)
    b_gamma += tl.where(o == 4, _column(b_4, DEPTH)[:, None], 0.0)
    b_size = tl.sum(tl.abs(b_gamma), axis=1)
    return tl.where((b_size < float("inf"))[:, None], b_gamma / b_scale, 0.0)


@triton.jit
def _products(b_row, b_history, p_dr, o, m_n, o_c, features, slots, held, J: tl.constexpr):
    """Adds to row J of the Gram matrix."""
    m_c = o_c < tl.where(held > J, features, 0)
    b_dr = tl.load(p_dr + (slots * J + o), m_n[:, None] & m_c[None, :], other=0.0).to(tl.float64)
    return b_row + tl.sum(b_history * b_dr[:, None, :], axis=2)


@triton.jit
def _step(
    p_x,
    p_r,
    p_last_x,
    p_last_r,
    p_best_x,
    p_dx,
    p_dr,
    o_n,
    m_n,
    b_limit,
    b_best,
    b_norm,
    b_taken,
    b_done,
    b_plain,
    step,
    depth,
    features,
    samples,
    BC: tl.constexpr,
):
    """What a sample has reached and, unless it is done, its next x; of `step`, from 1. Flags are 0 or 1.

    x, r and what is kept of them ``[N, features]``, the history ``[DEPTH, N, features]``, the rest by sample.
    """
    T: tl.constexpr = p_x.dtype.element_ty
    slots = samples.to(tl.int64) * features
    m_n = m_n & (b_done == 0)
    wide = tl.where(tl.max(m_n.to(tl.int32), axis=0) > 0, features, 0)
    b_size = tl.zeros_like(b_best)
    b_square = tl.zeros_like(b_best)
    b_odd = tl.zeros_like(b_done)
    for c in range(0, wide, BC):
        o_c = tl.arange(0, BC).to(tl.int64) + c
        b_r = tl.load(
            p_r + (o_n[:, None] * features + o_c[None, :]), m_n[:, None] & (o_c < features)[None, :], other=0.0
        )
        b_size = tl.maximum(b_size, tl.max(tl.abs(b_r), axis=1))
        b_odd = tl.maximum(b_odd, tl.max((b_r != b_r).to(tl.int32), axis=1))
        b_square += tl.sum(b_r * b_r, axis=1)
    b_size = tl.where(b_odd != 0, float("nan"), b_size)
    b_now = tl.sqrt(b_square)
    m_better = m_n & (b_size < b_best)
    b_taken += tl.where(m_n, 1, 0)
    b_best = tl.where(m_better, b_size, b_best)
    m_ends = (b_size <= b_limit) | ((b_plain != 0) & ((b_size < float("inf")) == 0))
    m_left = m_n & (m_ends == 0)
    b_done = tl.where(m_n & m_ends, 1, b_done)
    # the newest differences, x and r where they are accepted
    m_taken = (b_plain != 0) | (b_now <= b_norm)
    b_norm = tl.where(m_left & (m_taken | (step == 1)), b_now, b_norm)
    newest = (step - 2) % tl.maximum(depth, 1)
    held = tl.minimum(step - 1, depth)
    for c in range(0, wide, BC):
        o_c = tl.arange(0, BC).to(tl.int64) + c
        m_c = o_c < features
        o = o_n[:, None] * features + o_c[None, :]
        m = m_left[:, None] & m_c[None, :]
        b_x = tl.load(p_x + o, m_n[:, None] & m_c[None, :], other=0.0)
        b_r = tl.load(p_r + o, m, other=0.0)
        tl.store(p_best_x + o, b_x, m_better[:, None] & m_c[None, :])
        if step > 1:
            b_dx = tl.where(m_taken[:, None], b_x - tl.load(p_last_x + o, m, other=0.0), 0.0)
            b_dr = tl.where(m_taken[:, None], b_r - tl.load(p_last_r + o, m, other=0.0), 0.0)
            m_empty = (m_left & (m_taken == 0))[:, None] & m_c[None, :]
            for slot in range(0, held):
                tl.store(p_dx + (slots * slot + o), tl.zeros_like(b_dx), m_empty)
                tl.store(p_dr + (slots * slot + o), tl.zeros_like(b_dr), m_empty)
            if depth > 0:
                m_keeps = (m_left & m_taken)[:, None] & m_c[None, :]
                tl.store(p_dx + (slots * newest + o), b_dx, m_keeps)
                tl.store(p_dr + (slots * newest + o), b_dr, m_keeps)
            m = (m_left & m_taken)[:, None] & m_c[None, :]
            tl.debug_barrier()  # the last x and r may be written by other threads than have read them
        tl.store(p_last_x + o, b_x, m)
        tl.store(p_last_r + o, b_r, m)
    tl.debug_barrier()
    b_0 = tl.zeros((o_n.shape[0], SLOTS), tl.float64)
    b_1 = tl.zeros_like(b_0)
    b_2 = tl.zeros_like(b_0)
    b_3 = tl.zeros_like(b_0)
    b_4 = tl.zeros_like(b_0)
    for c in range(0, tl.where(held > 0, wide, 0), BC):
        o_c = tl.arange(0, BC).to(tl.int64) + c
        m_c = o_c < features
        o = o_n[:, None] * features + o_c[None, :]
        m = m_left[:, None] & m_c[None, :]
        b_history = _load_history(p_dr, o_n, m_left, o_c, m_c, features, samples, held)
        b_last = tl.load(p_last_r + o, m, other=0.0)
        m_last = (tl.arange(0, SLOTS) == DEPTH)[None, :, None]
        b_history = tl.where(m_last, b_last[:, None, :], b_history).to(tl.float64)
        b_0 = _products(b_0, b_history, p_dr, o, m_left, o_c, features, slots, held, 0)
        b_1 = _products(b_1, b_history, p_dr, o, m_left, o_c, features, slots, held, 1)
        b_2 = _products(b_2, b_history, p_dr, o, m_left, o_c, features, slots, held, 2)
        b_3 = _products(b_3, b_history, p_dr, o, m_left, o_c, features, slots, held, 3)
        b_4 = _products(b_4, b_history, p_dr, o, m_left, o_c, features, slots, held, 4)
    b_gamma = _gamma(b_0, b_1, b_2, b_3, b_4).to(T)
    for c in range(0, wide, BC):
        o_c = tl.arange(0, BC).to(tl.int64) + c
        m_c = o_c < features
        o = o_n[:, None] * features + o_c[None, :]
        m = m_left[:, None] & m_c[None, :]
        b_both = _load_history(p_dx, o_n, m_left, o_c, m_c, features, samples, held)
        b_both += _load_history(p_dr, o_n, m_left, o_c, m_c, features, samples, held)
        b_bold = tl.sum(b_both * b_gamma[:, :, None], axis=1)
        tl.store(p_x + o, tl.load(p_last_x + o, m, other=0.0) + tl.load(p_last_r + o, m, other=0.0) - b_bold, m)
    tl.debug_barrier()
    # bold steps are those from an accepted point with a history
    b_plain = tl.where((step == 1) | (depth == 0) | (m_taken == 0), 1, 0)
    return b_best, b_norm, b_taken, b_done, b_plain


@triton.jit(do_not_specialize=SIZES)
def _solve_kernel(
    p_table,
    p_push,
    p_pull,
    p_biases,
    bias_pitch,
    p_parameters,
    p_planes,
    p_d,
    p_target,
    p_r,
    p_last_x,
    p_last_r,
    p_best_x,
    p_dx,
    p_dr,
    p_limit,
    p_best,
    p_taken,
    rows,
    pitch,
    most,
    depth,
    layers,
    ACTIVATION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """All iterations of a fully connected block. planes: of what maps read, the first x; TRANSPOSED: of what they
    give, the last x, with the slopes in d."""
    o_n = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_n = o_n < rows
    plane = pitch.to(tl.int64)
    features = _block.field(p_table, 0, IN)
    last = layers - 1
    b_limit = tl.load(p_limit + o_n, m_n, other=0.0)
    b_best = tl.zeros_like(b_limit) + float("inf")
    b_norm = tl.zeros_like(b_limit)
    b_taken = tl.zeros((BR,), tl.int32)
    b_done = tl.where(m_n, 0, 1).to(tl.int32)
    b_plain = tl.full((BR,), 1, tl.int32)
    p_x = p_planes
    if TRANSPOSED:
        p_x = p_planes + plane * _block.field(p_table, last, OUT_AT)
    step = 0
    left = tl.max(1 - b_done, axis=0)
    while (step < most) & (left > 0):
        step += 1
        m_live = b_done == 0
        if TRANSPOSED:
            _block.pull_chain(
                p_table, p_pull, p_planes, None, p_d, o_n, o_n, m_live, plane, plane, layers, ACTIVATION, BC, BK
            )
            p_in = p_planes
            p_w = p_pull
            inputs = _block.field(p_table, 0, OUT)
        else:
            _block.forward_chain(
                p_table,
                p_push,
                p_biases,
                bias_pitch,
                p_parameters,
                p_planes,
                None,
                None,
                o_n,
                m_live,
                plane,
                layers,
                ACTIVATION,
                BC,
                BK,
            )
            p_in = p_planes + plane * _block.field(p_table, last, IN_AT)
            p_w = p_push + _block.field(p_table, last, _block.PUSH_AT)
            inputs = _block.field(p_table, last, IN)
        for c in range(0, features, BC):
            o_c = tl.arange(0, BC).to(tl.int64) + c
            m_c = o_c < features
            b_g = _block.product(p_in, p_w, o_n, m_live, o_c, m_c, inputs, features, 1, 1, True, 1, BK)
            if not TRANSPOSED:
                p_bias = p_biases + _block.field(p_table, last, _block.BIAS_AT)
                b_g += _block.bias_tile(p_bias, bias_pitch, o_n, m_live, o_c, m_c)
            m = m_live[:, None] & m_c[None, :]
            o = o_n[:, None] * features + o_c[None, :]
            b_r = tl.load(p_target + o, m, other=0.0) - tl.load(p_x + o, m, other=0.0) - b_g
            tl.store(p_r + o, b_r, m)
        tl.debug_barrier()
        b_best, b_norm, b_taken, b_done, b_plain = _step(
            p_x,
            p_r,
            p_last_x,
            p_last_r,
            p_best_x,
            p_dx,
            p_dr,
            o_n,
            m_n,
            b_limit,
            b_best,
            b_norm,
            b_taken,
            b_done,
            b_plain,
            step,
            depth,
            features,
            rows,
            BD,
        )
        left = tl.max(1 - b_done, axis=0)
    tl.store(p_best + o_n, b_best, m_n)
    tl.store(p_taken + o_n, b_taken, m_n)


@triton.jit(do_not_specialize=SIZES)
def _step_kernel(
    p_x,
    p_r,
    p_last_x,
    p_last_r,
    p_best_x,
    p_dx,
    p_dr,
    p_limit,
    p_best,
    p_norm,
    p_taken,
    p_done,
    p_plain,
    step,
    depth,
    features,
    samples,
    BD: tl.constexpr,
):
    """One sample's step; features: numbers of a sample."""
    o_n = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    m_n = o_n < samples
    b_best, b_norm, b_taken, b_done, b_plain = _step(
        p_x,
        p_r,
        p_last_x,
        p_last_r,
        p_best_x,
        p_dx,
        p_dr,
        o_n,
        m_n,
        tl.load(p_limit + o_n),
        tl.load(p_best + o_n),
        tl.load(p_norm + o_n),
        tl.load(p_taken + o_n),
        tl.load(p_done + o_n),
        tl.load(p_plain + o_n),
        step,
        depth,
        features,
        samples,
        BD,
    )
    tl.store(p_best + o_n, b_best)
    tl.store(p_norm + o_n, b_norm)
    tl.store(p_taken + o_n, b_taken)
    tl.store(p_done + o_n, b_done)
    tl.store(p_plain + o_n, b_plain)


# ---------------------------------------------------------------------------------------------------------- launchers


class _Look:
    """Whether all samples are done, asked for now and answered later: the copy runs behind the launches so far."""

    def __init__(self, done: Tensor):
        self.left = (done == 0).any()
        self.event = None
        if done.device.type == "cuda":
            there = self.left
            self.left = torch.empty((), dtype=torch.bool, pin_memory=True)
            self.left.copy_(there, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def all_done(self) -> bool:
        if self.event is not None:
            self.event.synchronize()
        return self.left.device.type != "meta" and not bool(self.left)


def _looks(device: torch.device) -> bool:
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _limits(y: Tensor, rtol: float, atol: float, net: Network) -> Tensor:
    if not rtol:
        return y.new_full((net.samples,), atol, dtype=net.dtype)
    return atol + rtol * y.to(net.dtype).flatten(1).abs().amax(1)


def _solve(net: Network, planes, d, target: Tensor, x: Tensor, limit: Tensor, most: int, depth: int, transposed: bool):
    """``(x, residual, iterations)``; `x` is that of the planes where the iteration runs, and has the start."""
    size = x.numel() // net.samples
    depth = min(depth, size)
    new = torch.empty_like
    r, last_x, last_r, best_x = new(x), new(x), new(x), x.clone()
    history = [x.new_empty((depth, *x.shape)) for _ in range(2)]
    each = {"device": x.device, "dtype": torch.int32}
    taken = torch.zeros((net.samples,), **each)
    vectors = (r, last_x, last_r, best_x, *history)
    if not net.image:
        best = torch.empty_like(limit)
        tiles = _block.chain_tiles(x.element_size())._replace(BC=16 if x.element_size() == 8 else 32)
        _solve_kernel[(triton.cdiv(net.rows, tiles.BR),)](
            *(net.table, net.push, net.pull, net.biases, None if transposed else net.bias_pitch, net.parameters),
            *(planes[0], None if d is None else d[0], target, *vectors, limit, best, taken),
            *(net.rows, net.pitch, most, depth, net.layers),
            ACTIVATION=net.activation,
            TRANSPOSED=transposed,
            BD=4,
            **tiles._asdict(),
            enable_fp_fusion=True,
        )
        return best_x, best, taken
    best, norm = torch.full_like(limit, float("inf")), torch.zeros_like(limit)
    done, plain = torch.zeros((net.samples,), **each), torch.ones((net.samples,), **each)
    looks, look = _looks(x.device), None
    for step in range(1, most + 1):
        _evaluate(net, planes[1], d, target, x, r, done, transposed)
        arguments = (x, *vectors, limit, best, norm, taken, done, plain, step, depth, size, net.samples)
        _step_kernel[(net.samples,)](*arguments, BD=128, num_warps=4, maxnreg=255, enable_fp_fusion=True)
        if looks and step % INTERVAL == 0 and step < most:
            if look is not None and look.all_done():
                break
            look = _Look(done)
    return best_x, best, taken


def _evaluate(net: Network, planes, d, target, x, r, done, transposed: bool) -> None:
    """r = target − x − g(x), or less Jᵀx, of the samples that are not done."""
    if transposed:
        for i in range(net.layers - 1, 0, -1):
            net.pull_back(i, planes[i], d[1][i - 1], None, planes[i - 1], 1, done)
        net.pull_out(planes[0], r, target, x, done)
    else:
        for i in range(net.layers - 1):
            net.forward(i, planes[i], None, planes[i + 1], None, done)
        net.value(planes[-1], r, target, x, done)


def invertible_residual(
    y: Tensor,
    start: Tensor | None,
    weights,
    biases,
    parameters: Tensor,
    rtol: float,
    atol: float,
    max_iterations: int,
    depth: int,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(x, residual, iterations, converged)`` of contiguous tensors on one GPU; the caller has checked them."""
    begin = y if start is None else start
    if not y.numel():
        work = torch.promote_types(y.dtype, torch.float32)
        residual = y.new_full((len(y),), float("inf"), dtype=work)
        return begin.clone(), residual, torch.zeros_like(residual, dtype=torch.int64), torch.isnan(residual)
    with torch.cuda.device_of(y):
        net = Network(y, weights, biases, parameters, activation)
        planes = net.planes(net.in_widths)
        x = net.enter(planes[1][0], begin)
        target = net.enter(torch.empty_like(x), y)
        limit = _limits(y, rtol, atol, net)
        found, best, taken = _solve(net, planes, None, target, x, limit, max_iterations, depth, False)
        residual = torch.where(best < float("inf"), best, float("nan"))
        return net.leave(found, y), residual, taken.to(torch.int64), best <= limit


def invertible_residual_backward(
    grad: Tensor,
    x: Tensor,
    weights,
    biases,
    parameters: Tensor,
    rtol: float,
    atol: float,
    max_iterations: int,
    depth: int,
    activation: int,
) -> list[Tensor]:
    """Gradients of y, of each weight, of each bias and of the parameters. Conditions as for `invertible_residual`."""
    if not x.numel():
        return [torch.zeros_like(t) for t in (x, *weights, *biases, parameters)]
    with torch.cuda.device_of(x):
        net = Network(x, weights, biases, parameters, activation)
        at, deltas = _block.room_for_pass(net), net.planes(net.out_widths)
        _block.run_pass(net, at)
        w = net.enter(deltas[1][-1], grad)
        limit = _limits(grad, rtol + atol, 0.0, net)  # a loss may be of any scale: relative alone
        found, _, _ = _solve(net, deltas, at.d, w.clone(), w, limit, max_iterations, depth, True)
        torch.neg(found, out=deltas[1][-1])
        _, by_parameters = _block.run_deltas(net, at, None, deltas)
        maps = _block.map_gradients(net, at, None, deltas, weights, biases)
    return [net.leave(found, x), *maps, by_parameters.to(parameters.dtype)]


# ------------------------------------------------------------------------------------------ ahead-of-time compilation


def sample_calls() -> SampleCalls:
    """The activations that need the most registers (`log_det_series` has all of them), every type and layout once, with
    biases in common and of each sample."""
    names = {torch.float32: "fp32", torch.float64: "fp64"}
    kinds = [(torch.float32, image, int(kind), False) for image in (False, True) for kind in (ELU, CLIPSWISH)]
    kinds += [(torch.float64, image, int(CLIPSWISH), False) for image in (False, True)]
    kinds += [(dtype, image, int(CLIPSWISH), True) for dtype in names for image in (False, True)]
    calls = []
    for dtype, image, activation, own in kinds:
        tensor = partial(meta, dtype=dtype)
        twice = 2 if activation == CLIPSWISH.value else 1
        shapes = [(64, 12), (64, 64 * twice), (12, 64 * twice)]
        weights = [tensor(*s, *((k, k) if image else ())) for s, k in zip(shapes, (3, 1, 3), strict=True)]
        y = tensor(32, 12, 8, 8) if image else tensor(512, 12)
        biases = [tensor(len(y), s[0]) if own else tensor(s[0]) for s in shapes]
        net = (weights, biases, tensor(2), 0.0, 1e-5, 2, 5, activation)
        label = f"{names[dtype]} {'image' if image else 'rows'} {activation}{' own biases' if own else ''}"
        calls.append((f"{label} forward", partial(invertible_residual, y, None, *net)))
        calls.append((f"{label} backward", partial(invertible_residual_backward, y, y, *net)))
    return calls
