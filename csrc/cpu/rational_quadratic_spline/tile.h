// Rational-quadratic splines of 16 numbers at a time, the SIMD lanes; csrc/cpu/rational_quadratic_spline.cpp says how.
#pragma once

#include "../../common/rational_quadratic_spline.h"

#include <algorithm>

#include "../rows.h"
#include "../transpose.h"

namespace genkernels {
namespace spline {
namespace {

// A loop over the lanes of a tile, which g++ is to vectorise: nothing that it writes is read by another lane.
#define GK_LANES(lane) _Pragma("GCC ivdep") for (int64_t lane = 0; lane < kColumns; ++lane)

template <typename T>
struct Lanes {
  alignas(64) T values[kColumns];
  T& operator[](int64_t l) { return values[l]; }
  const T& operator[](int64_t l) const { return values[l]; }
};

// The bins of one tile as `find` leaves them. It stands on the stack of one function, into which all that works on it
// is inlined: lanes that the compiler knows to be there may be read whether they are chosen or not, and so by vectors.
template <typename T>
struct Found {
  Lanes<T> per_sum[2], place, left, width, bottom, height, before[2], first, last, by_first, by_last;

  __attribute__((always_inline)) inline Bin<T> bin(const Options<T>& o, int64_t l) const {
    return {left[l],   o.span * (o.least + o.rest * width[l]),
            bottom[l], o.span * (o.least + o.rest * height[l]),
            first[l],  last[l]};
  }
};

// A thread's scratch memory, and what is done with a tile.
template <typename T, Spline Kind>
struct Tile {
  static constexpr bool kCircular = Kind == Spline::kCircular, kClipped = Kind == Spline::kZuko;
  const Options<T> options;
  const int64_t bins, params;
  std::vector<T> flat, raw, soft, by_raw;  // [16][P], [P][16], exponentials and their logits' slopes [2K][16]

  explicit Tile(const Call& c)
      : options(c, Kind),
        bins(c.bins),
        params(c.params),
        flat(params * kColumns),
        raw(params * kColumns),
        soft(2 * bins * kColumns),
        by_raw(kClipped ? 2 * bins * kColumns : 0) {}

  // Of `count` numbers from `from` on; lanes beyond hold zeros.
  template <typename S>
  void take(const S* from, int64_t count) {
    if constexpr (std::is_same_v<S, T>)
      if (count == kColumns) return to_columns(from, params, raw.data());
    load(from, flat.data(), count * params);
    std::fill(flat.begin() + count * params, flat.end(), T(0));
    to_columns(flat.data(), params, raw.data());
  }

  // The same where the numbers lie side by side already: [P][stride].
  void take_columns(const T* from, int64_t stride, int64_t count) {
    for (int64_t j = 0; j < params; ++j) {
      T* to = raw.data() + j * kColumns;
      std::copy_n(from + j * stride, count, to);
      std::fill(to + count, to + kColumns, T(0));
    }
  }

  // The gradients by the parameters, which stand in `raw`.
  template <typename S>
  void give(S* to, int64_t count) {
    if constexpr (std::is_same_v<S, T>)
      if (count == kColumns) return to_rows(raw.data(), params, to);
    to_rows(raw.data(), params, flat.data());
    store(flat.data(), to, count * params);
  }

  __attribute__((noinline)) void exponentials(const T* __restrict from, T* __restrict to, T* __restrict slopes,
                                              T* __restrict total) const {
    const Options<T> o = options;
    const int64_t size = bins * kColumns;
    if constexpr (kClipped) {  // bounded by the logarithm of the floor
#pragma GCC ivdep
      for (int64_t i = 0; i < size; ++i) to[i] = spline::logit<Kind>(o, from[i], slopes[i]);
    } else {
      Lanes<T> peak;
      GK_LANES(l) peak[l] = o.logit_scale * from[l];
      for (int64_t i = kColumns; i < size; i += kColumns) GK_LANES(l) {
          const T u = o.logit_scale * from[i + l];
          peak[l] = u > peak[l] ? u : peak[l];
        }
      for (int64_t i = 0; i < size; i += kColumns) GK_LANES(l) to[i + l] = o.logit_scale * from[i + l] - peak[l];
    }
#pragma GCC ivdep
    for (int64_t i = 0; i < size; ++i) to[i] = math::exp(to[i]);
    Lanes<T> sum, lost;
    GK_LANES(l) sum[l] = lost[l] = T(0);
    for (int64_t i = 0; i < size; i += kColumns) GK_LANES(l) spline::add(to[i + l], sum[l], lost[l]);
    GK_LANES(l) total[l] = sum[l];
  }

