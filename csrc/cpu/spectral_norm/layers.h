// What both kinds of layers share: memory, the sharing out of work among threads, lengths of vectors, factors.
#pragma once

#include "../common.h"
#include "../vector.h"

#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <new>

namespace genkernels {
namespace spectral {

template <typename T>
constexpr int64_t kLanes = Vector<T>::kLanes;

inline int64_t divide_up(int64_t n, int64_t by) {
  return (n + by - 1) / by;
}
inline int64_t round_up(int64_t n, int64_t unit) {
  return divide_up(n, unit) * unit;
}

// ---- memory -----------------------------------------------------------------------------------------------------

// Memory of one thread, kept from call to call, because fresh pages cost more than they hold. It grows and is not
// freed. Slot 0 is an Arena's.
template <typename T>
T* scratch(int slot, int64_t count) {
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  struct Slot {
    std::unique_ptr<char, Free> memory;
    size_t bytes = 0;
  };
  thread_local Slot slots[3];
  Slot& s = slots[slot];
  const size_t wanted = std::max<int64_t>(count, 1) * sizeof(T);
  if (s.bytes < wanted) {
    s.memory.reset();
    s.bytes = 0;
    s.memory.reset(static_cast<char*>(::operator new(wanted, std::align_val_t(64))));
    s.bytes = wanted;
  }
  return reinterpret_cast<T*>(s.memory.get());
}

// Many arrays in one piece of memory: asked for with `need`, there after `make`, until the next Arena of this thread.
// Each begins a line of the cache and ends kSlack before the next, which whole vectors may read and write.
template <typename T>
class Arena {
 public:
  static constexpr int64_t kSlack = 64;

  void need(T*& where, int64_t count) {
    wanted_.push_back({&where, size_});
    size_ += round_up(count + kSlack, 64 / sizeof(T));
  }
  void make() {
    T* memory = scratch<T>(0, size_);
    for (const auto& [where, at] : wanted_) *where = memory + at;
  }

 private:
  struct Wanted {
    T** where;
    int64_t at;
  };
  std::vector<Wanted> wanted_;
  int64_t size_ = 0;
};

// n numbers of storage type S as T: themselves where the types agree, else `buffer`, filled.
template <typename S, typename T>
const T* as_arithmetic(const S* from, T* buffer, int64_t n) {
  if constexpr (std::is_same_v<S, T>) {
    return from;
  } else {
    load(from, buffer, n);
    return buffer;
  }
}

// ---- threads ----------------------------------------------------------------------------------------------------

constexpr int64_t kGrain = 32 * 1024;  // multiplications below which a second thread does not pay

// A part of a layer's work.
struct Piece {
  int64_t layer, index;
};

// Calls f(item) for every item, threads taking neighbouring ones of about the same cost in all; the same costs give the
// same shares, so that a thread finds in its cache what it left there. `backwards`: each takes its last item first.
template <typename Item, typename Cost, typename F>
void share_out(const std::vector<Item>& items, Cost cost, bool backwards, F f) {
  if (items.empty()) return;
  std::vector<int64_t> before(items.size() + 1, 0);
  for (size_t i = 0; i < items.size(); ++i) before[i + 1] = before[i] + cost(items[i]);
  const int64_t total = before.back();
  const int64_t shares =
      std::clamp<int64_t>(total / kGrain, 1, std::min<int64_t>(torch::stable::get_num_threads(), items.size()));
  const auto first_of = [&](int64_t share) -> size_t {  // an item is the share's that its middle lies in
    if (share == shares) return items.size();
    const double from = double(total) * double(share) / double(shares);
    size_t i = 0;
    while (i < items.size() && 0.5 * (double(before[i]) + double(before[i + 1])) < from) ++i;
    return i;
  };
  const auto run = [&](int64_t begin, int64_t end) {
    const size_t first = first_of(begin), last = first_of(end);
    for (size_t i = first; i < last; ++i) f(items[backwards ? last - 1 - (i - first) : i]);
  };
  if (shares == 1) return run(0, 1);
  torch::stable::parallel_for(0, shares, 1, run);
}

// Cuts layers, in their order, into groups of at most `most` in all, or of one layer.
template <typename Size, typename F>
void in_groups(int64_t layers, int64_t most, Size size, F f) {
  for (int64_t begin = 0; begin < layers;) {
    int64_t end = begin + 1, total = size(begin);
    while (end < layers && total + size(end) <= most) total += size(end++);
    f(begin, end);
    begin = end;
  }
}

// ---- lengths ----------------------------------------------------------------------------------------------------

// A sum of squares, sum · 4^exponent: those of fp64 may lie beyond its range.
struct Squares {
  double sum = 0;
  int exponent = 0;
};

template <typename T>
double sum_of_squares(const T* x, int64_t n, double scale) {
  constexpr int64_t kWide = 16;
  double lane[kWide] = {};
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide)
    for (int64_t j = 0; j < kWide; ++j) {
      const double y = sizeof(T) == 8 ? double(x[i + j]) * scale : double(x[i + j]);
      lane[j] += y * y;
    }
  for (; i < n; ++i) lane[0] += (double(x[i]) * scale) * (double(x[i]) * scale);
  for (int64_t width = kWide / 2; width; width /= 2)
    for (int64_t j = 0; j < width; ++j) lane[j] += lane[j + width];
  return lane[0];
}

// ⟨a, b⟩
template <typename T>
double inner(const T* a, const T* b, int64_t n) {
  constexpr int64_t kWide = 16;
  double lane[kWide] = {};
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide)
    for (int64_t j = 0; j < kWide; ++j) lane[j] += double(a[i + j]) * double(b[i + j]);
  for (; i < n; ++i) lane[0] += double(a[i]) * double(b[i]);
  for (int64_t width = kWide / 2; width; width /= 2)
    for (int64_t j = 0; j < width; ++j) lane[j] += lane[j + width];
  return lane[0];
}

