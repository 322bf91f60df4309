// Columns of numbers side by side: [16][P] to [P][16] and back, by squares of a vector's width.
#pragma once

#include <utility>

#include "vector.h"

namespace genkernels {
namespace {

constexpr int64_t kColumns = 16;

// Transposes the square of a vector's width by halves: blocks of kHalf lanes change places across the diagonal.
template <typename T, int64_t kHalf, size_t... kLane>
inline void exchange(typename Vector<T>::type* row, std::index_sequence<kLane...>) {
  using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  typedef Index Mask __attribute__((vector_size(kVectorBytes)));
  constexpr Index n = sizeof...(kLane), h = kHalf;
  constexpr Mask low = {((Index(kLane) & h) ? n + Index(kLane) - h : Index(kLane))...};
  constexpr Mask high = {((Index(kLane) & h) ? n + Index(kLane) : Index(kLane) + h)...};
#pragma GCC unroll 16
  for (int64_t i = 0; i < n; ++i)
    if (!(i & h)) {
      const auto a = row[i], b = row[i + h];
      row[i] = __builtin_shuffle(a, b, low);
      row[i + h] = __builtin_shuffle(a, b, high);
    }
  if constexpr (kHalf > 1) exchange<T, kHalf / 2>(row, std::index_sequence<kLane...>());
}

// Calls f(first row, first column) for the squares of [16][P]; the last ones overlap those before.
template <typename T, typename F>
inline void for_each_square(int64_t width, F&& f) {
  constexpr int64_t n = Vector<T>::kLanes;
  for (int64_t r = 0; r < kColumns; r += n) {
    int64_t c = 0;
    for (; c + n <= width; c += n) f(r, c);
    if (c < width) f(r, width - n);
  }
}

// [16][width], as it lies, to [width][16].
template <typename T>
inline void to_columns(const T* from, int64_t width, T* to) {
  constexpr int64_t n = Vector<T>::kLanes;
  if (width < n) {
    for (int64_t l = 0; l < kColumns; ++l)
      for (int64_t j = 0; j < width; ++j) to[j * kColumns + l] = from[l * width + j];
    return;
  }
  for_each_square<T>(width, [&](int64_t r, int64_t c) {
    typename Vector<T>::type row[n];
#pragma GCC unroll 16
    for (int64_t i = 0; i < n; ++i) row[i] = load_vector(from + (r + i) * width + c);
    exchange<T, n / 2>(row, std::make_index_sequence<n>());
#pragma GCC unroll 16
    for (int64_t i = 0; i < n; ++i) store_vector<T>(row[i], to + (c + i) * kColumns + r);
  });
}

// And back.
template <typename T>
inline void to_rows(const T* from, int64_t width, T* to) {
  constexpr int64_t n = Vector<T>::kLanes;
  if (width < n) {
    for (int64_t l = 0; l < kColumns; ++l)
      for (int64_t j = 0; j < width; ++j) to[l * width + j] = from[j * kColumns + l];
    return;
  }
  for_each_square<T>(width, [&](int64_t r, int64_t c) {
    typename Vector<T>::type row[n];
#pragma GCC unroll 16
    for (int64_t i = 0; i < n; ++i) row[i] = load_vector(from + (c + i) * kColumns + r);
    exchange<T, n / 2>(row, std::make_index_sequence<n>());
#pragma GCC unroll 16
    for (int64_t i = 0; i < n; ++i) store_vector<T>(row[i], to + (r + i) * width + c);
  });
}

}  // namespace
}  // namespace genkernels
