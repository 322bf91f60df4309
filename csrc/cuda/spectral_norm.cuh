// Spectral norm of many weights at once on a GPU: the kernels (Miyato et al. 2018; Behrmann et al. 2019 for
// convolutions; the definition is genkernels/reference/spectral_norm.py). Launchers: the .cu.
//
// Maths, A being what a weight W does to one sample. One power iteration is
//   a = A v    u = a / ‖a‖    b = Aᵀ u    v = b / ‖b‖    σ = ⟨u, A v⟩ = ‖b‖
// and with b taken as Aᵀ a / ‖a‖ it needs no norm before both products are done. Ŵ = f W, f = c / σ or min(1, c / σ);
// the gradient is f G + s D, s = −⟨G, Ŵ⟩ / σ + g_σ, D = ∂⟨u, A v⟩/∂W: u vᵀ of a matrix, of a convolution the
// correlation of u and v at each tap.
//
// Launches, each for up to kLayers layers, whose pointers and sizes travel as kernel arguments: first `left` (a), then
// `right` (b), both once an iteration, at last `finish` (σ, f, Ŵ, u, v): 3 at one iteration, 2 more for each further
// one, 2 at none. Backward: `inner` (⟨G, Ŵ⟩), then `gradient`. A layer has as many blocks of a launch as its shape asks
// for, and a block finds its layer by its number.
//
// Matrices, whatever their axis of rows: one read of W for both products. A block takes some whole rows (8, more where
// rows are short), its threads lie along them: first a of its rows, then, W coming out of the first cache, what these
// rows give to b, a row of K numbers: `partial` [blocks, K]. Scaled by the block's largest |a|, so that no square of σ
// arises, which overflows. `right` adds these up.
// Convolutions: both products, and D, are matrix products whose right factor is gathered by index from a vector (zero
// padded or circular, strided, dilated, grouped, transposed), in tiles of 32 channels and 64 positions, 32 deep; the
// next depth is loaded while one is multiplied.
//
// Norms. Every block leaves the largest magnitude of its numbers and their sum of squares in units of it; the next
// launch's blocks each combine them, in one order. u and v are divided by their norms wherever they are read. A norm
// that is 0 or not finite leaves u or v what it was: then `right` takes u as it was and, for a matrix, W once more.
//
// No atomics; sums in an order that depends on the layer's shape alone, not on addresses nor on the other layers: the
// same bits each run and in any company. The host waits for nothing and copies nothing, so a CUDA graph may capture it.
//
// Bytes, W being those of the weights: forward W read by `left` and, out of the second-level cache where the weights
// fit there (the 12 MB of an SN-GAN critic do), by `finish`, and Ŵ written: 3 W, beside partial sums, W / 8 written and
// read (W / 4 for half numbers). Backward G twice, W once, the gradient: 4 W. `left` has 8 loads of 16 bytes of a
// thread in flight for 32 multiply-adds (fp32), one fused operation for each 4 bytes: memory-bound, as the rest is.
// Convolutions read little and compute much, rows · columns · depth multiply-adds a product; a thread's 256 of a tile
// take some 340 instructions and its 12 numbers of the next tile, which are found by index, some 600: bound by the
// arithmetic of integers, at a quarter of the fp32 rate.
#pragma once

#include <limits>

#include "common.cuh"

// nvcc has it as a macro: the argument stays in constant memory, though its arrays are indexed at run time.
#ifndef __grid_constant__
#  define __grid_constant__
#endif

namespace genkernels {
namespace spectral {

constexpr int kLayers = 30;  // of one launch: arguments of a kernel are 4 KB at most
constexpr int kArgumentBytes = 4096 - 128;

enum Kind : short { kMatrix, kConvolution, kCircular };

// ---------------------------------------------------------------------------------------------------------------------
// Geometry

// How a weight acts on one sample. A convolution maps x [x channels, x...] to y [y channels, y...], a transposed one y
// to x; axes that a weight lacks stand first and have size 1.
struct Geometry {
  // a matrix: rows M, columns K, and the distance of rows, all numbers of a row being neighbours in runs of so many;
  // else y's channels, x's channels of a group, groups
  int sizes[3];
  int x[3], y[3], kernel[3], padding[3];
  short stride[3], dilation[3];
  Kind kind;
  bool transposed;

