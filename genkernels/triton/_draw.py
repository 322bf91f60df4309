r"""Draws of a pixel from the parameters that a network gave for it, for Triton kernels: the rule of
`genkernels.reference._draw`.

Each draw inverts a cumulative distribution at given uniform noise, so whoever computes the same parameters draws the
same integers. Weights in the parameters' type, their sums in fp64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from genkernels.triton import _math

LOWEST_LOG_SCALE = tl.constexpr(-7.0)
EDGE_32 = tl.constexpr(2.0**-24)  # the smallest step away from 0 and from 1
EDGE_64 = tl.constexpr(2.0**-53)


@triton.jit
def level_value(b_level, LEVELS: tl.constexpr):
    """How a network sees a level, a floating-point number."""
    return 2.0 * b_level / (LEVELS - 1) - 1.0


@triton.jit
def logistic_level(b_mean, b_s, b_u, b_t, LEVELS: tl.constexpr):
    """(level, its x): the logistic's distribution function inverted at u, rounded to a level."""
    EDGE: tl.constexpr = EDGE_64 if b_u.dtype == tl.float64 else EDGE_32
    b_u = tl.minimum(tl.maximum(b_u, EDGE), 1.0 - EDGE)
    b_s = tl.maximum(b_s, LOWEST_LOG_SCALE, propagate_nan=tl.PropagateNan.ALL)
    b_value = b_mean + _math.exp(b_s) * b_t * (_math.log(b_u) - _math.log(1.0 - b_u))
    b_value = tl.maximum(b_value, -1.0, propagate_nan=tl.PropagateNan.ALL)
    b_value = tl.minimum(b_value, 1.0, propagate_nan=tl.PropagateNan.ALL)
    b_level = tl.floor((b_value + 1.0) * (0.5 * (LEVELS - 1)) + 0.5)
    return tl.where(b_level == b_level, b_level, 0.0).to(tl.int64), level_value(b_level, LEVELS)


@triton.jit
def categorical(p_logits, o, m, b_u, b_t, COUNT: tl.constexpr, CHUNK: tl.constexpr, COLD: tl.constexpr):
    """int64 [B]: the category whose share of the cumulative distribution of softmax(logits / t) holds u [B].

    The COUNT logits of each lie side by side from o [B] on, and are read CHUNK at a time. COLD: the first of the
    largest. NaN: 0.
    """
    B: tl.constexpr = o.shape[0]
    b_most = tl.full((B,), float("-inf"), b_u.dtype)
    b_first = tl.zeros((B,), tl.int64)
    b_ordered = b_u == b_u
    for k in range(0, COUNT, CHUNK):
        o_k = tl.arange(0, CHUNK).to(tl.int64) + k
        b_logit = tl.load(p_logits + (o[:, None] + o_k[None, :]), m[:, None] & (o_k < COUNT)[None, :], float("-inf"))
        b_top = tl.max(b_logit, axis=1)
        b_at = tl.min(tl.where(b_logit == b_top[:, None], o_k[None, :], COUNT - 1), axis=1)
        b_ordered &= tl.max((b_logit != b_logit).to(tl.int32), axis=1) == 0
        b_first = tl.where(b_top > b_most, b_at, b_first)
        b_most = tl.where(b_top > b_most, b_top, b_most)
    if COLD:
        return tl.where(b_ordered, b_first, 0)
    else:
        b_total = tl.zeros((B,), tl.float64)
        for k in range(0, COUNT, CHUNK):
            b_total += tl.sum(_weights(p_logits, o, m, k, b_most, b_t, COUNT, CHUNK), axis=1)
        b_level = b_u.to(tl.float64) * b_total
        b_before = tl.zeros((B,), tl.float64)
        b_chosen = tl.zeros((B,), tl.int64)
        for k in range(0, COUNT, CHUNK):
            b_w = _weights(p_logits, o, m, k, b_most, b_t, COUNT, CHUNK)
            b_below = b_before[:, None] + tl.cumsum(b_w, axis=1)
            m_passed = (b_below <= b_level[:, None]) & (tl.arange(0, CHUNK) + k < COUNT - 1)[None, :]
            b_chosen += tl.sum(m_passed.to(tl.int32), axis=1).to(tl.int64)
            b_before += tl.sum(b_w, axis=1)
        return b_chosen


@triton.jit
def _weights(p_logits, o, m, k, b_most, b_t, COUNT: tl.constexpr, CHUNK: tl.constexpr):
    """exp((logit - most) / t) of CHUNK categories from k on, fp64 [B, CHUNK]; 0 beyond the last."""
    o_k = tl.arange(0, CHUNK).to(tl.int64) + k
    m_k = m[:, None] & (o_k < COUNT)[None, :]
    b_logit = tl.load(p_logits + (o[:, None] + o_k[None, :]), m_k, other=0.0)
    return tl.where(m_k, _math.exp((b_logit - b_most[:, None]) / b_t[:, None]), 0.0).to(tl.float64)