template <typename T>
Squares squares(const T* x, int64_t n) {
  if constexpr (sizeof(T) == 4) return {sum_of_squares(x, n, 1.0), 0};
  double largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
  const int exponent = largest > 0 && std::isfinite(largest) ? std::clamp(std::ilogb(largest), -1000, 1000) : 0;
  return {sum_of_squares(x, n, std::ldexp(1.0, -exponent)), exponent};
}

// The length that parts add up to.
inline double length(const Squares* parts, int64_t count) {
  int exponent = std::numeric_limits<int>::min();
  for (int64_t i = 0; i < count; ++i)
    if (parts[i].sum != 0) exponent = std::max(exponent, parts[i].exponent);
  double sum = 0;
  for (int64_t i = 0; i < count; ++i)
    if (parts[i].sum != 0) sum += std::ldexp(parts[i].sum, 2 * (parts[i].exponent - exponent));
  return sum == 0 ? 0.0 : std::ldexp(std::sqrt(sum), exponent);
}

// Whether a vector of this length has a direction: it is neither 0 nor beyond the range of T, nor NaN.
template <typename T>
bool has_direction(double length) {
  return T(length) > 0 && T(length) <= std::numeric_limits<T>::max();
}

// to = x / length.
template <typename T>
void divide(const T* x, double length, T* to, int64_t n) {
  const T by = T(1.0 / length);
  if (by >= std::numeric_limits<T>::min() && by <= std::numeric_limits<T>::max())
    for (int64_t i = 0; i < n; ++i) to[i] = x[i] * by;
  else
    for (int64_t i = 0; i < n; ++i) to[i] = T(double(x[i]) / length);
}

// n numbers, of which neither side overlaps the other, by whole vectors where there is one.
template <typename T>
void copy(const T* from, T* to, int64_t n) {
  constexpr int64_t L = kLanes<T>;
  if (n < L) {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
    return;
  }
  int64_t i = 0;
  for (; i + L <= n; i += L) store_vector<T>(load_vector(from + i), to + i);
  if (i < n) store_vector<T>(load_vector(from + n - L), to + n - L);
}

// ---- factors ----------------------------------------------------------------------------------------------------

// c of the operator, and f of a norm.
struct Rule {
  double coefficient;
  bool at_most;

  template <typename T>
  bool divides(T sigma) const {
    return !(at_most ? sigma <= T(coefficient) : sigma == 0);  // by NaN, too
  }
  template <typename T>
  T factor(T sigma) const {
    return divides(sigma) ? T(coefficient) / sigma : T(1);
  }
};

// to = factor · from; a factor of 1 copies.
template <typename S>
void multiply(const S* from, arithmetic_t<S> factor, S* to, int64_t n) {
  using T = arithmetic_t<S>;
  if (factor == T(1)) {
    std::memcpy(static_cast<void*>(to), from, n * sizeof(S));
  } else if constexpr (std::is_same_v<S, T>) {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i] * factor;
  } else {
    T buffer[512];
    for (int64_t i = 0; i < n; i += 512) {
      const int64_t count = std::min<int64_t>(512, n - i);
      load(from + i, buffer, count);
      for (int64_t j = 0; j < count; ++j) buffer[j] *= factor;
      store(buffer, to + i, count);
    }
  }
}

}  // namespace spectral
}  // namespace genkernels
