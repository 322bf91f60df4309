// The exact first term, tr J = Σ d₂ᵀ M d₁ (genkernels/reference/_block.py), and its gradient: M packed, one matrix for
// each class of pixels, over columns gathered by class.
//
// Of an image's nine classes the corners have one pixel each: a product over a tile's would be made of zeros for the
// most part. Where there is no gradient, columns of a class wait for those of further tiles.
#pragma once

#include <deque>
#include <numeric>

#include "gradient.h"

namespace genkernels {
namespace block {

// M[k][o][i] = W₂[o][i] Σ_t Σ_c W₁[i][c][t] W₃[c][o][−t] over the taps t that stay inside for pixels of class k; lanes
// are i. An activation of [z, −z] has the rows of W₁ and of W₂ twice.
template <typename T>
Tensor trace_map(const std::vector<Tensor>& weights, bool mirrored) {
  require(weights.size() == 3 && weights[1].size(1) * weights[0].size(0) > 0,
          "log_det_series: the trace's map is of three maps");
  const Numbers<T> first(weights[0]), middle(weights[1]), last(weights[2]);
  const int64_t h1 = weights[0].size(0), channels = weights[0].size(1), h2 = weights[1].size(0),
                columns = h1 * (mirrored ? 2 : 1), rows = h2 * (mirrored ? 2 : 1),
                taps = weights[0].numel() / (h1 * channels), count = taps == 9 ? 9 : 1;
  require(
      weights[1].numel() == h2 * columns && weights[2].numel() == channels * rows * taps && (taps == 1 || taps == 9),
      "log_det_series: the trace's weights must fit together");
  std::vector<T> turned(channels * taps * columns);  // W₁ as [channels, taps, i]
  for (int64_t i = 0; i < columns; ++i)
    for (int64_t e = 0; e < channels * taps; ++e) turned[e * columns + i] = first[i % h1 * channels * taps + e];
  Result<T> map(weights[0], {count, rows, columns});
  T* to = map;
  torch::stable::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    std::vector<T> room(taps * columns);
    const auto tap = [&](int64_t t) { return room.data() + t * columns; };
    for (int64_t o = begin; o < end; ++o) {
      std::fill(room.begin(), room.end(), T(0));
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t t = 0; t < taps; ++t) {
          const T by = last[(c * rows + o) * taps + taps - 1 - t], *row = &turned[(c * taps + t) * columns];
          T* sums = tap(t);
          for (int64_t i = 0; i < columns; ++i) sums[i] += by * row[i];
        }
      const T* weight = middle + o % h2 * columns;
      for (int64_t k = 0; k < count; ++k) {
        T* out = to + (k * rows + o) * columns;
        // of three taps a line, the first row or column of pixels leaves out the first one, the last the last one
        const int64_t y0 = count == 9 && k / 3 == 0, y1 = count == 1 ? 1 : k / 3 == 2 ? 2 : 3;
        const int64_t x0 = count == 9 && k % 3 == 0, x1 = count == 1 ? 1 : k % 3 == 2 ? 2 : 3;
        std::fill_n(out, columns, T(0));
        for (int64_t y = y0; y < y1; ++y)
          for (int64_t x = x0; x < x1; ++x) {
            const T* row = tap(3 * y + x);
            for (int64_t i = 0; i < columns; ++i) out[i] += row[i];
          }
        for (int64_t i = 0; i < columns; ++i) out[i] *= weight[i];
      }
    }
  });
  return map.done();
}

template <typename T>
struct Trace {
  static constexpr int64_t kLanes = Vector<T>::kLanes, kWaiting = 48;

  Numbers<T> map;
  int64_t rows, columns, count;
  std::vector<std::vector<Run>> runs;
  std::vector<int64_t> lengths;  // columns of each class in a tile, in whole vectors
  std::vector<int64_t> strides;  // of gathered columns, from channel to channel
  int64_t stride = 0;            // the largest
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
      lengths.push_back(round_up(n, kLanes));
      // room for a tile's behind some that wait, and for what a gathered run writes beyond its end
      const int64_t most = backwards ? lengths.back() : std::max(lengths.back(), kWaiting) + lengths.back();
      strides.push_back(((most + kLanes + 15) / 16 | 1) * 16);
    }
    stride = *std::max_element(strides.begin(), strides.end());
    for (int64_t k = 0; k < count; ++k) {
      const T* at = map + k * rows * columns;
      const auto none = [](int64_t) { return int64_t(0); };
      forward.emplace_back().pack(
          rows, columns, 1, strides[k], [&](int64_t o, int64_t i, int64_t) { return at[o * columns + i]; }, none);
      if (backwards)
        transposed.emplace_back().pack(
            columns, rows, 1, strides[k], [&](int64_t i, int64_t o, int64_t) { return at[o * columns + i]; }, none);
    }
  }

  // The columns of class k of `channels` planes, side by side, zeros up to whole vectors. A vector is read and written
  // beyond the end of a run, into what comes next.
  void gather(int64_t k, const T* from, int64_t plane, int64_t channels, T* to) const {
    for (int64_t c = 0; c < channels; ++c, from += plane) {
      T *at = to + c * strides[k], *end = at + lengths[k];
      for (const Run& run : runs[k]) {
        if (run.length == 1)
          *at = from[run.at];
        else
          for (int64_t i = 0; i < run.length; i += kLanes) store_vector<T>(load_vector(from + run.at + i), at + i);
        at += run.length;
      }
      std::fill(at, end, T(0));
    }
  }
  void scatter_add(int64_t k, const T* from, int64_t channels, T* to, int64_t plane) const {
    for (int64_t c = 0; c < channels; ++c, to += plane) {
      const T* at = from + c * strides[k];
      for (const Run& run : runs[k])
        for (int64_t i = 0; i < run.length; ++i) to[run.at + i] += *at++;
    }
  }
};

