// The layers of planar and radial flows on a tile of rows: kLanes rows side by side, [number][kLanes].
//
// Parameters stand in tiles as well, [layer][number][P]: P = 1 where all rows of the tile share them, P = kLanes where
// each lane has its own. Sums that go into their gradients are kept in kSumLanes lanes, into which the tile is folded.
#pragma once

#include <algorithm>
#include <vector>

#include "../../common/elementary_flows.h"
#include "../common.h"

namespace genkernels {
namespace flows {
namespace {

constexpr int kSumLanes = 16;

// A loop over the lanes of a tile, which g++ is to vectorise: nothing that it writes is read by another lane.
#define GK_LANES(lane, count) _Pragma("GCC ivdep") for (int lane = 0; lane < (count); ++lane)

// A number's place in a tile of parameters, for a lane.
template <int P>
constexpr int lane_of(int lane) {
  return P == 1 ? 0 : lane;
}

// sum[lane mod kSumLanes] += value(lane)
template <int kLanes, typename T, typename F>
inline void fold(T* sum, F&& value) {
  T folded[kSumLanes];
  GK_LANES(l, kSumLanes) folded[l] = sum[l];
  for (int from = 0; from < kLanes; from += kSumLanes) GK_LANES(l, kSumLanes) folded[l] += value(from + l);
  GK_LANES(l, kSumLanes) sum[l] = folded[l];
}

// sum[lane] += Σ_d value(d, lane), four at a time.
template <int kLanes, typename T, typename F>
inline void sum_over(int64_t features, T* sum, F&& value) {
  int64_t d = 0;
  for (; d + 4 <= features; d += 4)
    GK_LANES(l, kLanes) sum[l] += (value(d, l) + value(d + 1, l)) + (value(d + 2, l) + value(d + 3, l));
  for (; d < features; ++d) GK_LANES(l, kLanes) sum[l] += value(d, l);
}

// What a kind of flow does: `prepare` makes the ready numbers of each layer from its parameters, `forward` takes a tile
// z [D][kLanes] through all layers and adds to ldj [kLanes]; with `kept`, it leaves there what `backward` needs, which
// turns g, the gradient by z_K, into that by z and adds to the sums; `finish` turns sums into gradients by parameters.
template <typename Kind, typename T>
struct Layers;

template <typename T>
struct Layers<Planar, T> {
  int64_t layers, features;

  int64_t given() const { return 2 * features + 1; }  // w, u, b
  int64_t ready() const { return features + 2; }      // û, m = wᵀû, 1 + m
  int64_t kept() const { return features + 2; }       // z before the layer, h, s
  int64_t sums() const { return Planar::sums(features); }

  // The constraints of a layer's lanes, and v [D][P]; in fp64 where one serves all rows.
  template <int P>
  struct Constraints {
    using C = std::conditional_t<P == 1, double, T>;
    C per_v[P], per_largest[P], shift[P], soft[P], shift_slope[P], soft_slope[P];
    std::vector<C> v;

    explicit Constraints(int64_t features) : v(features * P) {}

    void of(const T* w, const T* u, int64_t features) {
      C largest[P] = {}, square[P] = {}, a[P] = {};
      for (int64_t d = 0; d < features; ++d) GK_LANES(l, P) {
          const C size = math::abs(w[d * P + l]);
          largest[l] = size > largest[l] || size != size ? size : largest[l];  // NaN stays
        }
      for (int64_t d = 0; d < features; ++d) GK_LANES(l, P)
      v[d * P + l] = w[d * P + l] / (largest[l] == C(0) ? C(1) : largest[l]);
      sum_over<P>(features, square, [&](int64_t d, int l) { return v[d * P + l] * v[d * P + l]; });
      sum_over<P>(features, a, [&](int64_t d, int l) { return C(w[d * P + l]) * u[d * P + l]; });
      GK_LANES(l, P) {
        const PlanarConstraint<C> of(largest[l], square[l], a[l], C(kLeastSoftplus<T>));
        per_v[l] = of.per_v, per_largest[l] = of.per_largest;
        shift[l] = of.shift, shift_slope[l] = of.shift_slope;
        soft[l] = of.soft, soft_slope[l] = of.soft_slope;
      }
    }
  };

  template <int P>
  __attribute__((noinline)) void prepare(const T* parameters, T* ready_numbers) const {
    Constraints<P> constraints(features);
    for (int64_t k = 0; k < layers; ++k) {
      const T *w = parameters + k * given() * P, *u = w + features * P;
      constraints.of(w, u, features);
      T* to = ready_numbers + k * ready() * P;
      for (int64_t d = 0; d < features; ++d) GK_LANES(l, P)
      to[d * P + l] = u[d * P + l] + constraints.shift[l] * (constraints.per_v[l] * constraints.v[d * P + l]);
      GK_LANES(l, P) {
        to[features * P + l] = constraints.soft[l] - 1;
        to[(features + 1) * P + l] = constraints.soft[l];
      }
    }
  }

