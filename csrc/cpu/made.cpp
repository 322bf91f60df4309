// Masked linear layers and the inverse of an autoregressive transform on the CPU (Germain et al. 2015; Papamakarios et
// al. 2017; Durkan et al. 2019).
//
//   y = (W ⊙ M) x + b         M by degrees; its two gradients
//   z_i = f(x_i; p_i)         p_i made of x_{<i}; x from z, and the gradient of that
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
// Parallel over chunks of samples, for layers also over groups of rows: a sum is always added up in the same order, so
// neither the batch nor the threads change its bits. A thread is started for no less than kWork multiply-adds: below, a
// call is a few microseconds of its own beside those of torch's dispatch. Bytes: the live weights once a chunk, from
// the outer caches; the floor is the flops.
#include "made/linear.h"
#include "made/solve.h"

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

// The network of a call; every count and index that memory is addressed by is checked here, for nothing above reads
// their values.
template <typename T>
struct Call {
  Network<T> net;
  Scratch<T> first;  // the first layer's weight with columns in the order of the steps, where that is not the data's

  Call(const Layers& layers, int64_t features, int64_t params)
      : first(is_natural(layers.order) ? 0 : layers.weights[0].size(0) * features) {
    net.features = features;
    net.params = params;
    net.residual = layers.residual;
    const int64_t hidden = layers.hidden();
    net.order.assign(data<int64_t>(layers.order), data<int64_t>(layers.order) + features);
    std::vector<bool> seen(features, false);
    for (int64_t i : net.order) {
      require(i >= 0 && i < features && !seen[i], "made: order must be a permutation of 0 to ", features - 1);
      seen[i] = true;
    }
    for (int64_t l = 0; l <= hidden; ++l) {
      net.weights.push_back(data<T>(layers.weights[l]));
      net.biases.push_back(data<T>(layers.biases[l]));
      if (l == hidden) break;
      net.sizes.push_back(layers.weights[l].size(0));
      const int64_t* c = data<int64_t>(layers.counts) + l * (features + 1);
      net.counts.push_back(c);
      bool fine = c[0] >= 0 && c[features] == net.sizes[l];
      for (int64_t k = 0; k < features; ++k) fine = fine && c[k] <= c[k + 1];
      require(
          fine,
          "made: counts must ascend from 0 or more to the number of units in each hidden layer, they do not in layer ",
          l);
      for (int64_t k = 0; net.joins(l) && k <= features; ++k)
        require(c[k] <= net.counts[l - 2][k],
                "made: a residual block must not add a unit to one of a lower degree, it does in layer ", l);
    }
    if (!is_natural(layers.order)) {
      gather_columns<T>(net.weights[0], net.sizes[0], features, net.order, first, features);
      net.weights[0] = first;
    }
  }

  static bool is_natural(const Tensor& order) {
    const int64_t* o = data<int64_t>(order);
    for (int64_t i = 0; i < order.size(0); ++i)
      if (o[i] != i) return false;
    return true;
  }
};

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

}  // namespace
}  // namespace made
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels, CPU, m) {
  using namespace genkernels::made;
  m.impl("masked_linear", TORCH_BOX(&masked_linear));
  m.impl("masked_linear_grad_input", TORCH_BOX(&masked_linear_grad_input));
  m.impl("masked_linear_grad_weight", TORCH_BOX(&masked_linear_grad_weight));
  m.impl("made_inverse", TORCH_BOX(&made_inverse<Cpu>));
  m.impl("made_inverse_backward", TORCH_BOX(&made_inverse_backward<Cpu>));
  m.impl("made_spline_inverse", TORCH_BOX(&made_spline_inverse<Cpu>));
  m.impl("made_spline_inverse_backward", TORCH_BOX(&made_spline_inverse_backward<Cpu>));
}
