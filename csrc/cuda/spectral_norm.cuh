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

#include "spectral_norm/convolutions.cuh"
#include "spectral_norm/matrices.cuh"

// nvcc has it as a macro: the argument stays in constant memory, though its arrays are indexed at run time.
#ifndef __grid_constant__
#  define __grid_constant__
#endif

namespace genkernels {
namespace spectral {

// Blocks of a multiprocessor, which is how many registers a thread may have: ptxas alone settles for 128 and spills.
template <typename T>
constexpr int kResident = sizeof(T) == 8 ? 1 : 2;

template <typename A>
union Shared {
  Rows<A> rows;
  Tiles<A> tiles;
  A parts[kThreads];
};

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