  GK_HOST_DEVICE inline int taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  GK_HOST_DEVICE inline int x_places() const { return x[0] * x[1] * x[2]; }
  GK_HOST_DEVICE inline int y_places() const { return y[0] * y[1] * y[2]; }
  GK_HOST_DEVICE inline int x_numbers() const { return sizes[1] * sizes[2] * x_places(); }
  GK_HOST_DEVICE inline int y_numbers() const { return sizes[0] * y_places(); }
  // Numbers of u and of v.
  GK_HOST_DEVICE inline int u_numbers() const {
    return kind == kMatrix ? sizes[0] : transposed ? x_numbers() : y_numbers();
  }
  GK_HOST_DEVICE inline int v_numbers() const {
    return kind == kMatrix ? sizes[1] : transposed ? y_numbers() : x_numbers();
  }
  GK_HOST_DEVICE inline int64_t numbers() const {
    return static_cast<int64_t>(sizes[0]) * sizes[1] * (kind == kMatrix ? 1 : taps());
  }
};

GK_HOST_DEVICE inline int cuts(int64_t count, int64_t size) {
  return static_cast<int>((count + size - 1) / size);
}
GK_HOST_DEVICE inline int least(int a, int b) {
  return a < b ? a : b;
}

// Numbers of a thread's run.
template <typename T>
constexpr int kRun = 16 / sizeof(T);

// How blocks share out a matrix in `left`: kThreads / across rows of threads, each with so many rows of W.
struct RowCut {
  int across, rows_a_thread;
  GK_HOST_DEVICE inline int rows_a_block() const { return kThreads / across * rows_a_thread; }
};
template <typename T>
GK_HOST_DEVICE inline RowCut row_cut(const Geometry& g) {
  int across = 32;
  while (across < kThreads && across * kRun<T> < g.sizes[1]) across *= 2;
  return {across, g.sizes[0] > 4 ? 8 : 1};
}

// And in `right`: `down` threads share a column; a block takes so many tiles of kThreads / down columns, few enough
// blocks that what they leave behind is little to combine.
struct ColumnCut {
  int down, tiles_a_block;
  GK_HOST_DEVICE inline int columns() const { return kThreads / down; }
};
template <typename T>
GK_HOST_DEVICE inline ColumnCut column_cut(const Geometry& g) {
  const int partials = cuts(g.sizes[0], row_cut<T>(g).rows_a_block());
  const int down = partials >= 8 ? 8 : partials >= 4 ? 4 : partials >= 2 ? 2 : 1;
  return {down, cuts(cuts(g.sizes[1], kThreads / down), 256)};
}

// The three matrix products of a convolution, [rows, depth] by [depth, columns] for each group.
//   kConvolve   y = W x: rows y channels, columns y places, depth (x channel, tap)
//   kSpread     x = Wᵀ y: rows x channels, columns x places, depth (y channel, tap)
//   kCorrelate  D of W's shape: rows y channels, columns (x channel, tap), depth y places
enum class Product { kConvolve, kSpread, kCorrelate };
constexpr int kTileRows = 32, kTileColumns = 64, kTileDepth = 32;

struct Extent {
  int rows, columns, depth;
  GK_HOST_DEVICE inline int row_tiles() const { return cuts(rows, kTileRows); }
  GK_HOST_DEVICE inline int column_tiles() const { return cuts(columns, kTileColumns); }
};
GK_HOST_DEVICE inline Extent extent(Product product, const Geometry& g) {
  const int y_channels = g.sizes[0] / g.sizes[2];
  switch (product) {
    case Product::kConvolve: return {y_channels, g.y_places(), g.sizes[1] * g.taps()};
    case Product::kSpread: return {g.sizes[1], g.x_places(), y_channels * g.taps()};
    default: return {y_channels, g.sizes[1] * g.taps(), g.y_places()};
  }
}
GK_HOST_DEVICE inline int tiles(Product product, const Geometry& g) {
  const Extent e = extent(product, g);
  return e.row_tiles() * e.column_tiles() * g.sizes[2];
}

// Blocks of a layer in each launch.
template <typename T>
GK_HOST_DEVICE inline int left_blocks(const Geometry& g) {
  if (g.kind == kMatrix) return cuts(g.sizes[0], row_cut<T>(g).rows_a_block());
  return tiles(g.transposed ? Product::kSpread : Product::kConvolve, g);
}
template <typename T>
GK_HOST_DEVICE inline int right_blocks(const Geometry& g) {
  if (g.kind != kMatrix) return tiles(g.transposed ? Product::kConvolve : Product::kSpread, g);
  const ColumnCut cut = column_cut<T>(g);
  return cuts(g.sizes[1], static_cast<int64_t>(cut.columns()) * cut.tiles_a_block);
}
// Numbers of a block of `finish` and of `gradient`, and of one of `inner`, of which a layer has at most 256.
template <typename T>
constexpr int kChunk = kThreads * kRun<T> * 4;
template <typename T>
GK_HOST_DEVICE inline int64_t inner_chunk(int64_t numbers) {
  return static_cast<int64_t>(cuts(numbers, 256 * kChunk<T>)) * kChunk<T>;
}
template <typename T>
GK_HOST_DEVICE inline int inner_blocks(int64_t numbers) {
  return cuts(numbers, inner_chunk<T>(numbers));
}
template <typename T>
GK_HOST_DEVICE inline int gradient_blocks(const Geometry& g) {
  return g.kind == kMatrix ? cuts(g.numbers(), kChunk<T>) : tiles(Product::kCorrelate, g);
}

// ---------------------------------------------------------------------------------------------------------------------
// What kernels are given

// A layer of `left` and `right`.
template <typename T>
struct Layer {
  const T *weight, *u, *v;  // u and v as given to the operator
  int64_t room;             // where its numbers begin in the workspace
  int first;                // its first block
  Geometry geometry;
};

// A layer of `finish`.
template <typename T>
struct Output {
  const T *weight, *u, *v;
  T *weight_out, *u_out, *v_out;
  int64_t room, numbers;
  int first, u_numbers, v_numbers, left_blocks, right_blocks;
};

// A layer of `inner` and `gradient`.
template <typename T>
struct Gradient {
  const T *grad, *weight, *u, *v;
  T* out;
  int sums;   // where its blocks' sums begin
  int first;  // its first block
  Geometry geometry;
};

template <typename L>
struct Layers {
  int count;
  L layer[kLayers];

  // That of this block.
  __device__ __forceinline__ const L& mine() const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (layer[middle].first <= static_cast<int>(blockIdx.x))
        low = middle;
      else
        high = middle - 1;
    }
    return layer[low];
  }
  __device__ __forceinline__ int index(const L& one) const { return static_cast<int>(&one - layer); }
};

