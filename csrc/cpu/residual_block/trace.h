// The exact first term, tr J = Σ d₂ᵀ M d₁ (genkernels/reference/_block.py), and its gradient: products of small
// matrices, M's one for each class of pixels.
//
// They give lines, one for each pixel with its channels side by side, those of a class one after the other: slopes are
// broadcast from where they lie in a tile against rows of M, so that a class of a single pixel, as an image's corners
// are, costs no more than its own products, and no column is a zero. Lines are turned into a tile's planes where they
// are added to them, and d₁ into lines where it is a product's rows.
#pragma once

#include "gradient.h"

namespace genkernels {
namespace block {

// to[e][·] = Σ_k x[e][at[k]] · g[k][·], or added to what is there, for E lines and V vectors of a line.
template <typename T, int E, int V>
void lines_tile(const T* const* x, const int64_t* at, int64_t depth, const T* g, int64_t stride, T* to, bool adds) {
  using Vec = typename Vector<T>::type;
  constexpr int64_t L = Vector<T>::kLanes;
  Vec acc[E][V] = {};
  const T* from[E];
  for (int e = 0; e < E; ++e) from[e] = x[e];
  for (int64_t k = 0; k < depth; ++k, g += stride) {
    Vec row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) row[v] = load_vector(g + v * L);
#pragma GCC unroll 8
    for (int e = 0; e < E; ++e)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[e][v] += row[v] * from[e][at[k]];
  }
#pragma GCC unroll 8
  for (int e = 0; e < E; ++e)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      T* line = to + e * stride + v * L;
      store_vector<T>(adds ? acc[e][v] + load_vector(line) : acc[e][v], line);
    }
}

// The same for e < count, x[e] being x + off[e]; rows of g and lines are `stride` numbers, whole vectors. Sums are cut
// into runs, as those of masked_conv/products.h.
template <typename T>
void multiply_lines(int64_t count, const T* x, const int64_t* off, const int64_t* at, int64_t depth, const T* g,
                    int64_t stride, T* to, bool adds) {
  constexpr int64_t L = Vector<T>::kLanes;
  const auto across = [&]<int V>(int64_t n) {
    for (int64_t k = 0; k < depth; k += masked::kRun) {
      int64_t e = 0;
      const auto some = [&]<int E>() {
        for (; e + E <= count; e += E) {
          const T* from[E];
          for (int j = 0; j < E; ++j) from[j] = x + off[e + j];
          lines_tile<T, E, V>(from, at + k, std::min(masked::kRun, depth - k), g + k * stride + n, stride,
                              to + e * stride + n, adds || k > 0);
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
  std::vector<int64_t> place, column;  // of each column of a tile its line, −1 where it is no pixel; and back
  std::vector<int64_t> channel;        // where each channel of a tile begins
  std::vector<int64_t> first;          // of each class: its first line; [count + 1]
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
    for (const std::vector<int64_t>& some : net.grid.classes(count)) {
      first.push_back(int64_t(column.size()));
      column.insert(column.end(), some.begin(), some.end());
    }
    first.push_back(int64_t(column.size()));
    for (int64_t line = 0; line < lines(); ++line) place[column[line]] = line;
    for (int64_t c = 0; c < std::max(rows, columns); ++c) channel.push_back(c * net.grid.plane());
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

  // to[place[q]][c] = from[c][q] · weight[q]; null: 1
  void to_lines(const T* from, int64_t plane, int64_t channels, const T* weight, T* to, int64_t stride) const {
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
        if (place[q + j] >= 0)
          copy(found + j * kSquare, weight ? weight[q + j] : T(1), to + place[q + j] * stride + c, across);
    });
  }

  // to[c][q] += from[place[q]][c] · weight[q]
  void add_lines(const T* from, int64_t stride, int64_t channels, const T* weight, T* to, int64_t plane) const {
    squares(stride, [&](int64_t q, int64_t n, int64_t c, int64_t across) {
      T square[kSquare][kSquare], found[kSquare * kSquare];
      for (int64_t j = 0; j < kSquare; ++j) {
        if (j < n && place[q + j] >= 0)
          copy(from + place[q + j] * stride + c, weight[q + j], square[j], across);
        else
          for (T& x : square[j]) x = T(0);
      }
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
  static void copy(const T* from, T by, T* to, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) store_vector<T>(by * load_vector(from + i), to + i);
  }
};

// Lines of a thread's tile: d₁, and what a product gives.
template <typename T>
struct TraceRoom {
  Scratch<T> d1, product;
  explicit TraceRoom(const Trace<T>& t) : d1(t.lines() * t.wide), product(t.lines() * std::max(t.wide, t.high)) {}
};

// Adds `by` times tr J of each of a tile's samples to to[sample].
template <typename T>
void add_trace(Tile<T>& tile, const Trace<T>& trace, TraceRoom<T>& room, double by, double* to) {
  using Vec = typename Vector<T>::type;
  constexpr int64_t L = Vector<T>::kLanes, kTerms = 128;  // of a lane in T, sums of these then in fp64
  trace.to_lines(tile.slope(0), tile.plane, trace.columns, nullptr, room.d1, trace.wide);
  for (int64_t k = 0; k < trace.count; ++k) {
    const int64_t line = trace.first[k], lines = trace.first[k + 1] - line, each = lines / trace.samples * trace.wide;
    T* found = room.product + line * trace.wide;
    multiply_lines<T>(lines, tile.slope(1), trace.column.data() + line, trace.channel.data(), trace.rows,
                      trace.of_class(k), trace.wide, found, false);
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
  const T *d1 = tile.slope(0), *d2 = tile.slope(1);
  const int64_t* channel = trace.channel.data();
  const auto classes = [&](auto&& f) {
    for (int64_t k = 0; k < trace.count; ++k)
      f(k, trace.first[k], trace.first[k + 1] - trace.first[k], trace.column.data() + trace.first[k]);
  };
  trace.to_lines(d1, tile.plane, trace.columns, weight, room.d1, trace.wide);
  classes([&](int64_t k, int64_t line, int64_t lines, const int64_t* column) {
    multiply_lines<T>(lines, d2, column, channel, trace.rows, trace.of_class(k), trace.wide,
                      room.product + line * trace.wide, false);
    multiply_lines<T>(trace.rows, d2, channel, column, lines, room.d1 + line * trace.wide, trace.wide,
                      by_map + k * trace.rows * trace.wide, true);
  });
  trace.add_lines(room.product, trace.wide, trace.columns, weight, by_d1, tile.plane);
  classes([&](int64_t k, int64_t line, int64_t lines, const int64_t* column) {
    multiply_lines<T>(lines, d1, column, channel, trace.columns, &trace.turned[k * trace.columns * trace.high],
                      trace.high, room.product + line * trace.high, false);
  });
  trace.add_lines(room.product, trace.high, trace.rows, weight, by_d2, tile.plane);
}

}  // namespace block
}  // namespace genkernels
