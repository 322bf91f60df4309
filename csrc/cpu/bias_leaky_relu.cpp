// Leaky ReLU with bias, gain and clamp on the CPU; genkernels/reference/bias_leaky_relu.py has the maths.
//
// Layout. x [N, C, S] has one bias a stretch of S numbers. Where S is at least kWhole, a stretch is a row; otherwise a
// sample is one, with its biases written out beside it, so that points vectorise as well as images. Rows go among
// threads in parts and tiles (rows.h).
//
// The gradient of the bias: stretches add up in fp64, in 16 lanes a part, then a channel its samples and parts in
// order; where samples are rows, columns go among threads and each adds up its samples in order. The same bits for any
// number of threads.
//
// Bytes: forward reads x and writes y; backward reads the gradient and y and writes the gradient of x.
#include <cmath>
#include <limits>

#include "rows.h"
#include "sums.h"

namespace genkernels {
namespace {

constexpr int64_t kWhole = 64;

template <typename T>
struct Curve {
  T below, gain, below_gain, limit;

  T value(T a) const {
    const T y = gain * (a > 0 ? a : below * a);
    return std::abs(y) >= limit ? std::copysign(limit, y) : y;
  }
  // What the gradient is multiplied by where y came out.
  T slope(T y) const {
    const T free = y > 0 ? gain : below_gain;
    return std::abs(y) >= limit ? T(0) : free;
  }
};

// The clamp is rounded to the storage type S; none is NaN, which no number reaches.
template <typename S>
Curve<arithmetic_t<S>> curve_of(double negative_slope, double gain, double clamp) {
  using T = arithmetic_t<S>;
  const T limit = std::isinf(clamp) ? std::numeric_limits<T>::quiet_NaN() : T(S(T(clamp)));
  return {T(negative_slope), T(gain), T(gain * negative_slope), limit};
}

struct Geometry {
  int64_t samples, channels, pixels;
  bool whole;  // whether a stretch is a row
  Rows rows;
};

Geometry geometry_of(const Tensor& x, bool with_bias) {
  require(x.dim() >= 2, "bias_leaky_relu: x must be [N, C, ...]");
  Geometry g{x.size(0), x.size(1), 1, true, {}};
  for (int64_t d = 2; d < x.dim(); ++d) g.pixels *= x.size(d);
  g.whole = !with_bias || g.pixels >= kWhole;
  g.rows = g.whole ? Rows{g.samples * g.channels, g.pixels} : Rows{g.samples, g.channels * g.pixels};
  if (!with_bias) g.rows = {1, x.numel()};
  return g;
}

Tensor bias_leaky_relu(Tensor x, std::optional<Tensor> bias, double negative_slope, double gain, double clamp) {
  const Geometry g = geometry_of(x, bias.has_value());
  Tensor y = empty(x);
  if (x.numel() == 0) return y;
  with_dtype<float, double, BFloat16, Half>("bias_leaky_relu: x", x, [&]<typename S>() {
    using T = arithmetic_t<S>;
    const Curve<T> curve = curve_of<S>(negative_slope, gain, clamp);
    const S* from = data<S>(x);
    const T* biases = data<T>(bias);
    S* to = mutable_data<S>(y);
    std::vector<T> line(g.whole ? 0 : g.rows.length);  // of a sample's biases
    for (size_t i = 0; i < line.size(); ++i) line[i] = biases[i / g.pixels];
    for_each_part(g.rows, [&](int64_t row, int64_t, int64_t offset, int64_t count) {
      const T one = biases && g.whole ? biases[row % g.channels] : T(0);
      for_each_tile(offset, count, [&](int64_t at, int64_t n) {
        Room<T> x_room, room;
        const T* a = widened(from + at, x_room, n);
        const T* b = g.whole ? nullptr : line.data() + (at - row * g.rows.length);
        narrowed(to + at, room, n, [&](T* out) {
          if (b) {
#pragma GCC ivdep
            for (int64_t i = 0; i < n; ++i) out[i] = curve.value(a[i] + b[i]);
          } else {
#pragma GCC ivdep
            for (int64_t i = 0; i < n; ++i) out[i] = curve.value(a[i] + one);
          }
        });
      });
    });
  });
  return y;
}

// grad_bias[c] from the sums of parts, [N·C, parts].
template <typename T>
void add_parts(const Geometry& g, const std::vector<double>& sums, T* by_bias) {
  const int64_t parts = parts_of(g.rows);
  for (int64_t c = 0; c < g.channels; ++c) {
    double total = 0;
    for (int64_t n = 0; n < g.samples; ++n)
      for (int64_t part = 0; part < parts; ++part) total += sums[(n * g.channels + c) * parts + part];
    by_bias[c] = T(total);
  }
}

// grad_bias[c] where samples are rows: columns, then the pixels of a channel.
template <typename S, typename T>
void add_columns(const Geometry& g, const Curve<T>& curve, const S* grad, const S* y, T* by_bias) {
  const int64_t columns = g.rows.length;
  std::vector<double> sums(columns, 0.0);
  const int64_t grain = std::max<int64_t>(kSumLanes, kPart / std::max<int64_t>(1, g.samples));
  torch::stable::parallel_for(0, columns, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = 0; n < g.samples; ++n) {
      for_each_tile(n * columns + begin, end - begin, [&](int64_t at, int64_t count) {
        Room<T> grad_room, y_room;
        const T *from = widened(grad + at, grad_room, count), *out = widened(y + at, y_room, count);
        double* to = sums.data() + (at - n * columns);
#pragma GCC ivdep
        for (int64_t i = 0; i < count; ++i) to[i] += from[i] * curve.slope(out[i]);
      });
    }
  });
  for (int64_t c = 0; c < g.channels; ++c) {
    double total = 0;
    for (int64_t p = 0; p < g.pixels; ++p) total += sums[c * g.pixels + p];
    by_bias[c] = T(total);
  }
}

