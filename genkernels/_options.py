"""The options of the operators, once: their names for users, and the numbers that schemas, Triton and C++ know them by.

``csrc/common/options.h`` has the same names and values; a test in ``tests/native`` holds the two to each other.
"""

from __future__ import annotations

import math
from enum import IntEnum


class Option(IntEnum):
    """A choice among named ways; a user says it by its word, the member's name in lower case."""

    @classmethod
    def words(cls) -> tuple[str, ...]:
        """The words, each at the place of its number."""
        return tuple(member.name.lower() for member in cls)


class ScaleMap(Option):
    """`affine_coupling`, `made`: σ as a function of s, and of a constant c where it has one."""

    EXP = 0  #: σ = exp(s)
    SIGMOID = 1  #: σ = sigmoid(s + 2)
    TANH = 2  #: σ = exp(c·tanh(s))
    ADDITIVE = 3  #: σ = 1, no log-scale among the parameters
    SIGMOID_FLOOR = 4  #: σ = sigmoid(s + 2) + c
    SOFTPLUS_FLOOR = 5  #: σ = softplus(s) + c
    SIGMOID_INVERSE = 6  #: σ = 1 / sigmoid(s + 2)
    ATAN = 7  #: σ = exp(c·atan(s))
    SOFT_CLIP = 8  #: σ = exp(s / (1 + |s| / c))


#: The scale maps that have a constant, with its default: for the soft clip −log(1e-3), σ then lies in (1e-3, 1e3).
SCALE_CONSTANTS = {
    ScaleMap.TANH: 1.0,
    ScaleMap.SIGMOID_FLOOR: 1e-3,
    ScaleMap.SOFTPLUS_FLOOR: 1e-3,
    ScaleMap.ATAN: 1.0,
    ScaleMap.SOFT_CLIP: -math.log(1e-3),
}


class Split(Option):
    """`affine_coupling`: which elements are transformed."""

    CHANNEL = 0
    CHECKERBOARD = 1
    NONE = 2  #: all of them, nothing passes
    ALTERNATE = 3  #: every second channel


class Layout(Option):
    """`affine_coupling`: how log-scales and shifts lie in params."""

    HALVES = 0
    INTERLEAVED = 1
    SHIFT_HALVES = 2  #: as HALVES, the shift first
    SHIFT_INTERLEAVED = 3  #: as INTERLEAVED, the shift first


class Activation(Option):
    """`masked_conv`, and the stages of `autoregressive_sampling`."""

    NONE = 0
    RELU = 1
    GATE = 2


class MaskType(Option):
    """`masked_conv`: whether a pixel sees itself (B) or not (A)."""

    A = 0
    B = 1

    @classmethod
    def words(cls) -> tuple[str, ...]:
        return tuple(member.name for member in cls)


class Region(Option):
    """`masked_conv`: which pixels one sees."""

    RASTER = 0
    VERTICAL = 1
    HORIZONTAL = 2


class Head(Option):
    """`autoregressive_sampling`: what the last plane holds."""

    CATEGORICAL = 0
    LOGISTIC_MIXTURE = 1


class Nonlinearity(Option):
    """`log_det_series`, `invertible_residual`: what stands between two layers of a residual block."""

    RELU = 0
    LEAKY_RELU = 1
    ELU = 2
    SILU = 3
    TANH = 4
    LIPSWISH = 5
    CLIPSWISH = 6


class Spline(Option):
    """`rational_quadratic_spline`: how raw numbers become bins and slopes."""

    NFLOWS = 0
    ZUKO = 1
    CIRCULAR = 2


#: LipSwish is Swish over the largest slope that it may have (Chen et al. 2019); CLipSwish is LipSwish of [x, -x] over
#: the norm of its slopes (Perugachi-Diaz et al. 2021).
LIPSWISH_DIVISOR, CLIPSWISH_DIVISOR = 1.1, 1.1 * 1.004

#: `invertible_residual`: converged samples leave the batch at every so many iterations, for looking for them makes the
#: host wait for a GPU.
INTERVAL = 4
