// Binds csrc/common/options.h for test_options.py: each option's names and numbers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "common/options.h"

namespace options_binding {

using Numbers = std::map<std::string, int>;
using namespace genkernels;

#define NUMBER(option, name) {#name, static_cast<int>(option::name)}

inline void bind_module(pybind11::module_& m) {
  const std::map<std::string, Numbers> options{
      {"ScaleMap",
       {NUMBER(ScaleMap, kExp), NUMBER(ScaleMap, kSigmoid), NUMBER(ScaleMap, kTanh), NUMBER(ScaleMap, kAdditive),
        NUMBER(ScaleMap, kSigmoidFloor), NUMBER(ScaleMap, kSoftplusFloor), NUMBER(ScaleMap, kSigmoidInverse),
        NUMBER(ScaleMap, kAtan), NUMBER(ScaleMap, kSoftClip)}},
      {"Split",
       {NUMBER(Split, kChannel), NUMBER(Split, kCheckerboard), NUMBER(Split, kNone), NUMBER(Split, kAlternate)}},
      {"Layout",
       {NUMBER(Layout, kHalves), NUMBER(Layout, kInterleaved), NUMBER(Layout, kShiftHalves),
        NUMBER(Layout, kShiftInterleaved)}},
      {"Activation", {NUMBER(Activation, kNone), NUMBER(Activation, kRelu), NUMBER(Activation, kGate)}},
      {"MaskType", {NUMBER(MaskType, kA), NUMBER(MaskType, kB)}},
      {"Region", {NUMBER(Region, kRaster), NUMBER(Region, kVertical), NUMBER(Region, kHorizontal)}},
      {"Nonlinearity",
       {NUMBER(Nonlinearity, kRelu), NUMBER(Nonlinearity, kLeakyRelu), NUMBER(Nonlinearity, kElu),
        NUMBER(Nonlinearity, kSilu), NUMBER(Nonlinearity, kTanh), NUMBER(Nonlinearity, kLipswish),
        NUMBER(Nonlinearity, kClipswish)}},
      {"Spline", {NUMBER(Spline, kNflows), NUMBER(Spline, kZuko), NUMBER(Spline, kCircular)}},
      {"Head", {NUMBER(Head, kCategorical), NUMBER(Head, kLogisticMixture)}},
  };
  m.attr("options") = options;
}

}  // namespace options_binding
