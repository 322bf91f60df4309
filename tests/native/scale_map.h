// Binds csrc/common/scale_map.h for test_scale_map.py: element by element, and as the plain loop that a compiler
// vectorises.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "common/scale_map.h"

namespace scale_map_binding {

namespace py = pybind11;
using genkernels::ScaleMap;

template <ScaleMap M, int kPart, typename T>
T part(T s) {
  T parts[3];
  genkernels::scale_map<M, T>(s, T(1), parts[0], parts[1], parts[2]);
  return parts[kPart];
}

template <ScaleMap M, typename T>
py::tuple loop(const py::array_t<T, py::array::c_style>& s, T constant) {
  const py::ssize_t n = s.size();
  py::array_t<T> log_scale(n), scale(n), slope(n);
  const T* in = s.data();
  T *a = log_scale.mutable_data(), *b = scale.mutable_data(), *c = slope.mutable_data();
  for (py::ssize_t i = 0; i < n; ++i) genkernels::scale_map<M, T>(in[i], constant, a[i], b[i], c[i]);
  return py::make_tuple(log_scale, scale, slope);
}

template <ScaleMap M, typename T>
void bind(py::module_& m, const std::string& name) {
  m.def((name + "_log_scale").c_str(), py::vectorize(part<M, 0, T>));
  m.def((name + "_scale").c_str(), py::vectorize(part<M, 1, T>));
  m.def((name + "_slope").c_str(), py::vectorize(part<M, 2, T>));
  m.def((name + "_loop").c_str(), loop<M, T>, py::arg("s"), py::arg("constant") = T(1));
}

template <typename T>
void bind_all(py::module_& m, const std::string& type) {
  bind<ScaleMap::kExp, T>(m, "exp_" + type);
  bind<ScaleMap::kSigmoid, T>(m, "sigmoid_" + type);
  bind<ScaleMap::kTanh, T>(m, "tanh_" + type);
  bind<ScaleMap::kAdditive, T>(m, "additive_" + type);
  bind<ScaleMap::kSigmoidFloor, T>(m, "sigmoid_floor_" + type);
  bind<ScaleMap::kSoftplusFloor, T>(m, "softplus_floor_" + type);
  bind<ScaleMap::kSigmoidInverse, T>(m, "sigmoid_inverse_" + type);
  bind<ScaleMap::kAtan, T>(m, "atan_" + type);
  bind<ScaleMap::kSoftClip, T>(m, "soft_clip_" + type);
}

inline void bind_module(pybind11::module_& m) {
  bind_all<float>(m, "float32");
  bind_all<double>(m, "float64");
}

}  // namespace scale_map_binding
