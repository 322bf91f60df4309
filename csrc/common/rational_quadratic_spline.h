// The operators rational_quadratic_spline and its backward but for their loops: raw numbers to shares and slopes, and
// what happens within one bin, for g++ and for nvcc alike; sizes, outputs and dtypes.
// genkernels/reference/rational_quadratic_spline.py has the maths.
//
// A backend gives two functions of tensors of type S (T = arithmetic_t<S>), for one parametrization:
//   forward<S, Kind>(call, input, params, output, ldj)
//   backward<S, Kind>(call, grad_output, grad_ldj, x, params, by_input, by_params)
// Both come with at least one number.
#pragma once

#include "elementary_flows.h"
#include "host.h"
#include "math.h"
#include "options.h"

namespace genkernels {
namespace spline {

// x [rows, length], params [rows, length, params]: K width logits, K height logits, then the raw slopes.
struct Call {
  int64_t rows, length, bins, params;
  double bound, logit_scale, floor;
  bool inverse;

  int64_t numbers() const { return rows * length; }
};

// The options in the type that is computed in.
template <typename T>
struct Options {
  T bound, span, logit_scale, floor, clip;
  T least, rest;  // share of a bin: least + rest · softmax

  Options(const Call& c, Spline kind)
      : bound(T(c.bound)),
        span(T(2 * c.bound)),
        logit_scale(T(c.logit_scale)),
        floor(T(c.floor)),
        clip(T(-1 / std::log(c.floor))),
        least(kind == Spline::kZuko ? T(0) : T(c.floor)),
        rest(kind == Spline::kZuko ? T(1) : T(1 - double(c.bins) * c.floor)) {}
};

// A softmax's exponent from a raw number; `slope`: its own by that number.
template <Spline Kind, typename T>
GK_HOST_DEVICE inline T logit(const Options<T>& o, T raw, T& slope) {
  const T u = o.logit_scale * raw;
  if constexpr (Kind == Spline::kZuko) {
    const T shrink = T(1) / (T(1) + math::abs(T(2) * o.clip * u));
    slope = o.logit_scale * shrink * shrink;
    return u * shrink;
  } else {
    slope = o.logit_scale;
    return u;
  }
}

// A knot's slope from a raw number; `by_raw`: its derivative.
template <Spline Kind, typename T>
GK_HOST_DEVICE inline T knot_slope(const Options<T>& o, T raw, T& by_raw) {
  if constexpr (Kind == Spline::kZuko) {
    const T shrink = T(1) / (T(1) + math::abs(o.clip * raw));
    const T value = math::exp(raw * shrink);
    by_raw = value * shrink * shrink;
    return value;
  } else {
    const flows::Softplus<T> soft(raw, T(0));
    by_raw = soft.slope;
    return o.floor + soft.value;
  }
}

// Keeps a NaN.
template <typename T>
GK_HOST_DEVICE inline T held(T t, T low, T high) {
  return math::select(t > high, high, math::select(t < low, low, t));
}

// sum += term, what its rounding lost being kept for the next (Kahan): a knot among 64 is as exact as one among 2.
template <typename T>
GK_HOST_DEVICE inline void add(T term, T& sum, T& lost) {
  const T whole = term - lost, next = sum + whole;
  lost = (next - sum) - whole;
  sum = next;
}

// Where bin `at` begins, `before` of the sum of all exponentials lying below it: in fp64, for the two parts cancel.
// per_sum: 1/sum as T has it, made good by a Newton step.
template <typename T>
GK_HOST_DEVICE inline T knot(const Options<T>& o, T at, T before, T sum, T per_sum) {
  const double r = per_sum, share = double(before) * (r * (2.0 - double(sum) * r));
  return static_cast<T>(double(o.span) * (double(at) * double(o.least) + double(o.rest) * share) - double(o.bound));
}

// The bin that a number lies in.
template <typename T>
struct Bin {
  T left, width, bottom, height, first, last;
};

// A place in a bin: ξ, 1 − ξ, s = h/w, and D and N of the maths.
template <typename T>
struct Place {
  T xi, eta, s, denominator, numerator;

