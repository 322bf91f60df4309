// The product that autoregressive_sampling is built of: rows that may overlap times packed weights.
#pragma once

#include "../common.h"
#include "../vector.h"

namespace genkernels {
namespace sampling {
namespace {

constexpr int kRows = kRegisters == 32 ? 8 : 6;  // rows of a product that share its weights' loads

// Vectors of outputs that a tile of M rows keeps in registers beside its weights and one input.
constexpr int widest(int m) {
  if (kRegisters == 32) return m >= 5 ? 2 : m >= 3 ? 4 : 8;
  return m >= 3 ? 2 : m == 2 ? 4 : 8;
}

// out[m][v] += Σ_k in[m·in_stride + k] · w[k][v], v < NV vectors.
template <typename T, int M, int NV>
inline void tile(const T* in, int64_t in_stride, int64_t count, const T* w, int64_t w_stride, T* out,
                 int64_t out_stride) {
  using V = typename Vector<T>::unaligned;
  constexpr int L = Vector<T>::kLanes;
  V sum[M][NV];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) sum[m][v] = *reinterpret_cast<const V*>(out + m * out_stride + v * L);
  }
  for (int64_t k = 0; k < count; ++k) {
    V weight[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) weight[v] = *reinterpret_cast<const V*>(w + k * w_stride + v * L);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const T x = in[m * in_stride + k];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sum[m][v] += x * weight[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) *reinterpret_cast<V*>(out + m * out_stride + v * L) = sum[m][v];
  }
}

template <typename T, int M, int NV>
inline void tiles(const T* in, int64_t in_stride, int64_t count, const T* w, int64_t vectors, T* out,
                  int64_t out_stride) {
  constexpr int L = Vector<T>::kLanes;
  const int64_t w_stride = vectors * L;
  int64_t v = 0;
  for (; v + NV <= vectors; v += NV) tile<T, M, NV>(in, in_stride, count, w + v * L, w_stride, out + v * L, out_stride);
  if constexpr (NV > 4)
    if (vectors - v >= 4) tile<T, M, 4>(in, in_stride, count, w + v * L, w_stride, out + v * L, out_stride), v += 4;
  if constexpr (NV > 2)
    if (vectors - v >= 2) tile<T, M, 2>(in, in_stride, count, w + v * L, w_stride, out + v * L, out_stride), v += 2;
  if constexpr (NV > 1)
    if (vectors - v >= 1) tile<T, M, 1>(in, in_stride, count, w + v * L, w_stride, out + v * L, out_stride);
}

// The same for any number of rows and of vectors; w is [count][vectors].
template <typename T>
void multiply(const T* in, int64_t in_stride, int64_t rows, int64_t count, const T* w, int64_t vectors, T* out,
              int64_t out_stride) {
  while (rows > 0) {
    const int64_t m = std::min<int64_t>(rows, kRows);
    switch (m) {
      case 1: tiles<T, 1, widest(1)>(in, in_stride, count, w, vectors, out, out_stride); break;
      case 2: tiles<T, 2, widest(2)>(in, in_stride, count, w, vectors, out, out_stride); break;
      case 3: tiles<T, 3, widest(3)>(in, in_stride, count, w, vectors, out, out_stride); break;
      case 4: tiles<T, 4, widest(4)>(in, in_stride, count, w, vectors, out, out_stride); break;
      case 5: tiles<T, 5, widest(5)>(in, in_stride, count, w, vectors, out, out_stride); break;
      case 6: tiles<T, 6, widest(6)>(in, in_stride, count, w, vectors, out, out_stride); break;
      case 7:
        if constexpr (kRows >= 7) tiles<T, 7, widest(7)>(in, in_stride, count, w, vectors, out, out_stride);
        break;
      case 8:
        if constexpr (kRows >= 8) tiles<T, 8, widest(8)>(in, in_stride, count, w, vectors, out, out_stride);
        break;
    }
    in += m * in_stride;
    out += m * out_stride;
    rows -= m;
  }
}

}  // namespace
}  // namespace sampling
}  // namespace genkernels
