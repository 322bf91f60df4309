r"""Sampling from a causal network on the GPU, pixel by pixel, with every stage's activations kept.

.. math:: x_{i,c} \sim p(x_{i,c} \mid x_{<i},\, x_{i,<c})

van den Oord et al. 2016a, 2016b; Ramachandran et al. 2017. `genkernels.reference.autoregressive_sampling` is the
definition.

Layout. A sample's planes lie in global memory as rings of the rows that are still read, pixel-major with zeros around,
so that the taps of one kernel
row at a pixel are one stretch of numbers: every convolution is a product with overlapping rows, without a copy. Weights
are packed ``[kernel row][column, in][out]``, the outputs of each block (a half of a gate, within it a data channel's
group) padded to a multiple of 4, so that a thread reads them 16 bytes at a time. Biases, conditions and partial sums
lie in the same order.

Parallelisation. A program draws ROWS samples, all their pixels and stages: no program waits for another, so one launch
does a whole block of
rows. A row of the image: first, for all its columns at once, vertical stages and what every other stage takes from rows
above, products of PIXELS × DEPTH × OUT. Then pixel by pixel the taps to the left and at the centre: threads are spread
over (DEPTH × OUT) weights, each loaded once for the ROWS samples, and their sums are added up across threads once a
stage. What threads hand to one another goes through global memory, which the first caches hold, with
`tl.debug_barrier`, a barrier of the program's threads, between stages.

Counted for 7×7 A + 8 × 3×3 B of 64 channels: a pixel passes 9 stages, one after the other. A stage is a trip to the
second-level cache for 32 kB of weights (512 clocks at 64 bytes a clock, behind some 300 of latency), a sum across
threads and two or three barriers: an estimate, not a measurement, of 0.6 µs, so 784 × 9 × 0.6 µs = 4 ms an image,
whatever the batch up to a program a multiprocessor. Beyond that ROWS grows, and with it what a loaded weight does.

Sums run in a fixed order: bitwise the same from run to run. Offsets are 64-bit. Nothing is read back to the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from genkernels.triton import KernelSpec, _draw, _math, _stages

MIXTURE = 1  # the head's number

SIZES = (
    "n",
    "height",
    "columns",
    "begin",
    "end",
    "stages",
    "image_at",
    "image_rows",
    "image_pitch",
    "state_size",
    "sums_size",
    "condition_size",
    "temperature",
    "temperature_low",
)


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _line(at, rows, pitch, i):
    """Where row i, which may be above the image, lies in a ring."""
    return at + ((i + rows) % rows) * pitch


@triton.jit
def _ring(p_ring, i):
    """The same for a record's `at`, `rows` and `pitch`."""
    return _line(tl.load(p_ring), tl.load(p_ring + 1), tl.load(p_ring + 2), i)


@triton.jit
def _activated(b_a, b_b, activation, GATED: tl.constexpr):
    b_a = tl.where(b_a < tl.where(activation == _stages.RELU, 0.0, float("-inf")), 0.0, b_a)  # NaN stays
    if GATED:
        b_tanh, _ = _math.tanh(b_a)
        b_e = _math.exp(-tl.abs(b_b))
        b_near = _math.reciprocal_of_sum(1.0, b_e)
        b_a = tl.where(activation == _stages.GATE, b_tanh * tl.where(b_b < 0, b_e * b_near, b_near), b_a)
    return b_a


