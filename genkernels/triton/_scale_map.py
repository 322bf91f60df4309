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


@triton.jit
def log_scale(b_s, MAP: tl.constexpr):
    """(ℓ, ℓ'), ℓ = log σ, of every map but the additive one."""
    if MAP == EXP:
        return b_s, tl.full(b_s.shape, 1.0, b_s.dtype)
    elif MAP == SIGMOID:
        _, b_rest, b_log = _math.sigmoid(b_s + 2.0)
        return b_log, b_rest
    else:
        return _math.tanh(b_s)


@triton.jit
def scale(b_s, MAP: tl.constexpr, ROUGH: tl.constexpr):
    """(ℓ, σ, 1/σ, ℓ').

    ROUGH: σ is multiplied into a 16-bit number, so the hardware's exp will do for it: half the instructions, and good
    to 2^-17, the argument of a finite result being below 89. ℓ, which goes into the log-determinant, never is rough.
    """
    if MAP == EXP:
        return b_s, _exp(b_s, ROUGH), _exp(-b_s, ROUGH), 1.0
    elif MAP == SIGMOID:
        b_sigma, b_rest, b_log = _math.sigmoid(b_s + 2.0)
        return b_log, b_sigma, 1.0 + _exp(-(b_s + 2.0), ROUGH), b_rest
    else:
        b_log, b_slope = _math.tanh(b_s)
        if ROUGH:
            return b_log, tl.exp(b_log), tl.exp(-b_log), b_slope
        else:
            return b_log, _math.exp_bounded(b_log), _math.exp_bounded(-b_log), b_slope


@triton.jit
def _exp(b_x, ROUGH: tl.constexpr):
    return tl.exp(b_x) if ROUGH else _math.exp(b_x)