// ---------------------------------------------------------------------------------------------------------------------
// Norms

// The largest magnitude of some numbers, their sum of squares in units of it, and a sum of products.
template <typename A>
struct Piece {
  A largest, squares, dot;
};

// In this order. A NaN reaches `squares`, and no comparison lets one into `largest`.
template <typename A, typename At>
__device__ __forceinline__ Piece<A> combine(int count, At at) {
  A largest = 0;
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    const A one = at(i).largest;
    largest = one > largest ? one : largest;
  }
  const A unit = largest > A(0) ? largest : A(1);
  Piece<A> all{largest, 0, 0};
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    const Piece<A> one = at(i);
    const A ratio = one.largest / unit;
    all.squares += ratio * ratio * one.squares;
    all.dot += one.dot;
  }
  return all;
}
template <typename A>
__device__ __forceinline__ Piece<A> piece_of(A value, A dot) {
  const A size = math::abs(value);
  return {size > A(0) ? size : A(0), size > A(0) ? A(1) : size, dot};  // NaN is not above 0
}

// Over the block; every thread has to call it and gets the sum.
template <typename A>
__device__ __forceinline__ Piece<A> block_combine(const Piece<A>& mine) {
  __shared__ Piece<A> all[kThreads];
  __shared__ Piece<A> some[16];
  all[threadIdx.x] = mine;
  __syncthreads();
  if (threadIdx.x < 16) some[threadIdx.x] = combine<A>(16, [&](int i) { return all[threadIdx.x + 16 * i]; });
  __syncthreads();
  return combine<A>(16, [&](int i) { return some[i]; });
}
template <typename A>
__device__ __forceinline__ A block_sum(A mine) {
  __shared__ A all[kThreads];
  __shared__ A some[16];
  all[threadIdx.x] = mine;
  __syncthreads();
  if (threadIdx.x < 16) {
    A sum = 0;
    for (int i = 0; i < 16; ++i) sum += all[threadIdx.x + 16 * i];
    some[threadIdx.x] = sum;
  }
  __syncthreads();
  A sum = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) sum += some[i];
  return sum;
}

// Of the pieces that a launch left behind; every thread of the block has to call it.
template <typename A>
__device__ __forceinline__ Piece<A> combine_pieces(const Piece<A>* pieces, int count) {
  if (count <= 16) return combine<A>(count, [&](int i) { return pieces[i]; });
  const int mine = count > static_cast<int>(threadIdx.x) ? cuts(count - static_cast<int>(threadIdx.x), kThreads) : 0;
  return block_combine(combine<A>(mine, [&](int i) { return pieces[threadIdx.x + i * kThreads]; }));
}

// A norm, and the division by it as two products, whose factors neither overflow nor underflow.
template <typename A>
struct Norm {
  A value, first = 1, second = 1;
  bool usable;  // neither 0 nor infinite nor NaN

  __device__ __forceinline__ explicit Norm(const Piece<A>& piece) {
    constexpr A huge = sizeof(A) == 4 ? A(18446744073709551616.0) : A(1.3407807929942597e154);  // 2^64, 2^512
    value = piece.largest > A(0) ? piece.largest * ::sqrt(piece.squares) : piece.squares;
    usable = value > A(0) && value <= std::numeric_limits<A>::max();
    if (usable) {
      first = value > huge ? 1 / huge : value < 1 / huge ? huge : A(1);
      second = 1 / (value * first);
    }
  }
  __device__ __forceinline__ A divide(A x) const { return x * first * second; }
};

// One access of 2 to 16 bytes to what the kernel does not write, through the caches.
template <typename T>
__device__ __forceinline__ T load_word(const T* p) {
  using W = typename Word<sizeof(T)>::type;
  const W word = __ldg(reinterpret_cast<const W*>(p));
  T value;
  memcpy(&value, &word, sizeof(T));
  return value;
}

// A vector: as given to the operator, or found by an earlier launch and still to be divided by its norm.
template <typename T>
struct Source {
  using A = arithmetic_t<T>;
  const T* given;
  const A* found;
  A first = 1, second = 1;

  __device__ __forceinline__ A operator[](int i) const {
    return given != nullptr ? static_cast<A>(load_word(given + i)) : load_word(found + i) * first * second;
  }
};

// A layer's numbers in the workspace.
template <typename T>
struct Room {
  using A = arithmetic_t<T>;
  A *a, *u, *b, *v;       // a = A v, b = Aᵀ u; u and v as the iterations before left them
  A* other_sigma;         // σ where v stays what it was
  Piece<A>*left, *right;  // of a and of b, one a block
  A* partial;             // matrix: [left blocks, pitch]
  int pitch;

  static GK_HOST_DEVICE inline int64_t round(int64_t n) { return (n + 7) / 8 * 8; }

  GK_HOST_DEVICE inline void place(A* base, int u_numbers, int v_numbers, int lefts, int rights) {
    a = base;
    u = a + round(u_numbers);
    b = u + round(u_numbers);
    v = b + round(v_numbers);
    other_sigma = v + round(v_numbers);
    left = reinterpret_cast<Piece<A>*>(other_sigma + 8);
    right = left + round(lefts);
    partial = reinterpret_cast<A*>(right + round(rights));
    pitch = static_cast<int>(round(v_numbers));
  }
  GK_HOST_DEVICE inline void place(A* base, const Geometry& g) {
    place(base, g.u_numbers(), g.v_numbers(), left_blocks<T>(g), right_blocks<T>(g));
  }
  // All of it.
  static int64_t size(const Geometry& g) {
    const int64_t u = round(g.u_numbers()), v = round(g.v_numbers());
    const int64_t pieces = round(left_blocks<T>(g)) + round(right_blocks<T>(g));
    return 2 * u + 2 * v + 8 + 3 * pieces + (g.kind == kMatrix ? left_blocks<T>(g) * v : 0);
  }
};