std::tuple<Tensor, Tensor> bias_leaky_relu_backward(Tensor grad, Tensor y, bool with_bias, double negative_slope,
                                                    double gain, double clamp) {
  const Geometry g = geometry_of(y, with_bias);
  require(shape_of(grad) == shape_of(y), "bias_leaky_relu: a gradient must have y's shape");
  Tensor by_x = empty(y), by_bias = empty(y, {with_bias ? g.channels : 0}, arithmetic_dtype(y));
  if (y.numel() == 0) return {by_x, torch::stable::zero_(by_bias)};
  with_dtype<float, double, BFloat16, Half>("bias_leaky_relu: y", y, [&]<typename S>() {
    using T = arithmetic_t<S>;
    const Curve<T> curve = curve_of<S>(negative_slope, gain, clamp);
    const S *from_grad = data<S>(grad), *from_y = data<S>(y);
    S* to = mutable_data<S>(by_x);
    const int64_t parts = parts_of(g.rows);
    const bool adds = with_bias && g.whole;
    std::vector<double> sums(adds ? g.rows.count * parts : 0, 0.0);
    for_each_part(g.rows, [&](int64_t row, int64_t part, int64_t offset, int64_t count) {
      for_each_tile(offset, count, [&](int64_t at, int64_t n) {
        Room<T> grad_room, y_room, room;
        const T *from = widened(from_grad + at, grad_room, n), *out = widened(from_y + at, y_room, n);
        narrowed(to + at, room, n, [&](T* by) {
#pragma GCC ivdep
          for (int64_t i = 0; i < n; ++i) by[i] = from[i] * curve.slope(out[i]);
          if (adds)
            sums[row * parts + part] +=
                sum_lanes<double>(n, [&](int64_t i) __attribute__((always_inline)) { return by[i]; });
        });
      });
    });
    if (adds) add_parts(g, sums, mutable_data<T>(by_bias));
    if (with_bias && !g.whole) add_columns(g, curve, from_grad, from_y, mutable_data<T>(by_bias));
  });
  return {by_x, by_bias};
}

}  // namespace
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels, CPU, m) {
  m.impl("bias_leaky_relu", TORCH_BOX(&genkernels::bias_leaky_relu));
  m.impl("bias_leaky_relu_backward", TORCH_BOX(&genkernels::bias_leaky_relu_backward));
}
