// Between the layout of tensors and that of the kernels (network.cuh): weights as both products read them, images of
// samples, rows of Jacobians.
#pragma once

#include "network.cuh"

namespace genkernels {
namespace residual {

// Of two outputs of an activation for each of `half` arguments, the place in the tensor of the one that stands at c.
GK_HOST_DEVICE inline int in_tensor(int c, int half) {
  return half > 0 ? c % 2 * half + c / 2 : c;
}

// to[tap, channel, row] = from[...]; rows up to a multiple of 4 are 0, and channels that are not there.
template <typename S>
struct Arrangement {
  const S* from;
  arithmetic_t<S>* to;
  int rows, channels, taps;
  int row_stride, channel_stride, tap_stride;
  int row_half, channel_half;  // where those are an activation's outputs, of two each
  int there;                   // channels of `from`
  int first;                   // block
};
constexpr int kArrangements = 3 * kMaps + 3, kArranged = 4 * kThreads;  // numbers of a block

template <typename S>
struct Arrangements {
  Arrangement<S> all[kArrangements];
  int count;
};

template <typename S>
__global__ void __launch_bounds__(kThreads) arrange(const __grid_constant__ Arrangements<S> work) {
  using A = arithmetic_t<S>;
  int i = 0;
  while (i + 1 < work.count && static_cast<int>(blockIdx.x) >= work.all[i + 1].first) ++i;
  const Arrangement<S>& a = work.all[i];
  const int rows = padded(a.rows);
  const int64_t count = static_cast<int64_t>(a.taps) * a.channels * rows;
  const int64_t begin = static_cast<int64_t>(blockIdx.x - a.first) * kArranged + threadIdx.x;
  for (int64_t e = begin; e < begin + kArranged && e < count; e += kThreads) {
    const int64_t line = e / rows;
    const int row = static_cast<int>(e - line * rows), tap = static_cast<int>(line / a.channels);
    const int channel = static_cast<int>(line - static_cast<int64_t>(tap) * a.channels);
    A value = 0;
    if (row < a.rows && channel < a.there)
      value = static_cast<A>(a.from[static_cast<int64_t>(in_tensor(row, a.row_half)) * a.row_stride +
                                    static_cast<int64_t>(in_tensor(channel, a.channel_half)) * a.channel_stride +
                                    static_cast<int64_t>(tap) * a.tap_stride]);
    a.to[e] = value;
  }
}

// Sizes of a batch of vectors: [vectors, samples, features] as tensors have it, [vectors · images, features, lanes]
// here.
struct Batch {
  int64_t vectors, samples, images, features;
  int lanes;
  int64_t inside() const { return vectors * images * features * lanes; }
  int64_t outside() const { return vectors * samples * features; }
};
struct BatchDivisors {
  Divisor samples, images, features, lanes;
  explicit BatchDivisors(const Batch& b) : samples(b.samples), images(b.images), features(b.features), lanes(b.lanes) {}
};

// Absent samples become 0. from null: vector p is the unit vector of feature p. each [samples]: factors, or null.
template <typename S>
__global__ void __launch_bounds__(kThreads)
    load_images(const __grid_constant__ Batch b, const __grid_constant__ BatchDivisors by, const S* __restrict__ from,
                const arithmetic_t<S>* __restrict__ each, arithmetic_t<S>* __restrict__ to, const int64_t count) {
  using A = arithmetic_t<S>;
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (e >= count) return;
  const int64_t line = by.lanes.divide(e), image = by.features.divide(line), vector = by.images.divide(image);
  const int64_t feature = line - image * b.features;
  const int64_t sample = (image - vector * b.images) * b.lanes + (e - line * b.lanes);
  A value = 0;
  if (sample < b.samples) {
    if (from == nullptr)
      value = feature == vector ? A(1) : A(0);
    else
      value = static_cast<A>(from[(vector * b.samples + sample) * b.features + feature]);
    if (each != nullptr) value *= each[sample];
  }
  to[e] = value;
}

template <typename S>
__global__ void __launch_bounds__(kThreads)
    store_images(const __grid_constant__ Batch b, const __grid_constant__ BatchDivisors by,
                 const arithmetic_t<S>* __restrict__ from, S* __restrict__ to, const int64_t count) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (e >= count) return;
  const int64_t line = by.features.divide(e), feature = e - line * b.features;
  const int64_t vector = by.samples.divide(line), sample = line - vector * b.samples;
  const int64_t image = by.lanes.divide(sample), lane = sample - image * b.lanes;
  to[e] = static_cast<S>(from[((vector * b.images + image) * b.features + feature) * b.lanes + lane]);
}

// matrix [samples, D, D] = 1 + J: row p is vector p of the images.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    jacobian_rows(const __grid_constant__ Batch b, const __grid_constant__ BatchDivisors by, const A* __restrict__ from,
                  A* __restrict__ matrix, const int64_t count) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (e >= count) return;
  const int64_t line = by.features.divide(e), feature = e - line * b.features;
  const int64_t sample = by.features.divide(line), vector = line - sample * b.features;
  const int64_t image = by.lanes.divide(sample), lane = sample - image * b.lanes;
  matrix[e] =
      from[((vector * b.images + image) * b.features + feature) * b.lanes + lane] + (feature == vector ? A(1) : A(0));
}

// rows [D, samples, D] = those of the matrices [samples, D, D].
template <typename S>
__global__ void __launch_bounds__(kThreads)
    rows_first(const __grid_constant__ Batch b, const __grid_constant__ BatchDivisors by,
               const arithmetic_t<S>* __restrict__ matrix, S* __restrict__ rows, const int64_t count) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (e >= count) return;
  const int64_t line = by.features.divide(e), feature = e - line * b.features;
  const int64_t row = by.samples.divide(line), sample = line - row * b.samples;
  rows[e] = static_cast<S>(matrix[(sample * b.features + row) * b.features + feature]);
}

// The sum over the threads of a lane (thread % lanes) of the block; every thread gets it. All of them have to call it;
// lanes is a power of two.
__device__ __forceinline__ double lane_sum(double value, int lanes, double* shared) {
  const int thread = threadIdx.x;
  __syncthreads();  // what was read of it before
  shared[thread] = value;
  for (int half = kThreads / 2; half >= lanes; half /= 2) {
    __syncthreads();
    if (thread < half) shared[thread] += shared[thread + half];
  }
  __syncthreads();
  return shared[thread % lanes];
}

}  // namespace residual
}  // namespace genkernels
