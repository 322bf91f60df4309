// Draws of one pixel from the parameters that a network gave for it, from uniform noise: the same rule as genkernels/reference/_draw.py.
//
// Each draw inverts a cumulative distribution, so the same noise gives the same integers whoever computes the parameters.
#pragma once

#include "math.h"

namespace genkernels {
namespace draw {

GK_HOST_DEVICE inline float log(float x) { return ::logf(x); }
GK_HOST_DEVICE inline double log(double x) { return ::log(x); }
GK_HOST_DEVICE inline float log1p(float x) { return ::log1pf(x); }
GK_HOST_DEVICE inline double log1p(double x) { return ::log1p(x); }
GK_HOST_DEVICE inline float floor(float x) { return ::floorf(x); }
GK_HOST_DEVICE inline double floor(double x) { return ::floor(x); }
GK_HOST_DEVICE inline float tanh(float x) { return ::tanhf(x); }
GK_HOST_DEVICE inline double tanh(double x) { return ::tanh(x); }

// Index of the category whose share of the cumulative distribution of softmax(logits / temperature) holds u. logits [count], `stride` apart.
// Temperature 0: the first of the largest logits. Weights in T, their sums in fp64. NaN among the logits: 0.
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

// One pixel of a discretised logistic mixture. params [mixtures * (channels == 1 ? 3 : 10)], `stride` apart: mixture logits, then for each
// channel means, log-scales and (3 channels) coefficients. noise [1 + channels], `noise_stride` apart: the mixture's, then each channel's.
// A draw of the logistic density rounded to the nearest level, the ends taking the tails, is a draw of the discretised one, and it is the
// rounded value that shifts the means of later channels; fixed [channels], where given, holds known levels, -1 where one is to be drawn.
// Temperature divides the mixture's logits and multiplies the logistic noise.
template <typename T>
GK_HOST_DEVICE inline void logistic_mixture(const T* params, int64_t stride, int mixtures, int channels, int levels, T temperature,
                                            const T* noise, int64_t noise_stride, int* index, const int* fixed = nullptr) {
  const int m = categorical(params, stride, mixtures, temperature, noise[0]);
  const int width = channels == 1 ? 2 : 3;
  const T* own = params + (mixtures + m) * stride;  // row r of channel c lies (c * width + r) * mixtures further on
  T x[3];
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int c = 0; c < 3; ++c) {  // a fixed count: unrolled, x stays in registers
    if (c >= channels) break;
    T mean = own[int64_t(c * width) * mixtures * stride];
    T log_scale = own[int64_t(c * width + 1) * mixtures * stride];
    log_scale = log_scale < T(-7) ? T(-7) : log_scale;
    if (c == 1) mean += tanh(own[int64_t(2) * mixtures * stride]) * x[0];
    if (c == 2) mean += tanh(own[int64_t(5) * mixtures * stride]) * x[0] + tanh(own[int64_t(8) * mixtures * stride]) * x[1];
    T u = noise[(1 + c) * noise_stride];
    u = u < OpenUnit<T>::kEdge ? OpenUnit<T>::kEdge : u;
    u = u > T(1) - OpenUnit<T>::kEdge ? T(1) - OpenUnit<T>::kEdge : u;
    T value = mean + math::exp(log_scale) * temperature * (log(u) - log1p(-u));
    value = value < T(-1) ? T(-1) : value > T(1) ? T(1) : value;
    T level = floor((value + T(1)) * (T(0.5) * T(levels - 1)) + T(0.5));
    if (fixed != nullptr && fixed[c] >= 0) level = T(fixed[c]);
    index[c] = level == level ? int(level) : 0;
    x[c] = T(2) * level / T(levels - 1) - T(1);
  }
}

}  // namespace draw
}  // namespace genkernels
