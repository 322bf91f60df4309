// The discretised logistic of PixelCNN++ (Salimans et al. 2017), for g++ and for nvcc alike, in units of a level: i the
// level, M the mean, w = 2·e^−s/(L − 1) the width of a bin in scales, a = (i + ½ − M)·w and b = (i − ½ − M)·w its
// edges.
//
// The probability of an inner level without a difference of sigmoids, and written by the edge nearer to the mean and
// the one farther from it, near = max(b, −a) ≥ −w/2 and far = near + w:
//
//     σ(a) − σ(b) = σ(−near)·σ(far)·(1 − e^−w)
//     log P = −max(near, 0) + [w < 1]·log w + log [ E·φ / ((1 + e^−|near|)·(E + F·e^−w)) ]
//     E = e^min(near, 0),  F = e^−max(near, 0)
//     φ = (1 − e^−w)/w = e^−w/2·sinh(w/2)/(w/2) where w < 1, 1 − e^−w elsewhere
//
// so that the bracket lies within [0.1, 1] for every parameter, can be multiplied over the channels and be summed over
// the components without a logarithm of its own, and no width is too small. An end level has one edge, its near one,
// and e^−w counts as 0: log P = −max(near, 0) + log [ E / ((1 + e^−|near|)·E) ].
//
// Each edge is rounded once from the level and the mean, so the upper edge of a level and the lower edge of the next
// are one number: the bins add up to 1 as exactly as the sigmoid is computed.
#pragma once

#include "math.h"

namespace genkernels {
namespace mixture {

template <typename T>
constexpr T kLowestLogScale = T(-7);

// e^x for lowest ≤ x ≤ 80, and e^lowest below: all that is needed here, in two thirds of the instructions of math::exp,
// whose range reduction and polynomial it has.
GK_HOST_DEVICE inline double exp(double x, double lowest = -700.0) {
  return ::exp(x < lowest ? lowest : x);
}

#if defined(__CUDA_ARCH__)
GK_HOST_DEVICE inline float exp(float x, float lowest = -87.0f) {
  return ::expf(x < lowest ? lowest : x);
}
#else
GK_HOST_DEVICE inline float exp(float x, float lowest = -87.0f) {
  constexpr float kRound = 12582912.0f;     // 1.5·2^23
  const float c = x < lowest ? lowest : x;  // false for NaN, which so passes through
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

// The largest |near| whose e^−|near| is told from 0: the bracket stays a quotient of normal numbers, three channels'
// product too, where a bin is wider than the exponential's range; what is lost beyond is below the rounding of 1.
template <typename T>
constexpr T kFarthest = sizeof(T) == 4 ? T(27.6) : T(230);

// What a level brings to each component: its edges less ½ and more ½, where it has them.
template <typename T>
struct Bin {
  T lower;  // i − ½; the lowest level: ½, its upper edge
  T flip;   // 1; the lowest level: −1
  T upper;  // i + ½; the highest level: ∞
  T inner;  // 1; an end level: 0
};

// Level i of 0 … highest. NaN gives NaN.
template <typename T>
GK_HOST_DEVICE inline Bin<T> bin_of(T i, T highest) {
  const bool first = i <= T(0), last = i >= highest;
  Bin<T> bin;
  bin.lower = first ? T(0.5) : i - T(0.5);
  bin.flip = first ? T(-1) : T(1);
  bin.upper = last ? std::numeric_limits<T>::infinity() : i + T(0.5);
  bin.inner = first || last ? T(0) : T(1);
  return bin;
}

template <typename T>
struct Level {
  T linear;        // log P = linear + log(numerator / denominator)
  T numerator;     // in [1e-13, 1]
  T denominator;   // in [numerator, 4]; 1 where the derivatives are wanted, whose division it shares
  T by_mean;       // ∂ log P / ∂ (mean in levels) / w, and so ∂ log P / ∂ (mean in [−1, 1]) / e^−s
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
    p = ((((T(1.0 / 1307674368000) * h2 + T(1.0 / 6227020800)) * h2 + T(1.0 / 39916800)) * h2 + T(1.0 / 362880)) * h2) +
        p;
  p = p * h2 + T(1.0 / 120);
  p = p * h2 + T(1.0 / 6);
  return p * h2 + T(1);
}

// One level under one component. log_width = log w, that of the clamped log-scale. Derivative: also fills by_mean and
// by_log_scale. Branch-free, so that a loop over it vectorises. NaN in, NaN out.
template <bool Derivative, typename T>
GK_HOST_DEVICE inline Level<T> level(const Bin<T>& bin, T mean, T width, T log_width) {
  const T below = (bin.lower - mean) * bin.flip * width;  // b; the lowest level: −a
  const T above = (mean - bin.upper) * width;             // −a; the highest level: −∞, or NaN, which is no larger
  const T near = above > below ? above : below;
  // e^−far by the half width's exponential: e^−w·e^−near, the latter being e^−|near| or its inverse
  const T half = T(0.5) * width;
  const T u = exp(-half);
  const T w = bin.inner * (u * u);
  const T e = exp(-math::abs(near), -kFarthest<T>);
  const bool inside = near < T(0);  // the mean lies within the bin
  const T E = math::select(inside, e, T(1));
  const T F = math::select(inside, T(1), e);
  const bool narrow = (width < T(1)) & (bin.inner > T(0));
  const T sinhc = sinhc_small(half < T(0.5) ? half : T(0.5));
  const T other = E + w * F;  // (1 + e^−far)·E
  const T both = (T(1) + e) * other;
  const T phi = math::select(narrow, u * sinhc, T(1) - w);
  Level<T> r;
  r.linear = math::select(narrow, log_width, T(0)) - math::select(inside, T(0), near);
  r.numerator = E * phi;
  r.denominator = both;
  r.by_mean = r.by_log_scale = T(0);
  if constexpr (Derivative) {
    // two quotients by one division
    const T difference = math::select(narrow, sinhc, T(1) - w);
    const T inverse = T(1) / (both * difference);
    const T by_both = difference * inverse;
    const T from_near = E * other * by_both;                                // σ(near)
    const T from_far = w * F * (T(1) + e) * by_both;                        // σ(−far), 0 at an end
    const T inner = math::select(narrow, u, w * width) * (both * inverse);  // w/(e^w − 1), 0 at an end
    const T slope = from_near - from_far;
    r.numerator *= by_both;
    r.denominator = T(1);
    r.by_mean = math::select(below > above, slope, -slope);
    r.by_log_scale = near * from_near - ((near + width) * from_far + inner);
  }
  return r;
}

}  // namespace mixture
}  // namespace genkernels
