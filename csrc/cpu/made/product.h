// The product that every part of `made` is built of: out[r][n] += Σ_k w_r[k·step]·act[k][n], the samples n lying side
// by side.
//
// Weights are broadcast from where they lie (a row of W, step 1; a column of a packed panel, step = its width), so
// nothing is packed for the layers' forward products; activations are vectors over the batch. A register tile takes
// kRows rows by kVectors vectors; the depth is cut so that the activations of a piece stay in the first-level cache
// while all rows pass over them, and each piece is summed up by itself: of n numbers the sum is off by some
// (kPiece + n / kPiece) roundings at most, where one after the other it were n.
#pragma once

#include "../common.h"
#include "../vector.h"

#include <array>
#include <memory>
#include <new>
#include <utility>

namespace genkernels {
namespace product {

constexpr int kVectors = kRegisters == 32 ? 4 : 2;
constexpr int kRows = 6;        // kRows·kVectors sums, kVectors activations and a weight fit the registers
constexpr int64_t kPiece = 48;  // of the depth: 24 KiB of activations of the widest chunk, 8 vectors

template <typename T>
constexpr int64_t kLanes = Vector<T>::kLanes;

inline int64_t round_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

template <typename T, int R, int V, bool Unit>
void tile(const T* const* w, int64_t step, const T* __restrict act, int64_t ld, int64_t depth, T* __restrict out,
          int64_t ldo) {
  using Vec = typename Vector<T>::unaligned;
  constexpr int64_t L = kLanes<T>;
  Vec sum[R][V];
  const T* row[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    row[r] = w[r];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[r][v] = Vec{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec a[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) a[v] = *reinterpret_cast<const Vec*>(act + k * ld + v * L);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const T s = row[r][Unit ? k : k * step];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] += s * a[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) *reinterpret_cast<Vec*>(out + r * ldo + v * L) += sum[r][v];
  }
}

template <typename T>
using Tile = void (*)(const T* const*, int64_t, const T*, int64_t, int64_t, T*, int64_t);

template <typename T, bool Unit, size_t... I>
constexpr std::array<Tile<T>, sizeof...(I)> tiles(std::index_sequence<I...>) {
  return {tile<T, int(I) / kVectors + 1, int(I) % kVectors + 1, Unit>...};
}

// The product over `rows` rows and `width` samples, a multiple of kLanes; `out` and `act` have width ≤ ldo, ld. Each
// sum is added up in one order, whatever the tile, so its bits depend neither on the batch nor on the threads.
template <typename T>
void multiply(const T* const* w, int64_t rows, int64_t step, const T* act, int64_t ld, int64_t depth, T* out,
              int64_t ldo, int64_t width) {
  using Every = std::make_index_sequence<kRows * kVectors>;
  static constexpr auto unit = tiles<T, true>(Every{}), strided = tiles<T, false>(Every{});
  const auto& table = step == 1 ? unit : strided;
  for (int64_t k = 0; k < depth; k += kPiece) {
    const int64_t deep = std::min(kPiece, depth - k);
    for (int64_t r = 0; r < rows; r += kRows) {
      const int64_t high = std::min<int64_t>(kRows, rows - r);
      const T* shifted[kRows];
      for (int64_t j = 0; j < high; ++j) shifted[j] = w[r + j] + k * step;
      for (int64_t n = 0; n < width;) {
        const int64_t wide = std::min<int64_t>(kVectors, (width - n) / kLanes<T>);
        table[(high - 1) * kVectors + wide - 1](shifted, step, act + k * ld + n, ld, deep, out + r * ldo + n, ldo);
        n += wide * kLanes<T>;
      }
    }
  }
}

// Rows whose depths ascend: row j takes the first depth(j) activations. Together as deep as the first of a group goes,
// then alone.
template <typename T, typename Depth>
void staircase(const T* const* w, int64_t rows, int64_t step, const T* act, int64_t ld, Depth depth, T* out,
               int64_t ldo, int64_t width) {
  for (int64_t r = 0; r < rows; r += kRows) {
    const int64_t high = std::min<int64_t>(kRows, rows - r), common = depth(r);
    multiply(w + r, high, step, act, ld, common, out + r * ldo, ldo, width);
    for (int64_t j = r + 1; j < r + high; ++j) {
      const int64_t more = depth(j) - common;
      const T* rest = w[j] + common * step;
      if (more > 0) multiply(&rest, 1, step, act + common * ld, ld, more, out + j * ldo, ldo, width);
    }
  }
}

// Uninitialised scratch, aligned to a cache line.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(::operator new(sizeof(T) * std::max<int64_t>(count, 1), std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() { return data_; }

 private:
  T* data_;
};

// to[k][n] = from[n][at(k)] for n < count, 0 beyond, up to width: samples side by side. And back.
template <typename T, typename At>
void turn(const T* from, int64_t stride, int64_t count, int64_t rows, At at, T* to, int64_t width) {
  for (int64_t k0 = 0; k0 < rows; k0 += 16) {
    const int64_t k1 = std::min(k0 + 16, rows);
    for (int64_t n = 0; n < count; ++n)
      for (int64_t k = k0; k < k1; ++k) to[k * width + n] = from[n * stride + at(k)];
    for (int64_t k = k0; k < k1; ++k) std::fill(to + k * width + count, to + (k + 1) * width, T(0));
  }
}
template <typename T, typename At>
void turn_back(const T* from, int64_t width, int64_t count, int64_t rows, At at, T* to, int64_t stride) {
  for (int64_t k0 = 0; k0 < rows; k0 += 16) {
    const int64_t k1 = std::min(k0 + 16, rows);
    for (int64_t n = 0; n < count; ++n)
      for (int64_t k = k0; k < k1; ++k) to[n * stride + at(k)] = from[k * width + n];
  }
}

}  // namespace product
}  // namespace genkernels
