// Affine coupling on a GPU: the kernels (Dinh et al. 2017; the definition is genkernels/reference). Launchers: the .cu.
//
// Maths, for each transformed element, with ℓ = log σ(s) and ℓ' = dℓ/ds (csrc/common/scale_map.h):
//   forward    z = x·σ + t                ldj = Σ ℓ
//   inverse    x = (z − t)·e^−ℓ           ldj = −Σ ℓ
//   gradient of the forward map    g_x = g_z·σ       g_t = g_z       g_s = (g_x·x + g_ldj)·ℓ'
//   gradient of the inverse map    g_z = g_x·e^−ℓ    g_t = −g_z      g_s = −(g_x·x + g_ldj)·ℓ'
// The other elements pass through, bit for bit, and so does their gradient.
//
// Layout, all tensors contiguous, S = product of the spatial sizes:
//   channel split    x [N, 2, E], E = C/2·S: one half passes, the other is transformed
//   checkerboard     x [N, E], E = C·H·W: element (c, h, w) is transformed where h + w is odd (flip: even)
//   alternating      x [N, C/2, 2, S]: one channel passes, the next is transformed
//   none             x [N, E]: all is transformed
//   params           [N, E / L, 2, L], log-scales and shifts (or shifts and log-scales) in alternating rows of L
//                    elements: the `halves` layouts are one pair of rows of L = E, the `interleaved` ones a pair a
//                    channel; additive: shifts alone, [N, E]
//
// Parallelisation: a thread owns one 16-byte run of elements (4 fp32, 8 half) in each tensor, a group of threads a
// chunk of one sample, a block 256 threads: many samples where they are small, a chunk of one where they are large.
// Sizes or addresses that rule out 16-byte accesses take the same kernels with the runs' lanes a group apart. Flip,
// inverse, layout and split are run-time values, the same for every thread: beside the memory traffic their branches
// cost nothing.
//
// Log-determinant: each group sums its chunk in a fixed order; samples of one chunk are done, for larger ones a second
// launch sums the chunks in a fixed order. No atomics: the same bits on every run. Chunks depend on a sample's size and
// alignment, not on the batch: a sample alone gives the bits that it gives among others.
//
// Bytes, in half-tensors (E elements), channel split: forward and inverse 2 + 2 in and 2 out = 6; backward 3 + 1 in
// (output gradient, transformed half, log-scales) and 2 + 2 out = 8; backward of the inverse 9 (shifts too); reverse 6
// in and 6 out = 12. With 30 to 80 instructions an element against 24 bytes in fp32, 12 in half types, they are
// memory-bound (half types with sigmoid come closest to the other limit), and what is left to do is to keep loads in
// flight: every load of a thread, 4 to 6 of 16 bytes, is issued before the first use of any.
//
// Saved for backward: the input and the params, which the network keeps anyway; reverse needs the output instead.
#pragma once

#include "../common/affine_coupling.h"
#include "../common/scale_map.h"
#include "common.cuh"

namespace genkernels {

using coupling::Gradient;

// One call's sizes, in elements.
struct Coupling {
  int64_t samples;  // N
  int64_t moved;    // E: what one of s and t covers in a sample
  Divisor row;      // L
  Divisor x_row;    // alternating: S, the numbers of a channel; else E
  Divisor height;   // checkerboard: H and W
  Divisor width;
  int64_t x_size;      // elements of a sample of x
  int64_t param_size;  // elements of a sample of params
  int64_t passed_at;   // where in a sample of x the two halves begin; without halves: both at 0
  int64_t moved_at;
  int64_t scale_at;  // where in a sample of params log-scales and shifts begin
  int64_t shift_at;
  ScaleMap map;
  double constant;  // c of the scale map
  bool checkerboard;
  bool copies;  // there is a half that passes
  bool flip;
  unsigned int chunks = 1;  // a sample's, set with the group

  __device__ __forceinline__ unsigned int chunk() const { return blockIdx.x % chunks; }
  __device__ __forceinline__ int64_t sample() const {
    return static_cast<int64_t>(blockIdx.x / chunks) * blockDim.y + threadIdx.y;
  }

  template <int V, bool kWide>
  __device__ __forceinline__ Lanes<V, kWide> run() const {
    const int group = blockDim.x;
    const int64_t chunk_first = static_cast<int64_t>(chunk()) * group * V;
    return {chunk_first + static_cast<int64_t>(threadIdx.x) * (kWide ? V : 1), moved, group};
  }

  // Offset of element e's log-scale behind `scale_at`, and of its shift behind `shift_at`, in a sample of params.
  __device__ __forceinline__ int64_t param_at(int64_t e) const {
    return row.value() < moved ? e + row.divide(e) * row.value() : e;
  }

