// Conversion between storage and arithmetic types, for the CPU kernels.
//
// One source, three builds (setup.py): x86-64-v3, AVX-512 and, on other processors, generic. Nothing here may be shared
// between the builds at run time: exactly one of them is loaded.
#pragma once

#include "../common/host.h"

#include <algorithm>
#include <bit>
#include <cstring>

#if defined(__F16C__) && defined(__AVX2__)
#  include <immintrin.h>
#endif

namespace genkernels {

// load: n values of storage type S into arithmetic type T. store: back, rounded to nearest even.
template <typename T>
inline void load(const T* from, T* to, int64_t n) {
  std::memcpy(to, from, n * sizeof(T));
}
template <typename T>
inline void store(const T* from, T* to, int64_t n) {
  std::memcpy(to, from, n * sizeof(T));
}

inline void load(const BFloat16* from, float* to, int64_t n) {
  const uint16_t* bits = reinterpret_cast<const uint16_t*>(from);
  for (int64_t i = 0; i < n; ++i) to[i] = std::bit_cast<float>(uint32_t(bits[i]) << 16);
}

inline void store(const float* from, BFloat16* to, int64_t n) {
  uint16_t* bits = reinterpret_cast<uint16_t*>(to);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t u = std::bit_cast<uint32_t>(from[i]);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const bool is_nan = (u & 0x7fffffffu) > 0x7f800000u;
    bits[i] = uint16_t(is_nan ? 0x7fc0u : rounded);
  }
}

inline void load(const Half* from, float* to, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__) && defined(__AVX2__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < n; ++i) to[i] = static_cast<float>(from[i]);
}

inline void store(const float* from, Half* to, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__) && defined(__AVX2__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; ++i) to[i] = Half(from[i]);
}

}  // namespace genkernels
