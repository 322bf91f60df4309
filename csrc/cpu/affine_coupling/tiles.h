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

// Visits the channel segments of a tile in the interleaved layout: f(params offset, position in the tile, length).
template <typename F>
void each_segment(const Geometry& g, const Tile& k, int64_t which, F&& f) {
  for (int64_t r = 0; r < k.rows; ++r)
    for (int64_t i = 0; i < k.width;) {
      const int64_t channel = (k.begin + i) / g.pixels, pixel = (k.begin + i) % g.pixels;
      const int64_t n = std::min(g.pixels - pixel, k.width - i);
      f((k.sample + r) * g.param_sample + (2 * channel + which) * g.pixels + pixel, r * k.width + i, n);
      i += n;
    }
}

// which: 0 the log-scale, 1 the shift.
template <typename P, typename T>
const T* stage_params(const P* params, const Geometry& g, const Tile& k, int64_t which, T* buffer) {
  if (!g.interleaved) return stage(params, g.param_sample, g.additive || which == 0 ? 0 : g.moved, k, buffer);
  each_segment(g, k, which, [&](int64_t at, int64_t i, int64_t n) { load(params + at, buffer + i, n); });
  return buffer;
}

template <typename P, typename T>
void unstage_params(const T* buffer, P* params, const Geometry& g, const Tile& k, int64_t which) {
  if (!g.interleaved) return unstage(buffer, params, g.param_sample, g.additive || which == 0 ? 0 : g.moved, k);
  each_segment(g, k, which, [&](int64_t at, int64_t i, int64_t n) { store(buffer + i, params + at, n); });
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

// The half that passes through, byte for byte; for the checkerboard it is part of the tile and handled by `blend`. A
// sample of several tiles copies a whole chunk at its first one: long runs keep fewer streams open at once than a piece
// a tile.
template <typename X>
void copy_passed(const X* from, X* to, const Geometry& g, const Tile& k) {
  if (!g.mask.empty() || k.begin % kChunk != 0) return;
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