  // The bins that `value`, x or y, lies in; `before`: the part of a softmax below it.
  template <bool kByHeight>
  __attribute__((always_inline)) inline void find(const Lanes<T>& value, Found<T>& f) {
    const Options<T> o = options;
    const int64_t size = bins * kColumns;
    T *w = soft.data(), *h = w + size, *slopes = by_raw.data();
    Lanes<T> total[2];
    exponentials(raw.data(), w, slopes, total[0].values);
    exponentials(raw.data() + size, h, slopes + (kClipped ? size : 0), total[1].values);
    GK_LANES(l) f.per_sum[0][l] = T(1) / total[0][l];
    GK_LANES(l) f.per_sum[1][l] = T(1) / total[1][l];
    const T* slope = raw.data() + 2 * size;
    Lanes<T> sum[2], lost[2], raw_first, raw_last;
    // the slopes at the first two knots; those at the ends are 1 where the parametrization says so
    const T* after = bins == 1 ? slope : slope + (kCircular ? kColumns : 0);
    const bool none = !kCircular && bins == 1;
    GK_LANES(l) {
      f.place[l] = f.before[0][l] = f.before[1][l] = lost[0][l] = lost[1][l] = T(0);
      f.width[l] = sum[0][l] = w[l];
      f.height[l] = sum[1][l] = h[l];
      raw_first[l] = T(0);
      raw_last[l] = T(0);
    }
    if (kCircular) GK_LANES(l) raw_first[l] = slope[l];
    if (!none) GK_LANES(l) raw_last[l] = after[l];
    const T* scale = f.per_sum[kByHeight].values;
    for (int64_t k = 1; k < bins; ++k, after += kColumns) {
      const T at = T(k), *next = k + 1 == bins ? slope : after + kColumns;  // at the last knot: circular alone
      Lanes<T> w_k, h_k, d_k, d_next, knot;
      GK_LANES(l) w_k[l] = w[k * kColumns + l];
      GK_LANES(l) h_k[l] = h[k * kColumns + l];
      GK_LANES(l) d_k[l] = after[l];
      GK_LANES(l) d_next[l] = next[l];
      GK_LANES(l) knot[l] = o.span * (at * o.least + o.rest * (sum[kByHeight][l] * scale[l])) - o.bound;
      GK_LANES(l) {
        const bool beyond = knot[l] <= value[l];
        f.place[l] = beyond ? at : f.place[l];
        f.before[0][l] = beyond ? sum[0][l] : f.before[0][l];
        f.before[1][l] = beyond ? sum[1][l] : f.before[1][l];
        f.width[l] = beyond ? w_k[l] : f.width[l];
        f.height[l] = beyond ? h_k[l] : f.height[l];
        raw_first[l] = beyond ? d_k[l] : raw_first[l];
        raw_last[l] = beyond ? d_next[l] : raw_last[l];
      }
      GK_LANES(l) spline::add(w_k[l], sum[0][l], lost[0][l]);
      GK_LANES(l) spline::add(h_k[l], sum[1][l], lost[1][l]);
    }
    const T final = T(bins - 1);
    GK_LANES(l) {
      const T at = f.place[l];
      f.left[l] = spline::knot(o, at, f.before[0][l], total[0][l], f.per_sum[0][l]);
      f.bottom[l] = spline::knot(o, at, f.before[1][l], total[1][l], f.per_sum[1][l]);
      f.before[0][l] *= f.per_sum[0][l];
      f.before[1][l] *= f.per_sum[1][l];
      f.width[l] *= f.per_sum[0][l];
      f.height[l] *= f.per_sum[1][l];
    }
    GK_LANES(l) f.first[l] = spline::knot_slope<Kind>(o, raw_first[l], f.by_first[l]);
    GK_LANES(l) f.last[l] = spline::knot_slope<Kind>(o, raw_last[l], f.by_last[l]);
    if constexpr (!kCircular) GK_LANES(l) {
        const bool low = f.place[l] == T(0), high = f.place[l] == final;
        f.first[l] = low ? T(1) : f.first[l];
        f.last[l] = high ? T(1) : f.last[l];
        f.by_first[l] = low ? T(0) : f.by_first[l];
        f.by_last[l] = high ? T(0) : f.by_last[l];
      }
  }

  // `given` to `out` with its log-determinant.
  template <bool kInverse>
  __attribute__((noinline)) void forward(const Lanes<T>& given, Lanes<T>& out, T* __restrict ell) {
    const Options<T> o = options;
    const Lanes<T> value = given;
    Found<T> f;
    find<kInverse>(value, f);
    Lanes<T> result, log_slope;
    GK_LANES(l) {
      if constexpr (kInverse)
        spline::inverse(f.bin(o, l), o.bound, value[l], result[l], log_slope[l]);
      else
        spline::forward(f.bin(o, l), o.bound, value[l], result[l], log_slope[l]);
    }
    GK_LANES(l) {
      const bool outside = math::abs(value[l]) > o.bound;
      result[l] = outside ? value[l] : result[l];
      log_slope[l] = outside ? T(0) : log_slope[l];
    }
    out = result;
    GK_LANES(l) ell[l] = log_slope[l];
  }

