// The operators made_inverse and made_inverse_backward but for their arithmetic: outputs, dtypes, empty batches.
//
// A backend gives two functions, for tensors of type T, fp32 or fp64, and at least one sample:
//   inverse<T>(layers, z, context, x, ldj)
//   inverse_backward<T>(layers, grad_x, grad_ldj, x, context, grads)
// grads: those of z, of the context, then of each layer's weight and bias, all of them to be written. Gradients that
// are not there count as zero, but multiply nothing.
#pragma once

#include "host.h"
#include "scale_map.h"

namespace genkernels {
namespace made {

// A network as the operators receive it. Weight l is [H_l, H_{l−1}], the first [H_0, D], the last [2·D, H].
struct Layers {
  const std::vector<Tensor>&weights, &biases;
  const Tensor& order;   // [D] the feature of each step
  const Tensor& counts;  // [hidden layers, D + 1] units known once k features are
  bool residual;
  ScaleMap map;
  double constant;  // c of the scale map

  int64_t hidden() const { return int64_t(weights.size()) - 1; }
};

inline ScaleMap map_of(int64_t scale_map) {
  require(scale_map >= 0 && scale_map < kScaleMaps && scale_map != int64_t(ScaleMap::kAdditive),
          "made: scale_map must be 0 to ", kScaleMaps - 1, " but not 3, got ", scale_map);
  return static_cast<ScaleMap>(scale_map);
}

template <typename Backend>
std::tuple<Tensor, Tensor> made_inverse(Tensor z, std::optional<Tensor> context, std::vector<Tensor> weights,
                                        std::vector<Tensor> biases, Tensor order, Tensor counts, bool residual,
                                        int64_t scale_map, double constant) {
  const Layers layers{weights, biases, order, counts, residual, map_of(scale_map), constant};
  Tensor x = empty(z), ldj = empty(z, {z.size(0)});
  if (z.size(0) == 0) return {x, ldj};
  with_dtype<float, double>("made: z", z,
                            [&]<typename T>() { Backend::template inverse<T>(layers, z, context, x, ldj); });
  return {x, ldj};
}

template <typename Backend>
std::vector<Tensor> made_inverse_backward(std::optional<Tensor> grad_x, std::optional<Tensor> grad_ldj, Tensor x,
                                          std::optional<Tensor> context, std::vector<Tensor> weights,
                                          std::vector<Tensor> biases, Tensor order, Tensor counts, bool residual,
                                          int64_t scale_map, double constant) {
  const Layers layers{weights, biases, order, counts, residual, map_of(scale_map), constant};
  const int64_t samples = x.size(0);
  const auto fresh = [&](const std::vector<int64_t>& shape) { return samples ? empty(x, shape) : zeros(x, shape); };
  std::vector<Tensor> grads = {fresh(shape_of(x)), fresh({samples, weights[0].size(0)})};
  for (size_t l = 0; l < weights.size(); ++l) {
    grads.push_back(fresh(shape_of(weights[l])));
    grads.push_back(fresh(shape_of(biases[l])));
  }
  if (samples == 0) return grads;
  with_dtype<float, double>("made: x", x, [&]<typename T>() {
    Backend::template inverse_backward<T>(layers, grad_x, grad_ldj, x, context, grads);
  });
  return grads;
}

}  // namespace made
}  // namespace genkernels