// Copies to `to` what v or u is from now on, a share a block: nothing where it stays what an earlier iteration left
// there.
template <typename T>
__device__ __forceinline__ void keep(const Source<T>& source, int count, int block, int blocks, arithmetic_t<T>* to) {
  if (source.found == to) return;
  for (int64_t i = static_cast<int64_t>(block) * kThreads + threadIdx.x; i < count;
       i += static_cast<int64_t>(blocks) * kThreads)
    to[i] = source[static_cast<int>(i)];
}

// ---------------------------------------------------------------------------------------------------------------------
// Matrices

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

// Blocks of a multiprocessor, which is how many registers a thread may have: ptxas alone settles for 128 and spills.
template <typename T>
constexpr int kResident = sizeof(T) == 8 ? 1 : 2;

// What the threads of a block share.
template <typename A>
struct Rows {                                      // in `sweep`
  A columns[kThreads * (sizeof(A) == 8 ? 2 : 8)];  // of each row of threads, where there are several
  A sums[kThreads / 32][8], a[64], products[64];
};
template <typename A>
struct Tiles {  // in `multiply`; two numbers of padding: a warp's stores to a column then meet each bank twice at most
  A left[kTileDepth][kTileRows + 2], right[kTileDepth][kTileColumns];
};
template <typename A>
union Shared {
  Rows<A> rows;
  Tiles<A> tiles;
  A parts[kThreads];
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

// ---------------------------------------------------------------------------------------------------------------------
// Convolutions

// d = ((c·r0 + t0)·r1 + t1)·r2 + t2, stepped by one number again and again: no division in a loop.
struct Counter {
  int radix[3], at[4], by[4];

  __device__ __forceinline__ Counter(const int (&r)[3], int d, int step) : radix{r[0], r[1], r[2]} {
    split(d, at);
    split(step, by);
  }
  __device__ __forceinline__ void split(int d, int (&digits)[4]) const {
#pragma unroll
    for (int a = 2; a >= 0; --a) {
      const int rest = d / radix[a];
      digits[a + 1] = d - rest * radix[a];
      d = rest;
    }
    digits[0] = d;
  }
  __device__ __forceinline__ void advance() {
#pragma unroll
    for (int a = 0; a < 4; ++a) at[a] += by[a];
#pragma unroll
    for (int a = 2; a >= 0; --a) {
      const bool carries = at[a + 1] >= radix[a];
      at[a + 1] -= carries ? radix[a] : 0;
      at[a] += carries;
    }
  }
};

// The right factor of a product: numbers of a vector, picked by a column (fixed for a thread) and a depth.
struct Gather {
  bool spreads, circular;
  int size[3];  // of the vector that is read
  int base[3];  // the column's place
  int by[3];    // how far one step of the depth's digits leads
  int channel;  // the column's
  const Geometry& g;

  __device__ __forceinline__ Gather(Product product, const Geometry& g, int group, int column) : g(g) {
    const bool correlates = product == Product::kCorrelate;
    spreads = product == Product::kSpread;
    circular = g.kind == kCircular;
#pragma unroll
    for (int a = 2; a >= 0; --a) {
      size[a] = spreads ? g.y[a] : g.x[a];
      by[a] = spreads ? -g.dilation[a] : correlates ? g.stride[a] : g.dilation[a];
      const int radix = spreads ? g.x[a] : correlates ? g.kernel[a] : g.y[a];
      const int rest = column / radix, digit = column - rest * radix;
      column = rest;
      base[a] = spreads ? digit + g.padding[a] : digit * (correlates ? g.dilation[a] : g.stride[a]) - g.padding[a];
    }
    channel = group * (spreads ? g.sizes[0] / g.sizes[2] : g.sizes[1]) + column;
  }

  // The output that a tap leads to, if there is one.
  __device__ __forceinline__ bool lands(int a, int place, int& at) const {
    at = place;
    if (g.stride[a] != 1) {
      if (place < 0 || place % g.stride[a] != 0) return false;
      at = place / g.stride[a];
    }
    return at >= 0 && at < size[a];
  }

  template <typename T>
  __device__ __forceinline__ arithmetic_t<T> at(const Source<T>& source, const Counter& depth) const {
    int place[3];
#pragma unroll
    for (int a = 0; a < 3; ++a) place[a] = base[a] + depth.at[a + 1] * by[a];
    const int start = (channel + depth.at[0]) * size[0];
    if (spreads && circular) {  // an input lies also a period before and after itself
      arithmetic_t<T> sum = 0;
      int to[3];
#pragma unroll 1
      for (int i = -1; i <= 1; ++i) {
        if (!lands(0, place[0] + i * g.x[0], to[0])) continue;
#pragma unroll 1
        for (int j = -1; j <= 1; ++j) {
          if (!lands(1, place[1] + j * g.x[1], to[1])) continue;
#pragma unroll 1
          for (int k = -1; k <= 1; ++k) {
            if (lands(2, place[2] + k * g.x[2], to[2]))
              sum += source[((start + to[0]) * size[1] + to[1]) * size[2] + to[2]];
          }
        }
      }
      return sum;
    }
    bool inside = true;
#pragma unroll
    for (int a = 0; a < 3; ++a) {
      if (circular) place[a] += place[a] < 0 ? size[a] : place[a] >= size[a] ? -size[a] : 0;
      inside = inside && (spreads ? lands(a, place[a], place[a]) : place[a] >= 0 && place[a] < size[a]);
    }
    return inside ? source[((start + place[0]) * size[1] + place[1]) * size[2] + place[2]] : 0;
  }
};

constexpr int kMicroRows = 2, kMicroColumns = 4;  // of a thread

// Where a thread's sums stand.
struct Place {
  int row, column;  // of the group's product; the first of kMicroRows · kMicroColumns
  Extent extent;
  int group;

