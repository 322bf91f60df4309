// The options of the operators, as the numbers that Python passes: the IntEnums of genkernels/_options.py have the same
// names and values, and a test in tests/native holds the two to each other.
#pragma once

namespace genkernels {

// affine_coupling and made: log σ as a function of s.
enum class ScaleMap : int {
  kExp = 0,
  kSigmoid = 1,
  kTanh = 2,
  kAdditive = 3,
  kSigmoidFloor = 4,
  kSoftplusFloor = 5,
  kSigmoidInverse = 6,
  kAtan = 7,
  kSoftClip = 8
};

// affine_coupling: which elements are transformed, and how log-scales and shifts lie in params.
enum class Split : int { kChannel = 0, kCheckerboard = 1, kNone = 2, kAlternate = 3 };
enum class Layout : int { kHalves = 0, kInterleaved = 1, kShiftHalves = 2, kShiftInterleaved = 3 };

// masked_conv and the stages of autoregressive_sampling.
enum class Activation : int { kNone = 0, kRelu = 1, kGate = 2 };

// masked_conv: whether a pixel sees itself, and which pixels it sees.
enum class MaskType : int { kA = 0, kB = 1 };
enum class Region : int { kRaster = 0, kVertical = 1, kHorizontal = 2 };

// autoregressive_sampling: what the last plane parametrises.
enum class Head : int { kCategorical = 0, kLogisticMixture = 1 };

// log_det_series and invertible_residual: what stands between two layers of a residual block.
enum class Nonlinearity : int {
  kRelu = 0,
  kLeakyRelu = 1,
  kElu = 2,
  kSilu = 3,
  kTanh = 4,
  kLipswish = 5,
  kClipswish = 6
};

// rational_quadratic_spline: how raw numbers become bins and slopes.
enum class Spline : int { kNflows = 0, kZuko = 1, kCircular = 2 };

}  // namespace genkernels
