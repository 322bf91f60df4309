// Masked linear layers and the inverse of an autoregressive transform on the CPU (Germain et al. 2015; Papamakarios et
// al. 2017; Durkan et al. 2019).
//
//   y = (W ⊙ M) x + b         M by degrees; its two gradients
//   z_i = f(x_i; p_i)         p_i made of x_{<i}; x from z, and the gradient of that; of affine maps also z from x
//
// f is an affine map of 2 parameters, σ and a shift, or a rational-quadratic spline of 3K − 1 or 3K (made/maps.h): the
// solve asks of it the inverse of one feature, the samples side by side, and the gradient of that.
//
// One product serves all (made/product.h). Samples are turned so that they lie side by side; rows and columns are taken
// in the order of their degrees, in which a masked weight is a staircase: a group of rows multiplies the inputs that
// all of it sees, then each row its few more. Dead weights are not read (but for the gradient's zeros, not written
// either): half the flops of the dense product.
//
// The inverse (made/solve.h) is a blocked nonlinear triangular solve. Features come in blocks of kBlock. What the
// features and units known before the block give to the block's units is added in whole products, one a layer; inside
// the block go feature by feature: its parameters, x, then the units of each layer whose degree has just become known,
// each a dot product over the few units of the block itself. Every unit is computed once: Σ H·H'/2 multiplications a
// sample, as many as one masked forward pass. Its gradient solves the transposed system from the last feature to the
// first in the same way, over weights packed a block's columns at a time, after one forward pass over the saved
// solution x (nothing else is saved: the units cost less to compute than to keep). The weights' gradients are then one
// masked product a layer, −δᵀu.
//
// The direction of one pass (made/pass.h) is all layers, the map and the log-determinant in one call, of several
// transforms and the ActNorms between them: in a small network the layers take less time than torch takes to get from
// one to the next, there and back.
//
// Parallel over chunks of samples, for layers also over groups of rows: a sum is always added up in the same order, so
// neither the batch nor the threads change its bits. A thread is started for no less than kWork multiply-adds: below, a
// call is a few microseconds of its own beside those of torch's dispatch. Bytes: the live weights once a chunk, from
// the outer caches; the floor is the flops.
#include "made/pass.h"

