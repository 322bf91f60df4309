// The discretised logistic of PixelCNN++ (Salimans et al. 2017), for g++ and for nvcc alike, in units of a level: i the level, M the mean,
// w = 2·e^−s/(L − 1) the width of a bin in scales, a = (i + ½ − M)·w and b = (i − ½ − M)·w its edges.
//
// The probability of an inner level without a difference of sigmoids, and written by the edge nearer to the mean and the one farther
// from it, near = max(b, −a) ≥ −w/2 and far = near + w:
//
//     σ(a) − σ(b) = σ(−near)·σ(far)·(1 − e^−w)
//     log P = log w − max(near, 0) + log [ φ / ((1 + e^−|near|)·(1 + e^−far)) ],   φ = (1 − e^−w)/w
//
// so that the bracket lies within [1e-5, 1] for every parameter, three channels' brackets are multiplied before one logarithm is taken,
// and no width is too small. An end level has one edge, its near one: log P = −max(near, 0) − log(1 + e^−|near|).
//
// Each edge is rounded once from the level and the mean, so the upper edge of a level and the lower edge of the next are one number:
// the bins add up to 1 as exactly as the sigmoid is computed.
#pragma once

#include "math.h"

namespace genkernels {
namespace mixture {

template <typename T>
constexpr T kLowestLogScale = T(-7);

// e^x for x ≤ 80, with everything below the normal numbers as small as they get, or 0: all that is needed here, in two thirds of the
// instructions of math::exp, whose range reduction and polynomial it has.
GK_HOST_DEVICE inline double exp(double x) { return ::exp(x); }

#if defined(__CUDA_ARCH__)
GK_HOST_DEVICE inline float exp(float x) { return ::expf(x); }
#else
GK_HOST_DEVICE inline float exp(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5·2^23
  const float c = x < -87.0f ? -87.0f : x;  // false for NaN, which so passes through
  const float shifted = c * 1.44269504088896341f + kRound;
  const float fn = shifted - kRound;
  const float r = (c - fn * 0.693359375f) + fn * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  // 2^n: the integer n in the low bits of `shifted`, moved to the exponent
  return p * math::bits_to_float((math::float_to_bits(shifted) << 23) + 0x3f800000);
}
#endif

// The least e^−|near| that counts where near < 0: keeps 0/0 out of widths beyond the exponential's range. Its cube is a normal number.
template <typename T>
struct Floor;
template <>
struct Floor<float> {
  static constexpr float kLeast = 1e-12f;
};
template <>
struct Floor<double> {
  static constexpr double kLeast = 1e-100;
};

template <typename T>
struct Level {
  T linear;       // log P = linear + log(numerator / denominator)
  T numerator;    // in [Floor / 2, 1]
  T denominator;  // in [numerator, 4·w + 4]
  T by_mean;      // ∂ log P / ∂ (mean in levels) / w, and so ∂ log P / ∂ (mean in [−1, 1]) / e^−s
  T by_log_scale;  // ∂ log P / ∂ s
};

// tanh x to an absolute 1e-7, which is what a shift of a mean needs, and 1 − tanh² x to as much of itself.
template <typename T>
GK_HOST_DEVICE inline void tanh(T x, T& tanh_x, T& sech2) {
  const T e = exp(T(-2) * math::abs(x));
  const T d = T(1) / (T(1) + e);
  const T magnitude = (T(1) - e) * d;
  tanh_x = math::select(x < T(0), -magnitude, magnitude);
  sech2 = T(4) * e * (d * d);
}

// sinh(h)/h for h in [0, ½].
template <typename T>
GK_HOST_DEVICE inline T sinhc_small(T h) {
  const T h2 = h * h;
  T p = T(1.0 / 5040);
  if constexpr (sizeof(T) == 8)
    p = ((((T(1.0 / 1307674368000) * h2 + T(1.0 / 6227020800)) * h2 + T(1.0 / 39916800)) * h2 + T(1.0 / 362880)) * h2) + p;
  p = p * h2 + T(1.0 / 120);
  p = p * h2 + T(1.0 / 6);
  return p * h2 + T(1);
}

// One level under one component. log_width = log w, that of the clamped log-scale. Derivative: also fills by_mean and by_log_scale.
// Branch-free, so that a loop over it vectorises. NaN in, NaN out.
template <bool Derivative, typename T>
GK_HOST_DEVICE inline Level<T> level(T i, T mean, T width, T log_width, bool lowest, bool highest) {
  const bool end = lowest | highest;
  const T upper = (i + T(0.5) - mean) * width;
  const T lower = (i - T(0.5) - mean) * width;
  const bool above = highest | (!lowest & (lower > -upper));  // the nearer edge is the lower one
  const T near = math::select(above, lower, -upper);
  const T far = math::select(above, upper, -lower);
  const bool inside = near < T(0);  // the mean lies within the bin
  // 1 − e^−w and e^−far by the half width's exponential: e^−far = e^−w·e^−near, the latter being e^−|near| or its inverse
  const T half = T(0.5) * width;
  const T u = exp(-half);
  const T u2 = u * u;
  const T w = math::select(end, T(0), u2);
  const T exact = exp(-math::abs(near));
  const T least = math::select(exact < Floor<T>::kLeast, T(Floor<T>::kLeast), exact);
  const T e = math::select(inside, least, exact);
  const T e_inside = math::select(inside, e, T(1));
  const bool narrow = width < T(1);
  const T sinhc = sinhc_small(math::select(narrow, half, T(0.5)));
  const T whole = T(1) - u2;  // 1 − e^−w, where w ≥ 1
  const T other = math::select(inside, e + w, T(1) + e * w);  // (1 + e^−far), times e where the mean lies inside
  Level<T> r;
  r.linear = math::select(end, T(0), log_width) - math::select(inside, T(0), near);
  r.numerator = math::select(end, T(1), math::select(narrow, u * sinhc, whole)) * e_inside;
  r.denominator = (T(1) + e) * other * math::select(end | narrow, T(1), width);
  if constexpr (Derivative) {
    // three quotients by one division
    const T both = (T(1) + e) * other;
    const T difference = math::select(narrow, sinhc, whole);
    const T inverse = T(1) / (both * difference);
    const T from_near = e_inside * other * (difference * inverse);      // σ(near)
    const T from_far = math::select(inside, w, e * w) * (T(1) + e) * (difference * inverse);  // σ(−far), 0 at an end
    const T inner = math::select(narrow, u, u2 * width) * (both * inverse);                // w/(e^w − 1)
    const T slope = from_near - from_far;
    r.by_mean = math::select(above, slope, -slope);
    r.by_log_scale = near * from_near - math::select(end, T(0), far * from_far + inner);
  } else {
    r.by_mean = r.by_log_scale = T(0);
  }
  return r;
}

}  // namespace mixture
}  // namespace genkernels
