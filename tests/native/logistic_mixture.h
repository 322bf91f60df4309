// Binds csrc/common/logistic_mixture.h and draw.h for test_logistic_mixture.py, as the plain loops that a
// compiler vectorises.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "common/draw.h"
#include "common/logistic_mixture.h"

namespace logistic_mixture_binding {

namespace py = pybind11;
namespace mixture = genkernels::mixture;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// (log P, ∂/∂ mean in levels, ∂/∂ log-scale, log P where no derivative is wanted) of one level index under each (mean
// in levels, log-scale).
template <typename T>
py::tuple level(const Array<T>& i, const Array<T>& mean, const Array<T>& log_scale, int levels) {
  const py::ssize_t n = i.size();
  Array<T> log_p(n), by_mean(n), by_log_scale(n), alone(n);
  const T *a = i.data(), *b = mean.data(), *c = log_scale.data();
  T *p = log_p.mutable_data(), *q = by_mean.mutable_data(), *r = by_log_scale.mutable_data(), *o = alone.mutable_data();
  const T half = T(0.5) * T(levels - 1), log_half = T(std::log(0.5 * (levels - 1)));
  for (py::ssize_t t = 0; t < n; ++t) {
    const T width = mixture::exp(-c[t]) / half;
    const auto bin = mixture::bin_of(a[t], T(levels - 1));
    const auto l = mixture::level<true>(bin, b[t], width, -c[t] - log_half);
    const auto value = mixture::level<false>(bin, b[t], width, -c[t] - log_half);
    p[t] = l.linear + genkernels::math::log(l.numerator / l.denominator);
    o[t] = value.linear + genkernels::math::log(value.numerator / value.denominator);
    q[t] = l.by_mean * width;
    r[t] = l.by_log_scale;
  }
  return py::make_tuple(log_p, by_mean, by_log_scale, alone);
}

// (log, exp, tanh, sech²) of each x.
template <typename T>
py::tuple functions(const Array<T>& x) {
  const py::ssize_t n = x.size();
  Array<T> log(n), exp(n), tanh(n), sech2(n);
  const T* in = x.data();
  T *a = log.mutable_data(), *b = exp.mutable_data(), *c = tanh.mutable_data(), *d = sech2.mutable_data();
  for (py::ssize_t t = 0; t < n; ++t) {
    a[t] = genkernels::math::log(in[t]);
    b[t] = mixture::exp(in[t]);
    mixture::tanh(in[t], c[t], d[t]);
  }
  return py::make_tuple(log, exp, tanh, sech2);
}

template <typename T>
Array<T> logit(const Array<T>& u) {
  Array<T> out(u.size());
  const T* in = u.data();
  T* to = out.mutable_data();
  for (py::ssize_t t = 0; t < u.size(); ++t) to[t] = genkernels::math::logit(in[t]);
  return out;
}

// The level drawn at u under each (mean, log-scale), as a vectorised loop and, second, alone as a mixture of one.
template <typename T>
py::tuple draw(const Array<T>& mean, const Array<T>& log_scale, const Array<T>& u, T temperature, int levels) {
  const py::ssize_t n = u.size();
  Array<T> loop(n), alone(n);
  const T *a = mean.data(), *b = log_scale.data(), *c = u.data();
  T *p = loop.mutable_data(), *q = alone.mutable_data();
  const T half = T(0.5) * T(levels - 1);
  for (py::ssize_t t = 0; t < n; ++t) p[t] = genkernels::draw::logistic(a[t], b[t], c[t], temperature, half);
  for (py::ssize_t t = 0; t < n; ++t) {
    const T params[3] = {T(0), a[t], b[t]}, noise[2] = {T(0.5), c[t]};
    int index;
    genkernels::draw::logistic_mixture(params, 1, 1, 1, levels, temperature, noise, 1, &index);
    q[t] = T(index);
  }
  return py::make_tuple(loop, alone);
}

inline void bind_module(pybind11::module_& m) {
  m.def("level_float32", level<float>);
  m.def("level_float64", level<double>);
  m.def("logit_float32", logit<float>);
  m.def("logit_float64", logit<double>);
  m.def("draw_float32", draw<float>);
  m.def("draw_float64", draw<double>);
  m.def("functions_float32", functions<float>);
  m.def("functions_float64", functions<double>);
}

}  // namespace logistic_mixture_binding
