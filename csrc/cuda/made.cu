// genkernels_cuda::masked_linear and its gradients, made_inverse and its gradient: launches, temporaries, registration.
// Kernels: the .cuh.
//
// Shapes, dtypes, devices and contiguity were checked above, in genkernels/ops, which also has the schemas. Masked
// products are cuBLAS's dense ones with a masked weight, through torch: on a GPU the dead half costs less than a
// product of one's own would lose.
#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "made.cuh"

namespace genkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
const T* read(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
T* write(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

Tensor fresh(const Tensor& like, std::vector<int64_t> shape) {
  return torch::stable::new_empty(like, shape);
}

// ---------------------------------------------------------------------------------------------------------------------
// Masked linear layers

template <typename F>
void with_float(const Tensor& t, F f) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
    default: throw std::runtime_error("made: tensors must be float64, float32, bfloat16 or float16");
  }
}

Tensor mask(const Tensor& weight, const Tensor& in_degrees, const Tensor& out_degrees, bool strict) {
  const int64_t out = weight.size(0), in = weight.size(1);
  Tensor masked = fresh(weight, {out, in});
  if (out * in == 0) return masked;
  const Launcher launch("masked_linear", weight);
  with_float(weight, [&](auto t) {
    using T = decltype(t);
    launch(made_mask<T>, ceil_div(out * in, kThreads), dim3(kThreads), read<T>(weight), out, in,
           read<int64_t>(in_degrees), read<int64_t>(out_degrees), strict, write<T>(masked));
  });
  return masked;
}