  GK_HOST_DEVICE inline Place(const Bin<T>& bin, T slope, T share, T rest) : xi(share), eta(rest), s(slope) {
    const T both = xi * eta, squares = xi * xi + eta * eta;
    denominator = s * squares + (bin.first + bin.last) * both;
    numerator = bin.last * (xi * xi) + T(2) * s * both + bin.first * (eta * eta);
  }
  GK_HOST_DEVICE inline T log_slope() const { return math::log(numerator) + T(2) * math::log(s / denominator); }
};

template <typename T>
GK_HOST_DEVICE inline Place<T> place_of(const Bin<T>& bin, T x) {
  const T xi = held((x - bin.left) / bin.width, T(0), T(1));
  return Place<T>(bin, bin.height / bin.width, xi, T(1) - xi);
}

// y of x, and log dy/dx.
template <typename T>
GK_HOST_DEVICE inline void forward(const Bin<T>& bin, T bound, T x, T& y, T& ell) {
  const Place<T> at = place_of(bin, x);
  y = bin.bottom + bin.height * ((at.s * at.xi + bin.first * at.eta) * at.xi / at.denominator);
  y = held(y, -bound, bound);
  ell = math::select(y == y, at.log_slope(), y);
}

// x of y, and log dx/dy.
template <typename T>
GK_HOST_DEVICE inline void inverse(const Bin<T>& bin, T bound, T y, T& x, T& ell) {
  const T r = held((y - bin.bottom) / bin.height, T(0), T(1)), q = T(1) - r, s = bin.height / bin.width;
  const T b = bin.first * q - bin.last * r;
  const T root = flows::root(b * b + T(4) * s * s * (r * q));
  const T above = math::select(b < T(0), root - b, T(2) * s * r);
  const T below = math::select(b < T(0), T(2) * s * q, b + root);
  const T per_sum = T(1) / (above + below);
  const Place<T> at(bin, s, above * per_sum, below * per_sum);
  x = held(bin.left + bin.width * at.xi, -bound, bound);
  ell = math::select(x == x, -at.log_slope(), x);
}

// Gradients by the input and by what makes the bin, at x: the forward map's input, the inverse's output.
template <typename T>
struct Gradient {
  T input, left, width, bottom, height, first, last;

