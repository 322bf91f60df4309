// Where the elements of an affine coupling lie, tile by tile: plain arrays of them, read from the tensors and written
// back.
#pragma once

#include "../../common/affine_coupling.h"
#include "../common.h"

namespace genkernels {
namespace {

constexpr int64_t kTile = 1024;
constexpr int64_t kChunk = 16 * 1024;
constexpr int64_t kGrain = 32 * 1024;  // elements below which a second thread does not pay

// A call's sizes, and what the loops over tiles read again and again.
struct Geometry : coupling::Call {
  bool additive, interleaved;  // interleaved: log-scales and shifts lie in rows shorter than all of a sample's
  std::vector<uint8_t> mask;   // [moved], 1 where the checkerboard transforms; empty for the channel split
};

inline Geometry geometry_of(const coupling::Call& c) {
  Geometry g{c, c.map == ScaleMap::kAdditive, c.row != c.moved, {}};
  if (!c.checkerboard) return g;
  g.mask.resize(c.sample);
  const int64_t lines = c.sample / c.width;  // of all channels
  for (int64_t line = 0, i = 0; line < lines; ++line)
    for (int64_t w = 0; w < c.width; ++w) g.mask[i++] = uint8_t(((line % c.height + w) & 1) == (c.flip ? 0 : 1));
  return g;
}

// A tile: elements [begin, begin + width) of the transformed parts of `rows` samples from `sample` on. rows > 1 only
// for whole samples.
struct Tile {
  int64_t sample, rows, begin, width;
  int64_t count() const { return rows * width; }
};

template <typename S, typename T>
constexpr bool same = std::is_same_v<S, T>;

// Plain arrays of a tile. `pointer` is the tensor itself where it can be read as it lies, else `buffer`, filled.
template <typename S, typename T>
const T* stage(const S* base, int64_t stride, int64_t offset, const Tile& k, T* buffer) {
  const S* first = base + k.sample * stride + offset + k.begin;
  if constexpr (same<S, T>)
    if (k.rows == 1) return first;
  for (int64_t r = 0; r < k.rows; ++r) load(first + r * stride, buffer + r * k.width, k.width);
  return buffer;
}

template <typename S, typename T>
void unstage(const T* buffer, S* base, int64_t stride, int64_t offset, const Tile& k) {
  S* first = base + k.sample * stride + offset + k.begin;
  if constexpr (same<S, T>)
    if (buffer == first) return;
  for (int64_t r = 0; r < k.rows; ++r) store(buffer + r * k.width, first + r * stride, k.width);
}

// Where the arithmetic should write: into the tensor itself, or into `buffer`, which unstage then carries over.
template <typename S, typename T>
T* target(S* base, int64_t stride, int64_t offset, const Tile& k, T* buffer, bool plain) {
  if constexpr (same<S, T>)
    if (plain && k.rows == 1) return base + k.sample * stride + offset + k.begin;
  return buffer;
}

// Which of two rows of params the log-scales (which = 0) and the shifts (1) are; additive: there is one.
inline int64_t param_row(const Geometry& g, int64_t which) {
  return g.additive ? 0 : which ^ int64_t(g.shift_first);
}

inline int64_t param_at(const Geometry& g, int64_t which) {
  return param_row(g, which) * g.moved;
}

// Visits the channels of a tile, one row of two in tensors whose samples are 2·C rows of `pixels`: f(offset, position
// in the tile, length). row: 0 the first of each pair, 1 the second.
template <typename F>
void each_segment(const Geometry& g, const Tile& k, int64_t sample, int64_t row, F&& f) {
  for (int64_t r = 0; r < k.rows; ++r)
    for (int64_t i = 0; i < k.width;) {
      const int64_t channel = (k.begin + i) / g.pixels, pixel = (k.begin + i) % g.pixels;
      const int64_t n = std::min(g.pixels - pixel, k.width - i);
      f((k.sample + r) * sample + (2 * channel + row) * g.pixels + pixel, r * k.width + i, n);
      i += n;
    }
}

// The same rows, read into a plain array and written from one. Rows of one pixel are every second number, across the
// samples of a tile too: a sample is its rows and nothing else.
template <typename S, typename T>
void load_rows(const S* base, const Geometry& g, const Tile& k, int64_t sample, int64_t row, T* buffer) {
  if constexpr (same<S, T>)
    if (g.pixels == 1) {
      const S* from = base + k.sample * sample + 2 * k.begin + row;
      for (int64_t i = 0; i < k.count(); ++i) buffer[i] = from[2 * i];
      return;
    }
  each_segment(g, k, sample, row, [&](int64_t at, int64_t i, int64_t n) { load(base + at, buffer + i, n); });
}

template <typename S, typename T>
void store_rows(const T* buffer, S* base, const Geometry& g, const Tile& k, int64_t sample, int64_t row) {
  if constexpr (same<S, T>)
    if (g.pixels == 1) {
      S* to = base + k.sample * sample + 2 * k.begin + row;
      for (int64_t i = 0; i < k.count(); ++i) to[2 * i] = buffer[i];
      return;
    }
  each_segment(g, k, sample, row, [&](int64_t at, int64_t i, int64_t n) { store(buffer + i, base + at, n); });
}

// The transformed part of a tensor like x.
template <typename S, typename T>
const T* stage_moved(const S* x, const Geometry& g, const Tile& k, T* buffer) {
  if (!g.turns) return stage(x, g.sample, g.moved_at, k, buffer);
  load_rows(x, g, k, g.sample, g.flip ? 0 : 1, buffer);
  return buffer;
}

template <typename S, typename T>
void unstage_moved(const T* buffer, S* x, const Geometry& g, const Tile& k) {
  if (!g.turns) return unstage(buffer, x, g.sample, g.moved_at, k);
  store_rows(buffer, x, g, k, g.sample, g.flip ? 0 : 1);
}

// which: 0 the log-scale, 1 the shift.
template <typename P, typename T>
const T* stage_params(const P* params, const Geometry& g, const Tile& k, int64_t which, T* buffer) {
  if (!g.interleaved) return stage(params, g.param_sample, param_at(g, which), k, buffer);
  load_rows(params, g, k, g.param_sample, param_row(g, which), buffer);
  return buffer;
}

template <typename P, typename T>
void unstage_params(const T* buffer, P* params, const Geometry& g, const Tile& k, int64_t which) {
  if (!g.interleaved) return unstage(buffer, params, g.param_sample, param_at(g, which), k);
  store_rows(buffer, params, g, k, g.param_sample, param_row(g, which));
}

// Runs f(tile, chunk index) over everything, in parallel. Chunks never depend on the number of threads.
template <typename F>
void for_each_tile(const Geometry& g, int64_t chunks, F&& f) {
  if (g.samples == 0 || g.moved == 0) return;
  if (g.moved >= kTile) {
    torch::stable::parallel_for(0, g.samples * chunks, std::max<int64_t>(1, kGrain / std::min(g.moved, kChunk)),
                                [&](int64_t from, int64_t to) {
                                  for (int64_t task = from; task < to; ++task) {
                                    const int64_t sample = task / chunks, chunk = task % chunks;
                                    const int64_t end = std::min((chunk + 1) * kChunk, g.moved);
                                    for (int64_t i = chunk * kChunk; i < end; i += kTile)
                                      f(Tile{sample, 1, i, std::min(kTile, end - i)}, chunk);
                                  }
                                });
  } else {
    const int64_t rows = kTile / g.moved;
    torch::stable::parallel_for(0, (g.samples + rows - 1) / rows, kGrain / kTile, [&](int64_t from, int64_t to) {
      for (int64_t group = from; group < to; ++group)
        f(Tile{group * rows, std::min(rows, g.samples - group * rows), 0, g.moved}, 0);
    });
  }
}

inline int64_t chunks_of(const Geometry& g) {
  return g.moved >= kTile ? (g.moved + kChunk - 1) / kChunk : 1;
}

// The half that passes through, byte for byte; for the checkerboard it is part of the tile and handled by `blend`, and
// without a split there is none. A
// sample of several tiles copies a whole chunk at its first one: long runs keep fewer streams open at once than a piece
// a tile.
template <typename X>
void copy_passed(const X* from, X* to, const Geometry& g, const Tile& k) {
  if (!g.copies) return;
  if (g.turns && g.pixels == 1) {
    const int64_t first = k.sample * g.sample + 2 * k.begin + (g.flip ? 1 : 0);
    for (int64_t i = 0; i < k.count(); ++i) to[first + 2 * i] = from ? from[first + 2 * i] : X(0);
    return;
  }
  if (g.turns) {
    each_segment(g, k, g.sample, g.flip ? 1 : 0, [&](int64_t at, int64_t, int64_t n) {
      if (from)
        std::copy_n(from + at, n, to + at);
      else
        std::fill_n(to + at, n, X(0));
    });
    return;
  }
  if (k.begin % kChunk != 0) return;
  const int64_t width = std::min(kChunk, g.moved - k.begin);
  for (int64_t r = 0; r < k.rows; ++r) {
    const int64_t at = (k.sample + r) * g.sample + g.passed_at + k.begin;
    if (from)
      std::memcpy(to + at, from + at, width * sizeof(X));
    else
      std::memset(to + at, 0, width * sizeof(X));
  }
}

// where(mask, moved, kept); kept == nullptr stands for zero. The mask decides, no product does, so NaN stays where it
// was.
template <typename T>
void blend(T* moved, const T* kept, const Geometry& g, const Tile& k) {
  if (g.mask.empty()) return;
  for (int64_t r = 0; r < k.rows; ++r) {
    const uint8_t* mask = g.mask.data() + k.begin;
    T* m = moved + r * k.width;
    if (kept) {
      const T* other = kept + r * k.width;
      for (int64_t i = 0; i < k.width; ++i) m[i] = mask[i] ? m[i] : other[i];
    } else {
      for (int64_t i = 0; i < k.width; ++i) m[i] = mask[i] ? m[i] : T(0);
    }
  }
}

}  // namespace
}  // namespace genkernels
