r"""Discretised logistic mixture on the GPU: one launch forward (and a small sum), one backward, one for the draw.

.. math::
    \mathrm{nll} = -\sum_\mathrm{pixels} \log \sum_k \pi_k \prod_c P_{ck},\qquad
    P = \sigma(a) - \sigma(b) = \sigma(-near)\,\sigma(far)\,(1 - e^{-w})

Salimans et al., "PixelCNN++", 2017. In units of a level, i the level, M the mean, w the width of a bin in scales:
:math:`a = (i + ½ - M) w`, :math:`b = (i - ½ - M) w`, near = max(b, -a) the edge nearer to the mean, far = near + w. No
sigmoids are subtracted, and what stands under the logarithm lies within [1e-5, 1], so that the channels share one.

Layout. params [N, P, S], P = 3 K or 10 K rows of S pixels. A program takes BLOCK neighbouring pixels of one sample and
all components at once, a tile [KP, BLOCK], KP being K rounded up to a power of two: each row of params is read once, in
whole lines, each component's numbers stay in registers, and the softmax over components is a reduction within the tile.
Offsets are 64-bit.

Saved for backward: the inputs alone; the tile holds all that a second log-sum-exp would need. Bytes: forward P S read,
backward P S read and P S written. Flops a component and pixel, C = 3: 90 forward, 160 backward, some 10 to 25 a byte:
near the balance of an H100.

The sum over pixels: in a fixed order within a program, its result into [N, blocks], which torch adds up in a fixed
order: no atomics. Arithmetic in fp32 (fp64 for fp64), rounded once at the store.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from genkernels.triton import _draw, _math
from genkernels.triton._recording import SampleCalls, meta

# the least e^-|near| that counts where the mean lies within the bin: no 0/0 at any width, and its cube is a normal
# number
FLOOR_32 = tl.constexpr(1e-12)
FLOOR_64 = tl.constexpr(1e-100)
# sinh(h)/h = sum of h^2k / (2k+1)!
SINHC_SERIES = tl.constexpr(tuple(1 / math.factorial(2 * k + 1) for k in range(8)))


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _level(b_x, LEVELS: tl.constexpr):
    """(level, its x) of x in [-1, 1]: the nearest, the ends beyond."""
    HALF: tl.constexpr = 0.5 * (LEVELS - 1)
    b_position = tl.maximum((b_x + 1.0) * HALF, 0.0, propagate_nan=tl.PropagateNan.ALL)
    b_position = tl.minimum(b_position, 2 * HALF, propagate_nan=tl.PropagateNan.ALL)
    b_level = tl.floor(b_position + 0.5)
    return b_level, b_level * (1 / HALF) - 1.0


@triton.jit
def _channel(b_level, b_mean, b_given, LEVELS: tl.constexpr):
    """One channel's log P = linear + log(numerator / denominator) and its derivatives by the mean and by the log-scale.

    What a kernel leaves unused is never computed.
    """
    HALF: tl.constexpr = 0.5 * (LEVELS - 1)
    LOG_HALF: tl.constexpr = tl.constexpr(_log_half(LEVELS))
    b_s = tl.maximum(b_given, _draw.LOWEST_LOG_SCALE, propagate_nan=tl.PropagateNan.ALL)
    b_shrink = _math.exp(-b_s)
    b_width = b_shrink * (1 / HALF)
    b_centre = (b_mean + 1.0) * HALF
    b_upper = (b_level + 0.5 - b_centre) * b_width
    b_lower = (b_level - 0.5 - b_centre) * b_width
    m_lowest = b_level <= 0
    m_highest = b_level >= LEVELS - 1
    m_end = m_lowest | m_highest
    m_above = m_highest | ((b_lower > -b_upper) & (b_level > 0))
    b_near = tl.where(m_above, b_lower, -b_upper)
    b_far = tl.where(m_above, b_upper, -b_lower)
    m_inside = b_near < 0
    b_u = _math.exp(-0.5 * b_width)
    b_u2 = b_u * b_u
    b_w = tl.where(m_end, 0.0, b_u2)
    b_e = _math.exp(-tl.abs(b_near))
    FLOOR: tl.constexpr = FLOOR_64 if b_e.dtype == tl.float64 else FLOOR_32
    b_e = tl.where(m_inside & (b_e < FLOOR), FLOOR, b_e)
    b_e_inside = tl.where(m_inside, b_e, 1.0)
    m_narrow = b_width < 1
    b_h2 = tl.where(m_narrow, 0.25 * b_width * b_width, 0.25)
    TERMS: tl.constexpr = 7 if b_e.dtype == tl.float64 else 3
    b_sinhc = b_h2 * SINHC_SERIES[TERMS] + SINHC_SERIES[TERMS - 1]
    for k in tl.static_range(TERMS - 2, -1, -1):
        b_sinhc = b_sinhc * b_h2 + SINHC_SERIES[k]
    b_whole = 1.0 - b_u2
    b_other = tl.where(m_inside, b_e + b_w, 1.0 + b_e * b_w)
    b_both = (1.0 + b_e) * b_other

    b_linear = tl.where(m_end, 0.0, -b_s - LOG_HALF) - tl.where(m_inside, 0.0, b_near)
    b_numerator = tl.where(m_end, 1.0, tl.where(m_narrow, b_u * b_sinhc, b_whole)) * b_e_inside
    b_denominator = b_both * tl.where(m_end | m_narrow, 1.0, b_width)

    b_difference = tl.where(m_narrow, b_sinhc, b_whole)
    b_inverse = _math.reciprocal_of_sum(b_both * b_difference, 0.0)
    b_from_near = b_e_inside * b_other * (b_difference * b_inverse)
    b_from_far = tl.where(m_inside, b_w, b_e * b_w) * (1.0 + b_e) * (b_difference * b_inverse)
    b_inner = tl.where(m_narrow, b_u, b_u2 * b_width) * (b_both * b_inverse)
    b_slope = b_from_near - b_from_far
    b_by_mean = b_shrink * tl.where(m_above, b_slope, -b_slope)
    b_by_log_scale = b_near * b_from_near - tl.where(m_end, 0.0, b_far * b_from_far + b_inner)
    b_by_log_scale = tl.where(b_given < _draw.LOWEST_LOG_SCALE, 0.0, b_by_log_scale)
    return b_linear, b_numerator, b_denominator, b_by_mean, b_by_log_scale


@triton.constexpr_function
def _log_half(levels):
    return math.log(0.5 * (levels - 1))


@triton.jit
def _tile(pixels, blocks, C: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr):
    """Sample, offsets [1, BLOCK] into x and [KP, BLOCK] into params, of their first rows, masks alike, and the rows'
    distance."""
    pid = tl.program_id(0)
    sample = (pid // blocks).to(tl.int64)
    size = pixels.to(tl.int64)
    o_pixel = ((pid % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :]
    o_k = tl.arange(0, KP).to(tl.int64)[:, None]
    ROWS: tl.constexpr = K * (3 if C == 1 else 10)
    m_pixel = o_pixel < size
    return (
        sample,
        o_pixel + sample * size * C,
        o_pixel + (sample * ROWS + o_k) * size,
        m_pixel,
        m_pixel & (o_k < K),
        size,
    )


@triton.jit(do_not_specialize=("pixels", "blocks"))
def _nll_kernel(
    p_params,
    p_x,
    p_nll,
    pixels,
    blocks,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """nll [N, blocks] from params [N, P, S] and x [N, C, S]."""
    _, o_x, o, m_pixel, m, size = _tile(pixels, blocks, C, K, KP, BLOCK)
    WIDTH: tl.constexpr = 2 if C == 1 else 3
    row = size * K
    b_logit = _math.widened(tl.load(p_params + o, m, other=0.0))
    b_logit = tl.where(m | ~m_pixel, b_logit, -float("inf"))
    b_best = tl.max(b_logit, axis=0)[None, :]
    b_logit -= b_best
    b_level0, b_x0 = _level(tl.load(p_x + o_x, m_pixel, other=0.0), LEVELS)
    b_mean = _math.widened(tl.load(p_params + o + row, m, other=0.0))
    b_s = _math.widened(tl.load(p_params + o + 2 * row, m, other=0.0))
    b_linear, b_up, b_down, _, _ = _channel(b_level0, b_mean, b_s, LEVELS)
    if C == 3:
        b_level1, b_x1 = _level(tl.load(p_x + o_x + size, m_pixel, other=0.0), LEVELS)
        b_tanh, _ = _math.tanh(_math.widened(tl.load(p_params + o + 3 * row, m, other=0.0)))
        b_mean = _math.widened(tl.load(p_params + o + (1 + WIDTH) * row, m, other=0.0)) + b_tanh * b_x0
        b_s = _math.widened(tl.load(p_params + o + (2 + WIDTH) * row, m, other=0.0))
        b_l1, b_up1, b_down1, _, _ = _channel(b_level1, b_mean, b_s, LEVELS)
        b_level2, _ = _level(tl.load(p_x + o_x + 2 * size, m_pixel, other=0.0), LEVELS)
        b_tanh, _ = _math.tanh(_math.widened(tl.load(p_params + o + 6 * row, m, other=0.0)))
        b_tanh2, _ = _math.tanh(_math.widened(tl.load(p_params + o + 9 * row, m, other=0.0)))
        b_mean = _math.widened(tl.load(p_params + o + 7 * row, m, other=0.0)) + b_tanh * b_x0 + b_tanh2 * b_x1
        b_s = _math.widened(tl.load(p_params + o + 8 * row, m, other=0.0))
        b_l2, b_up2, b_down2, _, _ = _channel(b_level2, b_mean, b_s, LEVELS)
        b_linear += b_l1 + b_l2
        b_up *= b_up1 * b_up2
        b_down *= b_down1 * b_down2
    b_joint = b_logit + b_linear + _math.log(b_up * _math.reciprocal_of_sum(b_down, 0.0))
    b_top = tl.max(b_joint, axis=0)
    b_evidence = tl.sum(_math.exp(b_joint - b_top[None, :]), axis=0)
    b_prior = tl.sum(_math.exp(b_logit), axis=0)
    b_nll = _math.log(b_prior) - (b_top + _math.log(b_evidence))
    b_nll = tl.where(tl.reshape(m_pixel, (BLOCK,)), b_nll, 0.0)
    tl.store(p_nll + tl.program_id(0).to(tl.int64), tl.sum(b_nll, axis=0))


@triton.jit(do_not_specialize=("pixels", "blocks"))
def _backward_kernel(
    p_grad,
    p_params,
    p_x,
    p_out,
    pixels,
    blocks,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [N, P, S], the gradient by params, from grad [N] and the forward's inputs."""
    sample, o_x, o, m_pixel, m, size = _tile(pixels, blocks, C, K, KP, BLOCK)
    WIDTH: tl.constexpr = 2 if C == 1 else 3
    row = size * K
    b_g = tl.load(p_grad + sample)
    b_logit = _math.widened(tl.load(p_params + o, m, other=0.0))
    b_logit = tl.where(m | ~m_pixel, b_logit, -float("inf"))
    b_logit -= tl.max(b_logit, axis=0)[None, :]
    b_level0, b_x0 = _level(tl.load(p_x + o_x, m_pixel, other=0.0), LEVELS)
    b_mean = _math.widened(tl.load(p_params + o + row, m, other=0.0))
    b_s = _math.widened(tl.load(p_params + o + 2 * row, m, other=0.0))
    b_linear, b_up, b_down, b_m0, b_s0 = _channel(b_level0, b_mean, b_s, LEVELS)
    if C == 3:
        b_level1, b_x1 = _level(tl.load(p_x + o_x + size, m_pixel, other=0.0), LEVELS)
        b_tanh0, b_sech0 = _math.tanh(_math.widened(tl.load(p_params + o + 3 * row, m, other=0.0)))
        b_mean = _math.widened(tl.load(p_params + o + (1 + WIDTH) * row, m, other=0.0)) + b_tanh0 * b_x0
        b_s = _math.widened(tl.load(p_params + o + (2 + WIDTH) * row, m, other=0.0))
        b_l1, b_up1, b_down1, b_m1, b_s1 = _channel(b_level1, b_mean, b_s, LEVELS)
        b_level2, _ = _level(tl.load(p_x + o_x + 2 * size, m_pixel, other=0.0), LEVELS)
        b_tanh1, b_sech1 = _math.tanh(_math.widened(tl.load(p_params + o + 6 * row, m, other=0.0)))
        b_tanh2, b_sech2 = _math.tanh(_math.widened(tl.load(p_params + o + 9 * row, m, other=0.0)))
        b_mean = _math.widened(tl.load(p_params + o + 7 * row, m, other=0.0)) + b_tanh1 * b_x0 + b_tanh2 * b_x1
        b_s = _math.widened(tl.load(p_params + o + 8 * row, m, other=0.0))
        b_l2, b_up2, b_down2, b_m2, b_s2 = _channel(b_level2, b_mean, b_s, LEVELS)
        b_linear += b_l1 + b_l2
        b_up *= b_up1 * b_up2
        b_down *= b_down1 * b_down2
    b_joint = b_logit + b_linear + _math.log(b_up * _math.reciprocal_of_sum(b_down, 0.0))
    b_joint = _math.exp(b_joint - tl.max(b_joint, axis=0)[None, :])
    b_weight = b_joint * (-b_g / tl.sum(b_joint, axis=0))[None, :]
    b_prior = _math.exp(b_logit)
    b_share = b_weight - b_prior * (-b_g / tl.sum(b_prior, axis=0))[None, :]

    OUT: tl.constexpr = p_out.dtype.element_ty
    tl.store(p_out + o, b_share.to(OUT), m)
    tl.store(p_out + o + row, (b_weight * b_m0).to(OUT), m)
    tl.store(p_out + o + 2 * row, (b_weight * b_s0).to(OUT), m)
    if C == 3:
        b_m1 *= b_weight
        b_m2 *= b_weight
        tl.store(p_out + o + 3 * row, (b_m1 * b_x0 * b_sech0).to(OUT), m)
        tl.store(p_out + o + 4 * row, b_m1.to(OUT), m)
        tl.store(p_out + o + 5 * row, (b_weight * b_s1).to(OUT), m)
        tl.store(p_out + o + 6 * row, (b_m2 * b_x0 * b_sech1).to(OUT), m)
        tl.store(p_out + o + 7 * row, b_m2.to(OUT), m)
        tl.store(p_out + o + 8 * row, (b_weight * b_s2).to(OUT), m)
        tl.store(p_out + o + 9 * row, (b_m2 * b_x1 * b_sech2).to(OUT), m)


