// The activations of a residual block on rows of numbers: value and slope, and what a gradient needs of curvature and
// of the parameter, all from one exponential.
#pragma once

#include "../../common/math.h"
#include "../../common/options.h"
#include "../common.h"
#include "../vector.h"

namespace genkernels {
namespace block {

// With z an activation's argument and a its parameter: φ, φ', φ'', ∂φ/∂a and ∂φ'/∂a.
template <typename T>
struct Point {
  T value, slope, curvature, value_by, slope_by;
};

template <Nonlinearity A>
constexpr double kDivisor = A == Nonlinearity::kLipswish    ? 1.1
                            : A == Nonlinearity::kClipswish ? 1.1 * 1.004
                                                            : 1.0;

template <Nonlinearity A, typename T>
__attribute__((always_inline)) inline Point<T> point(T z, T a) {
  using math::select;
  const bool above = z > T(0);
  const T below = select(above, T(0), z);
  if constexpr (A == Nonlinearity::kRelu) {
    return {z - below, select(above, T(1), T(0)), T(0), T(0), T(0)};
  } else if constexpr (A == Nonlinearity::kLeakyRelu) {
    return {select(above, z, a * z), select(above, T(1), a), T(0), below, select(above, T(0), T(1))};
  } else if constexpr (A == Nonlinearity::kElu) {
    const T e = math::exp(below);
    // expm1 near 0, where exp(z) − 1 would lose digits: its series up to |z| = 1/4
    const T near =
        below *
        (T(1) +
         below * (T(1) / 2 +
                  below * (T(1) / 6 +
                           below * (T(1) / 24 +
                                    below * (T(1) / 120 +
                                             below * (T(1) / 720 +
                                                      below * (T(1) / 5040 +
                                                               below * (T(1) / 40320 + below * (T(1) / 362880)))))))));
    const T m = select(below > T(-0.25), near, e - T(1));
    return {select(above, z, a * m), select(above, T(1), a * e), select(above, T(0), a * e), select(above, T(0), m),
            select(above, T(0), e)};
  } else if constexpr (A == Nonlinearity::kTanh) {
    T t, s;
    math::tanh_sech2(z, t, s);
    return {t, s, T(-2) * t * s, T(0), T(0)};
  } else {
    constexpr T kOver = T(1 / kDivisor<A>);
    const T steep = A == Nonlinearity::kSilu ? T(1) : a;
    const T x = steep * z;
    const T e = math::exp(-math::abs(x));
    const T inverse = T(1) / (T(1) + e);
    const T larger = inverse, smaller = e * inverse;
    const bool right = x > T(0);
    const T up = select(right, larger, smaller), down = select(right, smaller, larger);
    const T both = larger * smaller;
    const T bend = both * (T(2) + x * (down - up)) * kOver;  // 0 far out, where `both` is
    const T slope = (up + x * both) * kOver;
    if constexpr (A == Nonlinearity::kSilu) {
      return {z * up * kOver, slope, bend, T(0), T(0)};
    } else {
      return {z * up * kOver, slope, steep * bend, z * both * z * kOver, z * bend};
    }
  }
}

// f.operator()<A>() for the activation.
template <typename F>
inline void with_activation(Nonlinearity a, F&& f) {
  switch (a) {
    case Nonlinearity::kRelu: return f.template operator()<Nonlinearity::kRelu>();
    case Nonlinearity::kLeakyRelu: return f.template operator()<Nonlinearity::kLeakyRelu>();
    case Nonlinearity::kElu: return f.template operator()<Nonlinearity::kElu>();
    case Nonlinearity::kSilu: return f.template operator()<Nonlinearity::kSilu>();
    case Nonlinearity::kTanh: return f.template operator()<Nonlinearity::kTanh>();
    case Nonlinearity::kLipswish: return f.template operator()<Nonlinearity::kLipswish>();
    case Nonlinearity::kClipswish: return f.template operator()<Nonlinearity::kClipswish>();
  }
  fail("genkernels: there is no such activation");
}

// Loops over a row stand in functions of their own: inlined among others g++ does not vectorise all of them.
template <Nonlinearity A, bool Keep, bool Slope, typename T>
__attribute__((noinline)) void activate_row(const T* z, T sign, T a, const T* keep, T* value, T* slope, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const Point<T> p = point<A>(sign * z[i], a);
    const T signed_slope = sign * p.slope;
    value[i] = Keep ? math::select(keep[i] != T(0), p.value, T(0)) : p.value;
    if constexpr (Slope) slope[i] = Keep ? math::select(keep[i] != T(0), signed_slope, T(0)) : signed_slope;
  }
}

// value[i] and slope[i] at sign·z[i], the slope by z; slope null: the value alone. keep: 1 where a column counts, else
// 0 is written; null: all do.
template <typename T>
void activate(Nonlinearity which, const T* z, T sign, T a, const T* keep, T* value, T* slope, int64_t n) {
  with_activation(which, [&]<Nonlinearity A>() {
    const auto run = [&]<bool Keep>() {
      slope ? activate_row<A, Keep, true>(z, sign, a, keep, value, slope, n)
            : activate_row<A, Keep, false>(z, sign, a, keep, value, slope, n);
    };
    keep ? run.template operator()<true>() : run.template operator()<false>();
  });
}

// Σ row[i], in lanes of their own first.
template <typename T>
inline double sum_of(const T* row, int64_t n) {
  using Vec = typename Vector<T>::type;
  constexpr int64_t L = Vector<T>::kLanes;
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L)
    for (int64_t j = 0; j < 4; ++j) sums[j] += load_vector(row + i + j * L);
  for (; i + L <= n; i += L) sums[0] += load_vector(row + i);
  T lanes[L];
  store_vector<T>((sums[0] + sums[1]) + (sums[2] + sums[3]), lanes);
  double total = 0;
  for (T lane : lanes) total += double(lane);
  for (; i < n; ++i) total += double(row[i]);
  return total;
}

