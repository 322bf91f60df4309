// The importance-weighted bound and the Gaussian terms under it on a GPU: the kernels. Launchers: the .cu;
// genkernels/reference/importance_bound.py has the maths, csrc/common/importance_bound.h its arithmetic.
//
// Layout. Rows go to groups of threads, many rows a block where they are short; neighbours of a warp read neighbours of
// a row. The bound's threads go through theirs three times, of which the first alone comes from memory: for the peak,
// the sum, the weights. The Gaussian's samples are rows of D numbers; backward, a block takes kColumns numbers of one
// example, kDown threads each, which run down its samples and are added up in a fixed order.
//
// Sums: in T, a thread's own in its order, then a group's by a butterfly. No atomics: the same bits on every run.
//
// Bytes: log-weights once, weights once; backward weights once, the gradient once. The Gaussian reads ε and writes z;
// its backward reads ε and the gradient of z.
#pragma once

#include "../common/importance_bound.h"
#include "common.cuh"

namespace genkernels {
namespace importance {

constexpr int kColumns = 32, kDown = kThreads / kColumns;

// The largest of a group, or the NaN among them. Every thread of the block has to call it, once in a kernel.
template <typename T>
__device__ __forceinline__ T group_peak(T value) {
  const int group = blockDim.x;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, value, offset);
    if (offset < group) value = larger(value, other);
  }
  if (group <= 32) return value;
  __shared__ T peaks[kThreads / 32];
  const int thread = threadIdx.y * group + threadIdx.x;
  if (thread % 32 == 0) peaks[thread / 32] = value;
  __syncthreads();
  const int warps = group / 32;
  for (int w = 0; w < warps; ++w) value = larger(value, peaks[threadIdx.y * warps + w]);
  return value;
}

template <typename S>
__global__ void __launch_bounds__(kThreads) bound_kernel(const Rows rows, const double log_count,
                                                         const S* __restrict__ log_w,           // [N, K]
                                                         arithmetic_t<S>* __restrict__ bound,   // [N]
                                                         arithmetic_t<S>* __restrict__ weights  // [N, K]
) {
  using T = arithmetic_t<S>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool there = row < rows.count;
  const S* from = log_w + (there ? row : 0) * rows.length;
  T peak = -std::numeric_limits<T>::infinity();
  for (int64_t k = threadIdx.x; k < rows.length; k += blockDim.x) peak = larger(peak, static_cast<T>(from[k]));
  peak = group_peak(peak);
  const bool finite = is_finite(peak);
  T total = 0;
  if (finite) {
    for (int64_t k = threadIdx.x; k < rows.length; k += blockDim.x) total += math::exp(static_cast<T>(from[k]) - peak);
  }
  total = group_sum(total);
  if (!there) return;
  T* to = weights + row * rows.length;
  for (int64_t k = threadIdx.x; k < rows.length; k += blockDim.x)
    to[k] = finite ? math::exp(static_cast<T>(from[k]) - peak) / total : weight_without_peak(peak);
  if (threadIdx.x == 0) bound[row] = bound_of(peak, total, log_count);
}

template <typename S>
__global__ void __launch_bounds__(kThreads)
    bound_backward_kernel(const Rows rows,
                          const arithmetic_t<S>* __restrict__ by_bound,    // [N], or null: zero
                          const arithmetic_t<S>* __restrict__ by_weights,  // [N, K], or null: zero
                          const arithmetic_t<S>* __restrict__ weights,     // [N, K]
                          S* __restrict__ by_log_w                         // [N, K]
    ) {
  using T = arithmetic_t<S>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool there = row < rows.count;
  const int64_t offset = (there ? row : 0) * rows.length;
  T product = 0;
  if (by_weights) {
    for (int64_t k = threadIdx.x; k < rows.length; k += blockDim.x)
      product += by_weights[offset + k] * weights[offset + k];
  }
  product = group_sum(product);
  if (!there) return;
  const T slope = (by_bound ? by_bound[row] : T(0)) - product;
  for (int64_t k = threadIdx.x; k < rows.length; k += blockDim.x)
    by_log_w[offset + k] = static_cast<S>((by_weights ? slope + by_weights[offset + k] : slope) * weights[offset + k]);
}

