// Rational-quadratic splines on a GPU: the kernels. Launchers: the .cu;
// genkernels/reference/rational_quadratic_spline.py has the maths, csrc/common/rational_quadratic_spline.h that of one
// number.
//
// Layout. A thread takes a number. The parameters of a block's numbers lie one after the other: the block copies them
// to shared memory, neighbours by neighbours, where each thread then goes through its own, an odd number of words from
// the next thread's, so that no two of a warp meet in a bank; backward writes the gradients over them, and the block
// copies them out. Logits become exponentials in place; those of the zuko parametrization, whose gradient asks for the
// raw number too, are computed again instead.
//
// A block takes whole rows, or a segment of one that is longer. Its log-determinants are added up in shared memory by
// halves, those of a row's segments in a second kernel: no atomics, the same bits on every run.
//
// Bytes, a number of K = 8 in fp32: 100 forward, 196 backward.
#pragma once

#include "../common/rational_quadratic_spline.h"
#include "common.cuh"

namespace genkernels {
namespace spline {

constexpr int kNumbers = 128;  // threads, and numbers at most, of a block

// How a call's numbers go to blocks.
struct Shape {
  int64_t rows, length, segments;  // segments of a row
  int width, rows_a_block;         // numbers of a segment; rows of a block where a row is one segment
  int bins, params, stride;        // words from one number's parameters to the next one's in shared memory
  Divisor by_params;
};

// A thread's place in its block.
struct Block {
  int64_t base, row;  // of the block's first number, and its first row
  int count;          // numbers of the block

  __device__ __forceinline__ explicit Block(const Shape& s) {
    const int64_t block = blockIdx.x;
    if (s.segments == 1) {
      row = block * s.rows_a_block;
      base = row * s.length;
      const int64_t left = s.rows - row;
      count = static_cast<int>((left < s.rows_a_block ? left : s.rows_a_block) * s.length);
    } else {
      row = block / s.segments;
      const int64_t at = block % s.segments * s.width, left = s.length - at;
      base = row * s.length + at;
      count = static_cast<int>(left < s.width ? left : s.width);
    }
  }
};

// Calls f(number, parameter, offset from the block's first) for all parameters of a block.
template <typename F>
__device__ __forceinline__ void for_each_parameter(const Shape& s, int count, F&& f) {
  for (int i = threadIdx.x; i < count * s.params; i += kNumbers) {
    const int number = static_cast<int>(s.by_params.divide(i));
    f(number, i - number * s.params, i);
  }
}

// One number's bins, by its parameters in shared memory.
template <typename T, Spline Kind>
struct Found {
  static constexpr bool kCircular = Kind == Spline::kCircular, kAgain = Kind == Spline::kZuko;

  T per_sum[2], before[2], in[2];
  int place;
  Bin<T> bin;
  T by_first, by_last;

  // The exponential of logit k of widths or heights.
  __device__ __forceinline__ static T exponential(const Options<T>& o, const T* p, int k, T& slope) {
    if constexpr (kAgain)
      return math::exp(logit<Kind>(o, p[k], slope));
    else
      return p[k];
  }

