// What surrounds the product of a masked convolution, pixel by pixel: condition, activation and residual behind it, and
// in the backward pass the gradient of the pre-activation before it.
#pragma once

#include "../../common/math.h"
#include "problem.h"
#include "products.h"

namespace genkernels {
namespace masked {
namespace {

template <typename T>
inline T sigmoid(T b, T& complement) {
  const T e = math::exp(-math::abs(b));
  const T near = math::quotient(T(1), T(1) + e), far = e * near;
  complement = b < T(0) ? near : far;
  return b < T(0) ? far : near;
}

template <typename T>
void relu(T* u, int64_t n) {
  for (int64_t i = 0; i < n; ++i) u[i] = u[i] < T(0) ? T(0) : u[i];  // NaN stays
}

template <typename T>
void gate(T* __restrict u, const T* __restrict v, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    T t, slope, complement;
    math::tanh_sech2(u[i], t, slope);
    u[i] = t * sigmoid(v[i], complement);
  }
}

// What follows the product, for rows of one image that lie in `result` [outputs][stride].
template <typename S>
struct Epilogue {
  const Problem& p;
  const S *condition, *residual;  // [N, Cout, H, W] and [N, Cout', H, W], or null
  S *output, *pre;                // pre or null

  template <typename A, typename T>
  void apply(int64_t n, int64_t first, int64_t rows, T* result, int64_t stride, int64_t pitch) const {
    const int64_t left = p.left(), skip = first * p.width, width = p.width, span = (rows - 1) * pitch + width;
    for (int64_t o = 0; o < left; ++o) {
      for (int64_t half = 0; half < p.outputs / left; ++half) {
        const int64_t c = o + half * left, at = (n * p.outputs + c) * p.pixels() + skip;
        if (condition) add_rows(condition + at, result + c * stride, rows, width, pitch);
        if (pre) store_rows<A>(result + c * stride, pre + at, rows, width, pitch);
      }
      T* u = result + o * stride;
      if (p.activation == Activation::kRelu) relu(u, span);
      if (p.activation == Activation::kGate) gate(u, u + left * stride, span);
      const int64_t at = (n * left + o) * p.pixels() + skip;
      if (residual) add_rows(residual + at, u, rows, width, pitch);
      store_rows<A>(u, output + at, rows, width, pitch);
    }
  }
};

// g over tiles of one plane; u, v: the state of the channel and, for the gate, of its other half.
template <typename T>
void slope_relu(T* __restrict g, const T* __restrict u, int64_t n) {
  for (int64_t i = 0; i < n; ++i) g[i] = u[i] <= T(0) ? T(0) : g[i];
}
template <typename T>
void slope_gate(T* __restrict ga, T* __restrict gb, const T* __restrict a, const T* __restrict b, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    T t, slope, complement;
    math::tanh_sech2(a[i], t, slope);
    const T s = sigmoid(b[i], complement), g = ga[i];
    ga[i] = g * s * slope;
    gb[i] = g * t * (s * complement);
  }
}

// Sum in 16 lanes, these in double.
template <typename T>
double sum_of(const T* v, int64_t n) {
  T lane[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int64_t l = 0; l < 16; ++l) lane[l] += v[i + l];
  double total = 0;
  for (T l : lane) total += l;
  for (; i < n; ++i) total += v[i];
  return total;
}

// g [N, Cout, H, W] (null where it is the output's gradient itself) and its sums over the pixels [N, Cout] (or null).
template <typename S, typename T>
void pre_gradient(const Problem& p, const S* grad_output, const S* grad_pre, const S* state, S* g, double* sums) {
  constexpr int64_t kTile = 512;
  const int64_t left = p.left(), halves = p.outputs / left, size = p.pixels();
  torch::stable::parallel_for(0, p.batch * left, std::max<int64_t>(1, 16384 / size), [&](int64_t from, int64_t to) {
    T tile[2][kTile], kept[2][kTile], extra[kTile];
    for (int64_t task = from; task < to; ++task) {
      const int64_t n = task / left, o = task % left;
      double total[2] = {0, 0};
      for (int64_t i = 0; i < size; i += kTile) {
        const int64_t count = std::min(kTile, size - i);
        int64_t at[2];
        for (int64_t h = 0; h < halves; ++h) at[h] = (n * p.outputs + o + h * left) * size + i;
        if (grad_output)
          load(grad_output + task * size + i, tile[0], count);
        else
          std::fill_n(tile[0], count, T(0));
        if (p.activation != Activation::kNone && grad_output) {
          for (int64_t h = 0; h < halves; ++h) load(state + at[h], kept[h], count);
          if (p.activation == Activation::kRelu)
            slope_relu(tile[0], kept[0], count);
          else
            slope_gate(tile[0], tile[1], kept[0], kept[1], count);
        } else if (halves == 2) {
          std::fill_n(tile[1], count, T(0));
        }
        for (int64_t h = 0; h < halves; ++h) {
          if (grad_pre) {
            load(grad_pre + at[h], extra, count);
            for (int64_t j = 0; j < count; ++j) tile[h][j] += extra[j];
          }
          if (g) store(tile[h], g + at[h], count);
          if (sums) total[h] += sum_of(tile[h], count);
        }
      }
      for (int64_t h = 0; sums && h < halves; ++h) sums[n * p.outputs + o + h * left] = total[h];
    }
  });
}

// What every gradient starts from: g, and its sums over the pixels as the gradients of the bias and of a [N, Cout]
// condition; each where it is not null.
template <typename S>
void pre_gradients(const Problem& p, const std::optional<Tensor>& grad_output, const std::optional<Tensor>& grad_pre,
                   const std::optional<Tensor>& state, S* g, S* grad_bias, S* grad_condition) {
  using T = arithmetic_t<S>;
  const bool summed = grad_bias || grad_condition;
  if (!g && !summed) return;
  std::vector<double> sums(summed ? p.batch * p.outputs : 0);
  pre_gradient<S, T>(p, data<S>(grad_output), data<S>(grad_pre), data<S>(state), g, summed ? sums.data() : nullptr);
  if (grad_bias) {
    std::vector<T> total(p.outputs);
    for (int64_t o = 0; o < p.outputs; ++o) {
      double sum = 0;
      for (int64_t n = 0; n < p.batch; ++n) sum += sums[n * p.outputs + o];
      total[o] = T(sum);
    }
    store(total.data(), grad_bias, p.outputs);
  }
  if (grad_condition && p.batch) {
    const std::vector<T> each(sums.begin(), sums.end());
    store(each.data(), grad_condition, p.batch * p.outputs);
  }
}

}  // namespace
}  // namespace masked
}  // namespace genkernels
