// Kernels of `made`: the inverse of an autoregressive transform, its transposed solve, and what puts weights in order.
//
//   z_i = f(x_i; p_i), p_i made of x_{<i}, f an affine map or a spline (made_maps.cuh)
//
// Papamakarios et al. 2017, Durkan et al. 2019; genkernels/reference/made.py has the maths.
//
// Parallelisation. A block of kSolveThreads threads solves kSamples samples alone, first feature to last, so that
// blocks never wait for each other and one launch does the whole inverse. A step is: the P parameters of its feature, x
// by one thread a sample, then each layer's units whose degree has just become known. A warp computes one unit: its
// lanes go through the known inputs side by side, for all samples of the block at once, so a weight is read once a
// block; a butterfly adds up. Barriers of the block separate what depends on each other: one a layer and step.
//
// Layout. Features are in the order of the steps ([N, D], first-layer columns and output rows alike, a feature's
// parameters side by side, see `arrange`), so what is known is always a prefix. Units [N, H] lie in global memory,
// where a block's few samples stay in its first-level cache. Every unit is computed once; the floor is the live
// weights' bytes, once a block, from the second-level cache. Sums in a fixed order: the same bits each run.
#pragma once

#include "common.cuh"
#include "made_maps.cuh"

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
  int features, params, layers;  // D, P, hidden layers
  bool residual;
  const int64_t* counts;            // [layers, D + 1]
  int size[kMaxLayers];             // units of each hidden layer
  const T* weight[kMaxLayers + 1];  // [H, inputs], the last [D·P, H]; for the transposed solve [inputs, H], [H, D·P]
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

// x_steps [N, D] and log_det [N] from z_steps; or, z_steps null, everything from a given x_steps. A sample's parameters
// of a step begin at params + sample·sample_stride + step·step_stride: [N, D, P], or [N, P] that each step writes over.
template <typename T, typename Map>
__global__ void __launch_bounds__(kSolveThreads, 1)
    made_extend(const __grid_constant__ MadeNetwork<T> net, const Map map,
                const T* __restrict__ z_steps,  // [N, D] or null
                const T* __restrict__ context,  // [N, H of the first layer] or null
                T* x_steps,                     // [N, D]
                T* params, const int64_t sample_stride, const int64_t step_stride,
                T* __restrict__ log_det  // [N] or null
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
    const int known = net.known(top, step);
    for (int base = 0; base < net.params; base += kWarps) {
      const int number = base + warp;
      const bool live = number < net.params;
      const int64_t row = static_cast<int64_t>(step) * net.params + number;
      T value[kSamples];
#pragma unroll
      for (int s = 0; s < kSamples; ++s) value[s] = live ? net.bias[top + 1][row] : T(0);
      add_dot(net.weight[top + 1] + row * net.size[top], live, net.units[top], net.size[top], samples, 0, known, value);
      if (live && lane == 0) {
#pragma unroll
        for (int s = 0; s < kSamples; ++s)
          if (samples.inside(s)) params[samples.at(s) * sample_stride + step * step_stride + number] = value[s];
      }
    }
    __syncthreads();
    if (z_steps != nullptr && mine < kSamples && samples.inside(mine)) {
      const int64_t n = samples.at(mine), at = n * D + step;
      T ell;
      map.invert(params + n * sample_stride + step * step_stride, z_steps[at], x_steps[at], ell);
      total += ell;
    }
    __syncthreads();
  }
  if (log_det != nullptr && mine < kSamples && samples.inside(mine)) log_det[samples.at(mine)] = total;
}