  __device__ __forceinline__ Found(const Options<T>& o, int bins, T* p, bool by_height, T value) {
    T slope, total[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      T* u = p + half * bins;
      T sum = 0, lost = 0;
      if constexpr (kAgain) {
        for (int k = 0; k < bins; ++k) add(exponential(o, u, k, slope), sum, lost);
      } else {
        T top = o.logit_scale * u[0];
        for (int k = 1; k < bins; ++k) {
          const T other = o.logit_scale * u[k];
          top = other > top ? other : top;
        }
        for (int k = 0; k < bins; ++k) {
          const T e = math::exp(o.logit_scale * u[k] - top);
          u[k] = e;
          add(e, sum, lost);
        }
      }
      total[half] = sum;
      per_sum[half] = T(1) / sum;
    }
    T sum[2] = {exponential(o, p, 0, slope), exponential(o, p + bins, 0, slope)}, lost[2] = {};
    before[0] = before[1] = 0;
    in[0] = sum[0];
    in[1] = sum[1];
    place = 0;
    for (int k = 1; k < bins; ++k) {
      const T part = by_height ? sum[1] * per_sum[1] : sum[0] * per_sum[0];
      const bool beyond = o.span * (T(k) * o.least + o.rest * part) - o.bound <= value;
      const T w = exponential(o, p, k, slope), h = exponential(o, p + bins, k, slope);
      if (beyond) {
        place = k;
        before[0] = sum[0];
        before[1] = sum[1];
        in[0] = w;
        in[1] = h;
      }
      add(w, sum[0], lost[0]);
      add(h, sum[1], lost[1]);
    }
    const T at = T(place);
    bin.left = knot(o, at, before[0], total[0], per_sum[0]);
    bin.bottom = knot(o, at, before[1], total[1], per_sum[1]);
    before[0] *= per_sum[0];
    before[1] *= per_sum[1];
    in[0] *= per_sum[0];
    in[1] *= per_sum[1];
    bin.width = o.span * (o.least + o.rest * in[0]);
    bin.height = o.span * (o.least + o.rest * in[1]);
    const T* raw = p + 2 * bins;
    bin.first = bin.last = T(1);
    by_first = by_last = T(0);
    if (kCircular || place > 0) bin.first = knot_slope<Kind>(o, raw[kCircular ? place : place - 1], by_first);
    if (kCircular || place + 1 < bins)
      bin.last = knot_slope<Kind>(o, raw[kCircular ? (place + 1) % bins : place], by_last);
  }
};

// The gradient by the input at x, as `Gradient` has it, and over p those by the parameters.
template <typename T, Spline Kind>
__device__ __forceinline__ T gradients(const Options<T>& o, int bins, int params, T* p, bool inverted, T x, T g,
                                       T by_ldj) {
  if (math::abs(x) > o.bound) {
    for (int j = 0; j < params; ++j) p[j] = T(0);
    return g;
  }
  const Found<T, Kind> found(o, bins, p, false, x);
  const Gradient<T> of(found.bin, inverted, x, g, by_ldj);
  const T factor = o.span * o.rest;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const T start = factor * (half ? of.bottom : of.left), size = factor * (half ? of.height : of.width);
    const T mean = start * found.before[half] + size * found.in[half];
    T* u = p + half * bins;
    for (int k = 0; k < bins; ++k) {
      T slope = o.logit_scale;
      const T e = Found<T, Kind>::exponential(o, u, k, slope);
      const T by_share = k < found.place ? start : k == found.place ? size : T(0);
      u[k] = slope * (e * found.per_sum[half]) * (by_share - mean);
    }
  }
  // raw number i is the slope at knot i + 1, circular at knot i, and at knot K where i = 0
  T* raw = p + 2 * bins;
  for (int i = 0; i < params - 2 * bins; ++i) raw[i] = T(0);
  if constexpr (Kind == Spline::kCircular) {
    raw[found.place] += of.first * found.by_first;
    raw[(found.place + 1) % bins] += of.last * found.by_last;
  } else {
    if (found.place > 0) raw[found.place - 1] = of.first * found.by_first;
    if (found.place + 1 < bins) raw[found.place] = of.last * found.by_last;
  }
  return of.input;
}

template <typename S, Spline Kind, int kWords>
__global__ void __launch_bounds__(kNumbers)
    forward_kernel(const Shape shape, const Options<arithmetic_t<S>> o, const bool inverted,
                   const S* __restrict__ x,               // [N, D]
                   const S* __restrict__ params,          // [N, D, P]
                   S* __restrict__ y,                     // [N, D]
                   arithmetic_t<S>* __restrict__ log_det  // [N, segments]
    ) {
  using T = arithmetic_t<S>;
  __shared__ T words[kWords];
  __shared__ T ells[kNumbers];
  const Block block(shape);
  const S* from = params + block.base * shape.params;
  for_each_parameter(shape, block.count,
                     [&](int number, int j, int i) { words[number * shape.stride + j] = static_cast<T>(from[i]); });
  __syncthreads();
  const int t = threadIdx.x;
  T ell = 0;
  if (t < block.count) {
    const T value = static_cast<T>(x[block.base + t]);
    T result = value;
    if (!(math::abs(value) > o.bound)) {
      const Found<T, Kind> found(o, shape.bins, words + t * shape.stride, inverted, value);
      if (inverted)
        inverse(found.bin, o.bound, value, result, ell);
      else
        forward(found.bin, o.bound, value, result, ell);
    }
    y[block.base + t] = static_cast<S>(result);
  }
  ells[t] = ell;
  __syncthreads();
  const int column = t % shape.width;
  int half = 1;
  while (half < shape.width) half *= 2;
  for (half /= 2; half > 0; half /= 2) {
    if (column < half && column + half < shape.width && t + half < kNumbers) ells[t] += ells[t + half];
    __syncthreads();
  }
  if (column == 0 && t < block.count) {
    if (shape.segments == 1)
      log_det[block.row + t / shape.width] = ells[t];
    else
      log_det[blockIdx.x] = ells[t];
  }
}

template <typename S, Spline Kind, int kWords>
__global__ void __launch_bounds__(kNumbers)
    backward_kernel(const Shape shape, const Options<arithmetic_t<S>> o, const bool inverted,
                    const S* __restrict__ grad,                    // [N, D], or null: zero
                    const arithmetic_t<S>* __restrict__ grad_ldj,  // [N], or null: zero
                    const S* __restrict__ x,                       // [N, D]
                    const S* __restrict__ params,                  // [N, D, P]
                    S* __restrict__ by_x,                          // [N, D]
                    S* __restrict__ by_params                      // [N, D, P]
    ) {
  using T = arithmetic_t<S>;
  __shared__ T words[kWords];
  const Block block(shape);
  const S* from = params + block.base * shape.params;
  for_each_parameter(shape, block.count,
                     [&](int number, int j, int i) { words[number * shape.stride + j] = static_cast<T>(from[i]); });
  __syncthreads();
  const int t = threadIdx.x;
  if (t < block.count) {
    const int64_t row = block.row + (shape.segments == 1 ? t / shape.width : 0);
    by_x[block.base + t] = static_cast<S>(gradients<T, Kind>(
        o, shape.bins, shape.params, words + t * shape.stride, inverted, static_cast<T>(x[block.base + t]),
        grad ? static_cast<T>(grad[block.base + t]) : T(0), grad_ldj ? grad_ldj[row] : T(0)));
  }
  __syncthreads();
  S* to = by_params + block.base * shape.params;
  for_each_parameter(shape, block.count,
                     [&](int number, int j, int i) { to[i] = static_cast<S>(words[number * shape.stride + j]); });
}

}  // namespace spline
}  // namespace genkernels
