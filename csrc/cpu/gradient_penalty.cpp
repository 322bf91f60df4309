// Points between pairs and the penalty of a gradient's norm on the CPU; genkernels/reference/gradient_penalty.py has
// the maths, csrc/common/gradient_penalty.h its arithmetic.
//
// Layout. A sample is a row of L numbers, in parts and tiles (rows.h), in which half numbers are widened. A part adds
// up its squares in fp64, in 16 lanes; a row its parts in order: the same bits for any number of threads.
//
// Bytes: interpolation reads real and fake and writes x̂; its backward reads one and writes two; the penalty reads g;
// its backward reads g and writes as much. fp64 costs nothing beside them: 8 numbers to a 512-bit vector, one product
// each.
#include "../common/gradient_penalty.h"
#include "rows.h"
#include "sums.h"

namespace genkernels {
namespace {

using penalty::Target;

// The backend of common/gradient_penalty.h.
struct Cpu {
  template <typename S>
  static void interpolate(const Rows& rows, const Tensor& real, const Tensor& fake, const Tensor& u, const Tensor& x);
  template <typename S>
  static void interpolate_backward(const Rows& rows, const Tensor& grad, const Tensor& u, const Tensor& by_real,
                                   const Tensor& by_fake);
  template <typename S>
  static void penalty(const Rows& rows, const Target& target, const Tensor& gradient, const Tensor& value,
                      const Tensor& norm);
  template <typename S>
  static void penalty_backward(const Rows& rows, const Target& target, const std::optional<Tensor>& grad,
                               const std::optional<Tensor>& grad_norm, const Tensor& gradient, const Tensor& norm,
                               const Tensor& by_gradient);
};

template <typename S>
void Cpu::interpolate(const Rows& rows, const Tensor& real, const Tensor& fake, const Tensor& u, const Tensor& x) {
  using T = arithmetic_t<S>;
  const S *from_real = data<S>(real), *from_fake = data<S>(fake);
  const T* along = data<T>(u);
  S* to = mutable_data<S>(x);
  for_each_part(rows, [&](int64_t row, int64_t, int64_t offset, int64_t count) {
    for_each_tile(offset, count, [&](int64_t at, int64_t n) {
      Room<T> real_room, fake_room, room;
      const T* r = widened(from_real + at, real_room, n);
      const T* f = widened(from_fake + at, fake_room, n);
      narrowed(to + at, room, n, [&](T* out) {
#pragma GCC ivdep
        for (int64_t i = 0; i < n; ++i) out[i] = penalty::between(r[i], f[i], along[row]);
      });
    });
  });
}

template <typename S>
void Cpu::interpolate_backward(const Rows& rows, const Tensor& grad, const Tensor& u, const Tensor& by_real,
                               const Tensor& by_fake) {
  using T = arithmetic_t<S>;
  const S* from = data<S>(grad);
  const T* along = data<T>(u);
  S *to_real = mutable_data<S>(by_real), *to_fake = mutable_data<S>(by_fake);
  for_each_part(rows, [&](int64_t row, int64_t, int64_t offset, int64_t count) {
    for_each_tile(offset, count, [&](int64_t at, int64_t n) {
      Room<T> grad_room, room;
      const T* g = widened(from + at, grad_room, n);
      narrowed(to_real + at, room, n, [&](T* out) {
#pragma GCC ivdep
        for (int64_t i = 0; i < n; ++i) out[i] = along[row] * g[i];
      });
      narrowed(to_fake + at, room, n, [&](T* out) {
#pragma GCC ivdep
        for (int64_t i = 0; i < n; ++i) out[i] = g[i] - along[row] * g[i];
      });
    });
  });
}

template <typename S>
void Cpu::penalty(const Rows& rows, const Target& target, const Tensor& gradient, const Tensor& value,
                  const Tensor& norm) {
  using T = arithmetic_t<S>;
  const S* from = data<S>(gradient);
  const int64_t parts = parts_of(rows);
  std::vector<double> squares(rows.count * parts, 0.0);
  for_each_part(rows, [&](int64_t row, int64_t part, int64_t offset, int64_t count) {
    double& sum = squares[row * parts + part];
    for_each_tile(offset, count, [&](int64_t at, int64_t n) {
      Room<T> room;
      const T* g = widened(from + at, room, n);
      sum += sum_lanes<double>(n, [&](int64_t i) __attribute__((always_inline)) { return double(g[i]) * g[i]; });
    });
  });
  T* to = mutable_data<T>(value);
  double* to_norm = mutable_data<double>(norm);
  for (int64_t n = 0; n < rows.count; ++n) {
    double square = 0;
    for (int64_t part = 0; part < parts; ++part) square += squares[n * parts + part];
    to[n] = T(target.penalty(square));
    to_norm[n] = target.norm_of(square);
  }
}

template <typename S>
void Cpu::penalty_backward(const Rows& rows, const Target& target, const std::optional<Tensor>& grad,
                           const std::optional<Tensor>& grad_norm, const Tensor& gradient, const Tensor& norm,
                           const Tensor& by_gradient) {
  using T = arithmetic_t<S>;
  const T* by_value = data<T>(grad);
  const double *by_norm = data<double>(grad_norm), *norms = data<double>(norm);
  const S* from = data<S>(gradient);
  S* to = mutable_data<S>(by_gradient);
  for_each_part(rows, [&](int64_t row, int64_t, int64_t offset, int64_t count) {
    const double factor = target.factor(norms[row], by_value, by_norm, row);
    for_each_tile(offset, count, [&](int64_t at, int64_t n) {
      Room<T> gradient_room, room;
      const T* g = widened(from + at, gradient_room, n);
      narrowed(to + at, room, n, [&](T* out) {
#pragma GCC ivdep
        for (int64_t i = 0; i < n; ++i) out[i] = T(factor * g[i]);
      });
    });
  });
}

}  // namespace
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels, CPU, m) {
  using namespace genkernels;
  m.impl("interpolate_pairs", TORCH_BOX(&penalty::interpolate_pairs<Cpu>));
  m.impl("interpolate_pairs_backward", TORCH_BOX(&penalty::interpolate_pairs_backward<Cpu>));
  m.impl("gradient_penalty", TORCH_BOX(&penalty::gradient_penalty<Cpu>));
  m.impl("gradient_penalty_backward", TORCH_BOX(&penalty::gradient_penalty_backward<Cpu>));
}
