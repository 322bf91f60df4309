// genkernels_cuda::spectral_norm and spectral_norm_backward: geometries, workspace, launches and registration. Kernels:
// the .cuh.
#include <algorithm>

#include "spectral_norm.cuh"

namespace genkernels {
namespace spectral {
namespace {

// ---- geometries -------------------------------------------------------------------------------------------------

constexpr int kRecord = 13;                  // integers of the plan for one weight
constexpr int64_t kMost = int64_t(1) << 30;  // numbers of a vector, so that sums of a few places fit 32 bits

int small(int64_t value, int64_t most, const char* what) {
  require(value >= -most && value <= most, "spectral_norm: the CUDA kernels take at most ", most, " ", what, ", got ",
          value);
  return static_cast<int>(value);
}

Geometry matrix(const Tensor& weight, int64_t axis) {
  const int64_t dims = weight.dim(), at = axis < 0 ? axis + dims : axis;
  int64_t distance = 1;
  for (int64_t a = at + 1; a < dims; ++a) distance *= weight.size(a);
  Geometry g{};
  g.kind = kMatrix;
  g.sizes[0] = small(weight.size(at), kMost, "rows");
  g.sizes[1] = small(weight.numel() / weight.size(at), kMost, "columns");
  g.sizes[2] = static_cast<int>(distance);
  return g;
}

Geometry convolution(const Tensor& weight, const Tensor& x, const Tensor& y, const int64_t* record) {
  Geometry g{};
  g.kind = record[0] == kCircular ? kCircular : kConvolution;
  g.transposed = record[3] != 0;
  require(record[2] > 0 && weight.size(0) % record[2] == 0, "spectral_norm: groups must divide the first axis");
  g.sizes[0] = small(weight.size(0), kMost, "channels");
  g.sizes[1] = small(weight.size(1), kMost, "channels");
  g.sizes[2] = small(record[2], kMost, "groups");
  const int64_t lacking = 5 - weight.dim();
  int64_t taps = 1;
  for (int64_t a = 0; a < 3; ++a) {
    const bool has = a >= lacking;
    const auto at = [&](int64_t first) { return has ? record[first + a] : int64_t(first != 7); };
    g.kernel[a] = has ? small(weight.size(2 + a - lacking), 32767, "taps along an axis") : 1;
    g.x[a] = has ? small(x.size(1 + a - lacking), kMost, "places along an axis") : 1;
    g.y[a] = has ? small(y.size(1 + a - lacking), kMost, "places along an axis") : 1;
    g.stride[a] = static_cast<short>(small(at(4), 32767, "places of stride"));
    g.padding[a] = small(at(7), kMost, "places of padding");
    g.dilation[a] = static_cast<short>(small(at(10), 32767, "places of dilation"));
    taps *= g.kernel[a];
    small(taps * g.sizes[0], kMost, "taps times channels");
    small(taps * g.sizes[1], kMost, "taps times channels");
    small(static_cast<int64_t>(g.kernel[a]) * g.dilation[a], kMost, "places that a kernel spans");
    small(static_cast<int64_t>(g.y[a]) * g.stride[a], kMost, "places of an axis times its stride");
  }
  return g;
}

std::vector<Geometry> geometries(const std::vector<Tensor>& weights, const std::vector<Tensor>& u,
                                 const std::vector<Tensor>& v, const std::vector<int64_t>& plan) {
  const size_t count = weights.size();
  require(count > 0 && u.size() == count && v.size() == count && plan.size() == count * kRecord,
          "spectral_norm: weights, u, v and plan must be of one length, 1 or more");
  std::vector<Geometry> all;
  for (size_t i = 0; i < count; ++i) {
    const int64_t* record = plan.data() + i * kRecord;
    small(u[i].numel(), kMost, "numbers of u");
    small(v[i].numel(), kMost, "numbers of v");
    const bool transposed = record[3] != 0;
    all.push_back(record[0] == kMatrix
                      ? matrix(weights[i], record[1])
                      : convolution(weights[i], transposed ? u[i] : v[i], transposed ? v[i] : u[i], record));
    require(u[i].numel() == all[i].u_numbers() && v[i].numel() == all[i].v_numbers(),
            "spectral_norm: u and v must have the sizes of the weight's outputs and inputs");
  }
  return all;
}

// ---- launches ---------------------------------------------------------------------------------------------------

// Gives each layer its first block; the number of blocks of all.
template <typename L, typename Blocks>
int64_t number(Layers<L>& layers, Blocks blocks) {
  int64_t all = 0;
  for (int i = 0; i < layers.count; ++i) {
    layers.layer[i].first = static_cast<int>(all);
    all += blocks(layers.layer[i]);
    require(all < (int64_t(1) << 31), "spectral_norm: the weights need more thread blocks than a grid has");
  }
  return all;
}

template <typename T>
void run(const std::vector<Geometry>& shapes, const std::vector<Tensor>& weights, const std::vector<Tensor>& u,
         const std::vector<Tensor>& v, int64_t iterations, double coefficient, bool at_most,
         const std::vector<Tensor>& out) {
  using A = arithmetic_t<T>;
  static_assert(sizeof(Layers<Layer<T>>) <= kArgumentBytes && sizeof(Layers<Output<T>>) <= kArgumentBytes);
  const Launcher launch("spectral_norm", weights[0]);
  const int64_t count = static_cast<int64_t>(shapes.size());
  std::vector<int64_t> rooms = {0};
  for (const Geometry& g : shapes) rooms.push_back(rooms.back() + Room<T>::size(g));
  const Tensor workspace = empty(weights[0], {rooms.back()}, arithmetic_dtype(weights[0]));
  A* numbers = mutable_data<A>(workspace);
  for (int64_t begin = 0; begin < count; begin += kLayers) {
    Layers<Layer<T>> layers{};
    Layers<Output<T>> outputs{};
    layers.count = outputs.count = static_cast<int>(std::min<int64_t>(kLayers, count - begin));
    for (int64_t i = begin; i < begin + layers.count; ++i) {
      const Geometry& g = shapes[i];
      Layer<T>& layer = layers.layer[i - begin];
      layer.weight = data<T>(weights[i]);
      layer.u = data<T>(u[i]);
      layer.v = data<T>(v[i]);
      layer.room = rooms[i];
      layer.geometry = g;
      Output<T>& output = outputs.layer[i - begin];
      output.weight = layer.weight;
      output.u = layer.u;
      output.v = layer.v;
      output.weight_out = mutable_data<T>(out[i]);
      output.u_out = mutable_data<T>(out[count + i]);
      output.v_out = mutable_data<T>(out[2 * count + i]);
      output.room = rooms[i];
      output.numbers = g.numbers();
      output.u_numbers = g.u_numbers();
      output.v_numbers = g.v_numbers();
      output.left_blocks = left_blocks<T>(g);
      output.right_blocks = right_blocks<T>(g);
    }
    const dim3 block(kThreads);
    for (int64_t turn = 0; turn < std::max<int64_t>(1, iterations); ++turn) {
      const bool alone = iterations == 0;
      int64_t blocks = number(layers, [](const Layer<T>& l) { return left_blocks<T>(l.geometry); });
      launch(spectral_left<T>, blocks, block, layers, static_cast<int>(std::min<int64_t>(turn, 2)), alone, numbers);
      if (alone) break;
      blocks = number(layers, [](const Layer<T>& l) { return right_blocks<T>(l.geometry); });
      launch(spectral_right<T>, blocks, block, layers, static_cast<int>(std::min<int64_t>(turn, 2)), numbers);
    }
    const int64_t blocks = number(outputs, [](const Output<T>& l) { return cuts(l.numbers, kChunk<T>); });
    launch(spectral_finish<T>, blocks, block, outputs, static_cast<int>(std::min<int64_t>(iterations, 2)), at_most,
           static_cast<A>(coefficient), numbers, mutable_data<A>(out[3 * count]) + begin);
  }
}

template <typename T>
void run_backward(const std::vector<Geometry>& shapes, const std::vector<Tensor>& grads,
                  const std::optional<Tensor>& grad_sigma, const std::vector<Tensor>& weights,
                  const std::vector<Tensor>& u, const std::vector<Tensor>& v, const Tensor& sigma, double coefficient,
                  bool at_most, const std::vector<Tensor>& out) {
  using A = arithmetic_t<T>;
  static_assert(sizeof(Layers<Gradient<T>>) <= kArgumentBytes);
  const Launcher launch("spectral_norm_backward", weights[0]);
  const int64_t count = static_cast<int64_t>(shapes.size());
  int64_t most = 0;
  for (const Geometry& g : shapes) most += inner_blocks<T>(g.numbers());
  const Tensor sums = empty(weights[0], {most}, arithmetic_dtype(weights[0]));
  int64_t sum = 0;
  for (int64_t begin = 0; begin < count; begin += kLayers) {
    Layers<Gradient<T>> layers{};
    layers.count = static_cast<int>(std::min<int64_t>(kLayers, count - begin));
    for (int64_t i = begin; i < begin + layers.count; ++i) {
      Gradient<T>& layer = layers.layer[i - begin];
      layer.grad = data<T>(grads[i]);
      layer.weight = data<T>(weights[i]);
      layer.u = data<T>(u[i]);
      layer.v = data<T>(v[i]);
      layer.out = mutable_data<T>(out[i]);
      layer.sums = static_cast<int>(sum);
      layer.geometry = shapes[i];
      sum += inner_blocks<T>(shapes[i].numbers());
    }
    const dim3 block(kThreads);
    const A* sigmas = data<A>(sigma) + begin;
    const A* by_sigmas = grad_sigma ? data<A>(*grad_sigma) + begin : nullptr;
    int64_t blocks = number(layers, [](const Gradient<T>& l) { return inner_blocks<T>(l.geometry.numbers()); });
    launch(spectral_inner<T>, blocks, block, layers, at_most, static_cast<A>(coefficient), sigmas,
           mutable_data<A>(sums));
    blocks = number(layers, [](const Gradient<T>& l) { return gradient_blocks<T>(l.geometry); });
    launch(spectral_gradient<T>, blocks, block, layers, at_most, static_cast<A>(coefficient), sigmas, by_sigmas,
           data<A>(sums));
  }
}

// ---- operators --------------------------------------------------------------------------------------------------

std::vector<Tensor> spectral_norm(std::vector<Tensor> weights, std::vector<Tensor> u, std::vector<Tensor> v,
                                  std::vector<int64_t> plan, int64_t iterations, double coefficient, bool at_most) {
  const std::vector<Geometry> shapes = geometries(weights, u, v, plan);
  std::vector<Tensor> out;
  for (const auto* some : {&weights, &u, &v})
    for (const Tensor& t : *some) out.push_back(empty(t));
  out.push_back(empty(weights[0], {static_cast<int64_t>(weights.size())}, arithmetic_dtype(weights[0])));
  with_dtype<float, double, BFloat16, Half>("spectral_norm: weights", weights[0], [&]<typename T>() {
    run<T>(shapes, weights, u, v, iterations, coefficient, at_most, out);
  });
  return out;
}

std::vector<Tensor> spectral_norm_backward(std::vector<Tensor> grads, std::optional<Tensor> grad_sigma,
                                           std::vector<Tensor> weights, std::vector<Tensor> u, std::vector<Tensor> v,
                                           Tensor sigma, std::vector<int64_t> plan, double coefficient, bool at_most) {
  const std::vector<Geometry> shapes = geometries(weights, u, v, plan);
  require(grads.size() == weights.size() && sigma.numel() == static_cast<int64_t>(weights.size()),
          "spectral_norm_backward: grads and sigma must be as many as the weights");
  std::vector<Tensor> out;
  for (const Tensor& t : weights) out.push_back(empty(t));
  with_dtype<float, double, BFloat16, Half>("spectral_norm_backward: weights", weights[0], [&]<typename T>() {
    run_backward<T>(shapes, grads, grad_sigma, weights, u, v, sigma, coefficient, at_most, out);
  });
  return out;
}

}  // namespace
}  // namespace spectral
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels_cuda, CUDA, m) {
  using namespace genkernels::spectral;
  m.impl("spectral_norm", TORCH_BOX(&spectral_norm));
  m.impl("spectral_norm_backward", TORCH_BOX(&spectral_norm_backward));
}
