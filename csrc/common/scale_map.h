// The scale maps of an affine coupling, for g++ and for nvcc alike.
//
//   exp       log σ = s                        slope 1
//   sigmoid   log σ = logsigmoid(s + 2)        slope sigmoid(−(s + 2))
//   tanh      log σ = tanh(s)                  slope 1 − tanh²(s)
//   additive  log σ = 0
//
// slope is d log σ / d s. Each function is free of branches on its argument, so that a plain loop over it vectorises,
// and every formula holds its relative accuracy where the obvious one cancels: log(sigmoid(u)) is min(u, 0) −
// log1p(e^−|u|), and the slopes come from e^−|u| directly, never from 1 − (something near 1).
#pragma once

#include "math.h"
#include "options.h"

namespace genkernels {

template <ScaleMap M, typename T>
GK_HOST_DEVICE inline void scale_map(T s, T& log_scale, T& scale, T& slope) {
  if constexpr (M == ScaleMap::kExp) {
    log_scale = s;
    scale = math::exp(s);
    slope = T(1);
  } else if constexpr (M == ScaleMap::kSigmoid) {
    const T u = s + T(2);
    const T e = math::exp(-math::abs(u));  // in (0, 1]
    const T r = T(1) / (T(1) + e);
    const T er = e * r;
    log_scale = math::min_zero(u) - math::log1p_unit(e);
    scale = math::select(u >= T(0), r, er);
    slope = math::select(u >= T(0), er, r);
  } else if constexpr (M == ScaleMap::kTanh) {
    T tanh_s, sech2;
    math::tanh_sech2(s, tanh_s, sech2);
    log_scale = tanh_s;
    scale = math::exp(tanh_s);
    slope = sech2;
  } else {
    log_scale = T(0);
    scale = T(1);
    slope = T(0);
  }
}

}  // namespace genkernels
