// Planar and radial flows on a GPU, K layers in one kernel: the kernels. Launchers: the .cu;
// genkernels/reference/elementary_flows.py has the maths, csrc/common/elementary_flows.h that of one layer and row.
//
// Layout: z [G, R, D], parameters [G, K, ...]. A row is `lanes` neighbouring threads of a warp, each with V of its
// numbers in registers, lanes·V the power of two from D on: a point of the plane is one thread, 64 features are a warp.
// A warp takes 32 / lanes rows of one group at a time, `turns` times. The constraints are applied by a small kernel
// before: a warp for each layer of each group.
//
// Saved for backward: the inputs. Backward goes forward again and leaves each layer's z in scratch memory [K, G·R, D],
// where each thread finds its own numbers again, and comes back. A warp adds up its rows' share of what the gradients
// by parameters are made of, [warps, K, sums]; a last kernel adds up the warps in order and goes through the
// constraints. No atomics: the same bits on every run.
//
// Bytes: forward reads and writes z, backward reads z and a gradient and writes one, and goes through the scratch and
// the sums, which for D = 2 and K = 16 are 128 B and 12 B a row and stay in the second-level cache.
#pragma once

#include "../common/elementary_flows.h"
#include "common.cuh"

namespace genkernels {
namespace flows {

// Kernels ask for one block a multiprocessor at least: left to itself ptxas stops at 64 registers and spills a few.
constexpr int kWarp = 32, kWarps = kThreads / kWarp;  // of a block, shaped (32, 8)
constexpr int kMostNumbers = 8;                       // of a thread

// One launch's work: which rows of which group a warp takes.
struct Warps {
  Sizes sizes;
  int lanes;         // threads of a row
  int64_t turns;     // that a warp takes
  int64_t of_group;  // warps

  __host__ __device__ int64_t count() const { return sizes.groups * of_group; }
  __device__ int64_t warp() const { return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y; }
};

// A thread's place in one turn. Warps and rows beyond the last do its work again and keep it to themselves: all threads
// meet the same shuffles.
struct Place {
  int64_t warp, group, row;  // row: counted through all groups
  int lane;                  // of the row
  bool live;

  __device__ Place(const Warps& warps, int64_t turn) {
    const int64_t last = warps.count() - 1, wanted = warps.warp(), rows = kWarp / warps.lanes;
    warp = wanted < last ? wanted : last;
    group = warp / warps.of_group;
    lane = threadIdx.x % warps.lanes;
    const int64_t in_group = ((warp % warps.of_group) * warps.turns + turn) * rows + threadIdx.x / warps.lanes;
    const int64_t end = warps.sizes.rows;
    live = wanted <= last && in_group < end;
    row = group * end + (in_group < end ? in_group : end - 1);
  }
};

// The sum over threads whose numbers differ in bits from `from` to below `to`: over a row's with (1, lanes), over a
// warp's rows with (lanes, 32).
template <typename T>
__device__ __forceinline__ T sum_across(T value, int from, int to) {
  for (int offset = from; offset < to; offset *= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

template <typename T, int V, typename S>
__device__ __forceinline__ void load_row(const S* from, int lane, int lanes, int64_t features, T (&to)[V]) {
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const int64_t d = lane + static_cast<int64_t>(j) * lanes;
    to[j] = d < features ? static_cast<T>(from[d]) : T(0);
  }
}

template <typename T, int V, typename S>
__device__ __forceinline__ void store_row(const T (&from)[V], int lane, int lanes, int64_t features, S* to) {
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const int64_t d = lane + static_cast<int64_t>(j) * lanes;
    if (d < features) to[d] = static_cast<S>(from[j]);
  }
}

template <typename T, int V>
__device__ __forceinline__ T dot(const T (&a)[V], const T (&b)[V], int lanes) {
  T sum = 0;
#pragma unroll
  for (int j = 0; j < V; ++j) sum += a[j] * b[j];
  return sum_across(sum, 1, lanes);
}

// Adds a warp's share to its sums; in the first turn they are set.
template <typename T>
__device__ __forceinline__ void accumulate(T value, bool first, T* to) {
  *to = first ? value : *to + value;
}

// ---- planar ---------------------------------------------------------------------------------------------------------

// The constraint of one layer, by a warp; v of w[d] is w[d]·per_largest.
template <typename S, typename T>
__device__ __forceinline__ PlanarConstraint<T> constraint_of(const S* w, const S* u, int64_t features) {
  T largest = 0, square = 0, a = 0;
  for (int64_t d = threadIdx.x; d < features; d += kWarp) {
    const T size = math::abs(static_cast<T>(w[d]));
    largest = size > largest || size != size ? size : largest;
  }
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, largest, offset);
    largest = other > largest || other != other ? other : largest;
  }
  for (int64_t d = threadIdx.x; d < features; d += kWarp) {
    const T v = static_cast<T>(w[d]) / (largest == T(0) ? T(1) : largest);
    square += v * v;
    a += static_cast<T>(w[d]) * static_cast<T>(u[d]);
  }
  return PlanarConstraint<T>(largest, sum_across(square, 1, kWarp), sum_across(a, 1, kWarp));
}