// tr J of samples whose tiles come one after the other, without a gradient.
template <typename T>
class Traces {
 public:
  // to[k·batch + sample]: the part of class k
  Traces(const Trace<T>& trace, int64_t samples, int64_t batch, double* to)
      : trace_(trace), samples_(samples), batch_(batch), to_(to), product_(trace.rows * trace.stride + 64) {
    for (int64_t k = 0; k < trace.count; ++k)
      waiting_.emplace_back(trace.columns * trace.strides[k] + 64, trace.rows * trace.strides[k] + 64);
  }

  void add(Tile<T>& tile, int64_t from) {
    for (int64_t k = 0; k < trace_.count; ++k) {
      if (trace_.runs[k].empty()) continue;
      Waiting& columns = waiting_[k];
      trace_.gather(k, tile.slope(0), tile.plane, trace_.columns, columns.d1 + columns.count);
      trace_.gather(k, tile.slope(1), tile.plane, trace_.rows, columns.d2 + columns.count);
      columns.first.push_back(from);
      columns.count += of_tile(k);
      if (columns.count >= Trace<T>::kWaiting) give(k);
    }
  }
  void give() {
    for (int64_t k = 0; k < trace_.count; ++k) give(k);
  }

 private:
  struct Waiting {
    Scratch<T> d1, d2;
    int64_t count = 0;
    std::vector<int64_t> first;  // sample of each tile
    Waiting(int64_t d1_count, int64_t d2_count) : d1(d1_count), d2(d2_count) {}
  };

  int64_t of_tile(int64_t k) const {
    int64_t n = 0;
    for (const Run& run : trace_.runs[k]) n += run.length;
    return n;
  }

  // Σ_i d2_i (M d1)_i of every column that waits, to its sample.
  void give(int64_t k) {
    Waiting& columns = waiting_[k];
    if (columns.count == 0) return;
    const int64_t stride = trace_.strides[k], n = round_up(columns.count, Trace<T>::kLanes);
    trace_.forward[k].run(columns.d1, nullptr, product_, stride, n);
    std::vector<T> found(n, T(0));
    const T *d2 = columns.d2, *product = product_;
    for (int64_t i = 0; i < trace_.rows; ++i)
      for (int64_t q = 0; q < n; ++q) found[q] += d2[i * stride + q] * product[i * stride + q];
    const int64_t each = of_tile(k) / samples_;
    const T* at = found.data();
    for (int64_t first : columns.first)
      for (int64_t s = first; s < first + samples_; ++s, at += each)
        if (s < batch_) to_[k * batch_ + s] = std::accumulate(at, at + each, 0.0);
    columns.count = 0;
    columns.first.clear();
  }

  const Trace<T>& trace_;
  int64_t samples_, batch_;
  double* to_;
  Scratch<T> product_;
  std::deque<Waiting> waiting_;
};

// Scratch of a thread for the gradient.
template <typename T>
struct TraceRoom {
  Scratch<T> d1, d2, product;
  explicit TraceRoom(const Trace<T>& t)
      : d1(t.columns * t.stride + 64),
        d2(t.rows * t.stride + 64),
        product(std::max(t.rows, t.columns) * t.stride + 64) {}
};

// The trace's part: to the slopes' gradients, and to that of M.
template <typename T>
void add_trace_gradient(Tile<T>& tile, const Trace<T>& trace, TraceRoom<T>& room, T* by_d1, T* by_d2, const T* weight,
                        std::vector<Outer<T>>& by_map, T* turned) {
  for (int64_t k = 0; k < trace.count; ++k) {
    if (trace.runs[k].empty()) continue;
    trace.gather(k, tile.slope(0), tile.plane, trace.columns, room.d1);
    trace.gather(k, tile.slope(1), tile.plane, trace.rows, room.d2);
    std::vector<T> each(trace.strides[k], T(0));
    T* at = each.data();
    for (const Run& run : trace.runs[k]) at = std::copy_n(weight + run.at, run.length, at);
    for (int64_t i = 0; i < trace.rows; ++i)
      for (int64_t q = 0; q < trace.lengths[k]; ++q) room.d2[i * trace.strides[k] + q] *= each[q];
    trace.transposed[k].run(room.d2, nullptr, room.product, trace.strides[k], trace.lengths[k]);
    trace.scatter_add(k, room.product, trace.columns, by_d1, tile.plane);
    by_map[k].add(room.d2, trace.strides[k], room.d1, trace.lengths[k], turned);
    trace.forward[k].run(room.d1, nullptr, room.product, trace.strides[k], trace.lengths[k]);
    for (int64_t i = 0; i < trace.rows; ++i)
      for (int64_t q = 0; q < trace.lengths[k]; ++q) room.product[i * trace.strides[k] + q] *= each[q];
    trace.scatter_add(k, room.product, trace.rows, by_d2, tile.plane);
  }
}

}  // namespace block
}  // namespace genkernels
