// Device helpers that every operator's kernels share: wide accesses, the lanes of a thread, a sum over a group of
// threads.
//
// Blocks are always kThreads threads, shaped (group, kThreads / group) with `group` a power of two: a group works on
// one sample, so that a sample of two numbers costs one thread and a sample of a million costs many whole blocks.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/divisor.h"
#include "../common/host.h"
#include "launch.cuh"

namespace genkernels {

constexpr int kThreads = 256;

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Elements of a thread: what fills one 16-byte access or, element by element, enough to keep several loads in flight.
template <typename T, bool kWide>
constexpr int kLanes = kWide           ? 16 / sizeof(T)
                       : sizeof(T) < 8 ? 4
                                       : 1;

// fp64 is for checks, not for speed: it has no wide kernels.
template <typename T>
constexpr bool kHasWide = sizeof(T) < 8;

template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  T lane[V];
};

// ---------------------------------------------------------------------------------------------------------------------
// Accesses

// Words of 2, 4, 8 and 16 bytes, so that one load and one store serve every type of that size.
template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// A load with the evict-first hint, for tensors that are read once: it leaves the L2 cache to the outputs, which the
// next layer reads at once.
template <typename T>
__device__ __forceinline__ T load_once(const T* p) {
  using W = typename Word<sizeof(T)>::type;
  const W word = __ldcs(reinterpret_cast<const W*>(p));
  T value;
  memcpy(&value, &word, sizeof(T));
  return value;
}

// A plain assignment of 16 bytes was seen to become four stores of 4, and __stwb a store with ordering that is not
// needed.
template <typename T>
__device__ __forceinline__ void store(T* p, const T& value) {
  using W = typename Word<sizeof(T)>::type;
  W word;
  memcpy(&word, &value, sizeof(T));
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 16) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w)
                 : "memory");
    return;
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(word.x), "r"(word.y) : "memory");
    return;
  }
#endif
  *reinterpret_cast<W*>(p) = word;
}

// The V elements of a thread's run. Wide: V neighbours, one access, all inside or all outside. Otherwise the lanes
// stand `step` (the group's size) apart, so that each access of a warp is still one contiguous stretch; some may be
// outside.
template <int V, bool kWide>
struct Lanes {
  int64_t first;  // element of lane 0
  int64_t end;    // elements there are
  int step;

  __device__ __forceinline__ bool any() const { return first < end; }
  __device__ __forceinline__ int64_t element(int j) const {
    return kWide ? first + j : first + static_cast<int64_t>(j) * step;
  }
  __device__ __forceinline__ bool inside(int j) const { return kWide || element(j) < end; }
};

// Loads of a run with any lane inside; `at` maps an element to its offset from `base`, and neighbours of a wide run to
// neighbours. Lanes outside read the last element again: a load without a condition never waits for the one before it.
template <typename T, int V, bool kWide, typename At>
__device__ __forceinline__ Vector<T, V> load(const T* base, const Lanes<V, kWide>& run, At at) {
  Vector<T, V> values;
  if constexpr (kWide) {
    values = load_once(reinterpret_cast<const Vector<T, V>*>(base + at(run.first)));
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      values.lane[j] = load_once(base + at(run.inside(j) ? run.element(j) : run.end - 1));
    }
  }
  return values;
}

template <typename T, int V, bool kWide, typename At>
__device__ __forceinline__ void store(T* base, const Lanes<V, kWide>& run, At at, const Vector<T, V>& values) {
  if constexpr (kWide) {
    store(reinterpret_cast<Vector<T, V>*>(base + at(run.first)), values);
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (run.inside(j)) store(base + at(run.element(j)), values.lane[j]);
    }
  }
}

// Whether V elements may be accessed at once from each pointer on; null, for a tensor that is not there, is aligned.
template <int V, typename... T>
bool are_aligned(const T*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % (sizeof(T) * V) == 0) && ...);
}

// ---------------------------------------------------------------------------------------------------------------------
// Sums

// The sum over a group (blockDim.x threads, a power of two), in an order fixed by the group's size: a butterfly in each
// warp, then the warps one by one. Every thread of the block has to call it, once in a kernel.
template <typename A>
__device__ __forceinline__ A group_sum(A value) {
  const int group = blockDim.x;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const A other = __shfl_xor_sync(0xffffffffu, value, offset);
    if (offset < group) value += other;  // a narrower group stays within its own lanes
  }
  if (group <= 32) return value;

  __shared__ A warp_sums[kThreads / 32];
  const int thread = threadIdx.y * group + threadIdx.x;
  if (thread % 32 == 0) warp_sums[thread / 32] = value;
  __syncthreads();
  const int warps = group / 32;
  A sum = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warps) sum += warp_sums[threadIdx.y * warps + w];
  }
  return sum;
}

// sums[n] = Σ_k values[n, k], rows by groups: the second stage of a two-stage sum.
template <typename A>
__global__ void __launch_bounds__(kThreads) sum_rows(const A* __restrict__ values,  // [rows, columns]
                                                     const int64_t rows, const int64_t columns,
                                                     A* __restrict__ sums  // [rows]
) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  A sum = 0;
  if (row < rows) {
    for (int64_t k = threadIdx.x; k < columns; k += blockDim.x) sum += values[row * columns + k];
  }
  sum = group_sum(sum);
  if (threadIdx.x == 0 && row < rows) sums[row] = sum;
}

// The group that covers `elements` in one go, V at a thread, if 256 threads can.
inline int group_for(int64_t elements, int lanes) {
  int group = 1;
  while (group < kThreads && static_cast<int64_t>(group) * lanes < elements) group *= 2;
  return group;
}

template <typename A>
void launch_sum_rows(const Launcher& launch, const A* values, int64_t rows, int64_t columns, A* sums) {
  const int group = group_for(columns, 1);
  const int rows_a_block = kThreads / group;
  launch(sum_rows<A>, ceil_div(rows, rows_a_block), dim3(group, rows_a_block), values, rows, columns, sums);
}

}  // namespace genkernels
