"""Activations with first and second derivative, of one value."""

from __future__ import annotations

import triton
import triton.language as tl

from genkernels._options import CLIPSWISH_DIVISOR, LIPSWISH_DIVISOR, Nonlinearity
from genkernels.triton import _math

RELU = tl.constexpr(Nonlinearity.RELU.value)
LEAKY_RELU = tl.constexpr(Nonlinearity.LEAKY_RELU.value)
ELU = tl.constexpr(Nonlinearity.ELU.value)
SILU = tl.constexpr(Nonlinearity.SILU.value)
TANH = tl.constexpr(Nonlinearity.TANH.value)
LIPSWISH = tl.constexpr(Nonlinearity.LIPSWISH.value)
CLIPSWISH = tl.constexpr(Nonlinearity.CLIPSWISH.value)
ONE = tl.constexpr(1.0)
OVER_LIPSWISH, OVER_CLIPSWISH = tl.constexpr(1 / LIPSWISH_DIVISOR), tl.constexpr(1 / CLIPSWISH_DIVISOR)


@triton.jit
def _expm1(b_z):
    """e^z − 1 for z ≤ 0."""
    b_n, b_small = _math._reduce(tl.maximum(b_z, -80.0, propagate_nan=tl.PropagateNan.ALL))
    b_power = _math._times_power(tl.full(b_z.shape, 1.0, b_z.dtype), b_n)
    return b_power * b_small + (b_power - 1.0)


@triton.jit
def _steepness(parameter, ACTIVATION: tl.constexpr):
    """What z is multiplied by, and what divides the result, of those that have a sigmoid."""
    if ACTIVATION == LIPSWISH:
        return parameter, OVER_LIPSWISH
    elif ACTIVATION == CLIPSWISH:
        return parameter, OVER_CLIPSWISH
    else:
        return tl.full((), 1.0, parameter.dtype), ONE


@triton.jit
def curve(b_z, parameter, ACTIVATION: tl.constexpr):
    """Value and slope."""
    if ACTIVATION == RELU:
        b_value = tl.where(b_z <= 0, 0.0, b_z)
        b_slope = tl.where(b_z > 0, 1.0, 0.0).to(b_z.dtype)
    elif ACTIVATION == LEAKY_RELU:
        b_value = tl.where(b_z > 0, b_z, parameter * b_z)
        b_slope = tl.where(b_z > 0, 1.0, tl.zeros_like(b_z) + parameter)
    elif ACTIVATION == ELU:
        b_low = tl.minimum(b_z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        b_value = tl.where(b_z > 0, b_z, parameter * _expm1(b_low))
        b_slope = tl.where(b_z > 0, 1.0, parameter * _math.exp(b_low))
    elif ACTIVATION == TANH:
        b_value, b_slope = _math.tanh(b_z)
    else:
        beta, over = _steepness(parameter, ACTIVATION)
        b_up, b_down, _ = _math.sigmoid(beta * b_z)
        b_value = b_z * b_up * over
        b_slope = b_up * (1.0 + beta * b_z * b_down) * over
    return b_value, b_slope


@triton.jit
def curve_changes(b_z, parameter, ACTIVATION: tl.constexpr):
    """The curvature, and the derivatives of value and slope by the parameter."""
    b_zero = tl.zeros_like(b_z)
    if ACTIVATION == LEAKY_RELU:
        b_by = tl.minimum(b_z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return b_zero, b_by, tl.where(b_z <= 0, 1.0, b_zero)
    elif ACTIVATION == ELU:
        b_low = tl.minimum(b_z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        b_exp = tl.where(b_z > 0, 0.0, _math.exp(b_low))
        return parameter * b_exp, tl.where(b_z > 0, 0.0, _expm1(b_low)), b_exp
    elif ACTIVATION == TANH:
        b_tanh, b_slope = _math.tanh(b_z)
        return -2.0 * b_tanh * b_slope, b_zero, b_zero
    elif ACTIVATION == RELU:
        return b_zero, b_zero, b_zero
    else:
        beta, over = _steepness(parameter, ACTIVATION)
        b_up, b_down, _ = _math.sigmoid(beta * b_z)
        b_both = b_up * b_down * over
        b_bend = b_both * (2.0 + beta * b_z * (b_down - b_up))
        if ACTIVATION == SILU:
            return b_bend, b_zero, b_zero
        else:
            return beta * b_bend, b_z * b_z * b_both, b_z * b_bend