@triton.jit(do_not_specialize=("pixels", "blocks", "temperature", "temperature_low"))
def _sample_kernel(
    p_params,
    p_noise,
    p_index,
    pixels,
    blocks,
    temperature,
    temperature_low,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    K: tl.constexpr,
    COLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """index [N, C, S] int64 from params [N, P, S] and noise [N, 1 + C, S]; the temperature in two parts, for fp64."""
    _, o_index, o, m2, _, size = _tile(pixels, blocks, C, K, 1, BLOCK)
    o_index, o, m = tl.reshape(o_index, (BLOCK,)), tl.reshape(o, (BLOCK,)), tl.reshape(m2, (BLOCK,))
    o_noise = o_index + (tl.program_id(0) // blocks).to(tl.int64) * size
    b_u = tl.load(p_noise + o_noise, m, other=0.5)
    b_t = tl.zeros_like(b_u) + temperature + temperature_low
    b_most = _math.widened(tl.load(p_params + o, m, other=0.0))
    b_chosen = tl.zeros((BLOCK,), tl.int64)
    b_ordered = b_most == b_most
    for k in range(1, K):
        b_logit = _math.widened(tl.load(p_params + o + k * size, m, other=0.0))
        b_ordered &= b_logit == b_logit
        b_chosen = tl.where(b_logit > b_most, k, b_chosen)
        b_most = tl.where(b_logit > b_most, b_logit, b_most)
    if COLD:
        b_chosen = tl.where(b_ordered, b_chosen, 0)
    else:
        b_total = tl.zeros((BLOCK,), tl.float64)
        for k in range(0, K):
            b_logit = _math.widened(tl.load(p_params + o + k * size, m, other=0.0))
            b_total += _math.exp((b_logit - b_most) / b_t).to(tl.float64)
        b_total *= b_u.to(tl.float64)
        b_below = tl.zeros((BLOCK,), tl.float64)
        b_chosen = tl.zeros((BLOCK,), tl.int64)
        for k in range(0, K - 1):
            b_logit = _math.widened(tl.load(p_params + o + k * size, m, other=0.0))
            b_below += _math.exp((b_logit - b_most) / b_t).to(tl.float64)
            b_chosen += (b_below <= b_total).to(tl.int64)
    row = size * K
    o += (K + b_chosen) * size
    b_mean = _math.widened(tl.load(p_params + o, m, other=0.0))
    b_s = _math.widened(tl.load(p_params + o + row, m, other=0.0))
    b_index, b_x0 = _draw.logistic_level(b_mean, b_s, tl.load(p_noise + o_noise + size, m, other=0.5), b_t, LEVELS)
    tl.store(p_index + o_index, b_index, m)
    if C == 3:
        b_tanh, _ = _math.tanh(_math.widened(tl.load(p_params + o + 2 * row, m, other=0.0)))
        b_mean = _math.widened(tl.load(p_params + o + 3 * row, m, other=0.0)) + b_tanh * b_x0
        b_s = _math.widened(tl.load(p_params + o + 4 * row, m, other=0.0))
        b_index, b_x1 = _draw.logistic_level(
            b_mean, b_s, tl.load(p_noise + o_noise + 2 * size, m, other=0.5), b_t, LEVELS
        )
        tl.store(p_index + o_index + size, b_index, m)
        b_tanh, _ = _math.tanh(_math.widened(tl.load(p_params + o + 5 * row, m, other=0.0)))
        b_mean = _math.widened(tl.load(p_params + o + 6 * row, m, other=0.0)) + b_tanh * b_x0
        b_tanh, _ = _math.tanh(_math.widened(tl.load(p_params + o + 8 * row, m, other=0.0)))
        b_mean += b_tanh * b_x1
        b_s = _math.widened(tl.load(p_params + o + 7 * row, m, other=0.0))
        b_index, _ = _draw.logistic_level(b_mean, b_s, tl.load(p_noise + o_noise + 3 * size, m, other=0.5), b_t, LEVELS)
        tl.store(p_index + o_index + 2 * size, b_index, m)


# ---------------------------------------------------------------------------------------------------------- launchers


def _constants(params: int, channels: int, levels: int) -> dict[str, int]:
    return {"C": channels, "LEVELS": levels, "K": params // (3 if channels == 1 else 10)}


def _tile_of(mixtures: int) -> tuple[dict[str, int], int]:
    """Tile and warps, by K alone: two numbers a thread, since four spill in fp64 and 16 warps of them in fp32."""
    rows = max(2, triton.next_power_of_2(mixtures))
    block = max(2, min(128, 512 // rows))
    return {"KP": rows, "BLOCK": block}, min(32, max(4, rows * block // 64))


def _blocks(pixels: Tensor, block: int) -> tuple[int, int]:
    """Pixels a sample, and programs for them."""
    count = math.prod(pixels.shape[2:])
    return count, triton.cdiv(count, block)


def logistic_mixture_nll(params: Tensor, x: Tensor, levels: int) -> Tensor:
    """nll [N] of contiguous tensors on one GPU; the caller has checked them, x is fp32 (fp64 beside fp64 params)."""
    if x.numel() == 0:
        return x.new_zeros(x.shape[0])
    constants = _constants(params.shape[1], x.shape[1], levels)
    tile, warps = _tile_of(constants["K"])
    pixels, blocks = _blocks(x, tile["BLOCK"])
    partial = x.new_empty(x.shape[0], blocks)
    with torch.cuda.device_of(params):
        _nll_kernel[(x.shape[0] * blocks,)](
            params, x, partial, pixels, blocks, **constants, **tile, num_warps=warps, enable_fp_fusion=True
        )
    return partial.sum(1)


def logistic_mixture_nll_backward(grad: Tensor, params: Tensor, x: Tensor, levels: int) -> Tensor:
    """The gradient by params. Conditions as for `logistic_mixture_nll`."""
    out = torch.empty_like(params, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return out
    constants = _constants(params.shape[1], x.shape[1], levels)
    tile, warps = _tile_of(constants["K"])
    pixels, blocks = _blocks(x, tile["BLOCK"])
    with torch.cuda.device_of(params):
        _backward_kernel[(x.shape[0] * blocks,)](
            grad, params, x, out, pixels, blocks, **constants, **tile, num_warps=warps, enable_fp_fusion=True
        )
    return out


_SAMPLE_BLOCK = 128


def logistic_mixture_sample(params: Tensor, noise: Tensor, levels: int, temperature: float) -> Tensor:
    """Level indices [N, C, *spatial]. Conditions as for `logistic_mixture_nll`."""
    channels = noise.shape[1] - 1
    index = noise.new_empty((noise.shape[0], channels, *noise.shape[2:]), dtype=torch.int64)
    if index.numel() == 0:
        return index
    pixels, blocks = _blocks(noise, _SAMPLE_BLOCK)
    high = torch.tensor(temperature, dtype=torch.float32).item()
    with torch.cuda.device_of(params):
        _sample_kernel[(noise.shape[0] * blocks,)](
            params,
            noise,
            index,
            pixels,
            blocks,
            high,
            temperature - high,
            **_constants(params.shape[1], channels, levels),
            COLD=temperature == 0,
            BLOCK=_SAMPLE_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return index


# ------------------------------------------------------------------------------------------ ahead-of-time compilation


def sample_calls() -> SampleCalls:
    """Either number of channels, every kind of storage, few and many components."""
    f32, kinds = (
        torch.float32,
        {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"},
    )
    cases = [(3, 10, dtype) for dtype in kinds] + [(1, 5, dtype) for dtype in kinds]
    cases += [(3, 1, f32), (1, 32, f32), (3, 100, f32)]
    calls = []
    for channels, mixtures, dtype in cases:
        work = torch.promote_types(dtype, f32)
        params = meta(2, mixtures * (3 if channels == 1 else 10), 32, 32, dtype=dtype)
        x, grad = meta(2, channels, 32, 32, dtype=work), meta(2, dtype=work)
        noise = meta(2, 1 + channels, 32, 32, dtype=work)
        label = f"C{channels} K{mixtures} {kinds[dtype]}"
        calls.append((label, partial(logistic_mixture_nll, params, x, 256)))
        calls.append((label, partial(logistic_mixture_nll_backward, grad, params, x, 256)))
        calls.append((label, partial(logistic_mixture_sample, params, noise, 256, 1.0)))
    return calls
