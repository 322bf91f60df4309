// Draws of one pixel from the parameters that a network gave for it, from uniform noise: the same rule as
// genkernels/reference/_draw.py.
//
// Each draw inverts a cumulative distribution, so the same noise gives the same integers whoever computes the
// parameters.
#pragma once

#include "math.h"

namespace genkernels {
namespace draw {

GK_HOST_DEVICE inline float floor(float x) {
  return ::floorf(x);
}
GK_HOST_DEVICE inline double floor(double x) {
  return ::floor(x);
}

// Index of the category whose share of the cumulative distribution of softmax(logits / temperature) holds u. logits
// [count], `stride` apart. Temperature 0: the first of the largest logits. Weights in T, their sums in fp64. NaN among
// the logits: 0.
template <typename T>
GK_HOST_DEVICE inline int categorical(const T* logits, int64_t stride, int count, T temperature, T u) {
  T most = logits[0];
  int first = 0;
  bool ordered = true;
  for (int k = 0; k < count; ++k) {
    const T logit = logits[k * stride];
    ordered &= logit == logit;
    if (logit > most) {
      most = logit;
      first = k;
    }
  }
  if (temperature == T(0)) return ordered ? first : 0;
  double total = 0;
  for (int k = 0; k < count; ++k) total += double(math::exp((logits[k * stride] - most) / temperature));
  const double level = double(u) * total;
  double below = 0;
  for (int k = 0; k < count - 1; ++k) {
    below += double(math::exp((logits[k * stride] - most) / temperature));
    if (!(below <= level)) return k;
  }
  return count - 1;
}

// The end of `categorical`, for weights exp((logits - most) / temperature) that are there already.
template <typename T>
GK_HOST_DEVICE inline int share(const T* weights, int count, T u) {
  double total = 0;
  for (int k = 0; k < count; ++k) total += double(weights[k]);
  const double level = double(u) * total;
  double below = 0;
  for (int k = 0; k < count - 1; ++k) {
    below += double(weights[k]);
    if (!(below <= level)) return k;
  }
  return count - 1;
}

template <typename T>
struct OpenUnit;  // the smallest step away from 0 and from 1
template <>
struct OpenUnit<float> {
  static constexpr float kEdge = 5.9604644775390625e-8f;  // 2^-24
};
template <>
struct OpenUnit<double> {
  static constexpr double kEdge = 1.1102230246251565e-16;  // 2^-53
};

// One channel of a discretised logistic, in levels: a draw of the logistic density rounded to the nearest level, the
// ends taking the tails. half = (levels - 1) / 2. NaN stays. Free of branches, so that a plain loop over it vectorises.
// Products are rounded before they are added to, as PyTorch's are: fused, one draw of 256 levels in a million would be
// another integer than the definition's.
template <typename T>
GK_HOST_DEVICE inline T logistic(T mean, T log_scale, T u, T temperature, T half) {
  log_scale = math::select(log_scale < T(-7), T(-7), log_scale);
  u = math::select(u < OpenUnit<T>::kEdge, T(OpenUnit<T>::kEdge), u);
  u = math::select(u > T(1) - OpenUnit<T>::kEdge, T(1) - OpenUnit<T>::kEdge, u);
  T value = mean + math::product(math::exp(log_scale) * temperature, math::logit(u));
  value = math::select(value < T(-1), T(-1), value);
  value = math::select(value > T(1), T(1), value);
  return floor(math::product(value + T(1), half) + T(0.5));
}

// What an earlier channel's value adds to a later one's mean.
template <typename T>
GK_HOST_DEVICE inline T shift(T coefficient, T value) {
  T tanh, unused;
  math::tanh_sech2(coefficient, tanh, unused);
  return math::product(tanh, value);
}

// A level's place in [-1, 1]; levels - 1 = span.
template <typename T>
GK_HOST_DEVICE inline T place(T level, T span) {
  return T(2) * level / span - T(1);
}

// A level as an integer; NaN: 0.
template <typename T>
GK_HOST_DEVICE inline int index_of(T level) {
  return static_cast<int>(math::select(level == level, level, T(0)));
}

// One pixel of a discretised logistic mixture. params [mixtures * (channels == 1 ? 3 : 10)], `stride` apart: mixture
// logits, then for each channel means, log-scales and (3 channels) coefficients. noise [1 + channels], `noise_stride`
// apart: the mixture's, then each channel's. It is the rounded value of a channel that shifts the means of later ones;
// fixed [channels], where given, holds known levels, -1 where one is to be drawn. Temperature divides the mixture's
// logits and multiplies the logistic noise.
template <typename T>
GK_HOST_DEVICE inline void logistic_mixture(const T* params, int64_t stride, int mixtures, int channels, int levels,
                                            T temperature, const T* noise, int64_t noise_stride, int* index,
                                            const int* fixed = nullptr) {
  const int m = categorical(params, stride, mixtures, temperature, noise[0]);
  const int width = channels == 1 ? 2 : 3;
  const T* own = params + (mixtures + m) * stride;  // row r of channel c lies (c * width + r) * mixtures further on
  const T span = T(levels - 1);
  T x[3];
#if defined(__CUDA_ARCH__)
#  pragma unroll
#endif
  for (int c = 0; c < 3; ++c) {  // a fixed count: unrolled, x stays in registers
    if (c >= channels) break;
    T mean = own[int64_t(c * width) * mixtures * stride];
    const T log_scale = own[int64_t(c * width + 1) * mixtures * stride];
    if (c == 1) mean += shift(own[int64_t(2) * mixtures * stride], x[0]);
    if (c == 2)
      mean = mean + shift(own[int64_t(5) * mixtures * stride], x[0]) + shift(own[int64_t(8) * mixtures * stride], x[1]);
    T level = logistic(mean, log_scale, noise[(1 + c) * noise_stride], temperature, T(0.5) * span);
    if (fixed != nullptr && fixed[c] >= 0) level = T(fixed[c]);
    index[c] = index_of(level);
    x[c] = place(level, span);
  }
}

}  // namespace draw
}  // namespace genkernels
