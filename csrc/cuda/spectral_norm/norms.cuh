// Norms of vectors that many blocks hold parts of, and the vectors, divided by them wherever they are read.
#pragma once

#include <limits>

#include "layers.cuh"

namespace genkernels {
namespace spectral {

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

}  // namespace spectral
}  // namespace genkernels
