// Runs csrc/cuda/*.cu on the CPU: g++ compiles the very same source with this file included first (see emulation.py).
//
// A launch runs the blocks one after the other. The threads of a block are fibers that run in turn and hand over at
// each barrier and each shuffle, so the sums of csrc/cuda/common.cuh go through the same exchanges as on a GPU. What
// this shows: index arithmetic, masks, alignment, launch shapes, reductions, the torch side. What it cannot: speed,
// races between barriers.
//
// The operators register for the CPU, in a namespace of their own: torch.ops.genkernels_emulated.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#define genkernels_cuda genkernels_emulated
#define CUDA CPU
#define GENKERNELS_CUDA_LAUNCH_CUH  // in place of csrc/cuda/launch.cuh

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct alignas(8) uint2 {
  unsigned int x, y;
};
struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};
struct dim3 {
  unsigned int x, y, z;
  dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

constexpr int kMaxThreads = 1024;
constexpr size_t kStack = 64 * 1024;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 index;
  int barriers = 0;
  bool done = false;
};

inline std::vector<Fiber> fibers(kMaxThreads);
inline ucontext_t scheduler;
inline int current = 0, alive_threads = 0;
inline dim3 block_index, block_shape, grid_shape;
inline std::function<void()> body;
inline std::string error;
inline uint64_t exchanged[2][kMaxThreads];

inline void complain(const std::string& what) {
  if (error.empty()) error = what;
}

// Hands over to the other threads until all of them have come here.
inline void barrier() {
  Fiber& me = fibers[current];
  ++me.barriers;
  swapcontext(&me.context, &scheduler);
}

inline void start() {
  body();
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void run_block(int threads) {
  for (int i = 0; i < threads; ++i) {
    Fiber& f = fibers[i];
    f.done = false;
    f.barriers = 0;
    f.index = dim3(i % block_shape.x, i / block_shape.x % block_shape.y, i / (block_shape.x * block_shape.y));
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, start, 0);
  }
  // Each round takes every thread to its next barrier or to its end; a thread that ended is not waited for, as on a
  // GPU.
  for (bool running = true; running;) {
    running = false;
    for (int i = 0; i < threads; ++i) {
      if (fibers[i].done) continue;
      current = i;
      swapcontext(&scheduler, &fibers[i].context);
      running = running || !fibers[i].done;
    }
  }
  for (int i = 1; i < threads; ++i) {
    if (fibers[i].barriers != fibers[0].barriers)
      complain("threads of one block met different numbers of barriers and shuffles");
  }
}

template <typename T>
T shuffle_xor(unsigned int mask, T value, int offset) {
  if (mask != 0xffffffffu) complain("shuffles are expected to take whole warps");
  const int round = fibers[current].barriers % 2;  // two sets of slots: one is read while the next is written
  const int me = current;
  std::memcpy(&exchanged[round][me], &value, sizeof value);
  barrier();
  T other;
  std::memcpy(&other, &exchanged[round][me ^ offset], sizeof other);
  return other;
}

}  // namespace emulation

#define threadIdx (emulation::fibers[emulation::current].index)
#define blockIdx emulation::block_index
#define blockDim emulation::block_shape
#define gridDim emulation::grid_shape
#define __syncthreads emulation::barrier
#define __shfl_xor_sync emulation::shuffle_xor

template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
T __ldg(const T* p) {
  return *p;
}

namespace genkernels {

class Launcher {
 public:
  Launcher(const char* name, const torch::stable::Tensor&) : name_(name) {}

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, dim3 block, Arguments... arguments) const {
    if (blocks < 1 || blocks > 2147483647) throw std::runtime_error("a grid must have 1 to 2^31 - 1 blocks");
    const int threads = block.x * block.y * block.z;
    if (threads < 1 || threads > emulation::kMaxThreads)
      throw std::runtime_error("a block must have 1 to 1024 threads");
    emulation::error.clear();
    emulation::body = [=] { kernel(arguments...); };
    emulation::block_shape = block;
    emulation::grid_shape = dim3(static_cast<unsigned int>(blocks));
    for (int64_t b = 0; b < blocks; ++b) {
      emulation::block_index = dim3(static_cast<unsigned int>(b));
      emulation::run_block(threads);
    }
    if (!emulation::error.empty()) throw std::runtime_error(std::string(name_) + ": " + emulation::error);
  }

  // Blocks that run one after the other cannot wait for each other.
  template <typename... Parameters, typename... Arguments>
  void clustered(void (*kernel)(Parameters...), int64_t blocks, dim3 block, int cluster, Arguments... arguments) const {
    if (cluster != 1) throw std::runtime_error("there are no clusters here");
    (*this)(kernel, blocks, block, arguments...);
  }
  int largest_cluster() const { return 1; }
  int multiprocessors() const { return 1; }

 private:
  const char* name_;
};

}  // namespace genkernels
