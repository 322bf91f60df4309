// The product behind a convolution and its weight's gradient:
//
//   out[r][n] = Σ_k w[r][at_w(k)] · x[n][at_x(k)]
//
// w is broadcast, numbers n are lanes: groups of them, wherever each group begins. Both are read through tables of
// places, so that an image with its border serves as it is and nothing is unrolled for taps.
#pragma once

#include "layers.h"

namespace genkernels {
namespace spectral {

constexpr int kVectors = kRegisters == 32 ? 4 : 2;
constexpr int64_t kTile = 64;  // numbers of a tile of `out`, a multiple of every vector's lanes
constexpr int64_t kRun = 96;   // sums are cut into runs that start from zero: a rounding then is one of a short sum's

constexpr int rows_beside(int vectors) {
  if (kRegisters == 32) return vectors == 4 ? 6 : vectors == 2 ? 12 : 16;
  return vectors == 2 ? 6 : 10;
}

// What a product reads: row r of w begins at w[r], and lanes v at x[v].
template <typename T>
struct Operands {
  const T* const* w;
  const int64_t* at_w;  // null: k itself
  const T* const* x;
  const int64_t* at_x;
  int64_t depth;
};

template <typename T, int R, int V, bool Indexed>
void product_tile(const Operands<T>& p, bool first, int64_t row, int64_t vector, T* out) {
  using Vec = typename Vector<T>::type;
  constexpr int64_t L = kLanes<T>;
  const T *w[R], *x[V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) w[r] = p.w[row + r];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) x[v] = p.x[vector + v];
  out += row * kTile + vector * L;
  for (int64_t k = 0; k < p.depth;) {
    const int64_t end = p.depth - k < kRun + kRun / 2 ? p.depth : k + kRun;
    const bool fresh = first && k == 0;
    Vec sum[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = Vec{};
    for (; k < end; ++k) {
      const int64_t at_x = p.at_x[k], at_w = Indexed ? p.at_w[k] : k;
      Vec a[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) a[v] = load_vector(x[v] + at_x);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const T s = w[r][at_w];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] += s * a[v];
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        T* to = out + r * kTile + v * L;
        store_vector<T>(fresh ? sum[r][v] : sum[r][v] + load_vector(to), to);
      }
  }
}

template <typename T, int V, bool Indexed>
void product_column(const Operands<T>& p, bool first, int64_t rows, int64_t vector, T* out) {
  constexpr int R = rows_beside(V);
  int64_t row = 0;
  for (; row + R <= rows; row += R) product_tile<T, R, V, Indexed>(p, first, row, vector, out);
  for (; row + 4 <= rows; row += 4) product_tile<T, 4, V, Indexed>(p, first, row, vector, out);
  for (; row + 2 <= rows; row += 2) product_tile<T, 2, V, Indexed>(p, first, row, vector, out);
  if (row < rows) product_tile<T, 1, V, Indexed>(p, first, row, vector, out);
}

// `out` is [rows, kTile], of which `vectors` of lanes are written, or, where not `first`, added to.
template <typename T, bool Indexed>
void product(const Operands<T>& p, bool first, int64_t rows, int64_t vectors, T* out) {
  int64_t v = 0;
  if constexpr (kVectors == 4)
    for (; v + 4 <= vectors; v += 4) product_column<T, 4, Indexed>(p, first, rows, v, out);
  for (; v + 2 <= vectors; v += 2) product_column<T, 2, Indexed>(p, first, rows, v, out);
  if (v < vectors) product_column<T, 1, Indexed>(p, first, rows, v, out);
}

}  // namespace spectral
}  // namespace genkernels
