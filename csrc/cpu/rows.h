// Rows of numbers in parts and tiles: how operators that take [N, L] element by element are shared out among threads.
//
// A row is cut into parts of at most kPart numbers: many parts a row of an image, one of a point. Parts go among
// threads, and within a part tiles of at most kTile, for which there is room in the first cache. Nothing here depends
// on the number of threads.
#pragma once

#include <algorithm>

#include "common.h"

namespace genkernels {
namespace {

constexpr int64_t kPart = 16 * 1024, kTile = 512;

// Room for a tile. The empty instruction says that it is written, which the compiler does not see of loops whose length
// it does not know, and would warn of.
template <typename T>
struct Room {
  alignas(64) T values[kTile];
  Room() { asm("" : "=m"(values)); }
  operator T*() { return values; }
};

// n values in the arithmetic type: where they lie, if they are of it, else in `room`.
template <typename S>
inline const arithmetic_t<S>* widened(const S* from, arithmetic_t<S>* room, int64_t n) {
  if constexpr (std::is_same_v<S, arithmetic_t<S>>) {
    return from;
  } else {
    load(from, room, n);
    return room;
  }
}

// Calls f with a place for n values in the arithmetic type, which it fills: that of `to`, if it is of it, else `room`.
template <typename S, typename F>
inline void narrowed(S* to, arithmetic_t<S>* room, int64_t n, F&& f) {
  if constexpr (std::is_same_v<S, arithmetic_t<S>>) {
    f(to);
  } else {
    f(room);
    store(room, to, n);
  }
}

// A row's; one, of none, of an empty row.
inline int64_t parts_of(const Rows& rows) {
  return std::max<int64_t>(1, (rows.length + kPart - 1) / kPart);
}

// Calls f(row, part, offset of its first number, how many) for every part of every row.
template <typename F>
void for_each_part(const Rows& rows, F&& f) {
  const int64_t parts = parts_of(rows), grain = std::max<int64_t>(1, kPart / std::max<int64_t>(1, rows.length));
  torch::stable::parallel_for(0, rows.count * parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / parts, part = task % parts, at = part * kPart;
      f(row, part, row * rows.length + at, std::min(kPart, rows.length - at));
    }
  });
}

// Calls f(offset, how many) for the tiles of a part.
template <typename F>
void for_each_tile(int64_t offset, int64_t count, F&& f) {
  for (int64_t at = 0; at < count; at += kTile) f(offset + at, std::min(kTile, count - at));
}

}  // namespace
}  // namespace genkernels
