// Results and how they are stored: into the caches, or past them.
#pragma once

#include "layers.h"

namespace genkernels {
namespace spectral {

// How results are stored: into the caches, or past them, which spares the read of each line before it is overwritten.
enum class Stores { kCached, kPast };

constexpr int64_t kInner = 2 * 1024 * 1024;  // bytes of inner cache a thread
constexpr int64_t kTogether = 128;           // numbers that are computed before they are stored

// Results that the inner caches of all threads do not hold go past them.
inline Stores stores_of(int64_t bytes) {
  return bytes > kInner * int64_t(torch::stable::get_num_threads()) ? Stores::kPast : Stores::kCached;
}

// n numbers that begin a line, to where a line begins, past the caches.
template <typename S>
void store_past(const S* from, S* to, int64_t n) {
  int64_t whole = 0;
#if defined(__AVX512F__)
  for (; (whole + 64) <= n * int64_t(sizeof(S)); whole += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(reinterpret_cast<char*>(to) + whole),
                        _mm512_load_si512(reinterpret_cast<const char*>(from) + whole));
#elif defined(__AVX2__)
  for (; (whole + 32) <= n * int64_t(sizeof(S)); whole += 32)
    _mm256_stream_si256(
        reinterpret_cast<__m256i*>(reinterpret_cast<char*>(to) + whole),
        _mm256_load_si256(reinterpret_cast<const __m256i*>(reinterpret_cast<const char*>(from) + whole)));
#endif
  std::memcpy(reinterpret_cast<char*>(to) + whole, reinterpret_cast<const char*>(from) + whole, n * sizeof(S) - whole);
}

// compute(i, count, buffer) gives numbers [i, i + count); they are stored as S.
template <typename S, typename F>
void write(S* to, int64_t n, Stores stores, F compute) {
  using T = arithmetic_t<S>;
  const bool past = stores == Stores::kPast && n >= 4 * kTogether;
  if constexpr (std::is_same_v<S, T>)
    if (!past) return compute(0, n, to);
  alignas(64) T buffer[kTogether];
  alignas(64) S narrow[kTogether];
  int64_t ahead = past ? int64_t(-reinterpret_cast<uintptr_t>(to) % 64 / sizeof(S)) : 0;  // to where a line begins
  for (int64_t i = 0; i < n; ahead = 0) {
    const int64_t count = ahead ? ahead : std::min(kTogether, n - i);
    compute(i, count, buffer);
    if (!past || ahead) {
      store(buffer, to + i, count);
    } else if constexpr (std::is_same_v<S, T>) {
      store_past(buffer, to + i, count);
    } else {
      store(buffer, narrow, count);
      store_past(narrow, to + i, count);
    }
    i += count;
  }
}

// to = factor · from; a factor of 1 copies.
template <typename S>
void multiply(const S* from, arithmetic_t<S> factor, S* to, int64_t n, Stores stores) {
  using T = arithmetic_t<S>;
  if (factor == T(1)) {
    std::memcpy(static_cast<void*>(to), from, n * sizeof(S));
    return;
  }
  write(to, n, stores, [&](int64_t i, int64_t count, T* out) {
    if constexpr (std::is_same_v<S, T>) {
      for (int64_t j = 0; j < count; ++j) out[j] = from[i + j] * factor;
    } else {
      load(from + i, out, count);
      for (int64_t j = 0; j < count; ++j) out[j] *= factor;
    }
  });
}

// to = f g + s x
template <typename S>
void combine(const S* g, arithmetic_t<S> f, arithmetic_t<S> s, const arithmetic_t<S>* x, S* to, int64_t n,
             Stores stores) {
  using T = arithmetic_t<S>;
  write(to, n, stores, [&](int64_t i, int64_t count, T* out) {
    if constexpr (std::is_same_v<S, T>) {
      for (int64_t j = 0; j < count; ++j) out[j] = f * g[i + j] + s * x[i + j];
    } else {
      load(g + i, out, count);
      for (int64_t j = 0; j < count; ++j) out[j] = f * out[j] + s * x[i + j];
    }
  });
}

}  // namespace spectral
}  // namespace genkernels
