// The operators made_inverse and made_spline_inverse and their gradients, but for their arithmetic: outputs, dtypes,
// empty batches.
//
// A backend gives two functions, for tensors of type T, fp32 or fp64, for the maps of its operators and at least one
// sample:
//   inverse<T>(layers, maps, z, context, x, ldj)
//   inverse_backward<T>(layers, maps, grad_x, grad_ldj, x, context, grads)
// grads: those of z, of the context, then of each layer's weight and bias, all of them to be written. Gradients that
// are not there count as zero, but multiply nothing.
#pragma once

#include "host.h"
#include "scale_map.h"

namespace genkernels {
namespace made {

// A network as the operators receive it. Weight l is [H_l, H_{l−1}], the first [H_0, D], the last [P·D, H].
struct Layers {
  const std::vector<Tensor>&weights, &biases;
  const Tensor& order;   // [D] the feature of each step
  const Tensor& counts;  // [hidden layers, D + 1] units known once k features are
  bool residual;

  int64_t hidden() const { return int64_t(weights.size()) - 1; }
};

// z = x·σ(s) + t; P = 2.
struct AffineMaps {
  ScaleMap map;
  double constant;  // c of the scale map
  int64_t params = 2;

  AffineMaps(int64_t scale_map, double c) : map(static_cast<ScaleMap>(scale_map)), constant(c) {
    require(scale_map >= 0 && scale_map < kScaleMaps && map != ScaleMap::kAdditive, "made: scale_map must be 0 to ",
            kScaleMaps - 1, " but not 3, got ", scale_map);
  }
};

// Rational-quadratic splines of K bins; P = 3K − 1, circular 3K.
struct SplineMaps {
  Spline kind;
  double bound, logit_scale, floor;
  int64_t params = 0, bins = 0;

  SplineMaps(int64_t parametrization, double b, double scale, double least, int64_t outputs, int64_t features)
      : kind(static_cast<Spline>(parametrization)), bound(b), logit_scale(scale), floor(least) {
    require(parametrization >= 0 && parametrization <= int64_t(Spline::kCircular),
            "made: parametrization must be 0 to 2, got ", parametrization);
    params = outputs / features;
    const int64_t whole = params + (kind == Spline::kCircular ? 0 : 1);
    require(params * features == outputs && whole >= 3 && whole % 3 == 0,
            "made: the last weight must be [P*D, H] with P = 3K - 1, circular 3K, got ", outputs,
            " rows for D = ", features);
    bins = whole / 3;
  }
};

template <typename Backend, typename Maps>
std::tuple<Tensor, Tensor> inverse(const Layers& layers, const Maps& maps, const Tensor& z,
                                   const std::optional<Tensor>& context) {
  Tensor x = empty(z), ldj = empty(z, {z.size(0)});
  if (z.size(0) == 0) return {x, ldj};
  with_dtype<float, double>("made: z", z,
                            [&]<typename T>() { Backend::template inverse<T>(layers, maps, z, context, x, ldj); });
  return {x, ldj};
}

template <typename Backend, typename Maps>
std::vector<Tensor> inverse_backward(const Layers& layers, const Maps& maps, const std::optional<Tensor>& grad_x,
                                     const std::optional<Tensor>& grad_ldj, const Tensor& x,
                                     const std::optional<Tensor>& context) {
  const int64_t samples = x.size(0);
  const auto fresh = [&](const std::vector<int64_t>& shape) { return samples ? empty(x, shape) : zeros(x, shape); };
  std::vector<Tensor> grads = {fresh(shape_of(x)), fresh({samples, layers.weights[0].size(0)})};
  for (size_t l = 0; l < layers.weights.size(); ++l) {
    grads.push_back(fresh(shape_of(layers.weights[l])));
    grads.push_back(fresh(shape_of(layers.biases[l])));
  }
  if (samples == 0) return grads;
  with_dtype<float, double>("made: x", x, [&]<typename T>() {
    Backend::template inverse_backward<T>(layers, maps, grad_x, grad_ldj, x, context, grads);
  });
  return grads;
}

// ---- the operators --------------------------------------------------------------------------------------------------

template <typename Backend>
std::tuple<Tensor, Tensor> made_inverse(Tensor z, std::optional<Tensor> context, std::vector<Tensor> weights,
                                        std::vector<Tensor> biases, Tensor order, Tensor counts, bool residual,
                                        int64_t scale_map, double constant) {
  return inverse<Backend>({weights, biases, order, counts, residual}, AffineMaps(scale_map, constant), z, context);
}

template <typename Backend>
std::vector<Tensor> made_inverse_backward(std::optional<Tensor> grad_x, std::optional<Tensor> grad_ldj, Tensor x,
                                          std::optional<Tensor> context, std::vector<Tensor> weights,
                                          std::vector<Tensor> biases, Tensor order, Tensor counts, bool residual,
                                          int64_t scale_map, double constant) {
  return inverse_backward<Backend>({weights, biases, order, counts, residual}, AffineMaps(scale_map, constant), grad_x,
                                   grad_ldj, x, context);
}

template <typename Backend>
std::tuple<Tensor, Tensor> made_spline_inverse(Tensor z, std::optional<Tensor> context, std::vector<Tensor> weights,
                                               std::vector<Tensor> biases, Tensor order, Tensor counts, bool residual,
                                               int64_t parametrization, double bound, double logit_scale,
                                               double floor) {
  const SplineMaps maps(parametrization, bound, logit_scale, floor, weights.back().size(0), z.size(1));
  return inverse<Backend>({weights, biases, order, counts, residual}, maps, z, context);
}

template <typename Backend>
std::vector<Tensor> made_spline_inverse_backward(std::optional<Tensor> grad_x, std::optional<Tensor> grad_ldj, Tensor x,
                                                 std::optional<Tensor> context, std::vector<Tensor> weights,
                                                 std::vector<Tensor> biases, Tensor order, Tensor counts, bool residual,
                                                 int64_t parametrization, double bound, double logit_scale,
                                                 double floor) {
  const SplineMaps maps(parametrization, bound, logit_scale, floor, weights.back().size(0), x.size(1));
  return inverse_backward<Backend>({weights, biases, order, counts, residual}, maps, grad_x, grad_ldj, x, context);
}

}  // namespace made
}  // namespace genkernels
