// Spectral norm of many weights on the CPU; the head of genkernels/reference/spectral_norm.py has the maths.
//
// Matrices (spectral_norm/matrix.h): a whole power iteration in one read of the weight, which is then written
// normalised, last rows first, while the inner caches still have them. Layers go together in groups of about kCache
// bytes a thread, so that those which fit come from memory once. Convolutions (spectral_norm/convolution.h): two
// products over taps an iteration, all layers together, σ being a length that is known already. Gradients
// (spectral_norm/gradient.h): an inner product a layer, then one pass that makes D as it goes. A linear layer of a few
// inputs without its normalised weight (spectral_norm/linear.h): what it makes, and its gradients.
//
// Work is cut by each layer's shape alone and its sums are added up in one order, so that neither the number of threads
// nor the company of other layers changes a bit. Half numbers are computed in fp32.
//
// Bytes, in units of the weights: forward reads W and writes Ŵ (2), or reads W alone where u, v and σ are all that is
// wanted (1); backward reads G and W and writes the gradient (3). A layer beyond the inner caches reads W a second time
// going forward, G a second time going back. Matrices are bound by them; convolutions by multiplications, unless they
// have fewer places than channels. Stores are ordinary ones: such that pass the caches by gained a twentieth here, and
// cost whatever reads the weights next.
#include "spectral_norm/convolutions.h"
#include "spectral_norm/gradient.h"
#include "spectral_norm/linear.h"
#include "spectral_norm/matrices.h"

