// Binds csrc/common/divisor.h for test_divisor.py.
#include <pybind11/pybind11.h>

#include "common/divisor.h"

PYBIND11_MODULE(MODULE_NAME, m) {
  m.def("divide", [](int64_t n, int64_t d) { return genkernels::Divisor(d).divide(n); });
}