// The transposed solve, last feature to first: λ into solution [N, D], the parameters' cotangents over params, the
// layers' signals.
template <typename T, typename Map>
__global__ void __launch_bounds__(kSolveThreads, 1)
    made_solve_transposed(const __grid_constant__ MadeNetwork<T> net,  // transposed weights
                          const Map map,
                          const T* __restrict__ grad_steps,  // [N, D] or null
                          const T* __restrict__ grad_ldj,    // [N] or null
                          const T* __restrict__ x_steps,     // [N, D]
                          T* params,                         // [N, D, P] parameters, then their cotangents
                          T* __restrict__ solution           // [N, D]
    ) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, D = net.features, P = net.params, top = net.layers - 1;
  const int mine = threadIdx.x;  // the sample whose gradient this thread computes, one of the first kSamples threads
  const Samples samples{static_cast<int64_t>(blockIdx.x) * kSamples, net.samples};
  for (int step = D; step >= 0; --step) {  // the units of this degree, then the feature of this degree
    for (int layer = top; layer >= 0; --layer) {
      const int last = net.known(layer, step);
      const int above = layer == top ? P * D : net.size[layer + 1];
      for (int base = net.first_of(layer, step); base < last; base += kWarps) {
        const int unit = base + warp;
        const bool live = unit < last;
        const T* weight = net.weight[layer + 1] + static_cast<int64_t>(unit) * above;
        T g[kSamples];
#pragma unroll
        for (int s = 0; s < kSamples; ++s) g[s] = T(0);
        if (layer == top) {  // the same for all threads of the block
          add_dot(weight, live, static_cast<const T*>(params), above, samples, step * P, D * P, g);
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
    T by_units = 0;
#pragma unroll
    for (int s = 0; s < kSamples; ++s)
      if (s == mine) by_units = rest[s];
    if (mine < kSamples && samples.inside(mine)) {
      const int64_t n = samples.at(mine), at = n * D + feature;
      const T by_x = (grad_steps != nullptr ? grad_steps[at] : T(0)) - by_units;
      const bool unseen = grad_steps == nullptr && step == D;  // the last feature's x, which may be infinite
      solution[at] = map.backward(params + at * P, x_steps[at], by_x, grad_ldj != nullptr ? grad_ldj[n] : T(0), unseen);
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

// Where number i of all features' numbers, `each` a feature and side by side in the order of the steps, lies in a
// tensor that has one number of all features after the other, in data order.
__device__ __forceinline__ int64_t number_at(const int64_t* order, int64_t i, int64_t each, int64_t features) {
  return i % each * features + feature_at(order, i / each, features);
}

// to[r][c] = from[row(r)·row_stride + column(c)·column_stride]. rows_each: rows are numbers of features, so many each,
// to be put in the order of the steps; 0 where they are in place. columns_each alike. inverse: to[row(r)][column(c)] =
// from[r][c] instead, both dense.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    made_arrange(const T* __restrict__ from, const int64_t rows, const int64_t columns, const int64_t row_stride,
                 const int64_t column_stride, const int64_t* __restrict__ order, const int64_t features,
                 const int64_t rows_each, const int64_t columns_each, const bool inverse, T* __restrict__ to) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= rows * columns) return;
  const int64_t r = i / columns, c = i % columns;
  const int64_t row = rows_each ? number_at(order, r, rows_each, features) : r;
  const int64_t column = columns_each ? number_at(order, c, columns_each, features) : c;
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
  const int64_t rows = output ? static_cast<int64_t>(D) * net.params : net.size[layer],
                columns = layer == 0 ? D : net.size[layer - 1];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= rows * columns) return;
  const int64_t r = i / columns, c = i % columns;
  bool live = false;
  // a unit of degree d sees the inputs known after d features, an output of step k those known after k
  if (output) {
    live = c < net.known(layer - 1, static_cast<int>(r / net.params));
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
  const int64_t row = output ? number_at(order, r, net.params, D) : r;
  const int64_t column = layer == 0 ? feature_at(order, c, D) : c;
  grad[row * columns + column] = live ? -product[i] : T(0);
}

// sums[row(c)] = −Σ_n values[n][c]; columns are numbers of features, `each` a feature, or 0 where they are in place.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    made_sum_columns(const T* __restrict__ values, const int64_t rows, const int64_t columns,
                     const int64_t* __restrict__ order, const int64_t features, const int64_t each,
                     T* __restrict__ sums) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= columns) return;
  T sum = 0;
  for (int64_t n = 0; n < rows; ++n) sum += values[n * columns + c];
  sums[each ? number_at(order, c, each, features) : c] = -sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    made_negate(const T* __restrict__ from, const int64_t count, T* __restrict__ to) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) to[i] = -from[i];
}

}  // namespace genkernels
