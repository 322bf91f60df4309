r"""The scale maps of an affine coupling and of an autoregressive transform: σ as a function of the log-scale s.

``csrc/common/scale_map.h`` has the same; what a kernel leaves unused of the results is never computed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from genkernels._options import ScaleMap
from genkernels.triton import _math

EXP = tl.constexpr(ScaleMap.EXP.value)
SIGMOID = tl.constexpr(ScaleMap.SIGMOID.value)
ADDITIVE = tl.constexpr(ScaleMap.ADDITIVE.value)
SIGMOID_FLOOR = tl.constexpr(ScaleMap.SIGMOID_FLOOR.value)
SOFTPLUS_FLOOR = tl.constexpr(ScaleMap.SOFTPLUS_FLOOR.value)
SIGMOID_INVERSE = tl.constexpr(ScaleMap.SIGMOID_INVERSE.value)
ATAN = tl.constexpr(ScaleMap.ATAN.value)
SOFT_CLIP = tl.constexpr(ScaleMap.SOFT_CLIP.value)


@triton.jit
def log_scale(b_s, MAP: tl.constexpr, CONSTANT: tl.constexpr):
    """(ℓ, ℓ'), ℓ = log σ, of every map but the additive one."""
    if MAP == EXP:
        return b_s, tl.full(b_s.shape, 1.0, b_s.dtype)
    elif MAP == SIGMOID:
        _, b_rest, b_log = _math.sigmoid(b_s + 2.0)
        return b_log, b_rest
    elif MAP == SIGMOID_INVERSE:
        _, b_rest, b_log = _math.sigmoid(b_s + 2.0)
        return -b_log, -b_rest
    elif MAP == SIGMOID_FLOOR or MAP == SOFTPLUS_FLOOR:
        b_sigma, b_slope = _above_floor(b_s, MAP, CONSTANT)
        # the logarithm is that of normal numbers
        return tl.where(b_sigma < float("inf"), _math.log(b_sigma), b_sigma), b_slope
    elif MAP == ATAN:
        b_c = _constant(b_s, CONSTANT)
        return b_c * _math.atan(b_s), b_c / (1.0 + b_s * b_s)
    elif MAP == SOFT_CLIP:
        b_d = 1.0 / (1.0 + tl.abs(b_s) / _constant(b_s, CONSTANT))
        return b_s * b_d, b_d * b_d
    else:
        b_tanh, b_slope = _math.tanh(b_s)
        b_c = _constant(b_s, CONSTANT)
        return b_c * b_tanh, b_c * b_slope


@triton.jit
def scale(b_s, MAP: tl.constexpr, CONSTANT: tl.constexpr, ROUGH: tl.constexpr):
    """(ℓ, σ, 1/σ, ℓ').

    ROUGH: σ is multiplied into a 16-bit number, so the hardware's exp will do for it: half the instructions, and good
    to 2^-17, the argument of a finite result being below 89. ℓ, which goes into the log-determinant, never is rough.
    """
    if MAP == EXP:
        return b_s, _exp(b_s, ROUGH), _exp(-b_s, ROUGH), 1.0
    elif MAP == SIGMOID:
        b_sigma, b_rest, b_log = _math.sigmoid(b_s + 2.0)
        return b_log, b_sigma, 1.0 + _exp(-(b_s + 2.0), ROUGH), b_rest
    elif MAP == SIGMOID_INVERSE:
        b_sigma, b_rest, b_log = _math.sigmoid(b_s + 2.0)
        return -b_log, 1.0 + _exp(-(b_s + 2.0), ROUGH), b_sigma, -b_rest
    elif MAP == SIGMOID_FLOOR or MAP == SOFTPLUS_FLOOR:
        b_sigma, _ = _above_floor(b_s, MAP, CONSTANT)
        b_log, b_slope = log_scale(b_s, MAP, CONSTANT)
        return b_log, b_sigma, 1.0 / b_sigma, b_slope
    elif MAP == ATAN or MAP == SOFT_CLIP:
        b_log, b_slope = log_scale(b_s, MAP, CONSTANT)
        return b_log, _exp(b_log, ROUGH), _exp(-b_log, ROUGH), b_slope
    else:
        b_log, b_slope = log_scale(b_s, MAP, CONSTANT)
        if ROUGH:
            return b_log, tl.exp(b_log), tl.exp(-b_log), b_slope
        elif CONSTANT <= 80.0:
            return b_log, _math.exp_bounded(b_log), _math.exp_bounded(-b_log), b_slope
        else:
            return b_log, _math.exp(b_log), _math.exp(-b_log), b_slope


@triton.jit
def _above_floor(b_s, MAP: tl.constexpr, CONSTANT: tl.constexpr):
    """(σ, ℓ') of the maps that add a floor."""
    b_c = _constant(b_s, CONSTANT)
    if MAP == SIGMOID_FLOOR:
        b_near, b_rest, _ = _math.sigmoid(b_s + 2.0)
        b_sigma = b_near + b_c
        return b_sigma, b_near * b_rest / b_sigma
    else:
        b_near, _, _ = _math.sigmoid(b_s)
        b_soft = tl.maximum(b_s, 0.0, propagate_nan=tl.PropagateNan.ALL) + _math.log1p(_math.exp(-tl.abs(b_s)))
        b_linear = b_s > 20.0  # as torch has it
        b_sigma = tl.where(b_linear, b_s, b_soft) + b_c
        return b_sigma, tl.where(b_linear, 1.0, b_near) / b_sigma


@triton.jit
def _constant(b_s, CONSTANT: tl.constexpr):
    """c in the type of s: as a bare number Triton would round it to fp32."""
    return tl.full(b_s.shape, CONSTANT, b_s.dtype)


@triton.jit
def _exp(b_x, ROUGH: tl.constexpr):
    return tl.exp(b_x) if ROUGH else _math.exp(b_x)
