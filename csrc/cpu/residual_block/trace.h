// The exact first term, tr J = Σ d₂ᵀ M d₁ (genkernels/reference/_block.py), and its gradient: products of small
// matrices, M's one for each class of pixels.
//
// Slopes are turned to lines, one for each pixel with its channels side by side, those of a class one after the other.
// Lines are broadcast against rows of M, so that a class of a single pixel, as an image's corners are, costs no more
// than its own products, and no column is a zero.
#pragma once

#include "gradient.h"

namespace genkernels {
namespace block {

// to[e][·] = Σ_k x[e·each + k·step] · g[k][·] for e < count, or added to what is there; rows of g and `to` are `stride`
// numbers apart, whole vectors. Sums are cut into runs, as those of masked_conv/products.h.
template <typename T>
void multiply_lines(int64_t count, const T* x, int64_t each, int64_t step, int64_t depth, const T* g, int64_t stride,
                    T* to, bool adds) {
  constexpr int64_t L = Vector<T>::kLanes;
  if (depth == 0 && !adds) std::fill_n(to, count * stride, T(0));
  const auto across = [&]<int V>(int64_t n) {
    for (int64_t k = 0; k < depth; k += masked::kRun) {
      const int64_t deep = std::min(masked::kRun, depth - k);
      const bool first = !adds && k == 0;
      int64_t e = 0;
      const auto some = [&]<int E>() {
        for (; e + E <= count; e += E) {
          const T* from[E];
          for (int j = 0; j < E; ++j) from[j] = x + (e + j) * each + k * step;
          T* sums = to + e * stride + n;
          if (step == 1)
            masked::outer_tile<T, E, V>(from, 0, g + k * stride + n, stride, 1, deep, sums, stride, first);
          else
            masked::outer_tile<T, E, V>(from, step, g + k * stride + n, stride, deep, 1, sums, stride, first);
        }
      };
      some.template operator()<masked::entries_beside(V)>();
      some.template operator()<4>();
      some.template operator()<2>();
      some.template operator()<1>();
    }
  };
  for (int64_t n = 0; n < stride;) {
    const int64_t left = (stride - n) / L;
    if (left >= 4 && masked::kOuterVectors == 4)
      across.template operator()<masked::kOuterVectors>(n), n += 4 * L;
    else if (left >= 2)
      across.template operator()<2>(n), n += 2 * L;
    else
      across.template operator()<1>(n), n += L;
  }
}

template <typename T>
struct Trace {
  static constexpr int64_t kLanes = Vector<T>::kLanes, kSquare = 16;

  Numbers<T> map;
  int64_t rows, columns, count;  // of M, and how many there are
  int64_t high, wide;            // rows and columns in whole vectors
  int64_t tile_columns, samples;
  std::vector<int64_t> place;  // of each column of a tile: its line; −1: it is no pixel
  std::vector<int64_t> first;  // of each class: its first line; [count + 1]
  std::vector<T> straight,
      turned;  // M [count, rows, wide], where that is not `map` itself, and Mᵀ [count, columns, high]

  Trace(const Tensor& m, const Network<T>& net, bool backwards)
      : map(m),
        rows(m.size(1)),
        columns(m.size(2)),
        count(m.size(0)),
        high(round_up(rows, kLanes)),
        wide(round_up(columns, kLanes)),
        tile_columns(net.grid.columns()),
        samples(net.grid.samples),
        place(tile_columns, -1) {
    require(net.count() == 3 && rows == net.values(1) && columns == net.values(0) && (count == 1 || count == 9) &&
                (count == 1 || std::min(net.grid.height, net.grid.width) >= 2),
            "log_det_series: the trace's map must fit to the block");
    int64_t line = 0;
    for (const std::vector<int64_t>& some : net.grid.classes(count)) {
      first.push_back(line);
      for (int64_t column : some) place[column] = line++;
    }
    first.push_back(line);
    if (wide != columns) {
      straight.resize(count * rows * wide);
      for (int64_t r = 0; r < count * rows; ++r) std::copy_n(map + r * columns, columns, &straight[r * wide]);
    }
    if (!backwards) return;
    turned.resize(count * columns * high);
    torch::stable::parallel_for(0, count, std::max<int64_t>(1, 64 * 1024 / (rows * columns + 1)),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t k = begin; k < end; ++k)
                                    for (int64_t o = 0; o < rows; ++o)
                                      for (int64_t i = 0; i < columns; ++i)
                                        turned[(k * columns + i) * high + o] = map[(k * rows + o) * columns + i];
                                });
  }

  int64_t lines() const { return first.back(); }
  const T* of_class(int64_t k) const { return (straight.empty() ? map : straight.data()) + k * rows * wide; }

  // to[place[q]][c] = from[c][q]
  void to_lines(const T* from, int64_t plane, int64_t channels, T* to, int64_t stride) const {
    squares(stride, [&](int64_t q, int64_t n, int64_t c, int64_t across) {
      T square[kSquare][kSquare], found[kSquare * kSquare];
      for (int64_t k = 0; k < kSquare; ++k) {
        if (c + k < channels)
          masked::load_row(from + (c + k) * plane + q, square[k], n);
        else
          std::fill_n(square[k], kSquare, T(0));
      }
      masked::transpose(square, found, kSquare, n, kSquare);
      for (int64_t j = 0; j < n; ++j)
        if (place[q + j] >= 0) copy(found + j * kSquare, to + place[q + j] * stride + c, across);
    });
  }

