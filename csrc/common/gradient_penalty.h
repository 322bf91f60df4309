// The operators interpolate_pairs and gradient_penalty, each with its backward, but for their loops: the
// arithmetic for g++ and for nvcc alike, outputs and dtypes. genkernels/reference/gradient_penalty.py has the maths.
//
// A backend gives four functions of tensors of type S, [N, L] as far as it knows (T = arithmetic_t<S>):
//   interpolate<S>(rows, real, fake, u, x)
//   interpolate_backward<S>(rows, grad, u, by_real, by_fake)
//   penalty<S>(rows, target, gradient, value, norm)
//   penalty_backward<S>(rows, target, grad, grad_norm, gradient, norm, by_gradient)
// All come with at least one sample, and all but `penalty` with at least one element.
#pragma once

#include "host.h"
#include "math.h"

namespace genkernels {
namespace penalty {

// A norm below this has no direction.
constexpr double kSmallest = 0x1p-126;

template <typename T>
GK_HOST_DEVICE inline T between(T real, T fake, T u) {
  return fake + u * (real - fake);
}

// What a norm costs.
struct Target {
  double norm;
  bool one_sided;

  GK_HOST_DEVICE inline double excess(double of) const {
    const double more = of - norm;
    return one_sided && more < 0 ? 0 : more;  // NaN stays
  }
  // From the sum of squares.
  GK_HOST_DEVICE inline double norm_of(double square) const {
    return square < kSmallest * kSmallest ? 0 : ::sqrt(square);
  }
  GK_HOST_DEVICE inline double penalty(double square) const {
    if (norm == 0) return square;
    const double more = excess(norm_of(square));
    return more * more;
  }
  // What g of sample n is multiplied by to give the gradient, from those of the penalty and of the norm. What one that
  // is not there would have been multiplied by plays no part: 0 · ∞ would be NaN.
  template <typename T>
  GK_HOST_DEVICE inline double factor(double of, const T* grad, const double* grad_norm, int64_t n) const {
    const double inverse = of == 0 ? 0 : 1 / of;
    double sum = grad_norm ? grad_norm[n] * inverse : 0;
    if (grad) sum += (norm == 0 ? 2 : 2 * excess(of) * inverse) * grad[n];
    return sum;
  }
};

inline void check_samples(const Tensor& t, const Rows& rows) {
  require(t.dim() == 1 && t.size(0) == rows.count, "gradient_penalty: a number a sample must be [N]");
}

template <typename Backend>
Tensor interpolate_pairs(Tensor real, Tensor fake, Tensor u) {
  const Rows rows = rows_of(real);
  check_samples(u, rows);
  require(shape_of(real) == shape_of(fake), "interpolate_pairs: fake must have real's shape");
  Tensor x = empty(real);
  if (real.numel() == 0) return x;
  with_dtype<float, double, BFloat16, Half>(
      "interpolate_pairs: real", real, [&]<typename S>() { Backend::template interpolate<S>(rows, real, fake, u, x); });
  return x;
}

template <typename Backend>
std::tuple<Tensor, Tensor> interpolate_pairs_backward(Tensor grad, Tensor u) {
  const Rows rows = rows_of(grad);
  check_samples(u, rows);
  Tensor by_real = empty(grad), by_fake = empty(grad);
  if (grad.numel() == 0) return {by_real, by_fake};
  with_dtype<float, double, BFloat16, Half>("interpolate_pairs: grad", grad, [&]<typename S>() {
    Backend::template interpolate_backward<S>(rows, grad, u, by_real, by_fake);
  });
  return {by_real, by_fake};
}

template <typename Backend>
std::tuple<Tensor, Tensor> gradient_penalty(Tensor gradient, double target, bool one_sided) {
  const Rows rows = rows_of(gradient);
  Tensor value = empty(gradient, {rows.count}, arithmetic_dtype(gradient));
  Tensor norm = empty(gradient, {rows.count}, ScalarType::Double);
  if (rows.count == 0) return {value, norm};
  with_dtype<float, double, BFloat16, Half>("gradient_penalty: gradient", gradient, [&]<typename S>() {
    Backend::template penalty<S>(rows, Target{target, one_sided}, gradient, value, norm);
  });
  return {value, norm};
}

template <typename Backend>
Tensor gradient_penalty_backward(std::optional<Tensor> grad, std::optional<Tensor> grad_norm, Tensor gradient,
                                 Tensor norm, double target, bool one_sided) {
  const Rows rows = rows_of(gradient);
  check_samples(norm, rows);
  if (grad) check_samples(*grad, rows);
  if (grad_norm) check_samples(*grad_norm, rows);
  Tensor by_gradient = empty(gradient);
  if (gradient.numel() == 0) return by_gradient;
  with_dtype<float, double, BFloat16, Half>("gradient_penalty: gradient", gradient, [&]<typename S>() {
    Backend::template penalty_backward<S>(rows, Target{target, one_sided}, grad, grad_norm, gradient, norm,
                                          by_gradient);
  });
  return by_gradient;
}

}  // namespace penalty
}  // namespace genkernels