namespace genkernels {
namespace made {
namespace {

// ---- masked linear ----------------------------------------------------------------------------------------------

Tensor masked_linear(Tensor input, Tensor weight, std::optional<Tensor> bias, Tensor in_degrees, Tensor out_degrees,
                     bool strict) {
  const Stairs s = stairs_of(in_degrees, out_degrees, strict);
  Tensor y = empty(input, {input.size(0), s.out});
  with_dtype<float, double>("masked_linear: x", input, [&]<typename T>() {
    linear<T>(s, data<T>(input), input.size(0), data<T>(weight), data<T>(bias), mutable_data<T>(y));
  });
  return y;
}

Tensor masked_linear_grad_input(Tensor grad_output, Tensor weight, Tensor in_degrees, Tensor out_degrees, bool strict) {
  const Stairs s = stairs_of(in_degrees, out_degrees, strict);
  Tensor grad = empty(grad_output, {grad_output.size(0), s.in});
  with_dtype<float, double>("masked_linear: grad_output", grad_output, [&]<typename T>() {
    linear_grad_input<T>(s, data<T>(grad_output), grad_output.size(0), data<T>(weight), mutable_data<T>(grad));
  });
  return grad;
}

Tensor masked_linear_grad_weight(Tensor grad_output, Tensor input, Tensor in_degrees, Tensor out_degrees, bool strict) {
  const Stairs s = stairs_of(in_degrees, out_degrees, strict);
  const int64_t samples = input.size(0);
  Tensor grad = empty(input, {s.out, s.in});
  with_dtype<float, double>("masked_linear: x", input, [&]<typename T>() {
    const int64_t width = stride_for<T>(s.in);
    Scratch<T> sorted(samples * width), signals(s.out * samples);
    gather_columns<T>(data<T>(input), samples, s.in, s.columns, sorted, width);
    const T* g = data<T>(grad_output);
    for_tasks(s.out, std::max<int64_t>(64, kWork / 8 / std::max<int64_t>(1, samples)), [&](int64_t begin, int64_t end) {
      turn(g + begin, s.out, samples, end - begin, [](int64_t r) { return r; }, signals + begin * samples, samples);
    });
    outer<T>(
        signals, samples, [&](int64_t r) { return s.rows[r]; }, sorted, width, samples, s.out, s.in,
        [&](int64_t r) { return s.depth[r]; }, [&](int64_t r) { return s.rows[r]; },
        s.plain ? nullptr : s.columns.data(), T(1), mutable_data<T>(grad));
  });
  return grad;
}

// ---- the inverse ------------------------------------------------------------------------------------------------

// Samples of a chunk of the solves: as few chunks as there are threads, but no more than what keeps a chunk's units in
// cache.
template <typename T>
int64_t chunk_for(int64_t samples) {
  const int64_t threads = torch::stable::get_num_threads(), most = 4 * kLanes<T>;
  return std::max<int64_t>(1, std::min(most, round_up((samples + threads - 1) / threads, kLanes<T>)));
}

template <typename T>
const T* from_row(const std::optional<Tensor>& t, int64_t row) {
  return t.has_value() ? data<T>(*t) + row * (t->dim() > 1 ? t->size(1) : 1) : nullptr;
}

// The backend of common/made.h.
struct Cpu {
  template <typename T, typename Maps>
  static void inverse(const Layers& layers, const Maps& maps, const Tensor& z, const std::optional<Tensor>& context,
                      const Tensor& x, const Tensor& ldj);
  template <typename T, typename Maps>
  static void inverse_backward(const Layers& layers, const Maps& maps, const std::optional<Tensor>& grad_x,
                               const std::optional<Tensor>& grad_ldj, const Tensor& x,
                               const std::optional<Tensor>& context, const std::vector<Tensor>& grads);
};

template <typename T, typename Maps>
void Cpu::inverse(const Layers& layers, const Maps& maps, const Tensor& z, const std::optional<Tensor>& context,
                  const Tensor& x, const Tensor& ldj) {
  const int64_t samples = z.size(0), features = z.size(1);
  const Call<T> call(layers, features, maps.params);
  const int64_t size = chunk_for<T>(samples);
  for_tasks((samples + size - 1) / size, 1, [&](int64_t begin, int64_t end) {
    Chunk<T> chunk(call.net, std::min(size, samples));
    const auto map = map_of<T>(maps, chunk.width);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i * size, count = std::min(size, samples - row);
      invert<T>(chunk, *map, data<T>(z) + row * features, from_row<T>(context, row), count,
                mutable_data<T>(x) + row * features, mutable_data<T>(ldj) + row);
    }
  });
}

template <typename T, typename Maps>
void Cpu::inverse_backward(const Layers& layers, const Maps& maps, const std::optional<Tensor>& grad_x,
                           const std::optional<Tensor>& grad_ldj, const Tensor& x, const std::optional<Tensor>& context,
                           const std::vector<Tensor>& grads) {
  const int64_t samples = x.size(0), D = x.size(1), P = maps.params, hidden = layers.hidden();
  const Call<T> call(layers, D, P);
  const Network<T>& net = call.net;
  const int64_t size = chunk_for<T>(samples);
  // For the weights' gradients: what each layer reads [N, padded], the features in the order of the steps, and each
  // layer's signal [H, N].
  std::vector<std::unique_ptr<Scratch<T>>> inputs, signals;
  std::vector<int64_t> padded, rows;
  for (int64_t l = 0; l <= hidden; ++l) {
    padded.push_back(stride_for<T>(net.inputs(l)));
    rows.push_back(l == hidden ? P * D : net.sizes[l]);
    inputs.push_back(std::make_unique<Scratch<T>>(samples * padded[l]));
    signals.push_back(std::make_unique<Scratch<T>>(samples * rows[l]));
  }
  for_tasks((samples + size - 1) / size, 1, [&](int64_t begin, int64_t end) {
    Chunk<T> chunk(net, std::min(size, samples));
    const int64_t width = chunk.width;
    const auto map = map_of<T>(maps, width);
    Scratch<T> params(P * D * width), solution(D * width);
    std::vector<std::unique_ptr<Scratch<T>>> own;
    for (int64_t n : net.sizes) own.push_back(std::make_unique<Scratch<T>>(n * width));
    const auto same = [](int64_t k) { return k; };
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i * size, count = std::min(size, samples - row);
      evaluate<T>(chunk, data<T>(x) + row * D, from_row<T>(context, row), count, params);
      solve_transposed<T>(chunk, *map, from_row<T>(grad_x, row), from_row<T>(grad_ldj, row), count, params, own,
                          solution);
      turn_back<T>(
          solution, width, count, D, [&](int64_t k) { return net.order[k]; }, mutable_data<T>(grads[0]) + row * D, D);
      for (int64_t l = 0; l <= hidden; ++l) {
        T* in = *inputs[l] + row * padded[l];
        turn_back<T>(chunk.input(l), width, count, net.inputs(l), same, in, padded[l]);
        for (int64_t n = 0; n < count; ++n)
          std::fill(in + n * padded[l] + net.inputs(l), in + (n + 1) * padded[l], T(0));
        const T* mine = l == hidden ? static_cast<T*>(params) : static_cast<T*>(*own[l]);
        for (int64_t r = 0; r < rows[l]; ++r) std::copy_n(mine + r * width, count, *signals[l] + r * samples + row);
      }
    }
  });
  T* by_context = mutable_data<T>(grads[1]);
  turn_back<T>(*signals[0], samples, samples, rows[0], [](int64_t r) { return r; }, by_context, rows[0]);
  for (int64_t i = 0; i < samples * rows[0]; ++i) by_context[i] = -by_context[i];
  for (int64_t l = 0; l <= hidden; ++l) {
    const T* g = *signals[l];
    const int64_t into = net.inputs(l);
    // the rows of the last layer: the parameters of a feature see the same units
    const auto row_of = [&](int64_t r) { return l == hidden ? net.output(r) : r; };
    const auto signal_at = [](int64_t r) { return r; };
    std::vector<int64_t> depth;
    for (int64_t k = 0; k <= D && l < hidden; ++k) depth.resize(net.counts[l][k], l == 0 ? k : net.counts[l - 1][k]);
    for (int64_t i = 0; i < D && l == hidden; ++i) depth.insert(depth.end(), P, net.counts[hidden - 1][i]);
    outer<T>(
        g, samples, signal_at, *inputs[l], padded[l], samples, rows[l], into, [&](int64_t r) { return depth[r]; },
        row_of, l == 0 && !call.is_natural(layers.order) ? net.order.data() : nullptr, T(-1),
        mutable_data<T>(grads[2 + 2 * l]));
    T* by_bias = mutable_data<T>(grads[3 + 2 * l]);
    for (int64_t r = 0; r < rows[l]; ++r)
      by_bias[row_of(r)] = T(-std::accumulate(g + r * samples, g + (r + 1) * samples, 0.0));
  }
}

// ---- the direction of one pass --------------------------------------------------------------------------------------

// Transforms one after the other; lists hold what each has, transform by transform.
struct Chain {
  const std::vector<Tensor>&contexts, &weights, &biases, &norms, &orders, &counts;
  bool residual;

