// genkernels_cuda::made_inverse, made_spline_inverse and their gradients: launches, temporaries, registration. Kernels:
// the .cuh; outputs and dtypes: csrc/common/made.h. The gradients of the weights are cuBLAS's dense products, through
// torch, settled after.
#include "../common/made.h"
#include "made.cuh"

namespace genkernels {
namespace made {
namespace {

// A network with its tensors arranged for the kernels, and the temporaries that its pointers point into.
template <typename T>
class Call {
 public:
  Call(const char* name, const Tensor& x, const Layers& given, int64_t params)
      : launch_(name, x), weights_(given.weights), order_(given.order) {
    const int64_t layers = given.hidden();
    require(layers <= kMaxLayers, "made: the CUDA kernels take at most ", kMaxLayers, " hidden layers, got ", layers);
    net = MadeNetwork<T>{};
    net.samples = x.size(0);
    net.features = static_cast<int>(x.size(1));
    net.params = static_cast<int>(params);
    net.layers = static_cast<int>(layers);
    net.residual = given.residual;
    net.counts = data<int64_t>(given.counts);
    for (int64_t l = 0; l < layers; ++l) {
      net.size[l] = static_cast<int>(given.weights[l].size(0));
      net.values[l] = units(x, l);
      net.units[l] = units(x, l);
    }
    for (int64_t l = 0; l <= layers; ++l) {
      const bool first = l == 0, last = l == layers;
      net.weight[l] = data<T>(first || last ? arrange(given.weights[l], last ? params : 0, first) : given.weights[l]);
      net.bias[l] = data<T>(last ? arrange(given.biases[l], params, 0) : given.biases[l]);
    }
  }

  // A copy with rows or columns, so many numbers a feature, taken in the order of the steps; 0: they stay.
  const Tensor& arrange(const Tensor& from, int64_t rows, int64_t columns, bool transposed = false) {
    const int64_t height = from.size(0), width = from.dim() > 1 ? from.size(1) : 1;
    const int64_t r = transposed ? width : height, c = transposed ? height : width;
    Tensor to = keep(from.dim() > 1 ? empty(from, {r, c}) : empty(from, {r}));
    if (r * c > 0)
      launch_(made_arrange<T>, ceil_div(r * c, kThreads), dim3(kThreads), data<T>(from), r, c,
              transposed ? int64_t(1) : width, transposed ? width : int64_t(1), data<int64_t>(order_),
              int64_t(net.features), rows, columns, false, mutable_data<T>(to));
    return kept_.back();
  }

  // The reverse for [N, D]: columns in the order of the steps go back to data order.
  void restore(const Tensor& from, const Tensor& to) {
    launch_(made_arrange<T>, ceil_div(net.samples * net.features, kThreads), dim3(kThreads), data<T>(from), net.samples,
            int64_t(net.features), int64_t(0), int64_t(0), data<int64_t>(order_), int64_t(net.features), int64_t(0),
            int64_t(1), true, mutable_data<T>(to));
  }

  // params: [N, D, P], or null where nobody asks for them.
  template <typename Map>
  void extend(const Map& map, const T* z_steps, const std::optional<Tensor>& context, const Tensor& x_steps, T* params,
              T* log_det) {
    const bool all = params != nullptr;
    if (!all) params = mutable_data<T>(keep(empty(x_steps, {net.samples, int64_t(net.params)})));
    launch_(made_extend<T, Map>, blocks(), dim3(kSolveThreads), net, map, z_steps, data<T>(context),
            mutable_data<T>(x_steps), params, int64_t(net.params) * (all ? net.features : 1),
            int64_t(all ? net.params : 0), log_det);
  }

  // Transposes the weights, then solves.
  template <typename Map>
  void solve_transposed(const Map& map, const std::optional<Tensor>& grad_steps, const std::optional<Tensor>& grad_ldj,
                        const Tensor& x_steps, const Tensor& params, const Tensor& solution) {
    MadeNetwork<T> across = net;
    for (int l = 0; l <= net.layers; ++l)
      across.weight[l] = data<T>(arrange(weights_[l], l == 0, l == net.layers ? net.params : 0, true));
    launch_(made_solve_transposed<T, Map>, blocks(), dim3(kSolveThreads), across, map, data<T>(grad_steps),
            data<T>(grad_ldj), data<T>(x_steps), mutable_data<T>(params), mutable_data<T>(solution));
  }

  void settle(int layer, const Tensor& product, const Tensor& grad) {
    launch_(made_settle<T>, ceil_div(product.numel(), kThreads), dim3(kThreads), net, layer, data<T>(product),
            data<int64_t>(order_), mutable_data<T>(grad));
  }