template <typename S, bool kPrior>
__global__ void __launch_bounds__(kThreads) reparameterize_kernel(const Samples samples,
                                                                  const S* __restrict__ noise,         // [N, K, D]
                                                                  const S* __restrict__ mean,          // [N, D]
                                                                  const S* __restrict__ log_scale,     // [N, D]
                                                                  S* __restrict__ z,                   // [N, K, D]
                                                                  arithmetic_t<S>* __restrict__ ratio  // [N, K]
) {
  using T = arithmetic_t<S>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool there = row < samples.rows * samples.count;
  T sum = 0;
  if (there) {
    const int64_t of_example = row / samples.count * samples.width, offset = row * samples.width;
    for (int64_t d = threadIdx.x; d < samples.width; d += blockDim.x) {
      const T e = static_cast<T>(noise[offset + d]), s = static_cast<T>(log_scale[of_example + d]);
      const T value = static_cast<T>(mean[of_example + d]) + math::exp(s) * e;
      z[offset + d] = static_cast<S>(value);
      sum += term<kPrior>(e, value) + (kPrior ? s : s + T(kHalfLog2Pi));
    }
  }
  sum = group_sum(sum);
  if (there && threadIdx.x == 0) ratio[row] = sum;
}

// A block (kColumns, kDown) takes kColumns numbers of one example.
template <typename S>
__global__ void __launch_bounds__(kThreads)
    reparameterize_backward_kernel(const Samples samples, const Options options, const unsigned int tiles,
                                   const S* __restrict__ by_z,                    // [N, K, D], or null: zero
                                   const arithmetic_t<S>* __restrict__ by_ratio,  // [N, K], or null: zero
                                   const S* __restrict__ noise,                   // [N, K, D]
                                   const S* __restrict__ mean,                    // [N, D]
                                   const S* __restrict__ log_scale,               // [N, D]
                                   S* __restrict__ by_mean,                       // [N, D]
                                   S* __restrict__ by_log_scale                   // [N, D]
    ) {
  using T = arithmetic_t<S>;
  __shared__ T parts[5][kDown][kColumns];
  const int64_t row = blockIdx.x / tiles;
  const int64_t d = static_cast<int64_t>(blockIdx.x % tiles) * kColumns + threadIdx.x;
  const bool there = d < samples.width;
  const int64_t at = row * samples.width + (there ? d : 0);
  const T m = static_cast<T>(mean[at]), scale = math::exp(static_cast<T>(log_scale[at]));
  Sums<T> sums{};
  T r_sum = 0;
  for (int64_t k = threadIdx.y; there && k < samples.count; k += kDown) {
    const int64_t sample = row * samples.count + k, offset = sample * samples.width + d;
    const T e = static_cast<T>(noise[offset]);
    T g = by_z ? static_cast<T>(by_z[offset]) : T(0);
    if (by_ratio) {
      const T r = by_ratio[sample];
      if (options.prior) g -= r * (m + scale * e);
      if (options.stopped) {
        sums.r_noise += r * e;
        sums.r_noise2 += r * e * e;
      }
      r_sum += r;
    }
    sums.g += g;
    sums.g_noise += g * e;
  }
  const T mine[5] = {sums.g, sums.g_noise, sums.r_noise, sums.r_noise2, r_sum};
#pragma unroll
  for (int q = 0; q < 5; ++q) parts[q][threadIdx.y][threadIdx.x] = mine[q];
  __syncthreads();
  if (!there || threadIdx.y > 0) return;
  T all[5] = {};
#pragma unroll
  for (int q = 0; q < 5; ++q) {
#pragma unroll
    for (int y = 0; y < kDown; ++y) all[q] += parts[q][y][threadIdx.x];
  }
  const Sums<T> total{all[0], all[1], all[2], all[3]};
  by_mean[at] = static_cast<S>(total.by_mean({options.prior, options.stopped && by_ratio != nullptr}, scale));
  by_log_scale[at] = static_cast<S>(total.by_log_scale(options, scale, all[4]));
}

}  // namespace importance
}  // namespace genkernels
