// A sum in an order that does not depend on who adds it up.
#pragma once

#include <cstdint>

namespace genkernels {
namespace {

// Sum of value(i) in 16 lanes of T (the compiler may not reorder a plain sum), lanes added in fp64.
constexpr int64_t kSumLanes = 16;
template <typename T, typename F>
double sum_lanes(int64_t n, F&& value) {
  T lane[kSumLanes] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes) {
#pragma GCC ivdep
    for (int64_t l = 0; l < kSumLanes; ++l) lane[l] += value(i + l);
  }
  double total = 0;
  for (int64_t l = 0; l < kSumLanes; ++l) total += lane[l];
  for (; i < n; ++i) total += value(i);
  return total;
}

}  // namespace
}  // namespace genkernels
