// The exact first term, tr J = Σ d₂ᵀ M d₁ (genkernels/reference/_block.py), and its gradient: M packed, one matrix for
// each class of pixels, over columns gathered by class.
#pragma once

#include "gradient.h"

namespace genkernels {
namespace block {

template <typename T>
struct Trace {
  Numbers<T> map;
  int64_t rows, columns, count;
  std::vector<std::vector<Run>> runs;
  std::vector<int64_t> lengths;  // columns of each class in a tile, in whole vectors
  int64_t stride = 0;
  std::vector<Product<T>> forward, transposed;

  Trace(const Tensor& m, const Network<T>& net, bool backwards)
      : map(m), rows(m.size(1)), columns(m.size(2)), count(m.size(0)) {
    require(net.count() == 3 && rows == net.values(1) && columns == net.values(0) && (count == 1 || count == 9) &&
                (count == 1 || std::min(net.grid.height, net.grid.width) >= 2),
            "log_det_series: the trace's map must fit to the block");
    runs = net.grid.classes(count);
    for (const auto& some : runs) {
      int64_t n = 0;
      for (const Run& run : some) n += run.length;
      lengths.push_back(round_up(n, Vector<T>::kLanes));
      stride = std::max(stride, lengths.back());
    }
    stride = ((stride + 15) / 16 | 1) * 16;
    for (int64_t k = 0; k < count; ++k) {
      const T* at = map + k * rows * columns;
      const auto none = [](int64_t) { return int64_t(0); };
      forward.emplace_back().pack(
          rows, columns, 1, stride, [&](int64_t o, int64_t i, int64_t) { return at[o * columns + i]; }, none);
      if (backwards)
        transposed.emplace_back().pack(
            columns, rows, 1, stride, [&](int64_t i, int64_t o, int64_t) { return at[o * columns + i]; }, none);
    }
  }

  // The columns of class k of `channels` planes, side by side.
  void gather(int64_t k, const T* from, int64_t plane, int64_t channels, T* to) const {
    for (int64_t c = 0; c < channels; ++c, from += plane) {
      T* at = to + c * stride;
      for (const Run& run : runs[k]) at = std::copy_n(from + run.at, run.length, at);
      std::fill(at, to + c * stride + lengths[k], T(0));
    }
  }
  void scatter_add(int64_t k, const T* from, int64_t channels, T* to, int64_t plane) const {
    for (int64_t c = 0; c < channels; ++c, to += plane) {
      const T* at = from + c * stride;
      for (const Run& run : runs[k])
        for (int64_t i = 0; i < run.length; ++i) to[run.at + i] += *at++;
    }
  }
};

template <typename T>
struct TraceRoom {
  Scratch<T> d1, d2, product;
  explicit TraceRoom(const Trace<T>& t)
      : d1(t.columns * t.stride + 64),
        d2(t.rows * t.stride + 64),
        product(std::max(t.rows, t.columns) * t.stride + 64) {}
};

// sums[q] += Σ_i d2_i (M d1)_i
template <typename T>
void add_trace(Tile<T>& tile, const Trace<T>& trace, TraceRoom<T>& room, T* sums) {
  std::vector<T> found(trace.stride);
  for (int64_t k = 0; k < trace.count; ++k) {
    if (trace.runs[k].empty()) continue;
    trace.gather(k, tile.slope(0), tile.plane, trace.columns, room.d1);
    trace.gather(k, tile.slope(1), tile.plane, trace.rows, room.d2);
    trace.forward[k].run(room.d1, nullptr, room.product, trace.stride, trace.lengths[k]);
    std::fill(found.begin(), found.end(), T(0));
    for (int64_t i = 0; i < trace.rows; ++i) {
      const T *a = room.d2 + i * trace.stride, *b = room.product + i * trace.stride;
      for (int64_t q = 0; q < trace.lengths[k]; ++q) found[q] += a[q] * b[q];
    }
    const T* at = found.data();
    for (const Run& run : trace.runs[k])
      for (int64_t i = 0; i < run.length; ++i) sums[run.at + i] += *at++;
  }
}

// The trace's part: to the slopes' gradients, and to that of M.
template <typename T>
void add_trace_gradient(Tile<T>& tile, const Trace<T>& trace, TraceRoom<T>& room, T* by_d1, T* by_d2, const T* weight,
                        std::vector<Outer<T>>& by_map, T* turned) {
  for (int64_t k = 0; k < trace.count; ++k) {
    if (trace.runs[k].empty()) continue;
    trace.gather(k, tile.slope(0), tile.plane, trace.columns, room.d1);
    trace.gather(k, tile.slope(1), tile.plane, trace.rows, room.d2);
    std::vector<T> each(trace.stride, T(0));
    T* at = each.data();
    for (const Run& run : trace.runs[k]) at = std::copy_n(weight + run.at, run.length, at);
    for (int64_t i = 0; i < trace.rows; ++i)
      for (int64_t q = 0; q < trace.lengths[k]; ++q) room.d2[i * trace.stride + q] *= each[q];
    trace.transposed[k].run(room.d2, nullptr, room.product, trace.stride, trace.lengths[k]);
    trace.scatter_add(k, room.product, trace.columns, by_d1, tile.plane);
    by_map[k].add(room.d2, trace.stride, room.d1, trace.lengths[k], turned);
    trace.forward[k].run(room.d1, nullptr, room.product, trace.stride, trace.lengths[k]);
    for (int64_t i = 0; i < trace.rows; ++i)
      for (int64_t q = 0; q < trace.lengths[k]; ++q) room.product[i * trace.stride + q] *= each[q];
    trace.scatter_add(k, room.product, trace.rows, by_d2, tile.plane);
  }
}

}  // namespace block
}  // namespace genkernels