Tensor masked_linear(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, const Tensor& in_degrees,
                     const Tensor& out_degrees, bool strict) {
  const Tensor masked = mask(weight, in_degrees, out_degrees, strict);
  std::array<StableIValue, 3> stack{torch::stable::detail::from(input), torch::stable::detail::from(masked),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor masked_linear_grad_input(const Tensor& grad_output, const Tensor& weight, const Tensor& in_degrees,
                                const Tensor& out_degrees, bool strict) {
  return torch::stable::matmul(grad_output, mask(weight, in_degrees, out_degrees, strict));
}

Tensor masked_linear_grad_weight(const Tensor& grad_output, const Tensor& input, const Tensor& in_degrees,
                                 const Tensor& out_degrees, bool strict) {
  return mask(torch::stable::matmul(torch::stable::transpose(grad_output, 0, 1), input), in_degrees, out_degrees,
              strict);
}

// ---------------------------------------------------------------------------------------------------------------------
// The inverse

// A network with its tensors arranged for the kernels, and the temporaries that its pointers point into.
template <typename T>
class Call {
 public:
  Call(const char* name, const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
       const Tensor& order, const Tensor& counts, bool residual, int64_t map)
      : launch_(name, x), weights_(weights), order_(order) {
    const int64_t layers = static_cast<int64_t>(weights.size()) - 1;
    if (layers > kMaxLayers)
      throw std::runtime_error("made: the CUDA kernels take at most " + std::to_string(kMaxLayers) + " hidden layers");
    net = MadeNetwork<T>{};
    net.samples = x.size(0);
    net.features = static_cast<int>(x.size(1));
    net.layers = static_cast<int>(layers);
    net.residual = residual;
    net.map = static_cast<ScaleMap>(map);
    net.counts = read<int64_t>(counts);
    for (int64_t l = 0; l < layers; ++l) {
      net.size[l] = static_cast<int>(weights[l].size(0));
      net.values[l] = units(x, l);
      net.units[l] = units(x, l);
    }
    for (int64_t l = 0; l <= layers; ++l) {
      const bool first = l == 0, last = l == layers;
      net.weight[l] = read<T>(first || last ? arrange(weights[l], last, first) : weights[l]);
      net.bias[l] = read<T>(last ? arrange(biases[l], true, false) : biases[l]);
    }
  }

  // A copy with rows or columns taken in the order of the steps.
  const Tensor& arrange(const Tensor& from, bool rows, bool columns, bool transposed = false) {
    const int64_t height = from.size(0), width = from.dim() > 1 ? from.size(1) : 1;
    const int64_t r = transposed ? width : height, c = transposed ? height : width;
    Tensor to = from.dim() > 1 ? keep(fresh(from, {r, c})) : keep(fresh(from, {r}));
    if (r * c > 0)
      launch_(made_arrange<T>, ceil_div(r * c, kThreads), dim3(kThreads), read<T>(from), r, c,
              transposed ? int64_t(1) : width, transposed ? width : int64_t(1), read<int64_t>(order_),
              int64_t(net.features), rows, columns, false, write<T>(to));
    return kept_.back();
  }

  // The reverse for [N, D]: columns in the order of the steps go back to data order.
  void restore(const Tensor& from, const Tensor& to) {
    launch_(made_arrange<T>, ceil_div(net.samples * net.features, kThreads), dim3(kThreads), read<T>(from), net.samples,
            int64_t(net.features), int64_t(0), int64_t(0), read<int64_t>(order_), int64_t(net.features), false, true,
            true, write<T>(to));
  }

  void extend(const Tensor* z_steps, const std::optional<Tensor>& context, const Tensor& x_steps, const Tensor* params,
              const Tensor* log_det) {
    launch_(made_extend<T>, blocks(), dim3(kSolveThreads), net, z_steps ? read<T>(*z_steps) : nullptr,
            context ? read<T>(*context) : nullptr, write<T>(x_steps), params ? write<T>(*params) : nullptr,
            log_det ? write<T>(*log_det) : nullptr);
  }

  // Transposes the weights, then solves.
  void solve_transposed(const Tensor* grad_steps, const std::optional<Tensor>& grad_ldj, const Tensor& x_steps,
                        const Tensor& params, const Tensor& solution) {
    MadeNetwork<T> across = net;
    for (int l = 0; l <= net.layers; ++l)
      across.weight[l] = read<T>(arrange(weights_[l], l == 0, l == net.layers, true));
    launch_(made_solve_transposed<T>, blocks(), dim3(kSolveThreads), across,
            grad_steps ? read<T>(*grad_steps) : nullptr, grad_ldj ? read<T>(*grad_ldj) : nullptr, read<T>(x_steps),
            write<T>(params), write<T>(solution));
  }

  void settle(int layer, const Tensor& product, const Tensor& grad) {
    launch_(made_settle<T>, ceil_div(product.numel(), kThreads), dim3(kThreads), net, layer, read<T>(product),
            read<int64_t>(order_), write<T>(grad));
  }

  void sum_columns(const Tensor& values, bool by_step, const Tensor& sums) {
    launch_(made_sum_columns<T>, ceil_div(values.size(1), kThreads), dim3(kThreads), read<T>(values), values.size(0),
            values.size(1), read<int64_t>(order_), int64_t(net.features), by_step, write<T>(sums));
  }

  void negate(const Tensor& from, const Tensor& to) {
    launch_(made_negate<T>, ceil_div(from.numel(), kThreads), dim3(kThreads), read<T>(from), from.numel(),
            write<T>(to));
  }

  // A fresh [N, H] of a layer, zeros: units of a degree that no step reaches are read by products all the same.
  T* units(const Tensor& like, int64_t layer) {
    const std::vector<int64_t> shape = {net.samples, static_cast<int64_t>(net.size[layer])};
    keep(torch::stable::new_zeros(like, shape));
    return write<T>(kept_.back());
  }
  const Tensor& last_kept() const { return kept_.back(); }
  Tensor keep(Tensor t) {
    kept_.push_back(t);
    return t;
  }

  MadeNetwork<T> net;

 private:
  int64_t blocks() const { return ceil_div(net.samples, kSamples); }

  Launcher launch_;
  const std::vector<Tensor>& weights_;
  const Tensor& order_;
  std::vector<Tensor> kept_;
};

template <typename F>
void with_wide(const Tensor& t, F f) {
  if (t.scalar_type() == ScalarType::Float) return f(float{});
  if (t.scalar_type() == ScalarType::Double) return f(double{});
  throw std::runtime_error("made: the inverse takes float64 and float32");
}

std::tuple<Tensor, Tensor> made_inverse(const Tensor& z, std::optional<Tensor> context, std::vector<Tensor> weights,
                                        std::vector<Tensor> biases, const Tensor& order, const Tensor& counts,
                                        bool residual, int64_t scale_map) {
  Tensor x = fresh(z, {z.size(0), z.size(1)}), ldj = fresh(z, {z.size(0)});
  if (z.size(0) == 0) return {x, ldj};
  with_wide(z, [&](auto t) {
    using T = decltype(t);
    Call<T> call("made_inverse", z, weights, biases, order, counts, residual, scale_map);
    const Tensor z_steps = call.arrange(z, false, true);
    const Tensor x_steps = call.keep(fresh(z, {z.size(0), z.size(1)}));
    call.extend(&z_steps, context, x_steps, nullptr, &ldj);
    call.restore(x_steps, x);
  });
  return {x, ldj};
}

std::vector<Tensor> made_inverse_backward(std::optional<Tensor> grad_x, std::optional<Tensor> grad_ldj, const Tensor& x,
                                          std::optional<Tensor> context, std::vector<Tensor> weights,
                                          std::vector<Tensor> biases, const Tensor& order, const Tensor& counts,
                                          bool residual, int64_t scale_map) {
  const int64_t samples = x.size(0), D = x.size(1), layers = static_cast<int64_t>(weights.size());
  const auto zeros = [&](const Tensor& like) { return torch::stable::new_zeros(like, like.sizes()); };
  std::vector<Tensor> grads = {fresh(x, {samples, D}), fresh(x, {samples, weights[0].size(0)})};
  for (int64_t l = 0; l < layers; ++l) {
    grads.push_back(zeros(weights[l]));
    grads.push_back(zeros(biases[l]));
  }
  if (samples == 0) return grads;
  with_wide(x, [&](auto t) {
    using T = decltype(t);
    Call<T> call("made_inverse_backward", x, weights, biases, order, counts, residual, scale_map);
    std::vector<Tensor> inputs = {call.arrange(x, false, true)}, signals;
    const Tensor params = fresh(x, {samples, 2 * D}), solution = fresh(x, {samples, D});
    // fresh buffers of the units, held as tensors, for the products
    for (int l = 0; l < call.net.layers; ++l) {
      call.net.units[l] = call.units(x, l);
      inputs.push_back(call.last_kept());
      call.net.signals[l] = call.units(x, l);
      signals.push_back(call.last_kept());
    }
    signals.push_back(params);
    call.extend(nullptr, context, inputs[0], &params, nullptr);
    std::optional<Tensor> grad_steps;
    if (grad_x) grad_steps = call.arrange(*grad_x, false, true);
    call.solve_transposed(grad_steps ? &*grad_steps : nullptr, grad_ldj, inputs[0], params, solution);
    call.restore(solution, grads[0]);
    call.negate(signals[0], grads[1]);
    for (int64_t l = 0; l < layers; ++l) {
      const Tensor product = torch::stable::matmul(torch::stable::transpose(signals[l], 0, 1), inputs[l]);
      call.settle(static_cast<int>(l), product, grads[2 + 2 * l]);
      call.sum_columns(signals[l], l == layers - 1, grads[3 + 2 * l]);
    }
  });
  return grads;
}

}  // namespace
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels_cuda, CUDA, m) {
  m.impl("masked_linear", TORCH_BOX(&genkernels::masked_linear));
  m.impl("masked_linear_grad_input", TORCH_BOX(&genkernels::masked_linear_grad_input));
  m.impl("masked_linear_grad_weight", TORCH_BOX(&genkernels::masked_linear_grad_weight));
  m.impl("made_inverse", TORCH_BOX(&genkernels::made_inverse));
  m.impl("made_inverse_backward", TORCH_BOX(&genkernels::made_inverse_backward));
}
