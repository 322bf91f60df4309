// Binds csrc/common/divisor.h for test_divisor.py.
#pragma once

#include <pybind11/pybind11.h>

#include "common/divisor.h"

namespace divisor_binding {

inline void bind_module(pybind11::module_& m) {
  m.def("divide", [](int64_t n, int64_t d) { return genkernels::Divisor(d).divide(n); });
}

}  // namespace divisor_binding