namespace genkernels {
namespace spectral {
namespace {

constexpr int64_t kCache = 1536 * 1024;        // bytes of weights a thread has at a time
constexpr int64_t kScratch = 8 * 1024 * 1024;  // numbers of scratch of the convolutions that go together

std::vector<Record> records_of(const std::vector<Tensor>& weights, const std::vector<Tensor>& u,
                               const std::vector<Tensor>& v, const std::vector<int64_t>& plan) {
  const size_t count = weights.size();
  require(count && u.size() == count && v.size() == count && plan.size() == Record::kLength * count,
          "spectral_norm: weights, u, v and plan must be of one number of layers");
  std::vector<Record> records;
  for (size_t i = 0; i < count; ++i) {
    Record& r = records.emplace_back(plan.data() + Record::kLength * i);
    if (r.axis < 0) r.axis += weights[i].dim();
    require(weights[i].numel() > 0, "spectral_norm: a weight must not be empty");
    if (r.kind != kMatrix) continue;
    require(r.axis >= 0 && r.axis < weights[i].dim() && u[i].numel() == weights[i].size(r.axis) &&
                u[i].numel() * v[i].numel() == weights[i].numel(),
            "spectral_norm: a matrix, its u and its v must fit together");
  }
  return records;
}

// The layers that are matrices, or those that are convolutions.
std::vector<int64_t> layers_of(const std::vector<Record>& records, bool matrices) {
  std::vector<int64_t> found;
  for (size_t i = 0; i < records.size(); ++i)
    if ((records[i].kind == kMatrix) == matrices) found.push_back(int64_t(i));
  return found;
}

struct Call {
  const std::vector<Tensor>&weights, &u, &v;
  const std::vector<Record> records;
  Rule rule;
  std::vector<Tensor> out_weights, out_u, out_v;  // none of the first where vectors alone are wanted
  Tensor sigma;
};

// [rows, columns] of a weight whose rows are another axis than the first.
template <typename S>
std::unique_ptr<S[]> rows_first(const Tensor& w, int64_t axis) {
  int64_t before = 1, after = 1;
  for (int64_t a = 0; a < axis; ++a) before *= w.size(a);
  for (int64_t a = axis + 1; a < w.dim(); ++a) after *= w.size(a);
  const int64_t rows = w.size(axis), columns = before * after;
  std::unique_ptr<S[]> packed(new S[rows * columns]);
  const S* from = data<S>(w);
  S* to = packed.get();
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / columns), [&](int64_t begin, int64_t end) {
    for (int64_t a = 0; a < before; ++a)
      for (int64_t m = begin; m < end; ++m)
        std::copy_n(from + (a * rows + m) * after, after, to + m * columns + a * after);
  });
  return packed;
}

template <typename S>
void normalise_matrices(Call& call, const std::vector<int64_t>& which, int64_t iterations) {
  using T = arithmetic_t<S>;
  std::vector<std::unique_ptr<S[]>> packed;
  std::vector<Matrix<S>> layers(which.size());
  Arena<T> arena;
  for (size_t j = 0; j < which.size(); ++j) {
    const Tensor& w = call.weights[which[j]];
    const int64_t axis = call.records[which[j]].axis;
    const int64_t rows = w.size(axis), columns = w.numel() / rows;
    layers[j].turned = axis > 0 && axis == w.dim() - 1;
    if (layers[j].turned)
      layers[j].shape(data<S>(w), columns, rows);
    else
      layers[j].shape(axis ? packed.emplace_back(rows_first<S>(w, axis)).get() : data<S>(w), rows, columns);
    layers[j].allocate(arena);
  }
  arena.make();
  for (size_t j = 0; j < which.size(); ++j) {
    const bool turned = layers[j].turned;
    load(data<S>((turned ? call.v : call.u)[which[j]]), layers[j].u, layers[j].rows);
    load(data<S>((turned ? call.u : call.v)[which[j]]), layers[j].v, layers[j].columns);
  }
  Matrices<S> all(layers);
  all.iterate(iterations);
  for (size_t j = 0; j < which.size(); ++j) {
    Matrix<S>& m = layers[j];
    mutable_data<T>(call.sigma)[which[j]] = m.sigma;
    m.factor = call.rule.factor(m.sigma);
    store(m.u, mutable_data<S>((m.turned ? call.out_v : call.out_u)[which[j]]), m.rows);
    store(m.v, mutable_data<S>((m.turned ? call.out_u : call.out_v)[which[j]]), m.columns);
  }
  if (call.out_weights.empty()) return;
  all.backwards([&](Matrix<S>& m, int64_t row, int64_t rows) {
    const int64_t layer = which[&m - layers.data()], at = row * m.columns;  // number by number, whatever the axis
    multiply(data<S>(call.weights[layer]) + at, m.factor, mutable_data<S>(call.out_weights[layer]) + at,
             rows * m.columns);
  });
}

template <typename S>
void normalise_convolutions(Call& call, std::vector<Convolution<S>>& layers, const int64_t* which, int64_t iterations) {
  using T = arithmetic_t<S>;
  Arena<T> arena;
  for (size_t j = 0; j < layers.size(); ++j)
    layers[j].allocate(arena, mutable_data<S>(call.out_u[which[j]]), mutable_data<S>(call.out_v[which[j]]));
  arena.make();
  Convolutions<S>(layers).iterate(iterations);
  std::vector<int64_t> indices;
  for (size_t j = 0; j < layers.size(); ++j) indices.push_back(int64_t(j));
  const auto cost = [&](int64_t j) { return layers[j].weights() + layers[j].x_count() + layers[j].y_count(); };
  share_out(indices, cost, false, [&](int64_t j) {
    const Convolution<S>& c = layers[j];
    const int64_t i = which[j];
    mutable_data<T>(call.sigma)[i] = c.sigma;
    if constexpr (!std::is_same_v<S, T>) {
      store(c.u(), mutable_data<S>(call.out_u[i]), c.u_count());
      store(c.v(), mutable_data<S>(call.out_v[i]), c.v_count());
    }
    if (!call.out_weights.empty())
      multiply(c.weight, call.rule.factor(c.sigma), mutable_data<S>(call.out_weights[i]), c.weights());
  });
}

template <typename S>
void normalise(Call& call, int64_t iterations) {
  const int64_t threads = torch::stable::get_num_threads();
  const std::vector<int64_t> matrices = layers_of(call.records, true);
  const auto bytes = [&](int64_t j) { return call.weights[matrices[j]].numel() * int64_t(sizeof(S)); };
  in_groups(int64_t(matrices.size()), threads * kCache, bytes, [&](int64_t begin, int64_t end) {
    normalise_matrices<S>(call, {matrices.begin() + begin, matrices.begin() + end}, iterations);
  });
  const std::vector<int64_t> others = layers_of(call.records, false);
  std::vector<Convolution<S>> layers(others.size());
  for (size_t j = 0; j < others.size(); ++j)
    layers[j].shape(call.records[others[j]], call.weights[others[j]], call.u[others[j]], call.v[others[j]]);
  const auto numbers = [&](int64_t j) { return layers[j].scratch_size(); };
  in_groups(int64_t(others.size()), kScratch, numbers, [&](int64_t begin, int64_t end) {
    std::vector<Convolution<S>> some(std::make_move_iterator(layers.begin() + begin),
                                     std::make_move_iterator(layers.begin() + end));
    normalise_convolutions<S>(call, some, others.data() + begin, iterations);
  });
}

std::vector<Tensor> run(Call& call, int64_t iterations) {
  const Tensor& first = call.weights[0];
  call.out_u = empty(call.u), call.out_v = empty(call.v);
  call.sigma = empty(first, {int64_t(call.weights.size())}, arithmetic_dtype(first));
  with_dtype<float, double, BFloat16, Half>("spectral_norm: weights", first,
                                            [&]<typename S>() { normalise<S>(call, iterations); });
  std::vector<Tensor> out;
  for (const auto* some : {&call.out_weights, &call.out_u, &call.out_v})
    out.insert(out.end(), some->begin(), some->end());
  out.push_back(call.sigma);
  return out;
}

std::vector<Tensor> spectral_norm(std::vector<Tensor> weights, std::vector<Tensor> u, std::vector<Tensor> v,
                                  std::vector<int64_t> plan, int64_t iterations, double coefficient, bool at_most) {
  Call call{weights, u, v, records_of(weights, u, v, plan), {coefficient, at_most}, {}, {}, {}, {}};
  call.out_weights = empty(weights);
  return run(call, iterations);
}

std::vector<Tensor> spectral_norm_vectors(std::vector<Tensor> weights, std::vector<Tensor> u, std::vector<Tensor> v,
                                          std::vector<int64_t> plan, int64_t iterations) {
  Call call{weights, u, v, records_of(weights, u, v, plan), {1.0, false}, {}, {}, {}, {}};
  return run(call, iterations);
}

// Weights divided by norms that are known.
std::vector<Tensor> spectral_norm_apply(std::vector<Tensor> weights, std::vector<Tensor> u, std::vector<Tensor> v,
                                        Tensor sigma, std::vector<int64_t> plan, double coefficient, bool at_most) {
  records_of(weights, u, v, plan);
  require(sigma.numel() == int64_t(weights.size()), "spectral_norm: weights and norms must be of one number of layers");
  std::vector<Tensor> out = empty(weights);
  const Rule rule{coefficient, at_most};
  std::vector<Piece> pieces;
  for (size_t i = 0; i < weights.size(); ++i)
    for (int64_t p = 0; p < divide_up(weights[i].numel(), kPiece); ++p) pieces.push_back({int64_t(i), p});
  const auto size = [&](const Piece& p) { return std::min(kPiece, weights[p.layer].numel() - p.index * kPiece); };
  with_dtype<float, double, BFloat16, Half>("spectral_norm: weights", weights[0], [&]<typename S>() {
    using T = arithmetic_t<S>;
    const T* norms = data<T>(sigma);
    share_out(pieces, size, false, [&](const Piece& p) {
      const int64_t at = p.index * kPiece;
      multiply(data<S>(weights[p.layer]) + at, rule.factor(norms[p.layer]), mutable_data<S>(out[p.layer]) + at,
               size(p));
    });
  });
  return out;
}

// ---- backward ---------------------------------------------------------------------------------------------------

template <typename S>
struct Vectors {
  using T = arithmetic_t<S>;
  std::vector<T> u, v;