  // Gradients by the input, and by the parameters in `raw`.
  __attribute__((noinline)) void backward(bool inverse, const Lanes<T>& given, const Lanes<T>& by_output,
                                          const Lanes<T>& gamma, Lanes<T>& by_input) {
    const Options<T> o = options;
    const Lanes<T> x = given, g = by_output, by_ldj = gamma;
    Found<T> f;
    find<false>(x, f);
    Lanes<T> start[2], size[2], mean[2], first, last, input;
    if (inverse)
      gradients<true>(f, x, g, by_ldj, start, size, first, last, input);
    else
      gradients<false>(f, x, g, by_ldj, start, size, first, last, input);
    const T factor = o.span * o.rest;
    GK_LANES(l) {
      const bool outside = math::abs(x[l]) > o.bound;
      input[l] = outside ? g[l] : input[l];
      start[0][l] = outside ? T(0) : factor * start[0][l];
      start[1][l] = outside ? T(0) : factor * start[1][l];
      size[0][l] = outside ? T(0) : factor * size[0][l];
      size[1][l] = outside ? T(0) : factor * size[1][l];
      first[l] = outside ? T(0) : first[l] * f.by_first[l];
      last[l] = outside ? T(0) : last[l] * f.by_last[l];
      f.per_sum[0][l] = outside ? T(0) : f.per_sum[0][l];
      f.per_sum[1][l] = outside ? T(0) : f.per_sum[1][l];
      f.before[0][l] = outside ? T(0) : f.before[0][l];
      f.before[1][l] = outside ? T(0) : f.before[1][l];
      f.width[l] = outside ? T(0) : f.width[l];
      f.height[l] = outside ? T(0) : f.height[l];
    }
    by_input = input;
    GK_LANES(l) mean[0][l] = start[0][l] * f.before[0][l] + size[0][l] * f.width[l];
    GK_LANES(l) mean[1][l] = start[1][l] * f.before[1][l] + size[1][l] * f.height[l];
    T* __restrict to = raw.data();
    for (int half = 0; half < 2; ++half) {
      const T* __restrict e = soft.data() + half * bins * kColumns;
      const T* __restrict slopes = by_raw.data() + (kClipped ? half * bins * kColumns : 0);
      const Lanes<T> by_start = start[half], by_size = size[half], by_all = mean[half], per_sum = f.per_sum[half];
      for (int64_t k = 0; k < bins; ++k, e += kColumns, to += kColumns) {
        const T at = T(k);
        Lanes<T> by_share;
        GK_LANES(l) by_share[l] = at == f.place[l] ? by_size[l] : T(0);
        GK_LANES(l) by_share[l] = at < f.place[l] ? by_start[l] : by_share[l];
        GK_LANES(l) to[l] = (e[l] * per_sum[l]) * (by_share[l] - by_all[l]);
        if constexpr (kClipped)
          GK_LANES(l) to[l] *= slopes[k * kColumns + l];
        else
          GK_LANES(l) to[l] *= o.logit_scale;
      }
    }
    // raw number i is the slope at knot i + 1, circular at knot i, and at knot K where i = 0
    for (int64_t i = 0; i < params - 2 * bins; ++i, to += kColumns) {
      const T knot = T(kCircular ? i : i + 1), ends = T(kCircular ? (i == 0 ? bins : i) - 1 : i);
      Lanes<T> by_first, by_last;
      GK_LANES(l) by_first[l] = f.place[l] == knot ? first[l] : T(0);
      GK_LANES(l) by_last[l] = f.place[l] == ends ? last[l] : T(0);
      GK_LANES(l) to[l] = by_first[l] + by_last[l];
    }
  }

  template <bool kInverse>
  __attribute__((always_inline)) inline void gradients(const Found<T>& f, const Lanes<T>& x, const Lanes<T>& g,
                                                       const Lanes<T>& gamma, Lanes<T>* start, Lanes<T>* size,
                                                       Lanes<T>& first, Lanes<T>& last, Lanes<T>& input) const {
    const Options<T> o = options;
    GK_LANES(l) {
      const Gradient<T> of(f.bin(o, l), kInverse, x[l], g[l], gamma[l]);
      start[0][l] = of.left;
      size[0][l] = of.width;
      start[1][l] = of.bottom;
      size[1][l] = of.height;
      first[l] = of.first;
      last[l] = of.last;
      input[l] = of.input;
    }
  }
};

}  // namespace
}  // namespace spline
}  // namespace genkernels
