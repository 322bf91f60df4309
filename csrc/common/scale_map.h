// The scale maps of an affine coupling, for g++ and for nvcc alike; c is the constant of those that have one.
//
//   exp              log σ = s                        slope 1
//   sigmoid          log σ = logsigmoid(s + 2)        slope sigmoid(−(s + 2))
//   tanh             log σ = c·tanh(s)                slope c·(1 − tanh²(s))
//   additive         log σ = 0
//   sigmoid floor    σ = sigmoid(s + 2) + c           slope sigmoid'(s + 2) / σ
//   softplus floor   σ = softplus(s) + c              slope sigmoid(s) / σ
//   sigmoid inverse  log σ = −logsigmoid(s + 2)       slope −sigmoid(−(s + 2))
//   atan             log σ = c·atan(s)                slope c / (1 + s²)
//   soft clip        log σ = s / (1 + |s| / c)        slope (1 + |s| / c)⁻²
//
// slope is d log σ / d s. Each function is free of branches on its argument, so that a plain loop over it vectorises,
// and every formula holds its relative accuracy where the obvious one cancels: log(sigmoid(u)) is min(u, 0) −
// log1p(e^−|u|), and the slopes come from e^−|u| directly, never from 1 − (something near 1).
#pragma once

#include "math.h"
#include "options.h"

namespace genkernels {

constexpr int kScaleMaps = int(ScaleMap::kSoftClip) + 1;

template <ScaleMap M, typename T>
GK_HOST_DEVICE inline void scale_map(T s, T c, T& log_scale, T& scale, T& slope) {
  if constexpr (M == ScaleMap::kExp) {
    log_scale = s;
    scale = math::exp(s);
    slope = T(1);
  } else if constexpr (M == ScaleMap::kSigmoid || M == ScaleMap::kSigmoidInverse || M == ScaleMap::kSigmoidFloor) {
    const T u = s + T(2);
    const T e = math::exp(-math::abs(u));  // in (0, 1]
    const T r = T(1) / (T(1) + e);
    const T er = e * r;
    const T sigmoid = math::select(u >= T(0), r, er);
    if constexpr (M == ScaleMap::kSigmoidFloor) {
      scale = sigmoid + c;
      log_scale = math::log(scale);
      slope = r * er / scale;
    } else {
      log_scale = math::min_zero(u) - math::log1p_unit(e);
      scale = sigmoid;
      slope = math::select(u >= T(0), er, r);
      if constexpr (M == ScaleMap::kSigmoidInverse) {
        log_scale = -log_scale;
        scale = T(1) + math::exp(-u);
        slope = -slope;
      }
    }
  } else if constexpr (M == ScaleMap::kTanh) {
    T tanh_s, sech2;
    math::tanh_sech2(s, tanh_s, sech2);
    log_scale = c * tanh_s;
    scale = math::exp(log_scale);
    slope = c * sech2;
  } else if constexpr (M == ScaleMap::kSoftplusFloor) {
    const T e = math::exp(-math::abs(s));
    const T r = T(1) / (T(1) + e);
    const bool linear = s > T(20);  // as torch has it
    scale = math::select(linear, s, math::select(s < T(0), T(0), s) + math::log1p_unit(e)) + c;
    log_scale = math::select(scale > std::numeric_limits<T>::max(), scale, math::log(scale));
    slope = math::select(linear, T(1), math::select(s >= T(0), r, e * r)) / scale;
  } else if constexpr (M == ScaleMap::kAtan) {
    log_scale = c * math::atan(s);
    scale = math::exp(log_scale);
    slope = c / (T(1) + s * s);
  } else if constexpr (M == ScaleMap::kSoftClip) {
    const T d = T(1) / (T(1) + math::abs(s) / c);
    log_scale = s * d;
    scale = math::exp(log_scale);
    slope = d * d;
  } else {
    log_scale = T(0);
    scale = T(1);
    slope = T(0);
  }
}

// 1 / σ: of the maps whose log σ is a logarithm of σ by a division, of the others without the detour through σ.
template <ScaleMap M, typename T>
GK_HOST_DEVICE inline T shrink_of(T log_scale, T scale) {
  if constexpr (M == ScaleMap::kSigmoidFloor || M == ScaleMap::kSoftplusFloor)
    return T(1) / scale;
  else
    return math::exp(-log_scale);
}

// Calls f.operator()<M>() for a map.
template <typename F>
GK_HOST_DEVICE inline auto with_scale_map(ScaleMap map, F&& f) {
  switch (map) {
    case ScaleMap::kExp: return f.template operator()<ScaleMap::kExp>();
    case ScaleMap::kSigmoid: return f.template operator()<ScaleMap::kSigmoid>();
    case ScaleMap::kTanh: return f.template operator()<ScaleMap::kTanh>();
    case ScaleMap::kSigmoidFloor: return f.template operator()<ScaleMap::kSigmoidFloor>();
    case ScaleMap::kSoftplusFloor: return f.template operator()<ScaleMap::kSoftplusFloor>();
    case ScaleMap::kSigmoidInverse: return f.template operator()<ScaleMap::kSigmoidInverse>();
    case ScaleMap::kAtan: return f.template operator()<ScaleMap::kAtan>();
    case ScaleMap::kSoftClip: return f.template operator()<ScaleMap::kSoftClip>();
    default: return f.template operator()<ScaleMap::kAdditive>();
  }
}

}  // namespace genkernels
