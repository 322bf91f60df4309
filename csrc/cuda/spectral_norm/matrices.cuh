// Both products of a power iteration with a matrix, in one read of it.
#pragma once

#include "norms.cuh"

namespace genkernels {
namespace spectral {

template <typename... T>
__device__ __forceinline__ bool runs_aligned(const T*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// Offset of column k in row 0: columns lie in runs of `distance` numbers, then comes the same run of the next row.
__device__ __forceinline__ int64_t column_offset(const Geometry& g, int k) {
  const int rows = g.sizes[0], columns = g.sizes[1], distance = g.sizes[2];
  if (distance == columns) return k;
  const int run = k / distance;
  return static_cast<int64_t>(run) * rows * distance + (k - run * distance);
}

// f(l, column, numbers of kRows rows from `row` on) for the numbers of kRuns runs, which begin `step` columns apart at
// `begin`, run by run; l: the place in one. Rows beyond the last one are the last one. kWide: a run is one access.
template <int kRows, int kRuns, bool kWide, typename T, typename F>
__device__ __forceinline__ void visit(const T* weight, const Geometry& g, int row, int begin, int step, F f) {
  using A = arithmetic_t<T>;
  constexpr int V = kRun<T>, kLanes = kWide ? V : 1;
  const int rows = g.sizes[0], columns = g.sizes[1];
  Vector<T, kLanes> w[kRuns][kRows];
  const auto fetch = [&](int j, int l) {
    const T* at = weight + column_offset(g, least(begin + j * step + l, columns - kLanes));
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t offset = static_cast<int64_t>(least(row + i, rows - 1)) * g.sizes[2];
      w[j][i] = load_word(reinterpret_cast<const Vector<T, kLanes>*>(at + offset));
    }
  };
  if constexpr (kWide) {
#pragma unroll
    for (int j = 0; j < kRuns; ++j) fetch(j, 0);
  }
#pragma unroll
  for (int j = 0; j < kRuns; ++j) {
#pragma unroll
    for (int l = 0; l < V; ++l) {
      if constexpr (!kWide) fetch(j, l);
      A numbers[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) numbers[i] = static_cast<A>(w[j][i].lane[kWide ? l : 0]);
      if (begin + j * step + l < columns) f(l, begin + j * step + l, numbers);
    }
  }
}

// The sums of kRows values over the lanes of a warp; a lane gets that of row lane / (32 / kRows).
template <int kRows, typename A>
__device__ __forceinline__ A warp_sums(A (&value)[kRows]) {
  const int lane = threadIdx.x % 32;
  int offset = 16;
#pragma unroll
  for (int half = kRows / 2; half > 0; half /= 2) {
    const bool upper = (lane & offset) != 0;
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) {
      if (i >= half) continue;
      const A mine = upper ? value[i + half] : value[i];
      const A other = upper ? value[i] : value[i + half];
      value[i] = mine + __shfl_xor_sync(0xffffffffu, other, offset);
    }
    offset /= 2;
  }
  A sum = value[0];
#pragma unroll
  for (int rest = 16 / kRows; rest > 0; rest /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, rest);
  return sum;
}

// What the threads of a block share in `sweep`.
template <typename A>
struct Rows {
  A columns[kThreads * (sizeof(A) == 8 ? 2 : 8)];  // of each row of threads, where there are several
  A sums[kThreads / 32][8], a[64], products[64];
};

// A block's rows: a, its piece and, unless `alone`, what they give to b. kRows · kRuns loads are in flight at once.
template <int kRows, int kRuns, bool kWide, typename T>
__device__ void sweep(const Layer<T>& layer, const Room<T>& room, int block, int across, const Source<T>& u,
                      const Source<T>& v, bool alone, Rows<arithmetic_t<T>>& shared) {
  using A = arithmetic_t<T>;
  constexpr int V = kRun<T>;
  const Geometry& g = layer.geometry;
  const int rows = g.sizes[0], columns = g.sizes[1], runs = cuts(columns, V);
  const int x = threadIdx.x % across, y = threadIdx.x / across, down = kThreads / across;
  const int first = block * down * kRows, mine = first + y * kRows;  // rows
  const int step = across * V;                                       // columns

  A sum[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) sum[i] = 0;
  for (int run = x; run < runs; run += across * kRuns) {
    visit<kRows, kRuns, kWide>(layer.weight, g, mine, run * V, step, [&](int, int k, const A(&w)[kRows]) {
      const A factor = v[k];
#pragma unroll
      for (int i = 0; i < kRows; ++i) sum[i] += w[i] * factor;
    });
  }
  const A total = warp_sums(sum);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane % (32 / kRows) == 0) shared.sums[warp][lane / (32 / kRows)] = total;
  __syncthreads();
  const int count = least(rows - first, down * kRows);
  if (static_cast<int>(threadIdx.x) < count) {
    const int warps = across / 32, begin = threadIdx.x / kRows * warps;
    A found = 0;
    for (int i = 0; i < warps; ++i) found += shared.sums[begin + i][threadIdx.x % kRows];
    shared.a[threadIdx.x] = found;
    shared.products[threadIdx.x] = found * u[first + threadIdx.x];
    room.a[first + threadIdx.x] = found;
  }
  __syncthreads();
  A largest = 0;
  for (int i = 0; i < count; ++i) {
    const A size = math::abs(shared.a[i]);
    largest = size > largest ? size : largest;
  }
  if (threadIdx.x == 0)
    room.left[block] = combine<A>(count, [&](int i) { return piece_of(shared.a[i], shared.products[i]); });
  if (alone) return;

