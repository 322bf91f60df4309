// The operators importance_bound and gaussian_reparameterize, each with its backward, but for their loops: the
// arithmetic for g++ and for nvcc alike, outputs and dtypes. genkernels/reference/importance_bound.py has the maths.
//
// A backend gives four functions of tensors of type S (T = arithmetic_t<S>):
//   bound<S>(rows, log_w, bound, weights)
//   bound_backward<S>(rows, grad_bound, grad_weights, weights, by_log_w)
//   reparameterize<S>(samples, prior, noise, mean, log_scale, z, ratio)
//   reparameterize_backward<S>(samples, options, grad_z, grad_ratio, noise, mean, log_scale, by_mean, by_log_scale)
// All come with at least one row, and the second with at least one element.
#pragma once

#include "host.h"
#include "math.h"

namespace genkernels {
namespace importance {

constexpr double kHalfLog2Pi = 0.91893853320467274178;

// The larger of two, or the NaN among them.
template <typename T>
GK_HOST_DEVICE inline T larger(T a, T b) {
  return math::select(b > a, b, math::select(b != b, b, a));
}

template <typename T>
GK_HOST_DEVICE inline bool is_finite(T x) {
  return x - x == 0;
}

// The bound of a row from its largest log-weight, which may be NaN, and, where that is finite, the sum of e^{ℓ − peak}.
template <typename T>
GK_HOST_DEVICE inline T bound_of(T peak, T total, double log_count) {
  if (!is_finite(peak)) return peak;
  return static_cast<T>(static_cast<double>(peak) + (static_cast<double>(math::log(total)) - log_count));
}

// The weights of a row whose peak is not finite: none of −∞, and nothing that is known of +∞ or NaN.
template <typename T>
GK_HOST_DEVICE inline T weight_without_peak(T peak) {
  return peak < 0 ? T(0) : std::numeric_limits<T>::quiet_NaN();
}

// [N, K, D]
struct Samples {
  int64_t rows, count, width;
};

struct Options {
  bool prior, stopped;
};

// What one number of a sample adds to its ratio, but for s and ½ ln 2π.
template <bool kPrior, typename T>
GK_HOST_DEVICE inline T term(T noise, T z) {
  return kPrior ? T(0.5) * (noise * noise) - T(0.5) * (z * z) : T(0.5) * (noise * noise);
}

// Sums over the samples of one example, in which both gradients are linear: of g, g ε, r ε and r ε², with g the
// gradient by z all told and r that by the ratio.
template <typename T>
struct Sums {
  T g, g_noise, r_noise, r_noise2;

  // `r_sum`: Σ r.
  GK_HOST_DEVICE inline T by_mean(const Options& options, T scale) const {
    return options.stopped ? g + r_noise / scale : g;
  }
  GK_HOST_DEVICE inline T by_log_scale(const Options& options, T scale, T r_sum) const {
    return scale * g_noise + (options.stopped ? r_noise2 : r_sum);
  }
};

template <typename Backend>
std::tuple<Tensor, Tensor> importance_bound(Tensor log_w) {
  const Rows rows = rows_of(log_w);
  const ScalarType work = arithmetic_dtype(log_w);
  Tensor bound = empty(log_w, {rows.count}, work), weights = empty(log_w, {rows.count, rows.length}, work);
  if (log_w.numel() == 0) return {bound, weights};
  with_dtype<float, double, BFloat16, Half>(
      "importance_bound: log_w", log_w, [&]<typename S>() { Backend::template bound<S>(rows, log_w, bound, weights); });
  return {bound, weights};
}

template <typename Backend>
Tensor importance_bound_backward(std::optional<Tensor> grad_bound, std::optional<Tensor> grad_weights, Tensor weights,
                                 Tensor like) {
  const Rows rows = rows_of(weights);
  require(!grad_bound || (grad_bound->dim() == 1 && grad_bound->size(0) == rows.count),
          "importance_bound: the bound's gradient must be [N]");
  require(!grad_weights || shape_of(*grad_weights) == shape_of(weights),
          "importance_bound: the weights' gradient must have their shape");
  Tensor by_log_w = empty(weights, shape_of(weights), like.scalar_type());
  if (weights.numel() == 0) return by_log_w;
  with_dtype<float, double, BFloat16, Half>("importance_bound: like", like, [&]<typename S>() {
    Backend::template bound_backward<S>(rows, grad_bound, grad_weights, weights, by_log_w);
  });
  return by_log_w;
}

inline Samples samples_of(const Tensor& noise, const Tensor& mean, const Tensor& log_scale) {
  require(noise.dim() == 3, "gaussian_reparameterize: noise must be [N, K, D]");
  const Samples samples{noise.size(0), noise.size(1), noise.size(2)};
  const std::vector<int64_t> row{samples.rows, samples.width};
  require(shape_of(mean) == row && shape_of(log_scale) == row,
          "gaussian_reparameterize: mean and log_scale must be [N, D]");
  return samples;
}

template <typename Backend>
std::tuple<Tensor, Tensor> gaussian_reparameterize(Tensor noise, Tensor mean, Tensor log_scale, bool prior, bool) {
  const Samples samples = samples_of(noise, mean, log_scale);
  Tensor z = empty(noise), ratio = empty(noise, {samples.rows, samples.count}, arithmetic_dtype(noise));
  if (ratio.numel() == 0) return {z, ratio};
  with_dtype<float, double, BFloat16, Half>("gaussian_reparameterize: noise", noise, [&]<typename S>() {
    Backend::template reparameterize<S>(samples, prior, noise, mean, log_scale, z, ratio);
  });
  return {z, ratio};
}

template <typename Backend>
std::tuple<Tensor, Tensor> gaussian_reparameterize_backward(std::optional<Tensor> grad_z,
                                                            std::optional<Tensor> grad_ratio, Tensor noise, Tensor mean,
                                                            Tensor log_scale, bool prior, bool stopped) {
  const Samples samples = samples_of(noise, mean, log_scale);
  require(!grad_z || shape_of(*grad_z) == shape_of(noise),
          "gaussian_reparameterize: the gradient of z must have its shape");
  require(!grad_ratio || shape_of(*grad_ratio) == std::vector<int64_t>{samples.rows, samples.count},
          "gaussian_reparameterize: the gradient of the ratio must be [N, K]");
  Tensor by_mean = empty(mean), by_log_scale = empty(log_scale);
  if (mean.numel() == 0) return {by_mean, by_log_scale};
  with_dtype<float, double, BFloat16, Half>("gaussian_reparameterize: noise", noise, [&]<typename S>() {
    Backend::template reparameterize_backward<S>(samples, Options{prior, stopped}, grad_z, grad_ratio, noise, mean,
                                                 log_scale, by_mean, by_log_scale);
  });
  return {by_mean, by_log_scale};
}

}  // namespace importance
}  // namespace genkernels