// ready [G, K, D + 2]: û, m = wᵀû, 1 + m. A warp a layer.
template <typename S, typename T>
__global__ void __launch_bounds__(kThreads, 1) planar_prepare(const int64_t count, const int64_t features,
                                                              const S* __restrict__ w,  // [G, K, D]
                                                              const S* __restrict__ u,  // [G, K, D]
                                                              T* __restrict__ ready) {
  const int64_t wanted = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  const int64_t layer = wanted < count ? wanted : count - 1;
  w += layer * features;
  u += layer * features;
  const PlanarConstraint<T> of = constraint_of<S, T>(w, u, features);
  if (wanted != layer) return;
  ready += layer * (features + 2);
  for (int64_t d = threadIdx.x; d < features; d += kWarp) {
    const T v = of.shift == T(0) ? T(0) : static_cast<T>(w[d]) * of.per_largest;
    ready[d] = static_cast<T>(u[d]) + of.shift * (of.per_v * v);
  }
  if (threadIdx.x == 0) {
    ready[features] = of.soft - T(1);
    ready[features + 1] = of.soft;
  }
}

template <typename S, typename T, int V>
struct PlanarLayer {
  T w[V], u[V], b, m, soft;

  __device__ __forceinline__ PlanarLayer(const Warps& warps, const Place& at, int64_t k, const S* all_w, const S* all_b,
                                         const T* ready) {
    const int64_t layer = at.group * warps.sizes.layers + k, features = warps.sizes.features;
    load_row(all_w + layer * features, at.lane, warps.lanes, features, w);
    ready += layer * (features + 2);
    load_row(ready, at.lane, warps.lanes, features, u);
    b = static_cast<T>(all_b[layer]);
    m = ready[features];
    soft = ready[features + 1];
  }
  __device__ __forceinline__ PlanarStep<T> step(const T (&z)[V], int lanes) const {
    return PlanarStep<T>(dot(w, z, lanes) + b);
  }
  __device__ __forceinline__ void move(T h, T (&z)[V]) const {
#pragma unroll
    for (int j = 0; j < V; ++j) z[j] += u[j] * h;
  }
};

template <typename S, typename T, int V>
__global__ void __launch_bounds__(kThreads, 1) planar_forward(const Warps warps,
                                                              const S* __restrict__ z,      // [G, R, D]
                                                              const S* __restrict__ w,      // [G, K, D]
                                                              const S* __restrict__ b,      // [G, K]
                                                              const T* __restrict__ ready,  // [G, K, D + 2]
                                                              S* __restrict__ z_out, T* __restrict__ ldj) {
  const int64_t features = warps.sizes.features;
  for (int64_t turn = 0; turn < warps.turns; ++turn) {
    const Place at(warps, turn);
    T row[V], sum = 0;
    load_row(z + at.row * features, at.lane, warps.lanes, features, row);
    for (int64_t k = 0; k < warps.sizes.layers; ++k) {
      const PlanarLayer<S, T, V> layer(warps, at, k, w, b, ready);
      const PlanarStep<T> step = layer.step(row, warps.lanes);
      sum += step.log_det(layer.m, layer.soft);
      layer.move(step.h, row);
    }
    if (!at.live) continue;
    store_row(row, at.lane, warps.lanes, features, z_out + at.row * features);
    if (at.lane == 0) ldj[at.row] = sum;
  }
}