  template <int kLanes, int P>
  __attribute__((noinline)) void forward(const T* parameters, const T* ready_numbers, T* z, T* ldj,
                                         T* kept_numbers) const {
    for (int64_t k = 0; k < layers; ++k) {
      const T* w = parameters + k * given() * P;
      const T *b = w + 2 * features * P, *u = ready_numbers + k * ready() * P, *m = u + features * P, *soft = m + P;
      T h[kLanes], s[kLanes];
      GK_LANES(l, kLanes) h[l] = b[lane_of<P>(l)];
      sum_over<kLanes>(features, h, [&](int64_t d, int l) { return w[d * P + lane_of<P>(l)] * z[d * kLanes + l]; });
      GK_LANES(l, kLanes) {
        const PlanarStep<T> step(h[l]);
        h[l] = step.h;
        s[l] = step.s;
      }
      if (kept_numbers) {
        T* kept_here = kept_numbers + k * kept() * kLanes;
        std::copy_n(z, features * kLanes, kept_here);
        std::copy_n(h, kLanes, kept_here + features * kLanes);
        std::copy_n(s, kLanes, kept_here + (features + 1) * kLanes);
      } else {
        GK_LANES(l, kLanes) ldj[l] += PlanarStep<T>(h[l], s[l]).log_det(m[lane_of<P>(l)], soft[lane_of<P>(l)]);
      }
      for (int64_t d = 0; d < features; ++d) GK_LANES(l, kLanes) z[d * kLanes + l] += u[d * P + lane_of<P>(l)] * h[l];
    }
  }

  template <int kLanes, int P>
  __attribute__((noinline)) void backward(const T* parameters, const T* ready_numbers, const T* kept_numbers,
                                          const T* by_ldj, T* g, T* sum) const {
    for (int64_t k = layers - 1; k >= 0; --k) {
      const T* w = parameters + k * given() * P;
      const T *u = ready_numbers + k * ready() * P, *m = u + features * P, *soft = m + P;
      const T* z = kept_numbers + k * kept() * kLanes;
      const T *h = z + features * kLanes, *s = h + kLanes;
      T by_t[kLanes] = {}, by_m[kLanes];
      sum_over<kLanes>(features, by_t, [&](int64_t d, int l) { return u[d * P + lane_of<P>(l)] * g[d * kLanes + l]; });
      GK_LANES(l, kLanes) {
        const PlanarStep<T> step(h[l], s[l]);
        step.backward(m[lane_of<P>(l)], soft[lane_of<P>(l)], by_t[l], by_ldj[l], by_t[l], by_m[l]);
      }
      T *by_w = sum + k * sums() * kSumLanes, *by_u = by_w + features * kSumLanes,
        *others = by_u + features * kSumLanes;
      for (int64_t d = 0; d < features; ++d) {
        const T* z_d = z + d * kLanes;
        T* g_d = g + d * kLanes;
        fold<kLanes>(by_w + d * kSumLanes, [&](int l) { return z_d[l] * by_t[l]; });
        fold<kLanes>(by_u + d * kSumLanes, [&](int l) { return g_d[l] * h[l]; });
        GK_LANES(l, kLanes) g_d[l] += w[d * P + lane_of<P>(l)] * by_t[l];
      }
      fold<kLanes>(others, [&](int l) { return by_m[l]; });
      fold<kLanes>(others + kSumLanes, [&](int l) { return by_t[l]; });
    }
  }

  // Of w/‖w‖² the derivative is that of w, less twice its part along w, over ‖w‖².
  template <int P>
  __attribute__((noinline)) void finish(const T* parameters, const T*, const T* sum, T* gradients) const {
    using C = typename Constraints<P>::C;
    Constraints<P> of(features);
    for (int64_t k = 0; k < layers; ++k) {
      const T *w = parameters + k * given() * P, *u = w + features * P;
      const C* v = of.v.data();
      const T *by_w = sum + k * sums() * P, *by_u = by_w + features * P, *by_m = by_u + features * P;
      T *to_w = gradients + k * given() * P, *to_u = to_w + features * P, *to_b = to_u + features * P;
      of.of(w, u, features);
      C along[P] = {}, by_a[P], size[P];
      sum_over<P>(features, along, [&](int64_t d, int l) { return by_u[d * P + l] * v[d * P + l]; });
      GK_LANES(l, P) {
        along[l] *= of.per_v[l];
        by_a[l] = by_m[l] * of.soft_slope[l] + along[l] * of.shift_slope[l];
        size[l] = of.shift[l] * (of.per_largest[l] * of.per_v[l]);
      }
      for (int64_t d = 0; d < features; ++d) GK_LANES(l, P) {
          const int64_t at = d * P + l;
          to_w[at] = by_w[at] + by_a[l] * u[at] + size[l] * (by_u[at] - 2 * along[l] * v[at]);
          to_u[at] = by_u[at] + by_a[l] * w[at];
        }
      std::copy_n(by_m + P, P, to_b);
    }
  }
};

template <typename T>
struct Layers<Radial, T> {
  int64_t layers, features;

