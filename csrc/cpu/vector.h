// Vectors as wide as the processor's, by the compiler's own extension: one source for AVX-512, AVX2, SSE and NEON.
#pragma once

#include <cstdint>

namespace genkernels {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRegisters = 32;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));  // in memory
  static constexpr int64_t kLanes = kVectorBytes / sizeof(T);
};

template <typename T>
inline typename Vector<T>::type load_vector(const T* from) {
  return *reinterpret_cast<const typename Vector<T>::unaligned*>(from);
}

template <typename T>
inline void store_vector(typename Vector<T>::type value, T* to) {
  *reinterpret_cast<typename Vector<T>::unaligned*>(to) = value;
}

}  // namespace genkernels