  int64_t size() const { return int64_t(orders.size()); }
  int64_t layers() const { return size() ? int64_t(weights.size()) / size() : 0; }

  void check() const {
    const size_t K = orders.size();
    require(K >= 1 && counts.size() == K && weights.size() % K == 0 && layers() >= 2 &&
                biases.size() == weights.size() && (contexts.empty() || contexts.size() == K) &&
                (norms.empty() || norms.size() == 2 * K || norms.size() == 2 * K + 2),
            "made: a list must hold as many tensors for each transform, got ", K, " orders, ", counts.size(),
            " counts, ", weights.size(), " weights, ", biases.size(), " biases, ", norms.size(), " of ActNorms and ",
            contexts.size(), " contexts");
  }

  // Rows of the buffer.
  int64_t rows(int64_t features) const {
    int64_t count = size() * features;
    for (const Tensor& bias : biases) count += bias.size(0);
    return count;
  }
};

template <typename T>
struct Steps {
  const Chain& chain;
  std::vector<std::unique_ptr<Call<T>>> calls;
  std::vector<std::unique_ptr<Pass<T>>> passes;
  std::vector<int64_t> first;  // where the rows of each begin

  Steps(const Chain& c, const Tensor& x, const AffineMaps& maps, Columns columns) : chain(c) {
    const int64_t L = c.layers();
    int64_t next = 0;
    for (int64_t k = 0; k < c.size(); ++k) {
      const std::vector<Tensor> weights(c.weights.begin() + k * L, c.weights.begin() + (k + 1) * L);
      const std::vector<Tensor> biases(c.biases.begin() + k * L, c.biases.begin() + (k + 1) * L);
      calls.push_back(std::make_unique<Call<T>>(Layers{weights, biases, c.orders[k], c.counts[k], c.residual},
                                                x.size(1), maps.params, columns));
      passes.push_back(std::make_unique<Pass<T>>(calls.back()->net, x.size(0)));
      first.push_back(next);
      next += passes.back()->first.back();
    }
  }

