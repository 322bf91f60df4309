// genkernels_cuda::made_inverse and its gradient: launches, temporaries, registration. Kernels: the .cuh; outputs and
// dtypes: csrc/common/made.h. The gradients of the weights are cuBLAS's dense products, through torch, settled after.
#include "../common/made.h"
#include "made.cuh"

namespace genkernels {
namespace made {
namespace {

// A network with its tensors arranged for the kernels, and the temporaries that its pointers point into.
template <typename T>
class Call {
 public:
  Call(const char* name, const Tensor& x, const Layers& given, const AffineMaps& maps)
      : launch_(name, x), weights_(given.weights), order_(given.order) {
    const int64_t layers = given.hidden();
    require(layers <= kMaxLayers, "made: the CUDA kernels take at most ", kMaxLayers, " hidden layers, got ", layers);
    net = MadeNetwork<T>{};
    net.samples = x.size(0);
    net.features = static_cast<int>(x.size(1));
    net.layers = static_cast<int>(layers);
    net.residual = given.residual;
    net.map = maps.map;
    net.constant = T(maps.constant);
    net.counts = data<int64_t>(given.counts);
    for (int64_t l = 0; l < layers; ++l) {
      net.size[l] = static_cast<int>(given.weights[l].size(0));
      net.values[l] = units(x, l);
      net.units[l] = units(x, l);
    }
    for (int64_t l = 0; l <= layers; ++l) {
      const bool first = l == 0, last = l == layers;
      net.weight[l] = data<T>(first || last ? arrange(given.weights[l], last, first) : given.weights[l]);
      net.bias[l] = data<T>(last ? arrange(given.biases[l], true, false) : given.biases[l]);
    }
  }

  // A copy with rows or columns taken in the order of the steps.
  const Tensor& arrange(const Tensor& from, bool rows, bool columns, bool transposed = false) {
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
            int64_t(net.features), int64_t(0), int64_t(0), data<int64_t>(order_), int64_t(net.features), false, true,
            true, mutable_data<T>(to));
  }

  void extend(const T* z_steps, const std::optional<Tensor>& context, const Tensor& x_steps, T* params, T* log_det) {
    launch_(made_extend<T>, blocks(), dim3(kSolveThreads), net, z_steps, data<T>(context), mutable_data<T>(x_steps),
            params, log_det);
  }

  // Transposes the weights, then solves.
  void solve_transposed(const std::optional<Tensor>& grad_steps, const std::optional<Tensor>& grad_ldj,
                        const Tensor& x_steps, const Tensor& params, const Tensor& solution) {
    MadeNetwork<T> across = net;
    for (int l = 0; l <= net.layers; ++l)
      across.weight[l] = data<T>(arrange(weights_[l], l == 0, l == net.layers, true));
    launch_(made_solve_transposed<T>, blocks(), dim3(kSolveThreads), across, data<T>(grad_steps), data<T>(grad_ldj),
            data<T>(x_steps), mutable_data<T>(params), mutable_data<T>(solution));
  }

  void settle(int layer, const Tensor& product, const Tensor& grad) {
    launch_(made_settle<T>, ceil_div(product.numel(), kThreads), dim3(kThreads), net, layer, data<T>(product),
            data<int64_t>(order_), mutable_data<T>(grad));
  }

  void sum_columns(const Tensor& values, bool by_step, const Tensor& sums) {
    launch_(made_sum_columns<T>, ceil_div(values.size(1), kThreads), dim3(kThreads), data<T>(values), values.size(0),
            values.size(1), data<int64_t>(order_), int64_t(net.features), by_step, mutable_data<T>(sums));
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

// The backend of common/made.h.
struct Cuda {
  template <typename T>
  static void inverse(const Layers& layers, const AffineMaps& maps, const Tensor& z,
                      const std::optional<Tensor>& context, const Tensor& x, const Tensor& ldj) {
    Call<T> call("made_inverse", z, layers, maps);
    const Tensor z_steps = call.arrange(z, false, true);
    const Tensor x_steps = call.keep(empty(z));
    call.extend(data<T>(z_steps), context, x_steps, nullptr, mutable_data<T>(ldj));
    call.restore(x_steps, x);
  }

  template <typename T>
  static void inverse_backward(const Layers& layers, const AffineMaps& maps, const std::optional<Tensor>& grad_x,
                               const std::optional<Tensor>& grad_ldj, const Tensor& x,
                               const std::optional<Tensor>& context, const std::vector<Tensor>& grads) {
    const int64_t samples = x.size(0), D = x.size(1), hidden = layers.hidden();
    Call<T> call("made_inverse_backward", x, layers, maps);
    std::vector<Tensor> inputs = {call.arrange(x, false, true)}, signals;
    const Tensor params = empty(x, {samples, 2 * D}), solution = empty(x);
    // fresh buffers of the units, held as tensors, for the products
    for (int l = 0; l < call.net.layers; ++l) {
      call.net.units[l] = call.units(x, l);
      inputs.push_back(call.last_kept());
      call.net.signals[l] = call.units(x, l);
      signals.push_back(call.last_kept());
    }
    signals.push_back(params);
    call.extend(nullptr, context, inputs[0], mutable_data<T>(params), nullptr);
    std::optional<Tensor> grad_steps;
    if (grad_x) grad_steps = call.arrange(*grad_x, false, true);
    call.solve_transposed(grad_steps, grad_ldj, inputs[0], params, solution);
    call.restore(solution, grads[0]);
    call.negate(signals[0], grads[1]);
    for (int64_t l = 0; l <= hidden; ++l) {
      const Tensor product = torch::stable::matmul(torch::stable::transpose(signals[l], 0, 1), inputs[l]);
      call.settle(static_cast<int>(l), product, grads[2 + 2 * l]);
      call.sum_columns(signals[l], l == hidden, grads[3 + 2 * l]);
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
}