  // to[c][q] += from[place[q]][c]
  void add_lines(const T* from, int64_t stride, int64_t channels, T* to, int64_t plane) const {
    squares(stride, [&](int64_t q, int64_t n, int64_t c, int64_t across) {
      T square[kSquare][kSquare] = {}, found[kSquare * kSquare];
      for (int64_t j = 0; j < n; ++j)
        if (place[q + j] >= 0) copy(from + place[q + j] * stride + c, square[j], across);
      masked::transpose(square, found, kSquare, kSquare, kSquare);
      for (int64_t k = 0; k < std::min(kSquare, channels - c); ++k) {
        T* row = to + (c + k) * plane + q;
        for (int64_t j = 0; j < n; j += kLanes)
          store_vector<T>(load_vector(row + j) + load_vector(found + k * kSquare + j), row + j);
      }
    });
  }

 private:
  // f(column, columns, channel, channels) for each square of a tile and `stride` channels
  template <typename F>
  void squares(int64_t stride, F&& f) const {
    for (int64_t q = 0; q < tile_columns; q += kSquare)
      for (int64_t c = 0; c < stride; c += kSquare)
        f(q, std::min(kSquare, tile_columns - q), c, std::min(kSquare, stride - c));
  }
  static void copy(const T* from, T* to, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) store_vector<T>(load_vector(from + i), to + i);
  }
};

// Lines of a thread's tile: d₁, d₂, and what they are multiplied to.
template <typename T>
struct TraceRoom {
  Scratch<T> d1, d2, product;
  explicit TraceRoom(const Trace<T>& t)
      : d1(t.lines() * t.wide), d2(t.lines() * t.high), product(t.lines() * std::max(t.wide, t.high)) {}
};

// Adds `by` times tr J of each of a tile's samples to to[sample].
template <typename T>
void add_trace(Tile<T>& tile, const Trace<T>& trace, TraceRoom<T>& room, double by, double* to) {
  using Vec = typename Vector<T>::type;
  constexpr int64_t L = Vector<T>::kLanes, kTerms = 128;  // of a lane in T, sums of these then in fp64
  trace.to_lines(tile.slope(0), tile.plane, trace.columns, room.d1, trace.wide);
  trace.to_lines(tile.slope(1), tile.plane, trace.rows, room.d2, trace.high);
  for (int64_t k = 0; k < trace.count; ++k) {
    const int64_t line = trace.first[k], lines = trace.first[k + 1] - line, each = lines / trace.samples * trace.wide;
    T* found = room.product + line * trace.wide;
    multiply_lines<T>(lines, room.d2 + line * trace.high, trace.high, 1, trace.rows, trace.of_class(k), trace.wide,
                      found, false);
    const T* d1 = room.d1 + line * trace.wide;
    for (int64_t s = 0; s < trace.samples; ++s, found += each, d1 += each)
      for (int64_t i = 0; i < each;) {
        Vec sum = {};
        for (const int64_t end = std::min(each, i + kTerms * L); i < end; i += L)
          sum += load_vector(found + i) * load_vector(d1 + i);
        alignas(64) T lanes[L];
        store_vector<T>(sum, lanes);
        for (T lane : lanes) to[s] += by * double(lane);
      }
  }
}

// The trace's part, `weight` times at each column: to the slopes' gradients, and to that of M [count, rows, wide].
template <typename T>
void add_trace_gradient(Tile<T>& tile, const Trace<T>& trace, TraceRoom<T>& room, T* by_d1, T* by_d2, const T* weight,
                        T* by_map) {
  trace.to_lines(tile.slope(0), tile.plane, trace.columns, room.d1, trace.wide);
  trace.to_lines(tile.slope(1), tile.plane, trace.rows, room.d2, trace.high);
  const auto weigh = [&](T* lines, int64_t stride) {
    for (int64_t q = 0; q < trace.tile_columns; ++q)
      if (trace.place[q] >= 0)
        for (int64_t i = 0; i < stride; ++i) lines[trace.place[q] * stride + i] *= weight[q];
  };
  weigh(room.d2, trace.high);
  const auto classes = [&](auto&& f) {
    for (int64_t k = 0; k < trace.count; ++k) {
      const int64_t line = trace.first[k];
      f(k, trace.first[k + 1] - line, room.d1 + line * trace.wide, room.d2 + line * trace.high, line);
    }
  };
  classes([&](int64_t k, int64_t lines, const T* d1, const T* d2, int64_t line) {
    multiply_lines<T>(lines, d2, trace.high, 1, trace.rows, trace.of_class(k), trace.wide,
                      room.product + line * trace.wide, false);
    multiply_lines<T>(trace.rows, d2, 1, trace.high, lines, d1, trace.wide, by_map + k * trace.rows * trace.wide, true);
  });
  trace.add_lines(room.product, trace.wide, trace.columns, by_d1, tile.plane);
  classes([&](int64_t k, int64_t lines, const T* d1, const T*, int64_t line) {
    multiply_lines<T>(lines, d1, trace.wide, 1, trace.columns, &trace.turned[k * trace.columns * trace.high],
                      trace.high, room.product + line * trace.high, false);
  });
  weigh(room.product, trace.high);
  trace.add_lines(room.product, trace.high, trace.rows, by_d2, tile.plane);
}

}  // namespace block
}  // namespace genkernels