  // Offset of element e behind `passed_at` or `moved_at` in a sample of x.
  __device__ __forceinline__ int64_t x_at(int64_t e) const {
    return x_row.value() < moved ? e + x_row.divide(e) * x_row.value() : e;
  }

  // Bit j: lane j holds a transformed element.
  template <int V, bool kWide>
  __device__ __forceinline__ unsigned int moved_lanes(const Lanes<V, kWide>& run) const {
    unsigned int lanes = 0;
    int64_t h = 0, w = 0;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (checkerboard) {
        if (!kWide || j == 0) {
          const int64_t e = run.element(j), line = width.divide(e);
          w = e - line * width.value();
          h = line - height.divide(line) * height.value();
        } else if (++w == width.value()) {  // a wide run may cross the ends of lines and planes
          w = 0;
          if (++h == height.value()) h = 0;
        }
      }
      const bool moves = !checkerboard || ((h + w) % 2 != 0) != flip;
      if (run.inside(j) && moves) lanes |= 1u << j;
    }
    return lanes;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Kernels

// The scale maps with kernels of their own; kOther stands for all the others, chosen in the kernel: the same for every
// thread, the choice costs nothing beside the memory traffic, and the library does not grow by a kernel a map.
enum class Kernel : int { kExp, kSigmoid, kTanh, kAdditive, kOther };

// log σ, σ, 1 / σ and the slope; what a kernel does not use is not computed.
template <Kernel K, typename A>
__device__ __forceinline__ void scale_of(const Coupling& c, A s, A& log_scale, A& scale, A& shrink, A& slope) {
  const auto by_map = [&]<ScaleMap M>() {
    scale_map<M>(s, A(c.constant), log_scale, scale, slope);
    shrink = shrink_of<M>(log_scale, scale);
  };
  if constexpr (K == Kernel::kExp)
    by_map.template operator()<ScaleMap::kExp>();
  else if constexpr (K == Kernel::kSigmoid)
    by_map.template operator()<ScaleMap::kSigmoid>();
  else if constexpr (K == Kernel::kTanh)
    by_map.template operator()<ScaleMap::kTanh>();
  else if constexpr (K == Kernel::kAdditive)
    log_scale = slope = A(0), scale = shrink = A(1);
  else
    with_scale_map(c.map, by_map);
}

template <Kernel M, typename T, typename P, bool kWide>
__global__ void __launch_bounds__(kThreads)
    coupling_forward(const Coupling c, const bool inverse,
                     const T* __restrict__ x,               // [N, x_size]: z when inverse
                     const P* __restrict__ params,          // [N, param_size]
                     T* __restrict__ out,                   // [N, x_size]
                     arithmetic_t<T>* __restrict__ log_det  // [N, chunks]; additive: [N]
    ) {
  using A = arithmetic_t<T>;
  constexpr int V = kLanes<T, kWide>;
  constexpr bool kScales = M != Kernel::kAdditive;
  const int64_t sample = c.sample();
  const auto run = c.run<V, kWide>();
  A sum = 0;
  if (sample < c.samples && run.any()) {
    const auto x_at = [&c](int64_t e) { return c.x_at(e); };
    const auto p_at = [&c](int64_t e) { return c.param_at(e); };
    x += sample * c.x_size;
    out += sample * c.x_size;
    params += sample * c.param_size;

    const Vector<T, V> passed = load(x + c.passed_at, run, x_at);
    Vector<T, V> moved = load(x + c.moved_at, run, x_at);
    Vector<P, V> s{};
    if constexpr (kScales) s = load(params + c.scale_at, run, p_at);
    const Vector<P, V> t = load(params + c.shift_at, run, p_at);

    if (c.copies) store(out + c.passed_at, run, x_at, passed);
    const unsigned int lanes = c.moved_lanes(run);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const A value = static_cast<A>(moved.lane[j]), shift = static_cast<A>(t.lane[j]);
      A log_scale, scale, shrink, slope;
      scale_of<M, A>(c, static_cast<A>(s.lane[j]), log_scale, scale, shrink, slope);
      A result;
      if constexpr (kScales) {
        result = inverse ? (value - shift) * shrink : value * scale + shift;
      } else {
        result = inverse ? value - shift : value + shift;
      }
      const bool moves = lanes >> j & 1;  // the other lanes keep their bits, and nothing of them reaches the sum
      moved.lane[j] = moves ? static_cast<T>(result) : moved.lane[j];
      sum += moves ? log_scale : A(0);
    }
    store(out + c.moved_at, run, x_at, moved);
  }
  if constexpr (kScales) {
    sum = group_sum(sum);
    if (threadIdx.x == 0 && sample < c.samples) log_det[sample * c.chunks + c.chunk()] = inverse ? -sum : sum;
  } else {
    if (threadIdx.x == 0 && sample < c.samples && c.chunk() == 0) log_det[sample] = 0;
  }
}

template <Kernel M, typename T, typename P, bool kWide>
__global__ void __launch_bounds__(kThreads)
    coupling_backward(const Coupling c, const Gradient which,
                      const bool has_grad_out,         // otherwise nothing is multiplied by it
                      const T* __restrict__ grad_out,  // [N, x_size]; any such tensor without has_grad_out
                      const arithmetic_t<T>* __restrict__ grad_ldj,  // [N], or null: zero
                      const T* __restrict__ x,                       // [N, x_size]: x; kInverse and kReverse: z
                      const P* __restrict__ params,                  // [N, param_size]
                      T* __restrict__ grad_x,                        // [N, x_size]
                      P* __restrict__ grad_params,                   // [N, param_size]
                      T* __restrict__ x_out                          // [N, x_size], kReverse only: x
    ) {
  using A = arithmetic_t<T>;
  constexpr int V = kLanes<T, kWide>;
  constexpr bool kScales = M != Kernel::kAdditive;
  const bool from_output = which != Gradient::kForward;
  const bool inverse = which == Gradient::kInverse;
  const bool reverse = which == Gradient::kReverse;
  const int64_t sample = c.sample();
  const auto run = c.run<V, kWide>();
  if (sample >= c.samples || !run.any()) return;

  const auto x_at = [&c](int64_t e) { return c.x_at(e); };
  const auto p_at = [&c](int64_t e) { return c.param_at(e); };
  const int64_t x_first = sample * c.x_size, p_first = sample * c.param_size;

  Vector<T, V> grad_passed = load(grad_out + x_first + c.passed_at, run, x_at);
  Vector<T, V> grad = load(grad_out + x_first + c.moved_at, run, x_at);
  Vector<T, V> passed{}, moved{};
  Vector<P, V> s{}, t{};
  if constexpr (kScales) {
    s = load(params + p_first + c.scale_at, run, p_at);
    moved = load(x + x_first + c.moved_at, run, x_at);
    if (from_output) t = load(params + p_first + c.shift_at, run, p_at);
    if (reverse) passed = load(x + x_first + c.passed_at, run, x_at);
  } else if (reverse) {
    t = load(params + p_first, run, p_at);
    moved = load(x + x_first + c.moved_at, run, x_at);
    passed = load(x + x_first + c.passed_at, run, x_at);
  }
  const A grad_log_det = grad_ldj != nullptr ? grad_ldj[sample] : A(0);
  if (!has_grad_out) grad_passed = grad = Vector<T, V>{};

  if (c.copies) {
    store(grad_x + x_first + c.passed_at, run, x_at, grad_passed);
    if (reverse) store(x_out + x_first + c.passed_at, run, x_at, passed);
  }
  const unsigned int lanes = c.moved_lanes(run);
  Vector<P, V> grad_s, grad_t;  // zero at pass-through pixels
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const A g = static_cast<A>(grad.lane[j]);
    A value = static_cast<A>(moved.lane[j]);
    A log_scale, scale, shrink, slope;
    scale_of<M, A>(c, static_cast<A>(s.lane[j]), log_scale, scale, shrink, slope);
    if (from_output) {
      value = (value - static_cast<A>(t.lane[j])) * shrink;
      if (inverse) scale = shrink;
    }
    const A g_x = has_grad_out ? g * scale : A(0);
    const A g_log_scale = has_grad_out ? (inverse ? g : g_x) * value : A(0);
    const A g_s = (g_log_scale + grad_log_det) * slope;
    const bool moves = lanes >> j & 1;
    moved.lane[j] = moves ? static_cast<T>(value) : moved.lane[j];
    grad.lane[j] = moves ? static_cast<T>(g_x) : grad.lane[j];
    grad_t.lane[j] = moves ? static_cast<P>(inverse ? -g_x : g) : P(0);
    grad_s.lane[j] = moves ? static_cast<P>(inverse ? -g_s : g_s) : P(0);
  }
  store(grad_x + x_first + c.moved_at, run, x_at, grad);
  if constexpr (kScales) store(grad_params + p_first + c.scale_at, run, p_at, grad_s);
  store(grad_params + p_first + c.shift_at, run, p_at, grad_t);
  if (reverse) store(x_out + x_first + c.moved_at, run, x_at, moved);
}

}  // namespace genkernels
