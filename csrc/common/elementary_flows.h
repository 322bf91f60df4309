// Planar and radial flows, but for their loops: what one layer does to one row, for g++ and for nvcc alike, sizes,
// outputs and dtypes. genkernels/reference/elementary_flows.py has the maths.
//
// z is [G, R, D] and the parameters [G, K, ...]: shared ones are those of one group, amortised ones those of N groups
// of S rows. A layer's parameters lie, as kernels keep them, one after the other: w, u and b, or centre, α and β; the
// sums that go into their gradients: those by w, û, 1 + wᵀû and b, or by centre, softplus(α) and softplus(β).
//
// A backend gives two functions of tensors of type S:
//   forward<Kind, S>(sizes, z, parameters, z_out, ldj)
//   backward<Kind, S>(sizes, grad_z, grad_ldj, z, parameters, by_z, by_parameters)
// which come with at least one row and one layer.
#pragma once

#include <array>

#include "host.h"
#include "math.h"

namespace genkernels {
namespace flows {

struct Sizes {
  int64_t groups, rows, layers, features;
};

// ---- one row of one layer -------------------------------------------------------------------------------------------

// A softplus counts as at least the root of the smallest normal number: neither it nor its quotients leave the type.
template <typename T>
constexpr T kLeastSoftplus = T(0x1p-511);
template <>
constexpr float kLeastSoftplus<float> = 0x1p-63f;

// log(1 + eˣ) and log(1 + e⁻ˣ), and the slope of each by its own argument.
template <typename T>
struct Softplus {
  T value, slope, value_of_minus, slope_of_minus;

  GK_HOST_DEVICE explicit inline Softplus(T x, T least = kLeastSoftplus<T>) {
    const T e = math::exp(-math::abs(x));
    const T near = math::quotient(T(1), T(1) + e), far = e * near, tail = math::log1p_unit(e);
    value = (x - math::min_zero(x)) + tail;
    value_of_minus = tail - math::min_zero(x);
    slope = math::select(x < T(0), far, near);
    slope_of_minus = math::select(x < T(0), near, far);
    slope = math::select(value < least, T(0), slope);
    value = math::select(value < least, least, value);
  }
};

// 1 + x: where that would cancel, `sum`, which has it from positive parts.
template <typename T>
GK_HOST_DEVICE inline T one_plus(T x, T sum) {
  return math::select(x > T(-0.5), T(1) + x, sum);
}

// log(1 + x), from the above too: what the rounding of 1 + x lost is made good, so that a small x keeps its digits.
template <typename T>
GK_HOST_DEVICE inline T log_one_plus(T x, T plus) {
  const T lost = math::select(x > T(-0.5), x - (plus - T(1)), T(0));
  return math::log(plus) + lost / plus;
}

// A planar layer: h = tanh t, s = 1 − h². Of m = wᵀû and soft = 1 + m each keeps digits that the other has lost.
template <typename T>
struct PlanarStep {
  T h, s;

  GK_HOST_DEVICE explicit inline PlanarStep(T t) { math::tanh_sech2(t, h, s); }
  GK_HOST_DEVICE inline PlanarStep(T tanh, T sech2) : h(tanh), s(sech2) {}
  GK_HOST_DEVICE inline T log_det(T m, T soft) const {
    const T x = s * m;
    return log_one_plus(x, one_plus(x, h * h + s * soft));
  }
  // The gradients by t and by m, from gᵀû and the gradient by ldj.
  GK_HOST_DEVICE inline void backward(T m, T soft, T along, T by_ldj, T& by_t, T& by_m) const {
    by_m = by_ldj * s / (h * h + s * soft);
    by_t = s * along - T(2) * h * m * by_m;
  }
};

GK_HOST_DEVICE inline double root(double x) {
  return ::sqrt(x);
}
GK_HOST_DEVICE inline float root(float x) {
  return ::sqrtf(x);
}

// A radial layer: r = ‖z − c‖, x = β/(α + r), share = α/(α + r).
template <typename T>
struct RadialStep {
  T r, inverse, x, share, around, along;

  GK_HOST_DEVICE inline RadialStep(T square, T alpha, T soft) {
    r = root(square);
    inverse = T(1) / (alpha + r);
    x = (soft - alpha) * inverse;
    share = alpha * inverse;
    around = one_plus(x, (r + soft) * inverse);
    along = one_plus(x * share, r * inverse * (T(1) + share) + share * (soft * inverse));
  }
  GK_HOST_DEVICE inline T log_det(T others) const {  // D − 1
    return others * log_one_plus(x, around) + log_one_plus(x * share, along);
  }
  // The gradients by softplus(α), softplus(β) and, over r, by r, from gᵀd and the gradient by ldj. At the centre r
  // counts as constant.
  GK_HOST_DEVICE inline void backward(T others, T g_d, T by_ldj, T& by_inner, T& by_outer, T& outwards) const {
    const T of_along = by_ldj / along;
    const T by_x = g_d + others * (by_ldj / around) + share * of_along, by_share = x * of_along;
    const T by_sum = -(by_x * x + by_share * share) * inverse;
    by_outer = by_x * inverse;
    by_inner = by_share * inverse + by_sum - by_outer;
    outwards = math::select(r > T(0), by_sum / math::select(r > T(0), r, T(1)), T(0));
  }
};

// The constraint of a planar layer: û = u + shift·per_v·v, with v the vector w over its largest part, per_v = 1/‖v‖²,
// shift = (m(a) − a)/largest, a = wᵀu, so that per_v·v/largest is w/‖w‖² without a square that could leave the type.
// Gradients go through the slopes of `shift` and of soft = 1 + wᵀû by a. w = 0 is left as it is.
template <typename T>
struct PlanarConstraint {
  T per_v, per_largest, shift, soft, shift_slope, soft_slope;