  GK_HOST_DEVICE inline Gradient(const Bin<T>& bin, bool inverse, T x, T g, T gamma) {
    const Place<T> at = place_of(bin, x);
    const T xi = at.xi, eta = at.eta, s = at.s, d0 = bin.first, d1 = bin.last;
    const T both = xi * eta, xi2 = xi * xi, eta2 = eta * eta;
    const T per_n = T(1) / at.numerator, per_d = T(1) / at.denominator, per_d2 = per_d * per_d;
    const T per_w = T(1) / bin.width;
    // of the log-slope, by ξ, s, d₀ and d₁
    const T ell_xi = T(2) * ((xi * (d1 - s) + eta * (s - d0)) * per_n - (d0 + d1 - T(2) * s) * (eta - xi) * per_d);
    const T ell_s = T(2) * (both * per_n + T(1) / s - (xi2 + eta2) * per_d);
    const T ell_first = eta2 * per_n - T(2) * both * per_d, ell_last = xi2 * per_n - T(2) * both * per_d;
    const T slope = s * s * at.numerator * per_d2;
    const T from_below = s * xi + d0 * eta, from_above = s * eta + d1 * xi;
    gamma = inverse ? -gamma : gamma;
    const T outward = (g + gamma * ell_xi * per_w) / (inverse ? slope : T(1));
    bottom = inverse ? -outward : g;
    const T rise = bottom * bin.height;
    const T by_xi = rise * (s * at.numerator * per_d2) + gamma * ell_xi;
    const T by_s = rise * (both * (d1 * xi2 - d0 * eta2) * per_d2) + gamma * ell_s;
    left = -by_xi * per_w;
    width = -(by_xi * xi + by_s * s) * per_w;
    height = bottom * (from_below * xi * per_d) + by_s * per_w;
    first = rise * (both * eta * from_above * per_d2) + gamma * ell_first;
    last = gamma * ell_last - rise * (both * xi * from_below * per_d2);
    input = inverse ? outward : -left;
  }
};

// ---- tensors --------------------------------------------------------------------------------------------------------

inline Call call_of(const Tensor& x, const Tensor& params, Spline kind, double bound, double logit_scale, double floor,
                    bool inverse) {
  const Rows rows = rows_of(x);
  require(params.dim() == x.dim() + 1 && (x.numel() == 0 || params.numel() % x.numel() == 0),
          "rational_quadratic_spline: params must be [N, ..., P] for x [N, ...]");
  const int64_t count = params.size(params.dim() - 1), whole = count + (kind == Spline::kCircular ? 0 : 1);
  require(whole >= 3 && whole % 3 == 0 && params.numel() == x.numel() * count,
          "rational_quadratic_spline: params must be [N, ..., P] for x [N, ...], with P = 3K - 1, circular 3K");
  return {rows.count, rows.length, whole / 3, count, bound, logit_scale, floor, inverse};
}

// Calls f.operator()<S, Kind>().
template <typename F>
void with_types(const Tensor& x, int64_t parametrization, F&& f) {
  require(parametrization >= 0 && parametrization <= int64_t(Spline::kCircular),
          "rational_quadratic_spline: parametrization must be 0 to 2, got ", parametrization);
  with_dtype<float, double, BFloat16, Half>("rational_quadratic_spline: x", x, [&]<typename S>() {
    switch (static_cast<Spline>(parametrization)) {
      case Spline::kNflows: return f.template operator()<S, Spline::kNflows>();
      case Spline::kZuko: return f.template operator()<S, Spline::kZuko>();
      default: return f.template operator()<S, Spline::kCircular>();
    }
  });
}

template <typename Backend>
std::tuple<Tensor, Tensor> rational_quadratic_spline(Tensor input, Tensor params, int64_t parametrization, double bound,
                                                     double logit_scale, double floor, bool inverse) {
  const Call c = call_of(input, params, static_cast<Spline>(parametrization), bound, logit_scale, floor, inverse);
  Tensor output = empty(input), ldj = empty(input, {c.rows}, arithmetic_dtype(input));
  if (c.numbers() == 0) return {output, torch::stable::zero_(ldj)};
  with_types(input, parametrization,
             [&]<typename S, Spline Kind>() { Backend::template forward<S, Kind>(c, input, params, output, ldj); });
  return {output, ldj};
}

template <typename Backend>
std::tuple<Tensor, Tensor> rational_quadratic_spline_backward(std::optional<Tensor> grad_output,
                                                              std::optional<Tensor> grad_ldj, Tensor x, Tensor params,
                                                              int64_t parametrization, double bound, double logit_scale,
                                                              double floor, bool inverse) {
  const Call c = call_of(x, params, static_cast<Spline>(parametrization), bound, logit_scale, floor, inverse);
  require((!grad_output || grad_output->numel() == c.numbers()) && (!grad_ldj || grad_ldj->numel() == c.rows),
          "rational_quadratic_spline: gradients must be as long as the output and ldj");
  Tensor by_input = empty(x), by_params = empty(params);
  if (c.numbers() == 0) return {by_input, by_params};
  with_types(x, parametrization, [&]<typename S, Spline Kind>() {
    Backend::template backward<S, Kind>(c, grad_output, grad_ldj, x, params, by_input, by_params);
  });
  return {by_input, by_params};
}

}  // namespace spline
}  // namespace genkernels
