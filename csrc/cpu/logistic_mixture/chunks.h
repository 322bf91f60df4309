// The sizes of a call of logistic_mixture, and the loop over its chunks of pixels.
#pragma once

#include "../common.h"

namespace genkernels {
namespace {

constexpr int64_t kTile = 64;
constexpr int64_t kChunk = 256;
constexpr int64_t kGrain = 4096;  // pixels times components below which a second thread does not pay

struct Geometry {
  int64_t samples, pixels, mixtures, rows;  // N, S, K, P
  int channels, levels;
  int64_t chunks() const { return (pixels + kChunk - 1) / kChunk; }
};

inline Geometry geometry_of(const Tensor& params, int64_t channels, int64_t levels) {
  Geometry g;
  g.samples = params.size(0);
  g.rows = params.size(1);
  g.pixels = 1;
  for (int64_t i = 2; i < params.dim(); ++i) g.pixels *= params.size(i);
  g.channels = int(channels);
  g.levels = int(levels);
  g.mixtures = g.rows / (channels == 1 ? 3 : 10);
  return g;
}

// Runs f(sample, chunk) over everything, in parallel, with one scratch of `floats` numbers a thread's range.
template <typename T, typename F>
void for_each_chunk(const Geometry& g, int64_t floats, F&& f) {
  const int64_t chunks = g.chunks(), each = std::max<int64_t>(1, std::min(g.pixels, kChunk) * g.mixtures * g.channels);
  torch::stable::parallel_for(0, g.samples * chunks, std::max<int64_t>(1, kGrain / each),
                              [&](int64_t from, int64_t to) {
                                std::vector<T> scratch(floats);
                                for (int64_t task = from; task < to; ++task)
                                  f(task / chunks, task % chunks, scratch.data());
                              });
}

// n numbers of a row as T: the tensor itself where it has that type, else `buffer`, filled.
template <typename S, typename T>
const T* read(const S* from, T* buffer, int64_t n) {
  if constexpr (std::is_same_v<S, T>) {
    return from;
  } else {
    load(from, buffer, n);
    return buffer;
  }
}

}  // namespace
}  // namespace genkernels
