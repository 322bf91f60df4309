// csrc/common for the tests beside this file, as one module: pybind11 takes longer to compile than what it binds here.
#include "divisor.h"
#include "logistic_mixture.h"
#include "options.h"
#include "scale_map.h"

PYBIND11_MODULE(MODULE_NAME, m) {
  divisor_binding::bind_module(m);
  logistic_mixture_binding::bind_module(m);
  options_binding::bind_module(m);
  scale_map_binding::bind_module(m);
}
