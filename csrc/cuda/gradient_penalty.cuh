// Points between pairs and the penalty of a gradient's norm on a GPU: the kernels. Launchers: the .cu;
// genkernels/reference/gradient_penalty.py has the maths, csrc/common/gradient_penalty.h its arithmetic.
//
// Layout: [N, L], contiguous. A thread owns one 16-byte run of a row, a group of threads a chunk of one row, a block
// 256 threads: many rows where they are short, a chunk of one where they are long. The penalty's threads take kRuns
// runs each, all loaded before the first is squared. Rows or addresses that rule out 16-byte accesses take the same
// kernels with the lanes of a run a group apart.
//
// Sums: a group adds up its chunk in fp64, in a fixed order; rows of one chunk are done, of longer ones a second launch
// sums the chunks. No atomics: the same bits on every run. The fp64 is one product and one sum a number: beside its 4
// bytes they are no work on the GPUs that this is compiled for, which compute fp64 at half fp32's rate.
//
// Bytes: interpolation 2 reads and 1 write, its backward 1 and 2, the penalty 1 read, its backward 1 and 1.
#pragma once

#include "../common/gradient_penalty.h"
#include "common.cuh"

namespace genkernels {
namespace penalty {

constexpr int kRuns = 4;

// One launch's sizes.
struct Grid {
  Rows rows;
  unsigned int chunks = 1;  // a row's

  __device__ __forceinline__ int64_t row() const {
    return static_cast<int64_t>(blockIdx.x / chunks) * blockDim.y + threadIdx.y;
  }
  // The thread's run number r of `runs` in its chunk.
  template <int V, bool kWide>
  __device__ __forceinline__ Lanes<V, kWide> run(int r, int runs) const {
    const int group = blockDim.x;
    const int64_t first = (static_cast<int64_t>(blockIdx.x % chunks) * runs + r) * group * V;
    return {first + static_cast<int64_t>(threadIdx.x) * (kWide ? V : 1), rows.length, group};
  }
};

template <typename S, bool kWide>
__global__ void __launch_bounds__(kThreads) interpolate_kernel(const Grid grid,
                                                               const S* __restrict__ real,             // [N, L]
                                                               const S* __restrict__ fake,             // [N, L]
                                                               const arithmetic_t<S>* __restrict__ u,  // [N]
                                                               S* __restrict__ x                       // [N, L]
) {
  using T = arithmetic_t<S>;
  constexpr int V = kLanes<S, kWide>;
  const int64_t row = grid.row();
  const auto run = grid.run<V, kWide>(0, 1);
  if (row >= grid.rows.count || !run.any()) return;
  const int64_t offset = row * grid.rows.length;
  const auto at = [](int64_t e) { return e; };
  Vector<S, V> r = load(real + offset, run, at);
  const Vector<S, V> f = load(fake + offset, run, at);
  const T along = u[row];
#pragma unroll
  for (int j = 0; j < V; ++j)
    r.lane[j] = static_cast<S>(between(static_cast<T>(r.lane[j]), static_cast<T>(f.lane[j]), along));
  store(x + offset, run, at, r);
}

template <typename S, bool kWide>
__global__ void __launch_bounds__(kThreads) interpolate_backward_kernel(const Grid grid,
                                                                        const S* __restrict__ grad,  // [N, L]
                                                                        const arithmetic_t<S>* __restrict__ u,  // [N]
                                                                        S* __restrict__ by_real,  // [N, L]
                                                                        S* __restrict__ by_fake   // [N, L]
) {
  using T = arithmetic_t<S>;
  constexpr int V = kLanes<S, kWide>;
  const int64_t row = grid.row();
  const auto run = grid.run<V, kWide>(0, 1);
  if (row >= grid.rows.count || !run.any()) return;
  const int64_t offset = row * grid.rows.length;
  const auto at = [](int64_t e) { return e; };
  Vector<S, V> g = load(grad + offset, run, at), by;
  const T along = u[row];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const T value = static_cast<T>(g.lane[j]);
    by.lane[j] = static_cast<S>(along * value);
    g.lane[j] = static_cast<S>(value - along * value);
  }
  store(by_real + offset, run, at, by);
  store(by_fake + offset, run, at, g);
}

template <typename S, bool kWide>
__global__ void __launch_bounds__(kThreads) squares_kernel(const Grid grid,
                                                           const S* __restrict__ gradient,  // [N, L]
                                                           double* __restrict__ squares     // [N, chunks]
) {
  constexpr int V = kLanes<S, kWide>;
  const int64_t row = grid.row();
  double sum = 0;
  if (row < grid.rows.count) {
    gradient += row * grid.rows.length;
    const auto at = [](int64_t e) { return e; };
    Vector<S, V> g[kRuns];
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      const auto run = grid.run<V, kWide>(r, kRuns);
      g[r] = run.any() ? load(gradient, run, at) : Vector<S, V>{};
    }
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      const auto run = grid.run<V, kWide>(r, kRuns);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const double value = static_cast<arithmetic_t<S>>(g[r].lane[j]);
        if (run.any() && run.inside(j)) sum += value * value;
      }
    }
  }
  sum = group_sum(sum);
  if (threadIdx.x == 0 && row < grid.rows.count) squares[row * grid.chunks + blockIdx.x % grid.chunks] = sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) penalty_kernel(const Target target, const int64_t count,
                                                           const double* __restrict__ squares,  // [N]
                                                           T* __restrict__ value,               // [N]
                                                           double* __restrict__ norm            // [N]
) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= count) return;
  value[n] = static_cast<T>(target.penalty(squares[n]));
  norm[n] = target.norm_of(squares[n]);
}

template <typename S, bool kWide>
__global__ void __launch_bounds__(kThreads)
    penalty_backward_kernel(const Grid grid, const Target target,
                            const arithmetic_t<S>* __restrict__ grad,  // [N], or null: zero
                            const double* __restrict__ grad_norm,      // [N], or null: zero
                            const S* __restrict__ gradient,            // [N, L]
                            const double* __restrict__ norm,           // [N]
                            S* __restrict__ by_gradient                // [N, L]
    ) {
  using T = arithmetic_t<S>;
  constexpr int V = kLanes<S, kWide>;
  const int64_t row = grid.row();
  const auto run = grid.run<V, kWide>(0, 1);
  if (row >= grid.rows.count || !run.any()) return;
  const int64_t offset = row * grid.rows.length;
  const auto at = [](int64_t e) { return e; };
  Vector<S, V> g = load(gradient + offset, run, at);
  const double factor = target.factor(norm[row], grad, grad_norm, row);
#pragma unroll
  for (int j = 0; j < V; ++j) g.lane[j] = static_cast<S>(static_cast<T>(factor * static_cast<T>(g.lane[j])));
  store(by_gradient + offset, run, at, g);
}

}  // namespace penalty
}  // namespace genkernels
