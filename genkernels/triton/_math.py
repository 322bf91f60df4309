r"""Elementary functions for Triton kernels, good to about one unit in the last place in fp32 and in fp64.

Why not Triton's own: `tl.exp` in fp32 is ``ex2.approx(x * log2(e))``, whose argument is rounded, so its relative error
grows as :math:`|x|\,2^{-24}`: 40 units in the last place at x = 80. Triton has no log1p and no tanh. libdevice, which
is accurate, does not run in Triton's interpreter: what is tested would not be what runs.

All rests on one reduction, :math:`x = n\ln 2 + r` with :math:`|r| \le \tfrac12\ln 2`, one Taylor series,
:math:`e^r - 1`, and arithmetic on exponent bits. There is no branch and no approximate instruction except the
seed of the reciprocal. Kernels that call these are compiled with ``enable_fp_fusion``, so that a * b + c rounds once.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)

# Adding 1.5 * 2^(bits of the mantissa) and taking it off again rounds to the nearest integer.
ROUND_32 = tl.constexpr(12582912.0)
ROUND_64 = tl.constexpr(6755399441055744.0)

# ln 2 in two parts: the first has so few bits that its product with n is exact.
LN2_HIGH_32 = tl.constexpr(0.693359375)
LN2_LOW_32 = tl.constexpr(-2.12194440054690583e-4)
LN2_HIGH_64 = tl.constexpr(6.93147180369123816490e-01)
LN2_LOW_64 = tl.constexpr(1.90821492927058770002e-10)

# Where e^x is a normal number: below, exp gives 0; above, infinity.
EXP_RANGE_32 = tl.constexpr((-87.3365, 88.72283))
EXP_RANGE_64 = tl.constexpr((-708.396, 709.782712893384))

# Series coefficients, lowest first; the first left out adds less than a tenth of a unit.
EXP_SERIES = tl.constexpr(tuple(1 / math.factorial(k) for k in range(14)))  # e^r = sum of r^k / k!
ATANH_SERIES = tl.constexpr(tuple(1 / (2 * k + 1) for k in range(16)))  # atanh(r) = r * sum of r^2k / (2k+1)

QUARTER_PI = tl.constexpr(math.pi / 4)

SQRT_HALF_BITS_32 = tl.constexpr(0x3F3504F3)
SQRT_HALF_BITS_64 = tl.constexpr(0x3FE6A09E667F3BCD)


@triton.jit
def widened(b_x):
    """The number in the type that is computed in."""
    return b_x if b_x.dtype == tl.float64 else b_x.to(tl.float32)


@triton.jit
def reciprocal_of_sum(b_a, b_b):
    """1 / (a + b) for a >= b >= 0 and a sum up to 2^100, the rounding of the sum made good.

    An IEEE division would branch for each element, and know nothing of that rounding. Where b is the larger the result
    is as good as that of a division.
    """
    b_x = b_a + b_b
    b_low = b_b - (b_x - b_a)  # what the sum lost
    if b_x.dtype == tl.float64:
        b_y = 1.0 / b_x
    else:
        # the square of the approximate root, one instruction, is off by a few units
        b_y = tl.rsqrt(b_x)
        b_y = b_y * b_y
    # one Newton step
    return tl.fma(b_y, tl.fma(-b_x, b_y, 1.0) - b_low * b_y, b_y)


@triton.jit
def _reduce(b_x):
    """(n + ROUND, e^r - 1) with x = n ln 2 + r; the lowest bits of n + ROUND, a float, are the integer n."""
    if b_x.dtype == tl.float64:
        b_n = b_x * LOG2_E + ROUND_64
        b_r = (b_x - (b_n - ROUND_64) * LN2_HIGH_64) - (b_n - ROUND_64) * LN2_LOW_64
        b_tail = b_r * EXP_SERIES[13] + EXP_SERIES[12]
        for k in tl.static_range(11, 6, -1):
            b_tail = b_tail * b_r + EXP_SERIES[k]
    else:
        b_n = b_x * LOG2_E + ROUND_32
        b_r = (b_x - (b_n - ROUND_32) * LN2_HIGH_32) - (b_n - ROUND_32) * LN2_LOW_32
        b_tail = b_r * EXP_SERIES[8] + EXP_SERIES[7]
    for k in tl.static_range(6, 1, -1):
        b_tail = b_tail * b_r + EXP_SERIES[k]
    return b_n, b_tail * b_r * b_r + b_r


@triton.jit
def _times_power(b_y, b_n):
    """y 2^n for normal y and y 2^n, n as `_reduce` gives it: added to the exponent."""
    if b_y.dtype == tl.float64:
        b_bits = b_y.to(tl.int64, bitcast=True) + (b_n.to(tl.int64, bitcast=True) << 52)
        return b_bits.to(tl.float64, bitcast=True)
    else:
        b_bits = b_y.to(tl.int32, bitcast=True) + (b_n.to(tl.int32, bitcast=True) << 23)
        return b_bits.to(tl.float32, bitcast=True)


@triton.jit
def exp(b_x):
    """e^x; 0 where it is below the normal numbers, infinite where it overflows, NaN for NaN."""
    b_n, b_expm1 = _reduce(b_x)
    b_y = _times_power(1.0 + b_expm1, b_n)
    if b_x.dtype == tl.float64:
        b_y = tl.where(b_x < EXP_RANGE_64[0], 0.0, b_y)
        return tl.where(b_x <= EXP_RANGE_64[1], b_y, b_x + float("inf"))
    else:
        b_y = tl.where(b_x < EXP_RANGE_32[0], 0.0, b_y)
        return tl.where(b_x <= EXP_RANGE_32[1], b_y, b_x + float("inf"))


@triton.jit
def exp_bounded(b_x):
    """e^x for |x| up to 80; NaN for NaN."""
    b_n, b_expm1 = _reduce(b_x)
    return (1.0 + b_expm1) * _times_power(tl.full(b_x.shape, 1.0, b_x.dtype), b_n)


@triton.jit
def log1p(b_y):
    """log(1 + y) for y in [0, 1]: no bit of a small y is lost, as it would be by adding 1.

    With r = y / (2 + y) it is 2 atanh(r) = y - (h - r (h + R)), where h = y^2 / 2 and R = 2 (atanh(r) / r - 1): the
    leading term is exact, and the rounding of r enters through the corrections alone.
    """
    b_r = b_y * reciprocal_of_sum(2.0, b_y)
    b_r2 = b_r * b_r
    if b_y.dtype == tl.float64:
        b_sum = b_r2 * ATANH_SERIES[15] + ATANH_SERIES[14]
        for k in tl.static_range(13, 5, -1):
            b_sum = b_sum * b_r2 + ATANH_SERIES[k]
    else:
        b_sum = b_r2 * ATANH_SERIES[7] + ATANH_SERIES[6]
    for k in tl.static_range(5, 0, -1):
        b_sum = b_sum * b_r2 + ATANH_SERIES[k]
    b_h = 0.5 * b_y * b_y
    return b_y - (b_h - b_r * (b_h + 2.0 * b_sum * b_r2))


@triton.jit
def log(b_x):
    """log x for normal x > 0 and for NaN: x = 2^e m with m in [√½, √2), log m = 2 atanh((m - 1) / (m + 1))."""
    if b_x.dtype == tl.float64:
        b_bits = b_x.to(tl.int64, bitcast=True)
        b_e = (b_bits - SQRT_HALF_BITS_64) >> 52
        b_m = (b_bits - (b_e << 52)).to(tl.float64, bitcast=True)
        b_n = b_e.to(tl.float64)
        b_f = b_m - 1.0
        b_r = b_f * reciprocal_of_sum(2.0, b_f)
        b_r2 = b_r * b_r
        b_sum = b_r2 * ATANH_SERIES[12] + ATANH_SERIES[11]
        for k in tl.static_range(10, 0, -1):
            b_sum = b_sum * b_r2 + ATANH_SERIES[k]
        b_y = (b_n * LN2_LOW_64 + 2.0 * b_r * b_r2 * b_sum) + 2.0 * b_r + b_n * LN2_HIGH_64
    else:
        b_bits = b_x.to(tl.int32, bitcast=True)
        b_e = (b_bits - SQRT_HALF_BITS_32) >> 23
        b_m = (b_bits - (b_e << 23)).to(tl.float32, bitcast=True)
        b_n = b_e.to(tl.float32)
        b_f = b_m - 1.0
        b_r = b_f * reciprocal_of_sum(2.0, b_f)
        b_r2 = b_r * b_r
        b_sum = b_r2 * ATANH_SERIES[5] + ATANH_SERIES[4]
        for k in tl.static_range(3, 0, -1):
            b_sum = b_sum * b_r2 + ATANH_SERIES[k]
        b_y = (b_n * LN2_LOW_32 + 2.0 * b_r * b_r2 * b_sum) + 2.0 * b_r + b_n * LN2_HIGH_32
    return tl.where(b_x == b_x, b_y, b_x)


@triton.jit
def tanh(b_s):
    """(tanh s, 1 - tanh^2 s), the second without cancellation; beyond |s| = 40 they stay as at 40."""
    b_y = tl.minimum(2.0 * tl.abs(b_s), 80.0, propagate_nan=tl.PropagateNan.ALL)
    b_n, b_expm1 = _reduce(b_y)
    b_power = _times_power(tl.full(b_y.shape, 1.0, b_y.dtype), b_n)
    b_m = b_power * b_expm1 + (b_power - 1.0)  # e^y - 1; nothing cancels, for |e^r - 1| < 1/2
    b_q = reciprocal_of_sum(2.0, b_m)  # = (1 - tanh) / 2
    b_tanh = tl.where(b_m < 2.0, b_m * b_q, 1.0 - 2.0 * b_q)
    return tl.where(b_s < 0, -b_tanh, b_tanh), 4.0 * b_q * (1.0 - b_q)


# atan by Cephes: |x| is brought below tan(π/8) (fp64: 0.66) by π/2 − atan(1/x) or π/4 + atan((x − 1)/(x + 1)).
ATAN_32 = tl.constexpr((8.05374449538e-2, -1.38776856032e-1, 1.99777106478e-1, -3.33329491539e-1))
ATAN_P = tl.constexpr(
    (
        -8.750608600031904122785e-1,
        -1.615753718733365076637e1,
        -7.500855792314704667340e1,
        -1.228866684490136173410e2,
        -6.485021904942025371773e1,
    )
)
ATAN_Q = tl.constexpr(
    (
        2.485846490142306297962e1,
        1.650270098316988542046e2,
        4.328810604912902668951e2,
        4.853903996359136964868e2,
        1.945506571482613964425e2,
    )
)
HALF_PI_LOW = tl.constexpr(6.123233995736765886130e-17)  # what π/2 in fp64 lacks


@triton.jit
def atan(b_x):
    """The arc tangent; NaN for NaN."""
    b_a = tl.abs(b_x)
    b_far = b_a > 2.414213562373095
    if b_x.dtype == tl.float64:
        b_near = b_a <= 0.66
    else:
        b_near = b_a <= 0.4142135623730950
    b_up = tl.where(b_far, -1.0, tl.where(b_near, b_a, b_a - 1.0))
    b_r = b_up / tl.where(b_far, b_a, tl.where(b_near, 1.0, b_a + 1.0))
    b_z = b_r * b_r
    b_quarters = tl.where(b_far, 2.0, tl.where(b_near, 0.0, 1.0)).to(b_x.dtype)
    if b_x.dtype == tl.float64:
        b_p = b_z * ATAN_P[0] + ATAN_P[1]
        b_q = b_z + ATAN_Q[0]
        for k in tl.static_range(2, 5):
            b_p = b_p * b_z + ATAN_P[k]
        for k in tl.static_range(1, 5):
            b_q = b_q * b_z + ATAN_Q[k]
        b_y = b_quarters * QUARTER_PI + (b_r * (b_z * b_p / b_q) + b_r + b_quarters * (0.5 * HALF_PI_LOW))
    else:
        b_p = b_z * ATAN_32[0] + ATAN_32[1]
        for k in tl.static_range(2, 4):
            b_p = b_p * b_z + ATAN_32[k]
        b_y = b_quarters * QUARTER_PI + (b_p * b_z * b_r + b_r)
    return tl.where(b_x < 0, -b_y, b_y)


@triton.jit
def sigmoid(b_x):
    """(sigmoid x, 1 - sigmoid x, log sigmoid x), none of them with cancellation."""
    b_e = exp(-tl.abs(b_x))
    b_near = reciprocal_of_sum(1.0, b_e)  # sigmoid(|x|)
    b_far = b_e * b_near  # sigmoid(-|x|)
    return tl.where(b_x < 0, b_far, b_near), tl.where(b_x < 0, b_near, b_far), tl.minimum(b_x, 0.0) - log1p(b_e)
