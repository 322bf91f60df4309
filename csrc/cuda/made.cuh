// Kernels of `made`: the inverse of an autoregressive affine transform, its transposed solve, and what puts weights in
// order.
//
//   z_i = x_i σ(s_i) + t_i, (s, t)_i made of x_{<i}
//
// Papamakarios et al. 2017; genkernels/reference/made.py has the maths.
//
// Parallelisation. A block of kSolveThreads threads solves kSamples samples alone, first feature to last, so that
// blocks never wait for each other and one launch does the whole inverse. A step is: the two parameters of its feature,
// x, then each layer's units whose degree has just become known. A warp computes one unit: its lanes go through the
// known inputs side by side, for all samples of the block at once, so a weight is read once a block; a butterfly adds
// up. Barriers of the block separate what depends on each other: one a layer and step.
//
// Layout. Features are in the order of the steps ([N, D], first-layer columns and output rows alike, see `arrange`), so
// what is known is always a prefix. Units [N, H] lie in global memory, where a block's few samples stay in its
// first-level cache. Every unit is computed once; the floor is the live weights' bytes, once a block, from the
// second-level cache. Sums in a fixed order: the same bits each run.
#pragma once

#include "../common/scale_map.h"
#include "common.cuh"

// nvcc has it as a macro: the argument stays in constant memory, though its arrays are indexed at run time.
#ifndef __grid_constant__
#  define __grid_constant__
#endif

namespace genkernels {

constexpr int kSolveThreads = 128;
constexpr int kWarps = kSolveThreads / 32;
constexpr int kSamples = 4;
constexpr int kMaxLayers = 16;  // hidden layers: their pointers travel as kernel arguments

template <typename T>
struct MadeNetwork {
  int64_t samples;
  int features, layers;  // hidden layers
  bool residual;
  ScaleMap map;
  T constant;                       // c of the scale map
  const int64_t* counts;            // [layers, D + 1]
  int size[kMaxLayers];             // units of each hidden layer
  const T* weight[kMaxLayers + 1];  // [H, inputs], the last [2·D, H]; for the transposed solve [inputs, H], [H, 2·D]
  const T* bias[kMaxLayers + 1];
  T* values[kMaxLayers];   // [N, H] pre-activations, residual sums included
  T* units[kMaxLayers];    // [N, H] what the next layer reads
  T* signals[kMaxLayers];  // [N, H] gradients by the pre-activations

  // Units of a layer known once k features are, whatever the tensor holds.
  __device__ __forceinline__ int known(int layer, int k) const {
    const int64_t c = counts[static_cast<int64_t>(layer) * (features + 1) + k];
    return c < 0 ? 0 : c > size[layer] ? size[layer] : static_cast<int>(c);
  }
  __device__ __forceinline__ int first_of(int layer, int degree) const {
    return degree == 0 ? 0 : known(layer, degree - 1);
  }
};

template <typename T>
__device__ __forceinline__ void scale_of(const MadeNetwork<T>& net, T s, T& log_scale, T& shrink, T& slope) {
  with_scale_map(net.map, [&]<ScaleMap M>() {
    T scale;
    scale_map<M>(s, net.constant, log_scale, scale, slope);
    shrink = shrink_of<M>(log_scale, scale);
  });
}

// The samples of this block.
struct Samples {
  int64_t first, count;
  __device__ __forceinline__ int64_t at(int s) const { return first + s < count ? first + s : count - 1; }
  __device__ __forceinline__ bool inside(int s) const { return first + s < count; }
};

// sum[s] += Σ_k weight[k]·act[sample s][k] over begin ≤ k < end, by a warp; every lane gets it. All threads of the
// block have to call it.
template <typename T>
__device__ __forceinline__ void add_dot(const T* weight, bool live, const T* act, int64_t stride,
                                        const Samples& samples, int begin, int end, T (&sum)[kSamples]) {
  T mine[kSamples];
#pragma unroll
  for (int s = 0; s < kSamples; ++s) mine[s] = T(0);
  if (live) {
    for (int k = begin + static_cast<int>(threadIdx.x % 32); k < end; k += 32) {
      const T w = weight[k];
#pragma unroll
      for (int s = 0; s < kSamples; ++s) mine[s] += w * act[samples.at(s) * stride + k];
    }
  }
#pragma unroll
  for (int s = 0; s < kSamples; ++s) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) mine[s] += __shfl_xor_sync(0xffffffffu, mine[s], offset);
    sum[s] += mine[s];
  }
}