  void sum_columns(const Tensor& values, int64_t each, const Tensor& sums) {
    launch_(made_sum_columns<T>, ceil_div(values.size(1), kThreads), dim3(kThreads), data<T>(values), values.size(0),
            values.size(1), data<int64_t>(order_), int64_t(net.features), each, mutable_data<T>(sums));
  }

  void negate(const Tensor& from, const Tensor& to) {
    launch_(made_negate<T>, ceil_div(from.numel(), kThreads), dim3(kThreads), data<T>(from), from.numel(),
            mutable_data<T>(to));
  }

  // A fresh [N, H] of a layer, zeros: units of a degree that no step reaches are read by products all the same.
  T* units(const Tensor& like, int64_t layer) {
    const std::vector<int64_t> shape = {net.samples, static_cast<int64_t>(net.size[layer])};
    keep(zeros(like, shape));
    return mutable_data<T>(kept_.back());
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

// Calls f with the maps as kernels take them.
template <typename T, typename F>
void with_map(const AffineMaps& maps, F&& f) {
  f(Affine<T>(maps));
}
template <typename T, typename F>
void with_map(const SplineMaps& maps, F&& f) {
  switch (maps.kind) {
    case Spline::kNflows: return f(Splines<T, Spline::kNflows>(maps));
    case Spline::kZuko: return f(Splines<T, Spline::kZuko>(maps));
    default: return f(Splines<T, Spline::kCircular>(maps));
  }
}

// The backend of common/made.h.
struct Cuda {
  template <typename T, typename Maps>
  static void inverse(const Layers& layers, const Maps& maps, const Tensor& z, const std::optional<Tensor>& context,
                      const Tensor& x, const Tensor& ldj) {
    Call<T> call("made_inverse", z, layers, maps.params);
    const Tensor z_steps = call.arrange(z, 0, 1);
    const Tensor x_steps = call.keep(empty(z));
    with_map<T>(maps, [&](const auto& map) {
      call.extend(map, data<T>(z_steps), context, x_steps, nullptr, mutable_data<T>(ldj));
    });
    call.restore(x_steps, x);
  }

  template <typename T, typename Maps>
  static void inverse_backward(const Layers& layers, const Maps& maps, const std::optional<Tensor>& grad_x,
                               const std::optional<Tensor>& grad_ldj, const Tensor& x,
                               const std::optional<Tensor>& context, const std::vector<Tensor>& grads) {
    const int64_t samples = x.size(0), D = x.size(1), hidden = layers.hidden();
    Call<T> call("made_inverse_backward", x, layers, maps.params);
    std::vector<Tensor> inputs = {call.arrange(x, 0, 1)}, signals;
    const Tensor params = empty(x, {samples, D * maps.params}), solution = empty(x);
    // fresh buffers of the units, held as tensors, for the products
    for (int l = 0; l < call.net.layers; ++l) {
      call.net.units[l] = call.units(x, l);
      inputs.push_back(call.last_kept());
      call.net.signals[l] = call.units(x, l);
      signals.push_back(call.last_kept());
    }
    signals.push_back(params);
    std::optional<Tensor> grad_steps;
    if (grad_x) grad_steps = call.arrange(*grad_x, 0, 1);
    with_map<T>(maps, [&](const auto& map) {
      call.extend(map, nullptr, context, inputs[0], mutable_data<T>(params), nullptr);
      call.solve_transposed(map, grad_steps, grad_ldj, inputs[0], params, solution);
    });
    call.restore(solution, grads[0]);
    call.negate(signals[0], grads[1]);
    for (int64_t l = 0; l <= hidden; ++l) {
      const Tensor product = torch::stable::matmul(torch::stable::transpose(signals[l], 0, 1), inputs[l]);
      call.settle(static_cast<int>(l), product, grads[2 + 2 * l]);
      call.sum_columns(signals[l], l == hidden ? maps.params : 0, grads[3 + 2 * l]);
    }
  }
};

}  // namespace
}  // namespace made
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels_cuda, CUDA, m) {
  using namespace genkernels::made;
  m.impl("made_inverse", TORCH_BOX(&made_inverse<Cuda>));
  m.impl("made_inverse_backward", TORCH_BOX(&made_inverse_backward<Cuda>));
  m.impl("made_spline_inverse", TORCH_BOX(&made_spline_inverse<Cuda>));
  m.impl("made_spline_inverse_backward", TORCH_BOX(&made_spline_inverse_backward<Cuda>));
}