template <typename S, typename T, int V>
__global__ void __launch_bounds__(kThreads, 1)
    planar_backward(const Warps warps,
                    const S* __restrict__ grad_z,    // [G, R, D], or null: zero
                    const T* __restrict__ grad_ldj,  // [G, R], or null: zero
                    const S* __restrict__ z, const S* __restrict__ w, const S* __restrict__ b,
                    const T* __restrict__ ready,  // [G, K, D + 2]
                    T* scratch,                   // [K, G·R, D]
                    S* __restrict__ by_z,
                    T* sums  // [warps, K, 2·D + 2]: by w, û, m and b
    ) {
  const int64_t features = warps.sizes.features, layers = warps.sizes.layers;
  const int64_t plane = warps.sizes.groups * warps.sizes.rows * features, numbers = Planar::sums(features);
  const int lanes = warps.lanes;
  for (int64_t turn = 0; turn < warps.turns; ++turn) {
    const Place at(warps, turn);
    const int64_t here = at.row * features;
    T row[V];
    load_row(z + here, at.lane, lanes, features, row);
    for (int64_t k = 0; k < layers; ++k) {
      if (at.live) store_row(row, at.lane, lanes, features, scratch + k * plane + here);
      const PlanarLayer<S, T, V> layer(warps, at, k, w, b, ready);
      layer.move(layer.step(row, lanes).h, row);
    }
    T g[V] = {};
    if (grad_z && at.live) load_row(grad_z + here, at.lane, lanes, features, g);
    const T by_ldj = grad_ldj && at.live ? grad_ldj[at.row] : T(0);
    for (int64_t k = layers - 1; k >= 0; --k) {
      const PlanarLayer<S, T, V> layer(warps, at, k, w, b, ready);
#pragma unroll
      for (int j = 0; j < V; ++j) row[j] = T(0);
      if (at.live) load_row(scratch + k * plane + here, at.lane, lanes, features, row);
      const PlanarStep<T> step = layer.step(row, lanes);
      T by_t, by_m;
      step.backward(layer.m, layer.soft, dot(g, layer.u, lanes), by_ldj, by_t, by_m);
      T* to = sums + (at.warp * layers + k) * numbers;
      const bool mine = threadIdx.x < lanes && warps.warp() == at.warp, first = turn == 0;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int64_t d = at.lane + static_cast<int64_t>(j) * lanes;
        const T by_w = sum_across(row[j] * by_t, lanes, kWarp), by_u = sum_across(g[j] * step.h, lanes, kWarp);
        if (mine && d < features) {
          accumulate(by_w, first, to + d);
          accumulate(by_u, first, to + features + d);
        }
        g[j] += layer.w[j] * by_t;
      }
      by_m = sum_across(by_m, lanes, kWarp);
      by_t = sum_across(by_t, lanes, kWarp);
      if (mine && at.lane == 0) {
        accumulate(by_m, first, to + 2 * features);
        accumulate(by_t, first, to + 2 * features + 1);
      }
    }
    if (at.live) store_row(g, at.lane, lanes, features, by_z + here);
  }
}

// Sums over the warps of a group, in order.
template <typename T>
__device__ __forceinline__ T total_of(const T* sums, const Warps& warps, int64_t group, int64_t k, int64_t numbers,
                                      int64_t which) {
  double total = 0;
  for (int64_t i = 0; i < warps.of_group; ++i)
    total += sums[((group * warps.of_group + i) * warps.sizes.layers + k) * numbers + which];
  return static_cast<T>(total);
}