// x_steps [N, D] and log_det [N] from z_steps; or, z_steps null, everything from a given x_steps. params [N, 2·D] where
// not null.
template <typename T>
__global__ void __launch_bounds__(kSolveThreads, 1)
    made_extend(const __grid_constant__ MadeNetwork<T> net,
                const T* __restrict__ z_steps,  // [N, D] or null
                const T* __restrict__ context,  // [N, H of the first layer] or null
                T* x_steps,                     // [N, D]
                T* __restrict__ params,         // [N, 2·D] or null
                T* __restrict__ log_det         // [N] or null
    ) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, D = net.features, top = net.layers - 1;
  const Samples samples{static_cast<int64_t>(blockIdx.x) * kSamples, net.samples};
  const int mine = threadIdx.x;  // the sample whose x this thread computes, one of the first kSamples threads
  T total = 0;
  for (int step = 0; step <= D; ++step) {
    for (int layer = 0; layer <= top; ++layer) {
      const int last = net.known(layer, step), inputs = layer == 0 ? D : net.size[layer - 1];
      const int depth = layer == 0 ? step : net.known(layer - 1, step);
      for (int base = net.first_of(layer, step); base < last; base += kWarps) {
        const int unit = base + warp;
        const bool live = unit < last;
        T value[kSamples];
#pragma unroll
        for (int s = 0; s < kSamples; ++s) value[s] = live ? net.bias[layer][unit] : T(0);
        add_dot(net.weight[layer] + static_cast<int64_t>(unit) * inputs, live,
                layer == 0 ? x_steps : net.units[layer - 1], inputs, samples, 0, depth, value);
        if (live && lane == 0) {
#pragma unroll
          for (int s = 0; s < kSamples; ++s) {
            if (!samples.inside(s)) continue;
            const int64_t at = samples.at(s) * net.size[layer] + unit;
            T v = value[s];
            if (layer == 0 && context != nullptr) v += context[at];
            if (net.residual && layer >= 2 && layer % 2 == 0) v += net.values[layer - 2][at];
            net.values[layer][at] = v;
            net.units[layer][at] = v < T(0) && !(net.residual && layer == top) ? T(0) : v;
          }
        }
      }
      __syncthreads();
    }
    if (step == D) break;
    // every warp computes both parameters: cheaper than another barrier
    T s_t[2][kSamples];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = static_cast<int64_t>(h) * D + step;
#pragma unroll
      for (int s = 0; s < kSamples; ++s) s_t[h][s] = net.bias[top + 1][row];
      add_dot(net.weight[top + 1] + row * net.size[top], true, net.units[top], net.size[top], samples, 0,
              net.known(top, step), s_t[h]);
    }
    T scale_value = 0, shift = 0;
#pragma unroll
    for (int s = 0; s < kSamples; ++s) {
      if (s != mine) continue;
      scale_value = s_t[0][s];
      shift = s_t[1][s];
    }
    if (mine < kSamples && samples.inside(mine)) {
      const int64_t n = samples.at(mine);
      if (params != nullptr) {
        params[n * 2 * D + step] = scale_value;
        params[n * 2 * D + D + step] = shift;
      }
      if (z_steps != nullptr) {
        T log_scale, shrink, slope;
        scale_of(net, scale_value, log_scale, shrink, slope);
        x_steps[n * D + step] = (z_steps[n * D + step] - shift) * shrink;
        total -= log_scale;
      }
    }
    __syncthreads();
  }
  if (log_det != nullptr && mine < kSamples && samples.inside(mine)) log_det[samples.at(mine)] = total;
}