  __device__ __forceinline__ bool inside(int i, int j) const {
    return row + i < extent.rows && column + j < extent.columns;
  }
  __device__ __forceinline__ int64_t at(int i, int j) const {
    return (static_cast<int64_t>(group) * extent.rows + row + i) * extent.columns + column + j;
  }
};

__device__ __forceinline__ Place place_of(Product product, const Geometry& g, int block) {
  Place place;
  place.extent = extent(product, g);
  const int column_tile = block % place.extent.column_tiles(), above = block / place.extent.column_tiles();
  place.group = above / place.extent.row_tiles();
  place.row = above % place.extent.row_tiles() * kTileRows + threadIdx.x / 16 * kMicroRows;
  place.column = column_tile * kTileColumns + threadIdx.x % 16 * kMicroColumns;
  return place;
}

// sum = left · right, a tile of a block. left: for kCorrelate y, else the weight.
template <typename T>
__device__ __forceinline__ void multiply(Product product, const Geometry& g, const Place& place, const T* left,
                                         const Source<T>& right, Tiles<arithmetic_t<T>>& tiles,
                                         arithmetic_t<T> (&sum)[kMicroRows][kMicroColumns]) {
  using A = arithmetic_t<T>;
  constexpr int kLefts = kTileRows * kTileDepth / kThreads, kRights = kTileColumns * kTileDepth / kThreads;
  constexpr int kLeftStep = kThreads / kTileDepth, kRightStep = kThreads / kTileColumns;
  const bool spreads = product == Product::kSpread, correlates = product == Product::kCorrelate;
  const int depth = place.extent.depth;
  const int first_row = place.row - threadIdx.x / 16 * kMicroRows;
  const int first_column = place.column - threadIdx.x % 16 * kMicroColumns;

  // the left factor: a thread has one depth and some rows; a row's numbers are neighbours, but those of one y channel
  // to the next where rows are x channels
  const int left_depth = threadIdx.x % kTileDepth, left_row = threadIdx.x / kTileDepth;
  const int run = spreads ? g.taps() : depth;
  const int64_t pitch = run, skip = spreads ? static_cast<int64_t>(g.sizes[1] - 1) * run : 0;
  left += static_cast<int64_t>(place.group) * place.extent.rows * depth;
  // the right factor: one column and some depths
  const int right_depth = threadIdx.x / kTileColumns, right_column = threadIdx.x % kTileColumns;
  const Gather gather(product, g, place.group, least(first_column + right_column, place.extent.columns - 1));
  Counter digits(correlates ? g.y : g.kernel, right_depth, kRightStep);

  T left_numbers[kLefts];
  A right_numbers[kRights];
  const auto fetch = [&](int base) {
    const int d = base + left_depth;
    const int64_t offset = d + (spreads ? d / run * skip : 0);
#pragma unroll
    for (int i = 0; i < kLefts; ++i) {
      const int row = least(first_row + left_row + i * kLeftStep, place.extent.rows - 1);
      left_numbers[i] = d < depth ? left[row * pitch + offset] : T(0);
    }
#pragma unroll
    for (int i = 0; i < kRights; ++i) {
      right_numbers[i] = base + right_depth + i * kRightStep < depth ? gather.at(right, digits) : A(0);
      digits.advance();
    }
  };

#pragma unroll
  for (int i = 0; i < kMicroRows; ++i)
#pragma unroll
    for (int j = 0; j < kMicroColumns; ++j) sum[i][j] = 0;
#pragma unroll 1
  for (int base = -kTileDepth; base < depth; base += kTileDepth) {
    if (base >= 0) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kLefts; ++i)
        tiles.left[left_depth][left_row + i * kLeftStep] = static_cast<A>(left_numbers[i]);
#pragma unroll
      for (int i = 0; i < kRights; ++i) tiles.right[right_depth + i * kRightStep][right_column] = right_numbers[i];
      __syncthreads();
    }
    if (base + kTileDepth < depth) fetch(base + kTileDepth);
    if (base < 0) continue;
    A part[kMicroRows][kMicroColumns] = {};  // sums of a tile's depth first: fewer roundings one upon the other
#pragma unroll 8
    for (int d = 0; d < kTileDepth; ++d) {
      const auto l = *reinterpret_cast<const Vector<A, kMicroRows>*>(&tiles.left[d][threadIdx.x / 16 * kMicroRows]);
      Vector<A, kMicroColumns> r;
      constexpr int kPart = 16 / sizeof(A);
#pragma unroll
      for (int from = 0; from < kMicroColumns; from += kPart) {
        const auto some =
            *reinterpret_cast<const Vector<A, kPart>*>(&tiles.right[d][threadIdx.x % 16 * kMicroColumns + from]);
#pragma unroll
        for (int j = 0; j < kPart; ++j) r.lane[from + j] = some.lane[j];
      }
#pragma unroll
      for (int i = 0; i < kMicroRows; ++i)
#pragma unroll
        for (int j = 0; j < kMicroColumns; ++j) part[i][j] += l.lane[i] * r.lane[j];
    }
#pragma unroll
    for (int i = 0; i < kMicroRows; ++i)
#pragma unroll
      for (int j = 0; j < kMicroColumns; ++j) sum[i][j] += part[i][j];
  }
}