@triton.jit
def _row_sums(
    p_stage,
    p_parts,
    p_state,
    p_sums,
    p_weights,
    p_biases,
    p_condition,
    first_sample,
    n,
    i,
    row,
    columns,
    state_size,
    sums_size,
    condition_size,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    DEPTH: tl.constexpr,
    OUT: tl.constexpr,
):
    """Sums of one stage over all that depends on rows above only, for all columns of row i, the `row`-th of this
    launch."""
    width = tl.multiple_of(tl.load(p_stage + _stages.S_WIDTH), _stages.VECTOR)
    block, padded = tl.load(p_stage + _stages.S_BLOCK), tl.load(p_stage + _stages.S_PADDED)
    biases, sums = tl.load(p_stage + _stages.S_BIASES), tl.load(p_stage + _stages.S_SUMS)
    condition = tl.load(p_stage + _stages.S_CONDITION)
    conditioned = tl.where(condition < 0, 0, width)  # outputs that have one
    condition_row = tl.load(p_stage + _stages.S_CONDITION_ROW)
    condition_column = tl.load(p_stage + _stages.S_CONDITION_COLUMN)
    products = tl.load(p_stage + _stages.S_ROW)
    added = tl.load(p_stage + _stages.S_ROW_ADDED)
    end = tl.load(p_stage + _stages.S_PIXEL)
    for tile in range(0, ROWS * columns, PIXELS):
        o_m = tl.arange(0, PIXELS) + tile
        o_j = (o_m % columns).to(tl.int64)
        o_n = (o_m // columns).to(tl.int64) + first_sample
        m_m = (o_m < ROWS * columns) & (o_n < n)
        for first in range(0, width, OUT):
            o_o = tl.arange(0, OUT).to(tl.int64) + first
            m_o = o_o < width
            m = m_m[:, None] & m_o[None, :]
            b_sum = tl.zeros((PIXELS, OUT), p_state.dtype.element_ty)
            b_sum += tl.load(p_biases + biases + o_o, m_o, other=0.0)[None, :]
            o_c = o_n * condition_size + condition + row * condition_row + o_j * condition_column
            b_sum += tl.load(
                p_condition + (o_c[:, None] + o_o[None, :]), m_m[:, None] & (o_o < conditioned)[None, :], other=0.0
            )
            for part in range(products, added):
                p_part = p_parts + part * _stages.PART
                o_x = _ring(p_part + _stages.P_AT, i - tl.load(p_part + _stages.P_UP))
                o_x += o_n * state_size + o_j * tl.load(p_part + _stages.P_STEP)
                entries = tl.load(p_part + _stages.P_COUNT)
                weights = tl.multiple_of(tl.load(p_part + _stages.P_WEIGHTS), _stages.VECTOR)
                for e in range(0, entries, DEPTH):
                    o_e = tl.arange(0, DEPTH).to(tl.int64) + e
                    m_e = o_e < entries
                    b_x = tl.load(p_state + (o_x[:, None] + o_e[None, :]), m_m[:, None] & m_e[None, :], other=0.0)
                    o_w = (weights + o_e * width)[:, None] + o_o[None, :]
                    b_w = tl.load(p_weights + o_w, m_e[:, None] & m_o[None, :], other=0.0)
                    b_sum = tl.dot(b_x, b_w, b_sum, input_precision="ieee", out_dtype=b_sum.dtype)
            o_l = o_o % padded
            o_channel = o_o // padded * block + o_l
            for part in range(added, end):
                p_part = p_parts + part * _stages.PART
                o_x = _ring(p_part + _stages.P_AT, i)
                o_x += o_n * state_size + o_j * tl.load(p_part + _stages.P_STEP)
                b_sum += tl.load(p_state + (o_x[:, None] + o_channel[None, :]), m & (o_l < block)[None, :], other=0.0)
            tl.store(p_sums + ((o_n * sums_size + sums + o_j * width)[:, None] + o_o[None, :]), b_sum, m)


@triton.jit
def _finish_row(
    p_stage,
    p_state,
    p_sums,
    first_sample,
    n,
    i,
    columns,
    state_size,
    sums_size,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    OUT: tl.constexpr,
    GATED: tl.constexpr,
):
    """What a vertical stage makes of its sums, for all columns of row i."""
    width = tl.load(p_stage + _stages.S_WIDTH)
    padded = tl.load(p_stage + _stages.S_PADDED)
    made = tl.load(p_stage + _stages.S_MADE)
    sums, activation = tl.load(p_stage + _stages.S_SUMS), tl.load(p_stage + _stages.S_ACTIVATION)
    residual = tl.load(p_stage + _stages.S_RESIDUAL_AT)
    shifted = tl.where(residual < 0, 0, made)  # channels that a residual is added to
    gated = tl.where(activation == _stages.GATE, made, 0)
    out_line = _ring(p_stage + _stages.S_OUT_AT, i)
    residual_line = _ring(p_stage + _stages.S_RESIDUAL_AT, i)
    for tile in range(0, ROWS * columns, PIXELS):
        o_m = tl.arange(0, PIXELS) + tile
        o_j = (o_m % columns).to(tl.int64)
        o_n = (o_m // columns).to(tl.int64) + first_sample
        m_m = (o_m < ROWS * columns) & (o_n < n)
        for first in range(0, made, OUT):
            o_l = tl.arange(0, OUT).to(tl.int64) + first
            m = m_m[:, None] & (o_l < made)[None, :]
            m_gate = m_m[:, None] & (o_l < gated)[None, :]
            o_sum = (o_n * sums_size + sums + o_j * width)[:, None] + o_l[None, :]
            b_a = tl.load(p_sums + o_sum, m, other=0.0)
            b_b = b_a
            if GATED:
                b_b = tl.load(p_sums + (o_sum + padded), m_gate, other=0.0)
            b_a = _activated(b_a, b_b, activation, GATED)
            o_out = (o_n * state_size + o_j * made)[:, None] + o_l[None, :]
            b_a += tl.load(p_state + (o_out + residual_line), m_m[:, None] & (o_l < shifted)[None, :], other=0.0)
            tl.store(p_state + (o_out + out_line), b_a, m)


@triton.jit
def _one_pixel(
    p_stage,
    p_parts,
    p_state,
    p_sums,
    p_weights,
    o_n,
    m_n,
    i,
    j,
    g,
    state_size,
    sums_size,
    GROUPS: tl.constexpr,
    GATED: tl.constexpr,
    DEPTH: tl.constexpr,
    OUT: tl.constexpr,
):
    """Group g of one stage at pixel (i, j)."""
    ROWS: tl.constexpr = o_n.shape[0]
    width = tl.multiple_of(tl.load(p_stage + _stages.S_WIDTH), _stages.VECTOR)
    padded = tl.multiple_of(tl.load(p_stage + _stages.S_PADDED), _stages.VECTOR)
    block = tl.load(p_stage + _stages.S_BLOCK)
    made = tl.load(p_stage + _stages.S_MADE)
    activation = tl.load(p_stage + _stages.S_ACTIVATION)
    sums, residual = tl.load(p_stage + _stages.S_SUMS), tl.load(p_stage + _stages.S_RESIDUAL_AT)
    products = tl.load(p_stage + _stages.S_PIXEL)
    added = tl.load(p_stage + _stages.S_PIXEL_ADDED)
    end = tl.load(p_stage + _stages.S_END)
    out_line = _ring(p_stage + _stages.S_OUT_AT, i)
    residual_line = _ring(p_stage + _stages.S_RESIDUAL_AT, i)
    other = GROUPS * padded  # from a channel to its gate
    gated = tl.where(activation == _stages.GATE, padded, 0)  # outputs that have a gate
    shifted = tl.where(residual < 0, 0, block)  # and a residual
    for first in range(0, block, OUT):
        o_l = tl.arange(0, OUT).to(tl.int64) + first
        m_l = o_l < padded
        b_part = tl.zeros((ROWS, DEPTH, OUT), p_state.dtype.element_ty)
        b_part2 = b_part
        for part in range(products, added):
            p_part = p_parts + part * _stages.PART
            o_x = _ring(p_part + _stages.P_AT, i)
            o_x += o_n * state_size + j * tl.load(p_part + _stages.P_STEP)
            entries = tl.load(p_part + _stages.P_COUNT)  # at the centre only groups up to g, or below it, are drawn
            entries += tl.load(p_part + _stages.P_CENTRE) * (tl.load(p_part + _stages.P_OWN) + g)
            weights = tl.multiple_of(tl.load(p_part + _stages.P_WEIGHTS), _stages.VECTOR) + g * padded
            for e in range(0, entries, DEPTH):
                o_e = tl.arange(0, DEPTH).to(tl.int64) + e
                m_e = o_e < entries
                b_x = tl.load(p_state + (o_x[:, None] + o_e[None, :]), m_n[:, None] & m_e[None, :], other=0.0)
                o_w = (weights + o_e * width)[:, None] + o_l[None, :]
                m_w = m_e[:, None] & m_l[None, :]
                b_part += b_x[:, :, None] * tl.load(p_weights + o_w, m_w, other=0.0)[None, :, :]
                if GATED:
                    b_w = tl.load(p_weights + (o_w + other), m_e[:, None] & (o_l < gated)[None, :], other=0.0)
                    b_part2 += b_x[:, :, None] * b_w[None, :, :]
        m = m_n[:, None] & (o_l < block)[None, :]
        m_gate = m & (o_l < gated)[None, :]
        o_sum = (o_n * sums_size + sums + j * width + g * padded)[:, None] + o_l[None, :]
        b_a = tl.load(p_sums + o_sum, m, other=0.0) + tl.sum(b_part, axis=1)
        b_b = b_a
        if GATED:
            b_b = tl.load(p_sums + (o_sum + other), m_gate, other=0.0) + tl.sum(b_part2, axis=1)
        for part in range(added, end):
            p_part = p_parts + part * _stages.PART
            o_x = _ring(p_part + _stages.P_AT, i)
            o_x += o_n * state_size + j * tl.load(p_part + _stages.P_STEP) + g * block
            b_a += tl.load(p_state + (o_x[:, None] + o_l[None, :]), m, other=0.0)
            if GATED:
                b_b += tl.load(p_state + (o_x[:, None] + o_l[None, :] + made), m_gate, other=0.0)
        b_a = _activated(b_a, b_b, activation, GATED)
        o_out = (o_n * state_size + j * made + g * block)[:, None] + o_l[None, :]
        b_a += tl.load(p_state + (o_out + residual_line), m_n[:, None] & (o_l < shifted)[None, :], other=0.0)
        tl.store(p_state + (o_out + out_line), b_a, m)


@triton.jit
def _known_or(p_image, p_known, o, m, b_level):
    """The drawn levels, or the image's where they are known."""
    if p_known is not None:
        b_given = tl.load(p_image + o, m, other=0)
        b_level = tl.where(tl.load(p_known + o, m, other=0) != 0, b_given, b_level)
    return b_level


@triton.jit
def _mixture_channel(
    p_image,
    p_known,
    p_noise,
    p_state,
    o,
    o_noise,
    o_mean,
    o_x,
    m,
    b_shift,
    b_t,
    C: tl.constexpr,
    K: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """One channel drawn and stored; the x that shifts the means of later ones."""
    b_mean = tl.load(p_state + o_mean, m, other=0.0) + b_shift
    b_s = tl.load(p_state + (o_mean + K), m, other=0.0)
    b_level, b_x = _draw.logistic_level(b_mean, b_s, tl.load(p_noise + o_noise, m, other=0.5), b_t, LEVELS)
    b_level = _known_or(p_image, p_known, o, m, b_level)
    b_seen = _draw.level_value(b_level.to(b_t.dtype), LEVELS)
    tl.store(p_image + o, b_level, m)
    tl.store(p_state + o_x, b_seen, m)
    m_nan = b_x != b_x
    if p_known is not None:
        m_nan &= tl.load(p_known + o, m, other=0) == 0
    return tl.where(m_nan, b_x, b_seen)


@triton.jit(do_not_specialize=SIZES)
def _draw_rows_kernel(
    p_image,
    p_state,
    p_sums,
    p_noise,
    p_known,
    p_weights,
    p_biases,
    p_condition,
    p_stages,
    p_parts,
    n,
    height,
    columns,
    begin,
    end,
    stages,
    image_at,
    image_rows,
    image_pitch,
    state_size,
    sums_size,
    condition_size,
    temperature,
    temperature_low,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    K: tl.constexpr,
    COLD: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    OUT: tl.constexpr,
    PIXELS: tl.constexpr,
    ROW_DEPTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Rows begin to end of image int64 [N, C, H, W], with state [N, state_size] and scratch sums [N, sums_size]; noise
    [N, C or 1 + C, H, W].

    K: components of a logistic mixture, 0 for categories. image_at and so on: the ring of plane 0.
    """
    GROUPS: tl.constexpr = C if K == 0 else 1
    PLANES: tl.constexpr = C if K == 0 else C + 1  # of the noise
    first_sample = tl.program_id(0).to(tl.int64) * ROWS
    o_n = first_sample + tl.arange(0, ROWS)
    m_n = o_n < n
    size = height.to(tl.int64) * columns
    b_t = tl.zeros((ROWS,), p_state.dtype.element_ty) + temperature + temperature_low
    count = stages.to(tl.int64)
    p_last = p_stages + (count - 1) * _stages.STAGE
    for i in range(begin.to(tl.int64), end.to(tl.int64)):
        for k in range(0, count):
            p_stage = p_stages + k * _stages.STAGE
            _row_sums(
                p_stage,
                p_parts,
                p_state,
                p_sums,
                p_weights,
                p_biases,
                p_condition,
                first_sample,
                n,
                i,
                i - begin,
                columns,
                state_size,
                sums_size,
                condition_size,
                ROWS,
                PIXELS,
                ROW_DEPTH,
                OUT,
            )
            if tl.load(p_stage + _stages.S_VERTICAL) != 0:
                tl.debug_barrier()
                _finish_row(
                    p_stage,
                    p_state,
                    p_sums,
                    first_sample,
                    n,
                    i,
                    columns,
                    state_size,
                    sums_size,
                    ROWS,
                    PIXELS,
                    OUT,
                    GATED,
                )
                tl.debug_barrier()
        tl.debug_barrier()
        for j in range(0, columns.to(tl.int64)):
            place = i * columns + j
            o_plane0 = o_n * state_size + _line(image_at, image_rows, image_pitch, i) + j * C
            for group in range(0, GROUPS):
                g = tl.full([], group, tl.int64)
                for k in range(0, count):
                    p_stage = p_stages + k * _stages.STAGE
                    if tl.load(p_stage + _stages.S_VERTICAL) == 0:
                        _one_pixel(
                            p_stage,
                            p_parts,
                            p_state,
                            p_sums,
                            p_weights,
                            o_n,
                            m_n,
                            i,
                            j,
                            g,
                            state_size,
                            sums_size,
                            GROUPS,
                            GATED,
                            DEPTH,
                            OUT,
                        )
                        tl.debug_barrier()
                o_head = o_n * state_size + j * tl.load(p_last + _stages.S_MADE)
                o_head += _ring(p_last + _stages.S_OUT_AT, i)
                o_image = o_n * (C * size) + place
                o_noise = o_n * (PLANES * size) + place
                if K == 0:
                    b_u = tl.load(p_noise + (o_noise + g * size), m_n, other=0.5)
                    b_level = _draw.categorical(p_state, o_head + g * LEVELS, m_n, b_u, b_t, LEVELS, CHUNK, COLD)
                    b_level = _known_or(p_image, p_known, o_image + g * size, m_n, b_level)
                    tl.store(p_image + (o_image + g * size), b_level, m_n)
                    tl.store(p_state + (o_plane0 + g), _draw.level_value(b_level.to(b_t.dtype), LEVELS), m_n)
                else:
                    b_u = tl.load(p_noise + o_noise, m_n, other=0.5)
                    o_head += K + _draw.categorical(p_state, o_head, m_n, b_u, b_t, K, CHUNK, COLD)
                    b_x0 = _mixture_channel(
                        p_image,
                        p_known,
                        p_noise,
                        p_state,
                        o_image,
                        o_noise + size,
                        o_head,
                        o_plane0,
                        m_n,
                        0.0,
                        b_t,
                        C,
                        K,
                        LEVELS,
                    )
                    if C == 3:
                        b_tanh0, _ = _math.tanh(tl.load(p_state + (o_head + 2 * K), m_n, other=0.0))
                        b_tanh1, _ = _math.tanh(tl.load(p_state + (o_head + 5 * K), m_n, other=0.0))
                        b_tanh2, _ = _math.tanh(tl.load(p_state + (o_head + 8 * K), m_n, other=0.0))
                        b_x1 = _mixture_channel(
                            p_image,
                            p_known,
                            p_noise,
                            p_state,
                            o_image + size,
                            o_noise + 2 * size,
                            o_head + 3 * K,
                            o_plane0 + 1,
                            m_n,
                            b_tanh0 * b_x0,
                            b_t,
                            C,
                            K,
                            LEVELS,
                        )
                        _mixture_channel(
                            p_image,
                            p_known,
                            p_noise,
                            p_state,
                            o_image + 2 * size,
                            o_noise + 3 * size,
                            o_head + 6 * K,
                            o_plane0 + 2,
                            m_n,
                            b_tanh1 * b_x0 + b_tanh2 * b_x1,
                            b_t,
                            C,
                            K,
                            LEVELS,
                        )
                tl.debug_barrier()


# ---------------------------------------------------------------------------------------------------------- launchers


def _rows_of(n: int, device: torch.device) -> int:
    """Samples of a program: one until every multiprocessor has its program, then up to four."""
    programs = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    return min(4, triton.next_power_of_2(triton.cdiv(n, programs)))


def _tile(block: int, gated: bool, rows: int, wide: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Tile and options: as many weights in flight as registers hold, so that most stages take one trip to memory.

    16 warps of half the registers each spill: the loops' bounds and offsets alone take some 100.
    """
    out = min(64, max(16, triton.next_power_of_2(block)))
    weights = 8192 // rows // (2 if gated else 1) // (4 if wide else 1)
    tile = {"ROWS": rows, "DEPTH": weights // out, "OUT": out, "PIXELS": 16, "ROW_DEPTH": 16}
    return tile, {"num_warps": 8, "num_stages": 1, "maxnreg": 255}


def autoregressive_sampling(image, state, noise, known, tensors, plan, head, levels, temperature, begin, end) -> None:
    """Draws rows begin to end into image; contiguous tensors on one GPU, fp32 or fp64, which the caller has checked."""
    n, channels, height, columns = image.shape
    if image.numel() == 0 or begin >= end:
        return
    mixture = head == MIXTURE
    net = _stages.Network(tensors, plan, 1 if mixture else channels, noise, begin, end)
    mixtures = net.planes[-1].channels // (3 if channels == 1 else 10) if mixture else 0
    if state.shape != (n, net.state_size):
        raise ValueError(f"autoregressive_sampling: state must be {[n, net.state_size]}, got {list(state.shape)}")

    def records(rows):
        return torch.tensor(rows or [[0]], dtype=torch.int64).to(noise.device, non_blocking=True)

    empty = noise.new_zeros((n, 1))
    rows = _rows_of(n, noise.device)
    tile, options = _tile(net.block, net.gated, rows, noise.dtype == torch.float64)
    high = torch.tensor(temperature, dtype=torch.float32).item()
    with torch.cuda.device_of(noise):
        _draw_rows_kernel[(triton.cdiv(n, rows),)](
            image,
            state,
            noise.new_empty((n, net.sums_size)),
            noise,
            None if known is None else known.view(torch.uint8),
            torch.cat(net.weights) if net.weights else empty,
            torch.cat(net.biases),
            torch.cat(net.conditions, 1) if net.conditions else empty,
            records(net.stages),
            records(net.parts),
            n,
            height,
            columns,
            begin,
            end,
            len(net.stages),
            *net.image_ring,
            net.state_size,
            net.sums_size,
            net.condition_size,
            high,
            temperature - high,
            C=channels,
            LEVELS=levels,
            K=mixtures,
            COLD=temperature == 0,
            GATED=net.gated,
            CHUNK=min(1024, triton.next_power_of_2(mixtures or levels)),
            enable_fp_fusion=True,
            **tile,
            **options,
        )


# ------------------------------------------------------------------------------------------ ahead-of-time compilation


def kernel_specs() -> list[KernelSpec]:
    """What the launcher compiles: each head, gated and plain, few and many samples a program, in-painting, temperature
    0."""
    cases = [
        # label, type, C, levels, K, gated, block, rows, known, cold
        ("digits", "fp32", 1, 17, 0, False, 64, 1, False, False),
        ("digits gated", "fp32", 1, 17, 0, True, 64, 1, False, False),
        ("in-painted", "fp32", 1, 256, 0, True, 256, 1, True, True),
        ("rgb", "fp32", 3, 256, 0, False, 256, 2, True, False),
        ("rgb gated", "fp32", 3, 256, 0, True, 256, 4, False, False),
        ("mixture grey", "fp32", 1, 256, 5, False, 64, 4, False, False),
        ("mixture", "fp32", 3, 256, 10, True, 100, 1, True, False),
        ("one component", "fp32", 3, 256, 1, False, 64, 1, False, False),
        ("small", "fp32", 1, 2, 0, True, 4, 1, False, False),
        ("many levels", "fp32", 1, 65536, 0, False, 65536, 1, False, False),
        ("wide", "fp64", 1, 17, 0, True, 64, 1, False, False),
        ("wide mixture", "fp64", 3, 256, 10, False, 100, 4, True, False),
    ]
    specs = []
    for label, kind, channels, levels, mixtures, gated, block, rows, known, cold in cases:
        tile, options = _tile(block, gated, rows, kind == "fp64")
        constants = {"C": channels, "LEVELS": levels, "K": mixtures, "COLD": cold, "GATED": gated, **tile}
        constants["CHUNK"] = min(1024, triton.next_power_of_2(mixtures or levels))
        signature = {"p_image": "*i64"} | dict.fromkeys(("p_state", "p_sums", "p_noise"), f"*{kind}")
        signature |= {"p_known": "*u8" if known else "constexpr"}
        signature |= dict.fromkeys(("p_weights", "p_biases", "p_condition"), f"*{kind}")
        signature |= {"p_stages": "*i64", "p_parts": "*i64"} | dict.fromkeys(SIZES[:-2], "i32")
        signature |= {"temperature": "fp32", "temperature_low": "fp32"} | dict.fromkeys(constants, "constexpr")
        if not known:
            constants["p_known"] = None
        specs.append(
            KernelSpec(
                f"{label} {kind} rows {rows}",
                _draw_rows_kernel,
                signature,
                constants,
                options | {"enable_fp_fusion": True},
            )
        )
    return specs