  GK_HOST_DEVICE inline PlanarConstraint(T largest, T square, T a, T least = kLeastSoftplus<T>) {  // square: ‖v‖²
    const bool free = largest == T(0);
    per_v = T(1) / math::select(free, T(1), square);
    per_largest = T(1) / math::select(free, T(1), largest);
    const Softplus<T> of_a(a, least);
    shift = math::select(free, T(0), (of_a.value_of_minus - T(1)) * per_largest);
    shift_slope = math::select(free, T(0), -of_a.slope_of_minus * per_largest);
    soft = math::select(free, T(1) + a, of_a.value);
    soft_slope = math::select(free, T(1), of_a.slope);
  }
};

// ---- kinds ----------------------------------------------------------------------------------------------------------

struct Planar {
  static constexpr const char* kName = "planar_flow";
  static constexpr int kVectors = 2;  // parameters [.., D]; the others of the three are [..]
  GK_HOST_DEVICE static inline int64_t sums(int64_t features) { return 2 * features + 2; }
};

struct Radial {
  static constexpr const char* kName = "radial_flow";
  static constexpr int kVectors = 1;
  GK_HOST_DEVICE static inline int64_t sums(int64_t features) { return features + 2; }
};

// Numbers of a layer in parameter j, and in all three.
template <typename Kind>
int64_t width(int64_t features, int j) {
  return j < Kind::kVectors ? features : 1;
}
template <typename Kind>
int64_t parameters_of(int64_t features) {
  return Kind::kVectors * features + (3 - Kind::kVectors);
}

// ---- tensors --------------------------------------------------------------------------------------------------------

using Parameters = std::array<Tensor, 3>;

template <typename Kind>
Sizes sizes_of(const Tensor& z, const Parameters& parameters) {
  const Tensor& lead = parameters[0];
  require(z.dim() >= 2 && z.dim() <= 3 && lead.dim() >= 2 && lead.dim() <= 3 && z.size(z.dim() - 1) >= 1, Kind::kName,
          ": z must be [N, D] or [N, S, D] and the first parameter [K, D] or [N, K, D]");
  const bool own = lead.dim() == 3;
  Sizes sizes{own ? z.size(0) : 1, own ? 1 : z.size(0), lead.size(lead.dim() - 2), z.size(z.dim() - 1)};
  if (z.dim() == 3) sizes.rows *= z.size(1);
  for (int j = 0; j < 3; ++j)
    require(parameters[j].numel() == sizes.groups * sizes.layers * width<Kind>(sizes.features, j), Kind::kName,
            ": every parameter must be as long as z and the first one ask for");
  return sizes;
}

template <typename Backend, typename Kind>
std::tuple<Tensor, Tensor> forward(Tensor z, Tensor first, Tensor second, Tensor third) {
  const Parameters parameters{first, second, third};
  const Sizes sizes = sizes_of<Kind>(z, parameters);
  std::vector<int64_t> lead = shape_of(z);
  lead.pop_back();
  Tensor z_out = empty(z), ldj = empty(z, lead, arithmetic_dtype(z));
  if (sizes.layers == 0) {
    torch::stable::copy_(z_out, z);
    torch::stable::zero_(ldj);
  } else if (z.numel()) {
    with_dtype<float, double, BFloat16, Half>("elementary_flows: z", z, [&]<typename S>() {
      Backend::template forward<Kind, S>(sizes, z, parameters, z_out, ldj);
    });
  }
  return {z_out, ldj};
}

template <typename Backend, typename Kind>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(std::optional<Tensor> grad_z, std::optional<Tensor> grad_ldj,
                                                    Tensor z, Tensor first, Tensor second, Tensor third) {
  const Parameters parameters{first, second, third};
  const Sizes sizes = sizes_of<Kind>(z, parameters);
  require((!grad_z || grad_z->numel() == z.numel()) && (!grad_ldj || grad_ldj->numel() == sizes.groups * sizes.rows),
          Kind::kName, ": gradients must be as long as z and ldj");
  Tensor by_z = empty(z);
  Parameters by{zeros(first, shape_of(first)), zeros(second, shape_of(second)), zeros(third, shape_of(third))};
  if (sizes.layers == 0) {
    if (grad_z)
      torch::stable::copy_(by_z, *grad_z);
    else
      torch::stable::zero_(by_z);
  } else if (z.numel()) {
    with_dtype<float, double, BFloat16, Half>("elementary_flows: z", z, [&]<typename S>() {
      Backend::template backward<Kind, S>(sizes, grad_z, grad_ldj, z, parameters, by_z, by);
    });
  }
  return {by_z, by[0], by[1], by[2]};
}

}  // namespace flows
}  // namespace genkernels
