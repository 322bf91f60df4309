// The operators affine_coupling, _backward and _reverse but for their arithmetic: where elements lie, outputs, dtypes.
//
// A backend gives two functions, for x of type X and params of type P (T = arithmetic_t<X>):
//   forward<X, P>(call, inverse, input, params, output, ldj)
//   backward<X, P>(call, gradient, grad_output, grad_ldj, given, params, grad_input, grad_params, rebuilt)
// Both come with at least one element. Of the gradients of the output and of the log-determinant one is there at least.
// What the other would have been multiplied by plays no part: 0 · ∞ would be NaN. `rebuilt` is the input that
// Gradient::kReverse computes on the way, null otherwise.
#pragma once

#include "host.h"
#include "scale_map.h"

namespace genkernels {
namespace coupling {

// Which gradient: of the forward map from its input x, of the inverse map from its input z, or of the forward map from
// its output z, together with its input.
enum class Gradient : int { kForward, kInverse, kReverse };

// One call's sizes, in elements. x [N, sample]: two halves of `moved` elements, one of which passes (channel split), or
// one stretch of `moved` elements (checkerboard: element (c, h, w) is transformed where h + w is odd; flip: even; no
// split: all are). Alternating: the halves lie in turns, in rows of a channel's `pixels`. params [N, param_sample]:
// log-scales and shifts, or shifts and log-scales, in alternating rows of `row` elements; additive: shifts alone.
struct Call {
  int64_t samples;                // N
  int64_t sample, param_sample;   // elements of a sample
  int64_t moved, row;             // what one of s and t covers in a sample, and in a row
  int64_t moved_at, passed_at;    // where the halves begin in a sample; checkerboard: both at 0
  int64_t pixels, height, width;  // S; height and width: checkerboard
  ScaleMap map;
  double constant;  // c of the scale map
  bool checkerboard, turns, copies, shift_first, flip;
};

inline Call call_of(const Tensor& x, int64_t scale_map, double constant, int64_t split, int64_t layout, bool flip) {
  require(scale_map >= 0 && scale_map < kScaleMaps, "affine_coupling: scale_map must be 0 to ", kScaleMaps - 1,
          ", got ", scale_map);
  const bool halves = static_cast<Split>(split) == Split::kChannel || static_cast<Split>(split) == Split::kAlternate;
  require(x.dim() >= 2 && (!halves || x.size(1) % 2 == 0),
          "affine_coupling: x must be [N, C, ...] with an even C for a split of channels");
  Call c{};
  c.map = static_cast<ScaleMap>(scale_map);
  c.constant = constant;
  c.checkerboard = static_cast<Split>(split) == Split::kCheckerboard;
  c.turns = static_cast<Split>(split) == Split::kAlternate;
  c.copies = halves;
  c.flip = flip;
  c.samples = x.size(0);
  c.pixels = 1;
  for (int64_t d = 2; d < x.dim(); ++d) c.pixels *= x.size(d);
  c.sample = x.size(1) * c.pixels;
  c.moved = c.copies ? c.sample / 2 : c.sample;
  if (c.checkerboard) {
    c.height = x.size(2);
    c.width = x.size(3);
  } else if (c.copies) {
    (flip ? c.passed_at : c.moved_at) = c.turns ? c.pixels : c.moved;
  }
  const bool additive = c.map == ScaleMap::kAdditive;
  const Layout order = static_cast<Layout>(layout);
  c.shift_first = !additive && (order == Layout::kShiftHalves || order == Layout::kShiftInterleaved);
  const bool interleaved = order == Layout::kInterleaved || order == Layout::kShiftInterleaved;
  c.row = interleaved && !additive ? c.pixels : c.moved;
  c.param_sample = additive ? c.moved : 2 * c.moved;
  return c;
}

// Calls f.operator()<X, P>() for the dtypes of x and of params.
template <typename F>
void with_dtypes(const Tensor& x, const Tensor& params, F&& f) {
  if (x.scalar_type() == ScalarType::Float)
    return with_dtype<float, BFloat16, Half>("affine_coupling: params beside a float32 x", params,
                                             [&]<typename P>() { f.template operator()<float, P>(); });
  with_dtype<double, float, BFloat16, Half>("affine_coupling: x", x, [&]<typename X>() {
    require(params.scalar_type() == x.scalar_type(), "affine_coupling: params must have x's dtype, ", Dtype<X>::kName);
    f.template operator()<X, X>();
  });
}

template <typename Backend>
std::tuple<Tensor, Tensor> affine_coupling(Tensor input, Tensor params, int64_t scale_map, double constant,
                                           int64_t split, int64_t layout, bool flip, bool inverse) {
  const Call c = call_of(input, scale_map, constant, split, layout, flip);
  Tensor output = empty(input), ldj = empty(input, {c.samples}, arithmetic_dtype(input));
  if (input.numel() == 0) return {output, torch::stable::zero_(ldj)};
  with_dtypes(input, params, [&]<typename X, typename P>() {
    Backend::template forward<X, P>(c, inverse, input, params, output, ldj);
  });
  return {output, ldj};
}

template <typename Backend>
std::tuple<Tensor, Tensor> affine_coupling_backward(std::optional<Tensor> grad_output, std::optional<Tensor> grad_ldj,
                                                    Tensor input, Tensor params, int64_t scale_map, double constant,
                                                    int64_t split, int64_t layout, bool flip, bool inverse) {
  const Call c = call_of(input, scale_map, constant, split, layout, flip);
  Tensor grad_input = empty(input), grad_params = empty(params);
  if (!grad_output && !grad_ldj) return {torch::stable::zero_(grad_input), torch::stable::zero_(grad_params)};
  if (input.numel() == 0) return {grad_input, grad_params};
  with_dtypes(input, params, [&]<typename X, typename P>() {
    Backend::template backward<X, P>(c, inverse ? Gradient::kInverse : Gradient::kForward, grad_output, grad_ldj, input,
                                     params, grad_input, grad_params, nullptr);
  });
  return {grad_input, grad_params};
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> affine_coupling_reverse(std::optional<Tensor> grad_output,
                                                           std::optional<Tensor> grad_ldj, Tensor output, Tensor params,
                                                           int64_t scale_map, double constant, int64_t split,
                                                           int64_t layout, bool flip) {
  const Call c = call_of(output, scale_map, constant, split, layout, flip);
  if (!grad_output && !grad_ldj) {
    Tensor grad_input = empty(output), grad_params = empty(params);
    return {std::get<0>(affine_coupling<Backend>(output, params, scale_map, constant, split, layout, flip, true)),
            torch::stable::zero_(grad_input), torch::stable::zero_(grad_params)};
  }
  Tensor input = empty(output), grad_input = empty(output), grad_params = empty(params);
  if (output.numel() == 0) return {input, grad_input, grad_params};
  with_dtypes(output, params, [&]<typename X, typename P>() {
    Backend::template backward<X, P>(c, Gradient::kReverse, grad_output, grad_ldj, output, params, grad_input,
                                     grad_params, &input);
  });
  return {input, grad_input, grad_params};
}

}  // namespace coupling
}  // namespace genkernels