// to[i] = slope·by_value[i] + φ''·by_slope[i], added to what is there if `adds`; returns what the parameter gets.
// by_slope null: there is none. room: a row. What nothing is asked of stays 0, though a curvature there be infinite.
template <typename T>
double bend(Nonlinearity which, const T* z, T sign, T a, const T* keep, const T* slope, const T* by_value,
            const T* by_slope, bool adds, T* to, T* room, int64_t n) {
  const auto run = [&]<Nonlinearity A, bool Slope, bool Keep, bool Adds>() {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      const Point<T> p = point<A>(sign * z[i], a);
      const T g = by_value[i];
      const T by_g = p.value_by * g;
      T delta = slope[i] * g, parameter = math::select(g == T(0), T(0), by_g);
      if constexpr (Slope) {
        const T h = by_slope[i];
        const T bent = p.curvature * h, by_h = sign * p.slope_by * h;
        delta += math::select(h == T(0), T(0), bent);
        parameter += math::select(h == T(0), T(0), by_h);
      }
      if constexpr (Keep) {
        const bool counts = keep[i] != T(0);
        delta = math::select(counts, delta, T(0));
        parameter = math::select(counts, parameter, T(0));
      }
      room[i] = parameter;
      to[i] = Adds ? to[i] + delta : delta;
    }
  };
  with_activation(which, [&]<Nonlinearity A>() {
    const auto then = [&]<bool Slope, bool Keep>() {
      constexpr bool kMayAdd = A == Nonlinearity::kClipswish;
      if (kMayAdd && adds)
        run.template operator()<A, Slope, Keep, kMayAdd>();
      else
        run.template operator()<A, Slope, Keep, false>();
    };
    if (by_slope)
      keep ? then.template operator()<true, true>() : then.template operator()<true, false>();
    else
      keep ? then.template operator()<false, true>() : then.template operator()<false, false>();
  });
  return sum_of(room, n);
}

}  // namespace block
}  // namespace genkernels