  const A unit = largest > A(0) ? largest : A(1);
  A scaled[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) scaled[i] = mine + i < rows ? shared.a[y * kRows + i] / unit : A(0);
  A* partial = room.partial + static_cast<int64_t>(block) * room.pitch;
  // backwards: what was read last is still near
  for (int run = x < runs ? x + (runs - 1 - x) / across * across : -1; run >= 0; run -= across) {
    A given[V] = {};
    visit<kRows, 1, kWide>(layer.weight, g, mine, run * V, step, [&](int l, int, const A(&w)[kRows]) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) given[l] += scaled[i] * w[i];
    });
    constexpr int kPart = 16 / sizeof(A);
    // several rows of threads: rows of W are so short that a thread has one run at most
    A* to = down > 1 ? shared.columns + threadIdx.x * V : partial + run * V;
#pragma unroll
    for (int part = 0; part < V / kPart; ++part) {
      Vector<A, kPart> out;
#pragma unroll
      for (int l = 0; l < kPart; ++l) out.lane[l] = given[part * kPart + l];
      *reinterpret_cast<Vector<A, kPart>*>(to + part * kPart) = out;
    }
  }
  if (down > 1) {
    __syncthreads();
    for (int k = threadIdx.x; k < columns; k += kThreads) {
      A all = 0;
      for (int i = 0; i < down; ++i) all += shared.columns[i * step + k];
      partial[k] = all;
    }
  }
}

// b and its pieces from the partial sums, or from W and `u`, where a is no vector that could be divided by its norm.
template <typename T>
__device__ void gather(const Layer<T>& layer, const Room<T>& room, int block, const Norm<arithmetic_t<T>>& norm,
                       const Source<T>& u, arithmetic_t<T> (&parts)[kThreads]) {
  using A = arithmetic_t<T>;
  const Geometry& g = layer.geometry;
  const ColumnCut cut = column_cut<T>(g);
  const int rows = g.sizes[0], columns = g.sizes[1], wide = cut.columns(), partials = left_blocks<T>(g);
  const int x = threadIdx.x % wide, y = threadIdx.x / wide;
  A largest = 0, squares = 0;
  for (int tile = 0; tile < cut.tiles_a_block; ++tile) {
    const int k = (block * cut.tiles_a_block + tile) * wide + x;
    A sum = 0;
    if (k < columns) {
      if (norm.usable) {
        const A* partial = room.partial + k;
#pragma unroll 8
        for (int i = y; i < partials; i += cut.down)
          sum += norm.divide(room.left[i].largest) * partial[static_cast<int64_t>(i) * room.pitch];
      } else {
        const T* column = layer.weight + column_offset(g, k);
        for (int r = y; r < rows; r += cut.down)
          sum += static_cast<A>(column[static_cast<int64_t>(r) * g.sizes[2]]) * u[r];
      }
    }
    if (cut.down > 1) {
      parts[threadIdx.x] = sum;
      __syncthreads();
      if (y == 0)
        for (int i = 1; i < cut.down; ++i) sum += parts[i * wide + x];
      __syncthreads();
    }
    if (y == 0 && k < columns) {
      room.b[k] = sum;
      const Piece<A> one = piece_of(sum, A(0)), before{largest, squares, 0};
      const Piece<A> both = combine<A>(2, [&](int i) { return i == 0 ? before : one; });
      largest = both.largest;
      squares = both.squares;
    }
  }
  const Piece<A> all = block_combine(Piece<A>{largest, squares, 0});
  if (threadIdx.x == 0) room.right[block] = all;
}

}  // namespace spectral
}  // namespace genkernels