  int64_t size() const { return chain.size(); }
  Norm<T> norm(int64_t k) const {
    if (int64_t(chain.norms.size()) <= 2 * k) return {};
    return {data<T>(chain.norms[2 * k]), data<T>(chain.norms[2 * k + 1])};
  }
  // The step of each feature in transform k.
  std::vector<int64_t> places(int64_t k) const {
    const std::vector<int64_t>& order = passes[k]->net.order;
    std::vector<int64_t> at(order.size());
    for (size_t i = 0; i < order.size(); ++i) at[order[i]] = int64_t(i);
    return at;
  }
};

template <typename T>
void run_chain(const Steps<T>& steps, const AffineMaps& maps, const T* x, T* kept, T* z, T* log_det) {
  const Pass<T>& any = *steps.passes[0];
  const int64_t D = any.net.features, K = steps.size(), stride = any.stride, N = any.samples;
  std::vector<double> total(N, 0.0);
  Scratch<T> out(D * stride);
  any.turn_in(x, kept);
  for (int64_t i = 0; i < D; ++i) steps.norm(0).apply(any.net.order[i], kept + i * stride, N);
  for (int64_t k = 0; k < K; ++k) {
    const Pass<T>& p = *steps.passes[k];
    T* next = k + 1 < K ? kept + steps.first[k + 1] * stride : static_cast<T*>(out);
    // what is behind the last transform keeps its order
    const std::vector<int64_t> at = steps.places(std::min(k + 1, K - 1));
    const auto row_of = [&](int64_t i) { return next + at[p.net.order[i]] * stride; };
    transform<T>(p, maps, steps.chain.contexts.empty() ? nullptr : data<T>(steps.chain.contexts[k]),
                 kept + steps.first[k] * stride, row_of, total.data());
    for (int64_t i = 0; i < D; ++i) {
      steps.norm(k + 1).apply(p.net.order[i], row_of(i), N);
      if (k + 1 < K) std::fill(row_of(i) + N, row_of(i) + stride, T(0));
    }
  }
  steps.passes[K - 1]->turn_out(out, z);
  double same = 0;
  for (int64_t k = 0; k <= K; ++k)
    for (int64_t i = 0; i < D && steps.norm(k).log_scale; ++i) same += double(steps.norm(k).log_scale[i]);
  for (int64_t n = 0; n < N; ++n) log_det[n] = T(total[n] + same);
}

// grads: of x, of the contexts, of the ActNorms' tensors and, if any, of the layers' weights and biases in turn.
template <typename T>
void run_chain_back(const Steps<T>& steps, const AffineMaps& maps, const T* by_z, const T* by_log_det, const T* kept,
                    const std::vector<Tensor>& grads) {
  const Pass<T>& any = *steps.passes[0];
  const int64_t D = any.net.features, K = steps.size(), L = steps.chain.layers(), stride = any.stride, N = any.samples;
  const int64_t contexts = steps.chain.contexts.size(), norms = steps.chain.norms.size();
  std::vector<T> by_log(stride, T(0));
  double of_all = 0;
  if (by_log_det) std::copy_n(by_log_det, N, by_log.begin());
  for (int64_t n = 0; n < N; ++n) of_all += double(by_log[n]);
  Scratch<T> given(D * stride);
  bool moved = by_z != nullptr;
  if (moved) steps.passes[K - 1]->turn_in(by_z, given);
  int64_t widest = 0;
  for (const auto& p : steps.passes) widest = std::max(widest, p->first.back());
  Scratch<T> signals(widest * stride);
  // From the gradients by the values that an ActNorm gives to those by what it takes, a feature's in a row.
  const auto norm_back = [&](int64_t k, int64_t feature, T* g, const T* value) {
    const Norm<T> norm = steps.norm(k);
    if (!norm.bias) return;
    const T scale = math::exp(norm.log_scale[feature]);
    mutable_data<T>(grads[2 + contexts + 2 * k])[feature] =
        T(sum_lanes<T>(N, [&](int64_t n) { return g[n] * value[n]; }) + of_all);
    for (int64_t n = 0; n < N; ++n) g[n] *= scale;
    mutable_data<T>(grads[1 + contexts + 2 * k])[feature] = T(sum_lanes<T>(N, [&](int64_t n) { return g[n]; }));
  };
  if (steps.norm(K).bias) {
    if (!moved) std::fill_n(static_cast<T*>(given), D * stride, T(0));
    moved = true;
    Scratch<T> row(stride);
    const T* units = kept + steps.first[K - 1] * stride;
    for (int64_t i = 0; i < D; ++i) {
      const int64_t feature = steps.passes[K - 1]->net.order[i];
      value_of<T>(*steps.passes[K - 1], maps, units, i, row);
      steps.norm(K).apply(feature, row, N);
      norm_back(K, feature, given + i * stride, row);
    }
  }
  for (int64_t k = K - 1; k >= 0; --k) {
    const Pass<T>& p = *steps.passes[k];
    const T* units = kept + steps.first[k] * stride;
    const int64_t* column = Call<T>::is_natural(steps.chain.orders[k]) ? nullptr : p.net.order.data();
    transform_backward<T>(p, maps, moved ? static_cast<T*>(given) : nullptr, by_log.data(), units, column, signals);
    moved = true;
    if (contexts)
      p.for_samples(4 * p.rows[0], [&](int64_t n0, int64_t count) {
        turn_back<T>(
            signals + p.at(0) + n0, stride, count, p.rows[0], [](int64_t r) { return r; },
            mutable_data<T>(grads[1 + k]) + n0 * p.rows[0], p.rows[0]);
      });
    std::vector<std::pair<T*, T*>> layers;
    for (size_t l = 1 + contexts + norms + 2 * k * L; l < grads.size() && int64_t(layers.size()) < L; l += 2)
      layers.emplace_back(mutable_data<T>(grads[l]), mutable_data<T>(grads[l + 1]));
    if (!layers.empty()) layers_backward<T>(p, units, signals, column, layers.data());
    const std::vector<int64_t> at = steps.places(std::max<int64_t>(k - 1, 0));
    for (int64_t i = 0; i < D; ++i) {
      T* g = signals + i * stride;
      norm_back(k, p.net.order[i], g, units + i * stride);
      std::copy_n(g, stride, given + at[p.net.order[i]] * stride);
    }
  }
  any.turn_out(given, mutable_data<T>(grads[0]));
}

// kept: what the backward pass reads; without `keep` it is nothing, [0, 0].
std::tuple<Tensor, Tensor, Tensor> made_forward(Tensor x, std::vector<Tensor> contexts, std::vector<Tensor> weights,
                                                std::vector<Tensor> biases, std::vector<Tensor> norms,
                                                std::vector<Tensor> orders, std::vector<Tensor> counts, bool residual,
                                                int64_t scale_map, double constant, bool keep) {
  const AffineMaps maps(scale_map, constant);
  const Chain chain{contexts, weights, biases, norms, orders, counts, residual};
  chain.check();
  const int64_t samples = x.size(0), rows = chain.rows(x.size(1)), stride = stride_of_samples(samples);
  Tensor z = empty(x), log_det = empty(x, {samples}), kept = empty(x, {keep ? rows : 0, keep ? stride : 0});
  if (samples == 0) return {z, log_det, kept};
  with_dtype<float, double>("made: x", x, [&]<typename T>() {
    Scratch<T> dropped(keep ? 0 : rows * stride);
    run_chain<T>(Steps<T>(chain, x, maps, Columns::kEitherWay), maps, data<T>(x),
                 keep ? mutable_data<T>(kept) : static_cast<T*>(dropped), mutable_data<T>(z), mutable_data<T>(log_det));
  });
  return {z, log_det, kept};
}

// Gradients of x, of the contexts, of the ActNorms' tensors and, with `by_layers`, of each layer's weight and bias.
std::vector<Tensor> made_forward_backward(std::optional<Tensor> grad_z, std::optional<Tensor> grad_ldj, Tensor x,
                                          Tensor kept, std::vector<Tensor> contexts, std::vector<Tensor> weights,
                                          std::vector<Tensor> biases, std::vector<Tensor> norms,
                                          std::vector<Tensor> orders, std::vector<Tensor> counts, bool residual,
                                          int64_t scale_map, double constant, bool by_layers) {
  const AffineMaps maps(scale_map, constant);
  const Chain chain{contexts, weights, biases, norms, orders, counts, residual};
  chain.check();
  const int64_t samples = x.size(0);
  const auto fresh = [&](const Tensor& like) { return samples ? empty(like) : zeros(like, shape_of(like)); };
  std::vector<Tensor> grads = {fresh(x)};
  for (const Tensor& context : contexts) grads.push_back(fresh(context));
  for (const Tensor& norm : norms) grads.push_back(fresh(norm));
  for (size_t l = 0; by_layers && l < weights.size(); ++l) {
    grads.push_back(fresh(weights[l]));
    grads.push_back(fresh(biases[l]));
  }
  if (samples == 0) return grads;
  require(kept.dim() == 2 && kept.size(0) == chain.rows(x.size(1)) && kept.size(1) == stride_of_samples(samples),
          "made: kept must be what made_forward gave for these arguments");
  with_dtype<float, double>("made: x", x, [&]<typename T>() {
    run_chain_back<T>(Steps<T>(chain, x, maps, Columns::kAsTheyLie), maps, data<T>(grad_z), data<T>(grad_ldj),
                      data<T>(kept), grads);
  });
  return grads;
}

}  // namespace
}  // namespace made
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels, CPU, m) {
  using namespace genkernels::made;
  m.impl("masked_linear", TORCH_BOX(&masked_linear));
  m.impl("masked_linear_grad_input", TORCH_BOX(&masked_linear_grad_input));
  m.impl("masked_linear_grad_weight", TORCH_BOX(&masked_linear_grad_weight));
  m.impl("made_forward", TORCH_BOX(&made_forward));
  m.impl("made_forward_backward", TORCH_BOX(&made_forward_backward));
  m.impl("made_inverse", TORCH_BOX(&made_inverse<Cpu>));
  m.impl("made_inverse_backward", TORCH_BOX(&made_inverse_backward<Cpu>));
  m.impl("made_spline_inverse", TORCH_BOX(&made_spline_inverse<Cpu>));
  m.impl("made_spline_inverse_backward", TORCH_BOX(&made_spline_inverse_backward<Cpu>));
}
