// The activations of a residual block at one number: value and slope, and what a gradient needs of curvature and of the
// parameter, all from one exponential. What a caller leaves unread is not computed.
#pragma once

#include "../../common/math.h"
#include "../../common/options.h"

namespace genkernels {
namespace residual {

// With z an activation's argument and a its parameter: φ, φ', φ'', ∂φ/∂a and ∂φ'/∂a.
template <typename A>
struct Point {
  A value, slope, curvature, value_by, slope_by;
};

// e^z − 1 for z ≤ 0.
__device__ __forceinline__ float minus_one(float z) {
  return ::expm1f(z);
}
__device__ __forceinline__ double minus_one(double z) {
  return ::expm1(z);
}

// Swish of steepness a, over a constant: 1 for SiLU, the largest slope for LipSwish.
template <typename A>
__device__ __forceinline__ Point<A> swish(A z, A a, A over) {
  const A x = a * z, e = math::exp(-math::abs(x)), larger = A(1) / (A(1) + e), smaller = e * larger;
  const A up = x > A(0) ? larger : smaller, down = x > A(0) ? smaller : larger, both = larger * smaller;
  // a polynomial times what falls off exponentially: 0 where the latter is, whatever the former
  const bool flat = both == A(0);
  const A bend = flat ? A(0) : both * (A(2) + x * (down - up)) * over;
  return {z * up * over, (up + (flat ? A(0) : x * both)) * over, a * bend, flat ? A(0) : z * z * both * over,
          flat ? A(0) : z * bend};
}

// All threads of a launch take one branch.
template <typename A>
__device__ __forceinline__ Point<A> point(Nonlinearity which, A z, A a) {
  const bool above = z > A(0);
  const A below = above ? A(0) : z, one = above ? A(1) : A(0), rest = above ? A(0) : A(1);
  if (which == Nonlinearity::kRelu) return {z < A(0) ? A(0) : z, one, A(0), A(0), A(0)};
  if (which == Nonlinearity::kLeakyRelu) return {above ? z : a * z, above ? A(1) : a, A(0), below, rest};
  if (which == Nonlinearity::kElu) {
    const A m = minus_one(below), e = math::exp(below), bent = above ? A(0) : a * e;
    return {above ? z : a * m, above ? A(1) : a * e, bent, above ? A(0) : m, above ? A(0) : e};
  }
  if (which == Nonlinearity::kTanh) {
    A t, s;
    math::tanh_sech2(z, t, s);
    return {t, s, A(-2) * t * s, A(0), A(0)};
  }
  if (which == Nonlinearity::kSilu) {
    const Point<A> p = swish(z, A(1), A(1));
    return {p.value, p.slope, p.curvature, A(0), A(0)};
  }
  return swish(z, a, which == Nonlinearity::kLipswish ? A(1 / 1.1) : A(1 / (1.1 * 1.004)));
}

}  // namespace residual
}  // namespace genkernels