// Of w/‖w‖² the derivative is that of w, less twice its part along w, over ‖w‖². A warp a layer.
template <typename S, typename T>
__global__ void __launch_bounds__(kThreads, 1)
    planar_finish(const Warps warps, T* sums, const S* __restrict__ w, const S* __restrict__ u, S* __restrict__ by_w,
                  S* __restrict__ by_u, S* __restrict__ by_b) {
  const int64_t count = warps.sizes.groups * warps.sizes.layers, features = warps.sizes.features;
  const int64_t wanted = warps.warp(), layer = wanted < count ? wanted : count - 1;
  const int64_t group = layer / warps.sizes.layers, k = layer % warps.sizes.layers, numbers = Planar::sums(features);
  w += layer * features;
  u += layer * features;
  const PlanarConstraint<T> of = constraint_of<S, T>(w, u, features);
  const T unit = of.shift == T(0) ? T(0) : of.per_largest;
  T along = 0;
  for (int64_t d = threadIdx.x; d < features; d += kWarp)
    along += total_of(sums, warps, group, k, numbers, features + d) * (static_cast<T>(w[d]) * unit);
  along = sum_across(along, 1, kWarp) * of.per_v;
  if (wanted != layer) return;
  const T by_a = total_of(sums, warps, group, k, numbers, 2 * features) * of.soft_slope + along * of.shift_slope;
  const T size = of.shift * (of.per_largest * of.per_v);
  for (int64_t d = threadIdx.x; d < features; d += kWarp) {
    const T of_w = total_of(sums, warps, group, k, numbers, d),
            of_u = total_of(sums, warps, group, k, numbers, features + d);
    const T w_d = static_cast<T>(w[d]), u_d = static_cast<T>(u[d]);
    by_w[layer * features + d] = static_cast<S>(of_w + by_a * u_d + size * (of_u - T(2) * along * (w_d * unit)));
    by_u[layer * features + d] = static_cast<S>(of_u + by_a * w_d);
  }
  if (threadIdx.x == 0) by_b[layer] = static_cast<S>(total_of(sums, warps, group, k, numbers, 2 * features + 1));
}

// ---- radial ---------------------------------------------------------------------------------------------------------

// ready [G, K, 2]: softplus of α and β. A thread a layer.
template <typename S, typename T>
__global__ void __launch_bounds__(kThreads, 1) radial_prepare(const int64_t count, const S* __restrict__ alpha,
                                                              const S* __restrict__ beta, T* __restrict__ ready) {
  const int64_t layer = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.y * kWarp + threadIdx.x;
  if (layer >= count) return;
  ready[2 * layer] = Softplus<T>(static_cast<T>(alpha[layer])).value;
  ready[2 * layer + 1] = Softplus<T>(static_cast<T>(beta[layer])).value;
}

// d = z − c in place of z, and what the layer does there.
template <typename S, typename T, int V>
__device__ __forceinline__ RadialStep<T> radial_step(const Warps& warps, const Place& at, int64_t k, const S* center,
                                                     const T* ready, T (&row)[V]) {
  const int64_t layer = at.group * warps.sizes.layers + k;
  T c[V];
  load_row(center + layer * warps.sizes.features, at.lane, warps.lanes, warps.sizes.features, c);
#pragma unroll
  for (int j = 0; j < V; ++j) row[j] -= c[j];
  return RadialStep<T>(dot(row, row, warps.lanes), ready[2 * layer], ready[2 * layer + 1]);
}

template <typename S, typename T, int V>
__global__ void __launch_bounds__(kThreads, 1) radial_forward(const Warps warps,
                                                              const S* __restrict__ z,       // [G, R, D]
                                                              const S* __restrict__ center,  // [G, K, D]
                                                              const T* __restrict__ ready,   // [G, K, 2]
                                                              S* __restrict__ z_out, T* __restrict__ ldj) {
  const int64_t features = warps.sizes.features;
  for (int64_t turn = 0; turn < warps.turns; ++turn) {
    const Place at(warps, turn);
    T row[V], sum = 0;
    load_row(z + at.row * features, at.lane, warps.lanes, features, row);
    for (int64_t k = 0; k < warps.sizes.layers; ++k) {
      T d[V];
#pragma unroll
      for (int j = 0; j < V; ++j) d[j] = row[j];
      const RadialStep<T> step = radial_step(warps, at, k, center, ready, d);
      sum += step.log_det(T(features - 1));
#pragma unroll
      for (int j = 0; j < V; ++j) row[j] += step.x * d[j];
    }
    if (!at.live) continue;
    store_row(row, at.lane, warps.lanes, features, z_out + at.row * features);
    if (at.lane == 0) ldj[at.row] = sum;
  }
}