// The transposed solve, last feature to first: λ into solution [N, D], the cotangents of s and t over params, the
// layers' signals.
template <typename T>
__global__ void __launch_bounds__(kSolveThreads, 1)
    made_solve_transposed(const __grid_constant__ MadeNetwork<T> net,  // transposed weights
                          const T* __restrict__ grad_steps,            // [N, D] or null
                          const T* __restrict__ grad_ldj,              // [N] or null
                          const T* __restrict__ x_steps,               // [N, D]
                          T* params,                                   // [N, 2·D] parameters, then their cotangents
                          T* __restrict__ solution                     // [N, D]
    ) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, D = net.features, top = net.layers - 1;
  const Samples samples{static_cast<int64_t>(blockIdx.x) * kSamples, net.samples};
  for (int step = D; step >= 0; --step) {  // the units of this degree, then the feature of this degree
    for (int layer = top; layer >= 0; --layer) {
      const int last = net.known(layer, step);
      const int above = layer == top ? 2 * D : net.size[layer + 1];
      for (int base = net.first_of(layer, step); base < last; base += kWarps) {
        const int unit = base + warp;
        const bool live = unit < last;
        const T* weight = net.weight[layer + 1] + static_cast<int64_t>(unit) * above;
        T g[kSamples];
#pragma unroll
        for (int s = 0; s < kSamples; ++s) g[s] = T(0);
        if (layer == top) {  // the same for all threads of the block
          add_dot(weight, live, static_cast<const T*>(params), above, samples, step, D, g);
          add_dot(weight, live, static_cast<const T*>(params), above, samples, D + step, 2 * D, g);
        } else {
          add_dot(weight, live, static_cast<const T*>(net.signals[layer + 1]), above, samples,
                  net.first_of(layer + 1, step), above, g);
        }
        if (live && lane == 0) {
#pragma unroll
          for (int s = 0; s < kSamples; ++s) {
            if (!samples.inside(s)) continue;
            const int64_t at = samples.at(s) * net.size[layer] + unit;
            T value = g[s];
            if (!(net.residual && layer == top) && net.values[layer][at] <= T(0)) value = T(0);
            if (net.residual && layer % 2 == 0 && layer + 2 <= top) value += net.signals[layer + 2][at];
            net.signals[layer][at] = value;
          }
        }
      }
      __syncthreads();
    }
    if (step == 0) break;
    const int feature = step - 1;
    T rest[kSamples];
#pragma unroll
    for (int s = 0; s < kSamples; ++s) rest[s] = T(0);
    add_dot(net.weight[0] + static_cast<int64_t>(feature) * net.size[0], true, static_cast<const T*>(net.signals[0]),
            net.size[0], samples, net.known(0, feature), net.size[0], rest);
    const bool unseen = grad_steps == nullptr && step == D;  // the last feature's x, which may be infinite
    if (threadIdx.x == 0) {
#pragma unroll
      for (int s = 0; s < kSamples; ++s) {
        if (!samples.inside(s)) continue;
        const int64_t n = samples.at(s), at = n * 2 * D + feature;
        const T given = grad_steps != nullptr ? grad_steps[n * D + feature] : T(0);
        T log_scale, shrink, slope;
        scale_of(net, params[at], log_scale, shrink, slope);
        const T by_x = given - rest[s];
        T found = by_x * shrink, by_log = by_x * x_steps[n * D + feature];
        if (unseen) found = by_log = T(0);
        solution[n * D + feature] = found;
        params[at] = (by_log + (grad_ldj != nullptr ? grad_ldj[n] : T(0))) * slope;
        params[at + D] = found;
      }
    }
    __syncthreads();
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Element by element

// An index of a feature in a tensor, kept inside whatever `order` holds.
__device__ __forceinline__ int64_t feature_at(const int64_t* order, int64_t step, int64_t features) {
  const int64_t i = order[step];
  return i < 0 ? 0 : i >= features ? features - 1 : i;
}

// to[r][c] = from[row(r)·row_stride + column(c)·column_stride]. rows_by_step: row r is feature order[r mod D] of its
// half; columns_by_step alike. inverse: to[row(r)][column(c)] = from[r][c] instead, both dense.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    made_arrange(const T* __restrict__ from, const int64_t rows, const int64_t columns, const int64_t row_stride,
                 const int64_t column_stride, const int64_t* __restrict__ order, const int64_t features,
                 const bool rows_by_step, const bool columns_by_step, const bool inverse, T* __restrict__ to) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= rows * columns) return;
  const int64_t r = i / columns, c = i % columns;
  const int64_t row = rows_by_step ? r / features * features + feature_at(order, r % features, features) : r;
  const int64_t column = columns_by_step ? c / features * features + feature_at(order, c % features, features) : c;
  if (inverse)
    to[row * columns + column] = from[i];
  else
    to[i] = from[row * row_stride + column * column_stride];
}

// The gradient of a layer's weight, in data order, from the dense product of signal and input: negated, 0 where dead. A
// row's degree is that of unit r or, in the last layer, of the output's step + 1 (strict); a column's that of unit c or
// of feature step c + 1.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    made_settle(const __grid_constant__ MadeNetwork<T> net, const int layer, const T* __restrict__ product,
                const int64_t* __restrict__ order, T* __restrict__ grad) {
  const int D = net.features;
  const bool output = layer == net.layers;
  const int64_t rows = output ? 2 * static_cast<int64_t>(D) : net.size[layer],
                columns = layer == 0 ? D : net.size[layer - 1];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= rows * columns) return;
  const int64_t r = i / columns, c = i % columns;
  bool live = false;
  // a unit of degree d sees the inputs known after d features, an output of step k those known after k
  if (output) {
    live = c < net.known(layer - 1, static_cast<int>(r % D));
  } else {
    int low = 0, high = D;  // the degree of unit r: the first k with known(layer, k) > r
    while (low < high) {
      const int middle = (low + high) / 2;
      if (net.known(layer, middle) > r)
        high = middle;
      else
        low = middle + 1;
    }
    live = c < (layer == 0 ? low : net.known(layer - 1, low));
  }
  const int64_t row = output ? r / D * D + feature_at(order, r % D, D) : r;
  const int64_t column = layer == 0 ? feature_at(order, c, D) : c;
  grad[row * columns + column] = live ? -product[i] : T(0);
}

// sums[row(c)] = −Σ_n values[n][c].
template <typename T>
__global__ void __launch_bounds__(kThreads)
    made_sum_columns(const T* __restrict__ values, const int64_t rows, const int64_t columns,
                     const int64_t* __restrict__ order, const int64_t features, const bool by_step,
                     T* __restrict__ sums) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= columns) return;
  T sum = 0;
  for (int64_t n = 0; n < rows; ++n) sum += values[n * columns + c];
  sums[by_step ? c / features * features + feature_at(order, c % features, features) : c] = -sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    made_negate(const T* __restrict__ from, const int64_t count, T* __restrict__ to) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) to[i] = -from[i];
}

}  // namespace genkernels