  Vectors(const Tensor& tu, const Tensor& tv) : u(tu.numel()), v(tv.numel()) {
    load(data<S>(tu), u.data(), int64_t(u.size()));
    load(data<S>(tv), v.data(), int64_t(v.size()));
  }
};

template <typename S>
void differentiate(const Call& call, std::vector<Gradient<S>>& gradients, const arithmetic_t<S>* by_sigma) {
  using T = arithmetic_t<S>;
  const int64_t threads = torch::stable::get_num_threads();
  Gradients<S> all(gradients, by_sigma);
  const std::vector<int64_t> matrices = layers_of(call.records, true);
  const auto bytes = [&](int64_t j) { return 3 * call.weights[matrices[j]].numel() * int64_t(sizeof(S)); };
  in_groups(int64_t(matrices.size()), threads * kCache, bytes, [&](int64_t begin, int64_t end) {
    std::vector<Vectors<S>> vectors;
    std::vector<Outer<T>> outer;
    for (int64_t j = begin; j < end; ++j) {
      const int64_t i = matrices[j];
      const Vectors<S>& own = vectors.emplace_back(call.u[i], call.v[i]);
      outer.emplace_back(call.weights[i], call.records[i].axis, own.u.data(), own.v.data());
    }
    all.scales({matrices.begin() + begin, matrices.begin() + end});
    all.matrices([&](int64_t layer) -> const Outer<T>& {
      return outer[std::lower_bound(matrices.begin() + begin, matrices.begin() + end, layer) - matrices.begin() -
                   begin];
    });
  });
  const std::vector<int64_t> others = layers_of(call.records, false);
  if (others.empty()) return;
  all.scales(others);
  std::vector<ConvolutionGradient<S>> layers(others.size());
  for (size_t j = 0; j < others.size(); ++j) {
    const int64_t i = others[j];
    layers[j].layer.shape(call.records[i], call.weights[i], call.u[i], call.v[i]);
    layers[j].gradient = &gradients[i];
  }
  const auto numbers = [&](int64_t j) { return layers[j].scratch_size(); };
  in_groups(int64_t(others.size()), kScratch, numbers, [&](int64_t begin, int64_t end) {
    std::vector<ConvolutionGradient<S>> some(std::make_move_iterator(layers.begin() + begin),
                                             std::make_move_iterator(layers.begin() + end));
    Arena<T> arena;
    for (ConvolutionGradient<S>& c : some) c.allocate(arena);
    arena.make();
    convolution_gradients(some);
  });
}

std::vector<Tensor> spectral_norm_backward(std::vector<Tensor> grads, std::optional<Tensor> grad_sigma,
                                           std::vector<Tensor> weights, std::vector<Tensor> u, std::vector<Tensor> v,
                                           Tensor sigma, std::vector<int64_t> plan, double coefficient, bool at_most) {
  Call call{weights, u, v, records_of(weights, u, v, plan), {coefficient, at_most}, {}, {}, {}, sigma};
  const int64_t count = int64_t(weights.size());
  require(int64_t(grads.size()) == count && sigma.numel() == count &&
              (!grad_sigma.has_value() || grad_sigma->numel() == count),
          "spectral_norm: gradients and norms must be of one number of layers");
  call.out_weights = empty(weights);
  with_dtype<float, double, BFloat16, Half>("spectral_norm: weights", weights[0], [&]<typename S>() {
    using T = arithmetic_t<S>;
    std::vector<Gradient<S>> gradients(count);
    const T* norms = data<T>(sigma);
    for (int64_t i = 0; i < count; ++i) {
      require(grads[i].numel() == weights[i].numel(), "spectral_norm: a gradient must have its weight's size");
      Gradient<S>& g = gradients[i];
      g.grad = data<S>(grads[i]);
      g.weight = data<S>(weights[i]);
      g.out = mutable_data<S>(call.out_weights[i]);
      g.count = weights[i].numel();
      g.sigma = norms[i];
      g.factor = call.rule.factor(g.sigma);
      g.divides = call.rule.divides(g.sigma);
    }
    differentiate<S>(call, gradients, data<T>(grad_sigma));
  });
  return call.out_weights;
}

// ---- linear layers of a few inputs ------------------------------------------------------------------------------

template <typename T>
Linear<T> linear_of(const Tensor& x, const Tensor& weight) {
  require(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) && x.size(0) <= kFew && x.numel() > 0,
          "spectral_norm_linear: x must be [N, K] of 1 to ", kFew, " inputs, and the weight [M, K]");
  return {x.size(0), weight.size(0), weight.size(1), data<T>(x), data<T>(weight)};
}

