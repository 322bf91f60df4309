// What the solves of `made` do with one feature of one sample, by one thread: an affine map, or a spline.
//
// p points to the feature's P parameters. `invert`: x of z, and log dx/dz; it may write over p. `backward`: from the
// gradients by x and by log dx/dz, at x, that by z, and over p those by p with the sign turned; `unseen`: there is no
// gradient by x, which may be infinite.
#pragma once

#include "../common/made.h"
#include "rational_quadratic_spline.cuh"

namespace genkernels {
namespace made {

template <typename T>
struct Affine {
  ScaleMap map;
  T constant;  // c of the scale map

  explicit Affine(const AffineMaps& maps) : map(maps.map), constant(T(maps.constant)) {}

  __device__ __forceinline__ void scale_of(T s, T& log_scale, T& shrink, T& slope) const {
    with_scale_map(map, [&]<ScaleMap M>() {
      T scale;
      scale_map<M>(s, constant, log_scale, scale, slope);
      shrink = shrink_of<M>(log_scale, scale);
    });
  }

  __device__ __forceinline__ void invert(T* p, T z, T& x, T& ell) const {
    T log_scale, shrink, slope;
    scale_of(p[0], log_scale, shrink, slope);
    x = (z - p[1]) * shrink;
    ell = -log_scale;
  }

  __device__ __forceinline__ T backward(T* p, T x, T by_x, T by_log, bool unseen) const {
    T log_scale, shrink, slope;
    scale_of(p[0], log_scale, shrink, slope);
    const T found = unseen ? T(0) : by_x * shrink;
    p[0] = ((unseen ? T(0) : by_x * x) + by_log) * slope;
    p[1] = found;
    return found;
  }
};

template <typename T, Spline Kind>
struct Splines {
  spline::Options<T> options;
  int bins, params;

  explicit Splines(const SplineMaps& maps)
      : options({0, 0, maps.bins, maps.params, maps.bound, maps.logit_scale, maps.floor, true}, Kind),
        bins(static_cast<int>(maps.bins)),
        params(static_cast<int>(maps.params)) {}

  __device__ __forceinline__ void invert(T* p, T z, T& x, T& ell) const {
    x = z;
    ell = T(0);
    if (math::abs(z) > options.bound) return;
    const spline::Found<T, Kind> found(options, bins, p, true, z);
    spline::inverse(found.bin, options.bound, z, x, ell);
  }

  __device__ __forceinline__ T backward(T* p, T x, T by_x, T by_log, bool unseen) const {
    return -spline::gradients<T, Kind>(options, bins, params, p, true, x, unseen ? T(0) : -by_x, -by_log);
  }
};

}  // namespace made
}  // namespace genkernels