template <typename S, typename T, int V>
__global__ void __launch_bounds__(kThreads, 1)
    radial_backward(const Warps warps,
                    const S* __restrict__ grad_z,    // [G, R, D], or null: zero
                    const T* __restrict__ grad_ldj,  // [G, R], or null: zero
                    const S* __restrict__ z, const S* __restrict__ center,
                    const T* __restrict__ ready,  // [G, K, 2]
                    T* scratch,                   // [K, G·R, D]: z before the layer
                    S* __restrict__ by_z,
                    T* sums  // [warps, K, D + 2]: by centre, softplus(α) and softplus(β)
    ) {
  const int64_t features = warps.sizes.features, layers = warps.sizes.layers;
  const int64_t plane = warps.sizes.groups * warps.sizes.rows * features, numbers = Radial::sums(features);
  const int lanes = warps.lanes;
  for (int64_t turn = 0; turn < warps.turns; ++turn) {
    const Place at(warps, turn);
    const int64_t here = at.row * features;
    T row[V];
    load_row(z + here, at.lane, lanes, features, row);
    for (int64_t k = 0; k < layers; ++k) {
      if (at.live) store_row(row, at.lane, lanes, features, scratch + k * plane + here);
      T d[V];
#pragma unroll
      for (int j = 0; j < V; ++j) d[j] = row[j];
      const RadialStep<T> step = radial_step(warps, at, k, center, ready, d);
#pragma unroll
      for (int j = 0; j < V; ++j) row[j] += step.x * d[j];
    }
    T g[V] = {};
    if (grad_z && at.live) load_row(grad_z + here, at.lane, lanes, features, g);
    const T by_ldj = grad_ldj && at.live ? grad_ldj[at.row] : T(0);
    for (int64_t k = layers - 1; k >= 0; --k) {
      T d[V] = {};
      if (at.live) load_row(scratch + k * plane + here, at.lane, lanes, features, d);
      const RadialStep<T> step = radial_step(warps, at, k, center, ready, d);
      T inner, outer, outwards;
      step.backward(T(features - 1), dot(g, d, lanes), by_ldj, inner, outer, outwards);
      T* to = sums + (at.warp * layers + k) * numbers;
      const bool mine = threadIdx.x < lanes && warps.warp() == at.warp, first = turn == 0;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const T by_d = step.x * g[j] + outwards * d[j];
        const T by_c = sum_across(-by_d, lanes, kWarp);
        const int64_t at_d = at.lane + static_cast<int64_t>(j) * lanes;
        if (mine && at_d < features) accumulate(by_c, first, to + at_d);
        g[j] += by_d;
      }
      inner = sum_across(inner, lanes, kWarp);
      outer = sum_across(outer, lanes, kWarp);
      if (mine && at.lane == 0) {
        accumulate(inner, first, to + features);
        accumulate(outer, first, to + features + 1);
      }
    }
    if (at.live) store_row(g, at.lane, lanes, features, by_z + here);
  }
}

// A warp a layer.
template <typename S, typename T>
__global__ void __launch_bounds__(kThreads, 1)
    radial_finish(const Warps warps, const T* __restrict__ sums, const S* __restrict__ alpha,
                  const S* __restrict__ beta, S* __restrict__ by_center, S* __restrict__ by_alpha,
                  S* __restrict__ by_beta) {
  const int64_t layer = warps.warp(), features = warps.sizes.features, numbers = Radial::sums(features);
  if (layer >= warps.sizes.groups * warps.sizes.layers) return;
  const int64_t group = layer / warps.sizes.layers, k = layer % warps.sizes.layers;
  for (int64_t d = threadIdx.x; d < features; d += kWarp)
    by_center[layer * features + d] = static_cast<S>(total_of(sums, warps, group, k, numbers, d));
  if (threadIdx.x != 0) return;
  const T inner = total_of(sums, warps, group, k, numbers, features);
  const T outer = total_of(sums, warps, group, k, numbers, features + 1);
  by_alpha[layer] = static_cast<S>(inner * Softplus<T>(static_cast<T>(alpha[layer])).slope);
  by_beta[layer] = static_cast<S>(outer * Softplus<T>(static_cast<T>(beta[layer])).slope);
}

}  // namespace flows
}  // namespace genkernels