std::tuple<Tensor, Tensor> spectral_norm_linear(Tensor x, Tensor weight, std::optional<Tensor> bias, double factor) {
  Tensor y, z;
  with_dtype<float, double>("spectral_norm_linear: x", x, [&]<typename T>() {
    const Linear<T> layer = linear_of<T>(x, weight);
    require(!bias.has_value() || bias->numel() == layer.rows, "spectral_norm_linear: the bias must be [M]");
    y = empty(x, {layer.inputs, layer.rows}), z = empty(x, {layer.inputs, layer.rows});
    layer.forward(data<T>(bias), T(factor), mutable_data<T>(y), mutable_data<T>(z));
  });
  return {y, z};
}

// norm: 0 where the weight is not divided by it.
std::tuple<Tensor, Tensor> spectral_norm_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor z, Tensor u,
                                                         Tensor v, double factor, double norm, bool by_x) {
  Tensor by_weight = empty(weight), by_inputs = empty(x, by_x ? shape_of(x) : std::vector<int64_t>{0});
  with_dtype<float, double>("spectral_norm_linear: x", x, [&]<typename T>() {
    const Linear<T> layer = linear_of<T>(x, weight);
    const int64_t count = layer.inputs * layer.rows;
    require(grad.numel() == count && z.numel() == count && u.numel() == layer.rows && v.numel() == layer.columns,
            "spectral_norm_linear: gradient, outputs, u and v must fit the layer");
    std::vector<T> scaled(count);
    multiply(data<T>(grad), T(factor), scaled.data(), count);
    const double product = norm == 0 ? 0 : inner(scaled.data(), data<T>(z), count);
    layer.by_weight(scaled.data(), data<T>(u), data<T>(v), norm != 0, T(-product / norm), mutable_data<T>(by_weight));
    if (by_x) layer.by_inputs(scaled.data(), mutable_data<T>(by_inputs));
  });
  return {by_weight, by_inputs};
}

}  // namespace
}  // namespace spectral
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels, CPU, m) {
  using namespace genkernels::spectral;
  m.impl("spectral_norm", TORCH_BOX(&spectral_norm));
  m.impl("spectral_norm_vectors", TORCH_BOX(&spectral_norm_vectors));
  m.impl("spectral_norm_apply", TORCH_BOX(&spectral_norm_apply));
  m.impl("spectral_norm_backward", TORCH_BOX(&spectral_norm_backward));
  m.impl("spectral_norm_linear", TORCH_BOX(&spectral_norm_linear));
  m.impl("spectral_norm_linear_backward", TORCH_BOX(&spectral_norm_linear_backward));
}