  int64_t given() const { return features + 2; }  // centre, α, β
  int64_t ready() const { return 4; }             // softplus(α), softplus(β), their slopes
  int64_t kept() const { return features + 1; }   // d = z − c, ‖d‖²
  int64_t sums() const { return Radial::sums(features); }

  template <int P>
  __attribute__((noinline)) void prepare(const T* parameters, T* ready_numbers) const {
    for (int64_t k = 0; k < layers; ++k) {
      const T* raw = parameters + (k * given() + features) * P;
      T* to = ready_numbers + k * ready() * P;
      GK_LANES(l, 2 * P) {
        const Softplus<T> of(raw[l]);
        to[l] = of.value, to[2 * P + l] = of.slope;
      }
    }
  }

  template <int kLanes, int P>
  __attribute__((noinline)) void forward(const T* parameters, const T* ready_numbers, T* z, T* ldj,
                                         T* kept_numbers) const {
    const T others = T(features - 1);
    for (int64_t k = 0; k < layers; ++k) {
      const T *c = parameters + k * given() * P, *alpha = ready_numbers + k * ready() * P, *soft = alpha + P;
      T square[kLanes] = {}, x[kLanes];
      sum_over<kLanes>(features, square, [&](int64_t d, int l) {
        const T part = z[d * kLanes + l] - c[d * P + lane_of<P>(l)];
        return part * part;
      });
      GK_LANES(l, kLanes) {
        const RadialStep<T> step(square[l], alpha[lane_of<P>(l)], soft[lane_of<P>(l)]);
        x[l] = step.x;
        if (!kept_numbers) ldj[l] += step.log_det(others);
      }
      T* kept_here = kept_numbers ? kept_numbers + k * kept() * kLanes : nullptr;
      if (kept_here) std::copy_n(square, kLanes, kept_here + features * kLanes);
      for (int64_t d = 0; d < features; ++d) {
        T part[kLanes];
        GK_LANES(l, kLanes) {
          part[l] = z[d * kLanes + l] - c[d * P + lane_of<P>(l)];
          z[d * kLanes + l] += x[l] * part[l];
        }
        if (kept_here) std::copy_n(part, kLanes, kept_here + d * kLanes);
      }
    }
  }

  template <int kLanes, int P>
  __attribute__((noinline)) void backward(const T* parameters, const T* ready_numbers, const T* kept_numbers,
                                          const T* by_ldj, T* g, T* sum) const {
    const T others = T(features - 1);
    for (int64_t k = layers - 1; k >= 0; --k) {
      const T *alpha = ready_numbers + k * ready() * P, *soft = alpha + P;
      const T *part = kept_numbers + k * kept() * kLanes, *square = part + features * kLanes;
      T g_d[kLanes] = {}, x[kLanes], outwards[kLanes], inner[kLanes], outer[kLanes];
      sum_over<kLanes>(features, g_d, [&](int64_t d, int l) { return g[d * kLanes + l] * part[d * kLanes + l]; });
      GK_LANES(l, kLanes) {
        const RadialStep<T> step(square[l], alpha[lane_of<P>(l)], soft[lane_of<P>(l)]);
        step.backward(others, g_d[l], by_ldj[l], inner[l], outer[l], outwards[l]);
        x[l] = step.x;
      }
      T* by_c = sum + k * sums() * kSumLanes;
      for (int64_t d = 0; d < features; ++d) {
        T by_d[kLanes];
        GK_LANES(l, kLanes) {
          by_d[l] = x[l] * g[d * kLanes + l] + outwards[l] * part[d * kLanes + l];
          g[d * kLanes + l] += by_d[l];
        }
        fold<kLanes>(by_c + d * kSumLanes, [&](int l) { return -by_d[l]; });
      }
      fold<kLanes>(by_c + features * kSumLanes, [&](int l) { return inner[l]; });
      fold<kLanes>(by_c + (features + 1) * kSumLanes, [&](int l) { return outer[l]; });
    }
  }

  template <int P>
  __attribute__((noinline)) void finish(const T* parameters, const T* ready_numbers, const T* sum, T* gradients) const {
    for (int64_t k = 0; k < layers; ++k) {
      const T *slopes = ready_numbers + (k * ready() + 2) * P, *from = sum + k * sums() * P;
      T* to = gradients + k * given() * P;
      std::copy_n(from, features * P, to);
      GK_LANES(l, 2 * P) to[features * P + l] = from[features * P + l] * slopes[l];
    }
  }
};

}  // namespace
}  // namespace flows
}  // namespace genkernels