// out = W · vector by this block's tile, and its piece; `dot`: also the sum of products with another vector.
template <typename T>
__device__ __forceinline__ void apply(Product product, const Layer<T>& layer, int block, const Source<T>& vector,
                                      const Source<T>* dot, arithmetic_t<T>* out, Piece<arithmetic_t<T>>* pieces,
                                      Tiles<arithmetic_t<T>>& tiles) {
  using A = arithmetic_t<T>;
  A sum[kMicroRows][kMicroColumns];
  const Place place = place_of(product, layer.geometry, block);
  multiply(product, layer.geometry, place, layer.weight, vector, tiles, sum);
  const auto number = [&](int i) {
    const int r = i / kMicroColumns, c = i % kMicroColumns;
    return place.inside(r, c) ? sum[r][c] : A(0);
  };
  A products = 0;
#pragma unroll
  for (int i = 0; i < kMicroRows * kMicroColumns; ++i) {
    const int r = i / kMicroColumns, c = i % kMicroColumns;
    if (!place.inside(r, c)) continue;
    const int at = static_cast<int>(place.at(r, c));
    out[at] = sum[r][c];
    if (dot != nullptr) products += sum[r][c] * (*dot)[at];
  }
  A largest = 0, squares = 0;
#pragma unroll
  for (int i = 0; i < kMicroRows * kMicroColumns; ++i) {
    const A size = math::abs(number(i));
    largest = size > largest ? size : largest;
  }
  const A unit = largest > A(0) ? largest : A(1);
#pragma unroll
  for (int i = 0; i < kMicroRows * kMicroColumns; ++i) {
    const A ratio = number(i) / unit;
    squares += ratio * ratio;
  }
  const Piece<A> all = block_combine(Piece<A>{largest, squares, products});
  if (threadIdx.x == 0) pieces[block] = all;
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernels

template <typename T>
__device__ __forceinline__ Room<T> room_of(arithmetic_t<T>* workspace, const Layer<T>& layer) {
  Room<T> room;
  room.place(workspace + layer.room, layer.geometry);
  return room;
}

// u or v: `found`, to be divided by its norm where it has one; else as it was, which before the first of the iterations
// that could change it is as given, after it in `kept`.
template <typename T>
__device__ __forceinline__ Source<T> current(const Norm<arithmetic_t<T>>& norm, const arithmetic_t<T>* found,
                                             bool first, const T* given, const arithmetic_t<T>* kept) {
  if (norm.usable) return {nullptr, found, norm.first, norm.second};
  if (first) return {given, nullptr};
  return {nullptr, kept};
}

// a = A v with its pieces, and for matrices the partial sums of b. turn: iterations before this one; alone: no b is
// wanted.
template <typename T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    spectral_left(const __grid_constant__ Layers<Layer<T>> layers, const int turn, const bool alone,
                  arithmetic_t<T>* workspace) {
  using A = arithmetic_t<T>;
  alignas(16) __shared__ Shared<A> shared;
  const Layer<T>& layer = layers.mine();
  const Geometry& g = layer.geometry;
  const Room<T> room = room_of(workspace, layer);
  const int block = static_cast<int>(blockIdx.x) - layer.first;
  Source<T> v{layer.v, nullptr}, u{layer.u, nullptr};
  if (turn > 0) {
    const Norm<A> norm(combine_pieces(room.right, right_blocks<T>(g)));
    v = current(norm, room.b, turn == 1, layer.v, room.v);
    u = {nullptr, room.u};
    keep(v, g.v_numbers(), block, left_blocks<T>(g), room.v);
  }
  if (g.kind == kMatrix) {
    const RowCut cut = row_cut<T>(g);
    const bool wide = g.sizes[1] % kRun<T> == 0 && g.sizes[2] % kRun<T> == 0 && runs_aligned(layer.weight);
    if (cut.rows_a_thread == 8) {
      if (wide)
        sweep<8, 1, true>(layer, room, block, cut.across, u, v, alone, shared.rows);
      else
        sweep<8, 1, false>(layer, room, block, cut.across, u, v, alone, shared.rows);
    } else {
      if (wide)
        sweep<1, 8, true>(layer, room, block, cut.across, u, v, alone, shared.rows);
      else
        sweep<1, 1, false>(layer, room, block, cut.across, u, v, alone, shared.rows);
    }
  } else {
    const Product product = g.transposed ? Product::kSpread : Product::kConvolve;
    apply(product, layer, block, v, &u, room.a, room.left, shared.tiles);
  }
}

// b = Aᵀ u with its pieces; u, for the iterations to come; and σ for the case that v stays what it is.
template <typename T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    spectral_right(const __grid_constant__ Layers<Layer<T>> layers, const int turn, arithmetic_t<T>* workspace) {
  using A = arithmetic_t<T>;
  alignas(16) __shared__ Shared<A> shared;
  const Layer<T>& layer = layers.mine();
  const Geometry& g = layer.geometry;
  const Room<T> room = room_of(workspace, layer);
  const int block = static_cast<int>(blockIdx.x) - layer.first;
  const Piece<A> piece = combine_pieces(room.left, left_blocks<T>(g));
  const Norm<A> norm(piece);
  const Source<T> u = current(norm, room.a, turn == 0, layer.u, room.u);
  keep(u, g.u_numbers(), block, right_blocks<T>(g), room.u);
  if (block == 0 && threadIdx.x == 0) *room.other_sigma = norm.usable ? norm.value : piece.dot;
  if (g.kind == kMatrix)
    gather(layer, room, block, norm, u, shared.parts);
  else
    apply(g.transposed ? Product::kConvolve : Product::kSpread, layer, block, u, static_cast<const Source<T>*>(nullptr),
          room.b, room.right, shared.tiles);
}

// Whether a weight is divided by its norm at all, and the factor.
template <typename A>
struct Factor {
  bool divides;
  A value;

  __device__ __forceinline__ Factor(A sigma, A coefficient, bool at_most) {
    divides = at_most ? sigma > coefficient || sigma != sigma : sigma != A(0);
    value = divides ? coefficient / sigma : A(1);
  }
};

// Numbers from, from + 1, ... of a run of V below `end`; those beyond are 0.
template <bool kOnce, int V, typename T>
__device__ __forceinline__ Vector<T, V> load_run(const T* base, int64_t from, int64_t end, bool wide) {
  Vector<T, V> run;
  if (wide && from + V <= end) {
    const auto at = reinterpret_cast<const Vector<T, V>*>(base + from);
    run = kOnce ? load_once(at) : load_word(at);
  } else {
#pragma unroll
    for (int l = 0; l < V; ++l) run.lane[l] = from + l < end ? base[from + l] : T(0);
  }
  return run;
}
template <int V, typename T>
__device__ __forceinline__ void store_run(T* base, int64_t from, int64_t end, bool wide, const Vector<T, V>& run) {
  if (wide && from + V <= end) {
    store(reinterpret_cast<Vector<T, V>*>(base + from), run);
  } else {
#pragma unroll
    for (int l = 0; l < V; ++l)
      if (from + l < end) base[from + l] = run.lane[l];
  }
}

// σ, and everything that the operator returns.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    spectral_finish(const __grid_constant__ Layers<Output<T>> layers, const int iterations, const bool at_most,
                    const arithmetic_t<T> coefficient, arithmetic_t<T>* workspace,
                    arithmetic_t<T>* __restrict__ sigmas  // of these layers
    ) {
  using A = arithmetic_t<T>;
  constexpr int V = kRun<T>, kRuns = kChunk<T> / (kThreads * V);
  const Output<T>& layer = layers.mine();
  const int block = static_cast<int>(blockIdx.x) - layer.first, blocks = cuts(layer.numbers, kChunk<T>);
  const bool wide = runs_aligned(layer.weight, layer.weight_out);
  const int64_t first = static_cast<int64_t>(block) * kChunk<T> + threadIdx.x * V;
  Vector<T, V> w[kRuns];
#pragma unroll
  for (int i = 0; i < kRuns; ++i) w[i] = load_run<true, V>(layer.weight, first + i * kThreads * V, layer.numbers, wide);

  Room<T> room;
  room.place(workspace + layer.room, layer.u_numbers, layer.v_numbers, layer.left_blocks, layer.right_blocks);
  A sigma;
  Source<T> u{layer.u, nullptr}, v{layer.v, nullptr};
  if (iterations > 0) {
    const Norm<A> norm(combine_pieces(room.right, layer.right_blocks));
    sigma = norm.usable ? norm.value : *room.other_sigma;
    u = {nullptr, room.u};
    v = current(norm, room.b, iterations == 1, layer.v, room.v);
  } else {
    sigma = combine_pieces(room.left, layer.left_blocks).dot;
  }
  const Factor<A> factor(sigma, coefficient, at_most);
#pragma unroll
  for (int i = 0; i < kRuns; ++i) {
#pragma unroll
    for (int l = 0; l < V; ++l) w[i].lane[l] = static_cast<T>(static_cast<A>(w[i].lane[l]) * factor.value);
    store_run<V>(layer.weight_out, first + i * kThreads * V, layer.numbers, wide, w[i]);
  }
  const int64_t stride = static_cast<int64_t>(blocks) * kThreads;
  for (int64_t i = static_cast<int64_t>(block) * kThreads + threadIdx.x; i < layer.u_numbers; i += stride)
    layer.u_out[i] = static_cast<T>(u[static_cast<int>(i)]);
  for (int64_t i = static_cast<int64_t>(block) * kThreads + threadIdx.x; i < layer.v_numbers; i += stride)
    layer.v_out[i] = static_cast<T>(v[static_cast<int>(i)]);
  if (block == 0 && threadIdx.x == 0) sigmas[layers.index(layer)] = sigma;
}

