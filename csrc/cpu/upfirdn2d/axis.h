// One axis of upfirdn2d: which numbers each result takes, and by which weight.
//
// Result o takes tap j from place p = o·d + j − p₀ of the spread axis, which holds number p / u where u divides p and a
// zero elsewhere. With g = gcd(u, d), results P = u / g apart take the same taps, from numbers M = d / g apart: in a
// row that is cut into M streams (numbers s, s + M, s + 2M, …) the results of one of P phases take contiguous
// stretches.
#pragma once

#include <cstdint>
#include <numeric>
#include <vector>

namespace genkernels {
namespace {

inline int64_t floor_div(int64_t a, int64_t b) {
  return a / b - (a % b != 0 && (a < 0) != (b < 0));
}

template <typename T>
struct Tap {
  int64_t from;  // the number that result `phase` takes
  T weight;
};

template <typename T>
struct Axis {
  int64_t length, results;                // numbers and results
  int64_t phases, streams;                // P and M
  std::vector<std::vector<Tap<T>>> taps;  // of each phase

  Axis(int64_t length, const T* filter, int64_t count, int64_t up, int64_t down, int64_t before, int64_t after,
       bool flip, T gain)
      : length(length), results(floor_div(length * up + before + after - count, down) + 1) {
    const int64_t common = std::gcd(up, down);
    phases = up / common;
    streams = down / common;
    taps.resize(phases);
    for (int64_t phase = 0; phase < phases; ++phase) {
      for (int64_t j = 0; j < count; ++j) {
        const int64_t place = phase * down + j - before;
        if (place - floor_div(place, up) * up == 0)
          taps[phase].push_back({floor_div(place, up), gain * filter[flip ? j : count - 1 - j]});
      }
    }
  }

  // The stretch of its stream that a tap takes begins here.
  int64_t place_of(const Tap<T>& tap) const { return floor_div(tap.from, streams); }

  const std::vector<Tap<T>>& taps_of(int64_t result) const { return taps[result % phases]; }
  // How far the numbers of a result lie beyond those of its phase's first one.
  int64_t shift_of(int64_t result) const { return result / phases * streams; }
};

}  // namespace
}  // namespace genkernels