// Blocks' sums of G · Ŵ; nothing is read where Ŵ is W whatever its norm.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    spectral_inner(const __grid_constant__ Layers<Gradient<T>> layers, const bool at_most,
                   const arithmetic_t<T> coefficient, const arithmetic_t<T>* __restrict__ sigmas,
                   arithmetic_t<T>* __restrict__ sums) {
  using A = arithmetic_t<T>;
  constexpr int V = kRun<T>, kRuns = kChunk<T> / (kThreads * V);
  const Gradient<T>& layer = layers.mine();
  const int block = static_cast<int>(blockIdx.x) - layer.first;
  const Factor<A> factor(sigmas[layers.index(layer)], coefficient, at_most);
  A sum = 0;
  if (factor.divides) {
    const int64_t numbers = layer.geometry.numbers(), chunk = inner_chunk<T>(numbers);
    const bool wide = runs_aligned(layer.grad, layer.weight);
    for (int64_t from = block * chunk; from < (block + 1) * chunk && from < numbers; from += kChunk<T>) {
      Vector<T, V> g[kRuns], w[kRuns];
#pragma unroll
      for (int i = 0; i < kRuns; ++i) {
        const int64_t at = from + (i * kThreads + threadIdx.x) * V;
        g[i] = load_run<false, V>(layer.grad, at, numbers, wide);
        w[i] = load_run<true, V>(layer.weight, at, numbers, wide);
      }
#pragma unroll
      for (int i = 0; i < kRuns; ++i)
#pragma unroll
        for (int l = 0; l < V; ++l) sum += static_cast<A>(g[i].lane[l]) * (factor.value * static_cast<A>(w[i].lane[l]));
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[layer.sums + block] = sum;
}

// f G + s D.
template <typename T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    spectral_gradient(const __grid_constant__ Layers<Gradient<T>> layers, const bool at_most,
                      const arithmetic_t<T> coefficient, const arithmetic_t<T>* __restrict__ sigmas,
                      const arithmetic_t<T>* __restrict__ grad_sigmas,  // or null
                      const arithmetic_t<T>* __restrict__ sums) {
  using A = arithmetic_t<T>;
  constexpr int V = kRun<T>, kRuns = kChunk<T> / (kThreads * V);
  alignas(16) __shared__ Tiles<A> tiles;
  const Gradient<T>& layer = layers.mine();
  const Geometry& g = layer.geometry;
  const int block = static_cast<int>(blockIdx.x) - layer.first;
  const int64_t numbers = g.numbers();
  const A sigma = sigmas[layers.index(layer)];
  const Factor<A> factor(sigma, coefficient, at_most);
  const int count = inner_blocks<T>(numbers);  // 256 at most
  A inner = 0;
  if (count <= 16) {
    for (int i = 0; i < count; ++i) inner += sums[layer.sums + i];
  } else {
    inner = block_sum(static_cast<int>(threadIdx.x) < count ? sums[layer.sums + threadIdx.x] : A(0));
  }
  A by_sigma = factor.divides ? -inner / sigma : A(0);
  if (grad_sigmas != nullptr) by_sigma += grad_sigmas[layers.index(layer)];

  if (g.kind == kMatrix) {
    const int rows = g.sizes[0], distance = g.sizes[2];
    const bool wide = runs_aligned(layer.grad, layer.out);
    const int64_t from = static_cast<int64_t>(block) * kChunk<T>;
    Vector<T, V> out[kRuns];
#pragma unroll
    for (int i = 0; i < kRuns; ++i)
      out[i] = load_run<true, V>(layer.grad, from + (i * kThreads + threadIdx.x) * V, numbers, wide);
    // number (run · rows + row) · distance + inside has row `row` and column run · distance + inside
    const int64_t line = from / distance;
    const int inside_first = static_cast<int>(from - line * distance);
    const int run_first = static_cast<int>(line / rows), row_first = static_cast<int>(line - int64_t(run_first) * rows);
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const int64_t at = from + (i * kThreads + threadIdx.x) * V;
      if (at >= numbers) break;
      const int64_t over = static_cast<int64_t>(inside_first) + (i * kThreads + threadIdx.x) * V;
      const int lines =
          over < distance ? 0 : static_cast<int>(static_cast<unsigned>(over) / static_cast<unsigned>(distance));
      int inside = static_cast<int>(over - static_cast<int64_t>(lines) * distance);
      const unsigned below = static_cast<unsigned>(row_first) + static_cast<unsigned>(lines);
      const int more = static_cast<int>(below / static_cast<unsigned>(rows));
      int row = static_cast<int>(below - static_cast<unsigned>(more) * rows), run = run_first + more;
#pragma unroll
      for (int l = 0; l < V; ++l) {
        if (at + l < numbers) {
          const A d = static_cast<A>(layer.u[row]) * static_cast<A>(layer.v[run * distance + inside]);
          const A scaled = factor.value * static_cast<A>(out[i].lane[l]);
          out[i].lane[l] = static_cast<T>(by_sigma != A(0) ? scaled + by_sigma * d : scaled);
        }
        if (++inside == distance) {
          inside = 0;
          if (++row == rows) {
            row = 0;
            ++run;
          }
        }
      }
      store_run<V>(layer.out, at, numbers, wide, out[i]);
    }
  } else {
    const T *x = g.transposed ? layer.u : layer.v, *y = g.transposed ? layer.v : layer.u;
    A d[kMicroRows][kMicroColumns] = {};
    const Place place = place_of(Product::kCorrelate, g, block);
    if (by_sigma != A(0)) multiply(Product::kCorrelate, g, place, y, Source<T>{x, nullptr}, tiles, d);
#pragma unroll
    for (int i = 0; i < kMicroRows; ++i)
#pragma unroll
      for (int j = 0; j < kMicroColumns; ++j) {
        if (!place.inside(i, j)) continue;
        const int64_t at = place.at(i, j);
        layer.out[at] = static_cast<T>(factor.value * static_cast<A>(layer.grad[at]) + by_sigma * d[i][j]);
      }
  }
}

}  // namespace spectral
}  // namespace genkernels
