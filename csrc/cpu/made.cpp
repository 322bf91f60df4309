// Masked linear layers and the inverse of an autoregressive affine transform on the CPU (Germain et al. 2015;
// Papamakarios et al. 2017).
//
//   y = (W ⊙ M) x + b, M by degrees;      z_i = x_i σ(s_i) + t_i with (s, t)_i made of x_{<i}: x from z, and the
//   gradient of that
//
// One product serves all (made_product.h). Samples are turned so that they lie side by side; rows and columns are taken
// in the order of their degrees, in which a masked weight is a staircase: a group of rows multiplies the inputs that
// all of it sees, then each row its few more. Dead weights are not read (but for the gradient's zeros, not written
// either): half the flops of the dense product.
//
// The inverse (made_solve.h) is a blocked nonlinear triangular solve. Features come in blocks of kBlock. What the
// features and units known before the block give to the block's units is added in whole products, one a layer; inside
// the block go feature by feature: its s and t, x, then the units of each layer whose degree has just become known,
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
#include "made_solve.h"

#include <functional>
#include <numeric>

namespace genkernels {
namespace {

using namespace product;

// Multiply-adds below which a task is not worth a thread of its own, some 5 µs of them: waking one takes 1 to 10 µs.
constexpr int64_t kWork = 128 * 1024;

void for_tasks(int64_t tasks, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (tasks > 0) torch::stable::parallel_for(0, tasks, grain, body);
}

// ---- masked linear ----------------------------------------------------------------------------------------------

// Indices by ascending key in [0, keys), equal ones in their order.
std::vector<int64_t> sorted_by(const std::vector<int64_t>& key, int64_t keys) {
  std::vector<int64_t> at(keys + 1, 0), order(key.size());
  for (int64_t k : key) ++at[k + 1];
  for (int64_t k = 0; k < keys; ++k) at[k + 1] += at[k];
  for (size_t i = 0; i < key.size(); ++i) order[at[key[i]]++] = int64_t(i);
  return order;
}

// The staircase of a mask: columns by degree, rows by how many of those they see.
struct Stairs {
  int64_t out, in;
  std::vector<int64_t> columns, rows, depth;  // permutations; depth [out], in the order of `rows`
  int64_t live() const { return std::accumulate(depth.begin(), depth.end(), int64_t(0)); }
  bool plain;  // columns are in place already
};

Stairs stairs_of(const Tensor& in_degrees, const Tensor& out_degrees, bool strict) {
  Stairs s{out_degrees.size(0), in_degrees.size(0), {}, {}, {}, true};
  const int64_t* into = data<int64_t>(in_degrees);
  const int64_t* out = data<int64_t>(out_degrees);
  s.plain = std::is_sorted(into, into + s.in);
  s.columns.resize(s.in);
  std::iota(s.columns.begin(), s.columns.end(), 0);
  if (!s.plain)
    std::stable_sort(s.columns.begin(), s.columns.end(), [&](int64_t a, int64_t b) { return into[a] < into[b]; });
  std::vector<int64_t> sorted(s.in), depth(s.out);
  for (int64_t k = 0; k < s.in; ++k) sorted[k] = into[s.columns[k]];
  for (int64_t r = 0; r < s.out; ++r)
    depth[r] = (strict ? std::lower_bound(sorted.begin(), sorted.end(), out[r])
                       : std::upper_bound(sorted.begin(), sorted.end(), out[r])) -
               sorted.begin();
  s.rows = sorted_by(depth, s.in + 1);
  s.depth.resize(s.out);
  for (int64_t r = 0; r < s.out; ++r) s.depth[r] = depth[s.rows[r]];
  return s;
}

// A copy with columns in the order given (rows of `width` numbers, of which `columns` count, zeros beyond).
template <typename T>
void gather_columns(const T* from, int64_t rows, int64_t stride, const std::vector<int64_t>& columns, T* to,
                    int64_t width) {
  const int64_t count = int64_t(columns.size());
  for_tasks(rows, std::max<int64_t>(1, kWork / 8 / std::max<int64_t>(1, width)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t k = 0; k < count; ++k) to[r * width + k] = from[r * stride + columns[k]];
      std::fill(to + r * width + count, to + (r + 1) * width, T(0));
    }
  });
}

// Samples of a chunk, and into how many parts the rows are cut when there are fewer chunks than threads. live: weights
// that act.
template <typename T>
struct Cut {
  int64_t size, chunks, parts, grain;
  Cut(int64_t samples, int64_t groups, int64_t live) {
    const int64_t most = 8 * kLanes<T>;
    chunks = (samples + most - 1) / most;
    size = chunks ? round_up((samples + chunks - 1) / chunks, kLanes<T>) : 0;
    chunks = size ? (samples + size - 1) / size : 0;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t each = std::max<int64_t>(1, size * live);
    parts = chunks == 0 || chunks >= threads ? 1 : std::min({(threads + chunks - 1) / chunks, groups, each / kWork});
    parts = std::max<int64_t>(parts, 1);
    grain = std::max<int64_t>(1, kWork * parts / each);
  }
};

constexpr int64_t kGroup = 8 * kRows;  // rows (columns, for the input's gradient) that a part takes at once

template <typename T>
void linear(const Stairs& s, const T* x, int64_t samples, const T* weight, const T* bias, T* y) {
  const int64_t groups = (s.out + kGroup - 1) / kGroup;
  const Cut<T> cut(samples, groups, s.live());
  Scratch<T> gathered(s.plain ? 0 : s.out * s.in);
  if (!s.plain) gather_columns<T>(weight, s.out, s.in, s.columns, gathered, s.in);
  const T* w = s.plain ? weight : static_cast<T*>(gathered);
  for_tasks(cut.chunks * cut.parts, cut.grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % cut.parts, first = task / cut.parts * cut.size,
                    count = std::min(cut.size, samples - first);
      const int64_t width = round_up(count, kLanes<T>);
      Scratch<T> act(s.in * width), out(kGroup * width);
      turn(x + first * s.in, s.in, count, s.in, [&](int64_t k) { return s.columns[k]; }, static_cast<T*>(act), width);
      for (int64_t g = part; g < groups; g += cut.parts) {
        const int64_t from = g * kGroup, rows = std::min(kGroup, s.out - from);
        const T* pointers[kGroup];
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t row = s.rows[from + r];
          pointers[r] = w + row * s.in;
          std::fill_n(out + r * width, width, bias ? bias[row] : T(0));
        }
        staircase<T>(pointers, rows, 1, act, width, [&](int64_t r) { return s.depth[from + r]; }, out, width, width);
        turn_back(
            static_cast<const T*>(out), width, count, rows, [&](int64_t r) { return s.rows[from + r]; },
            y + first * s.out, s.out);
      }
    }
  });
}

// grad_x = g (W ⊙ M): the same over columns, the deepest first, rows from the last one backwards, over panels of packed
// columns.
template <typename T>
void linear_grad_input(const Stairs& s, const T* g, int64_t samples, const T* weight, T* grad_x) {
  const int64_t groups = (s.in + kGroup - 1) / kGroup;
  const Cut<T> cut(samples, groups, s.live());
  std::vector<int64_t> live(s.in);  // rows that see a column (in the order of columns): the last live[k] of them
  for (int64_t k = 0; k < s.in; ++k) live[k] = s.depth.end() - std::upper_bound(s.depth.begin(), s.depth.end(), k);
  for_tasks(cut.chunks * cut.parts, cut.grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % cut.parts, first = task / cut.parts * cut.size,
                    count = std::min(cut.size, samples - first);
      const int64_t width = round_up(count, kLanes<T>);
      Scratch<T> act(s.out * width), out(kGroup * width), panel(kGroup * s.out);
      turn(
          g + first * s.out, s.out, count, s.out, [&](int64_t r) { return s.rows[s.out - 1 - r]; },
          static_cast<T*>(act), width);
      for (int64_t group = part; group < groups; group += cut.parts) {
        const int64_t from = group * kGroup, columns = std::min(kGroup, s.in - from);
        const auto column = [&](int64_t j) { return s.columns[from + columns - 1 - j]; };  // ascending in live rows
        const int64_t deepest = live[from];
        for (int64_t r = 0; r < deepest; ++r) {
          const T* row = weight + s.rows[s.out - 1 - r] * s.in;
          T* to = panel + r * columns;
          if (s.plain)
            std::copy_n(row + from, columns, to);
          else
            for (int64_t j = 0; j < columns; ++j) to[j] = row[s.columns[from + j]];
        }
        const T* pointers[kGroup];
        for (int64_t j = 0; j < columns; ++j) pointers[j] = panel + (columns - 1 - j);
        std::fill_n(static_cast<T*>(out), columns * width, T(0));
        staircase<T>(
            pointers, columns, columns, act, width, [&](int64_t j) { return live[from + columns - 1 - j]; }, out, width,
            width);
        turn_back(static_cast<const T*>(out), width, count, columns, column, grad_x + first * s.in, s.in);
      }
    }
  });
}

// The stride of rows of n numbers in whole vectors, off the powers of two that would put all rows into the same few
// cache sets.
template <typename T>
int64_t stride_for(int64_t n) {
  const int64_t stride = round_up(n, kLanes<T>);
  return stride * int64_t(sizeof(T)) % 512 == 0 ? stride + kLanes<T> : stride;
}

// grad[row(r)][column[k]] = ±Σ_n g[r][n]·u[n][k] for the k < depth(r) that row r sees, 0 elsewhere (column null: k). u
// has a stride of `width`, whole vectors in a row; r counts in the order of ascending depth and has its signals, the
// samples side by side, at g_at(r).
template <typename T, typename GAt, typename Depth, typename Row>
void outer(const T* g, int64_t stride, GAt g_at, const T* u, int64_t width, int64_t samples, int64_t rows,
           int64_t columns, Depth depth, Row row, const int64_t* column, T sign, T* grad) {
  const int64_t groups = (rows + kRows - 1) / kRows;
  for_tasks(groups, std::max<int64_t>(1, kWork / std::max<int64_t>(1, columns * samples * kRows / 2)),
            [&](int64_t begin, int64_t end) {
              Scratch<T> out(kRows * width);
              for (int64_t task = begin; task < end; ++task) {
                // groups from both ends in turn: shallow and deep ones are shared out evenly
                const int64_t group = task % 2 ? groups - 1 - task / 2 : task / 2;
                const int64_t from = group * kRows, high = std::min<int64_t>(kRows, rows - from);
                const int64_t wide = round_up(depth(from + high - 1), kLanes<T>);
                const T* pointers[kRows];
                for (int64_t j = 0; j < high; ++j) {
                  pointers[j] = g + g_at(from + j) * stride;
                  std::fill_n(out + j * width, wide, T(0));
                }
                // in strips that the first-level cache holds
                for (int64_t n = 0; n < wide; n += kVectors * kLanes<T>)
                  multiply<T>(pointers, high, 1, u + n, width, samples, out + n, width,
                              std::min(kVectors * kLanes<T>, wide - n));
                for (int64_t j = 0; j < high; ++j) {
                  T* to = grad + row(from + j) * columns;
                  const T* found = out + j * width;
                  const int64_t live = depth(from + j);
                  if (column == nullptr) {
                    for (int64_t k = 0; k < live; ++k) to[k] = sign * found[k];
                    std::fill(to + live, to + columns, T(0));
                  } else {
                    for (int64_t k = 0; k < live; ++k) to[column[k]] = sign * found[k];
                    for (int64_t k = live; k < columns; ++k) to[column[k]] = T(0);
                  }
                }
              }
            });
}

template <typename F>
auto with_dtype(const Tensor& t, F&& f) {
  if (t.scalar_type() == ScalarType::Double) return f.template operator()<double>();
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "made: the CPU kernels take float64 and float32");
  return f.template operator()<float>();
}

Tensor masked_linear(Tensor input, Tensor weight, std::optional<Tensor> bias, Tensor in_degrees, Tensor out_degrees,
                     bool strict) {
  const Stairs s = stairs_of(in_degrees, out_degrees, strict);
  Tensor y = empty(input, {input.size(0), s.out}, input.scalar_type());
  with_dtype(input, [&]<typename T>() {
    linear<T>(s, data<T>(input), input.size(0), data<T>(weight), data<T>(bias), mutable_data<T>(y));
  });
  return y;
}

Tensor masked_linear_grad_input(Tensor grad_output, Tensor weight, Tensor in_degrees, Tensor out_degrees, bool strict) {
  const Stairs s = stairs_of(in_degrees, out_degrees, strict);
  Tensor grad = empty(grad_output, {grad_output.size(0), s.in}, grad_output.scalar_type());
  with_dtype(grad_output, [&]<typename T>() {
    linear_grad_input<T>(s, data<T>(grad_output), grad_output.size(0), data<T>(weight), mutable_data<T>(grad));
  });
  return grad;
}

Tensor masked_linear_grad_weight(Tensor grad_output, Tensor input, Tensor in_degrees, Tensor out_degrees, bool strict) {
  const Stairs s = stairs_of(in_degrees, out_degrees, strict);
  const int64_t samples = input.size(0);
  Tensor grad = empty(input, {s.out, s.in}, input.scalar_type());
  with_dtype(input, [&]<typename T>() {
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
  made::Network<T> net;
  Scratch<T> first;  // the first layer's weight with columns in the order of the steps, where that is not the data's

  Call(int64_t features, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, const Tensor& order,
       const Tensor& counts, bool residual, int64_t map)
      : first(is_natural(order) ? 0 : weights[0].size(0) * features) {
    net.features = features;
    net.residual = residual;
    net.map = static_cast<ScaleMap>(map);
    const int64_t hidden = int64_t(weights.size()) - 1;
    net.order.assign(data<int64_t>(order), data<int64_t>(order) + features);
    std::vector<bool> seen(features, false);
    for (int64_t i : net.order) {
      STD_TORCH_CHECK(i >= 0 && i < features && !seen[i], "made: order must be a permutation of 0 to ", features - 1);
      seen[i] = true;
    }
    for (int64_t l = 0; l <= hidden; ++l) {
      net.weights.push_back(data<T>(weights[l]));
      net.biases.push_back(data<T>(biases[l]));
      if (l == hidden) break;
      net.sizes.push_back(weights[l].size(0));
      const int64_t* c = data<int64_t>(counts) + l * (features + 1);
      net.counts.push_back(c);
      bool fine = c[0] >= 0 && c[features] == net.sizes[l];
      for (int64_t k = 0; k < features; ++k) fine = fine && c[k] <= c[k + 1];
      STD_TORCH_CHECK(
          fine,
          "made: counts must ascend from 0 or more to the number of units in each hidden layer, they do not in layer ",
          l);
      for (int64_t k = 0; net.joins(l) && k <= features; ++k)
        STD_TORCH_CHECK(c[k] <= net.counts[l - 2][k],
                        "made: a residual block must not add a unit to one of a lower degree, it does in layer ", l);
    }
    if (!is_natural(order)) {
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

std::tuple<Tensor, Tensor> made_inverse(Tensor z, std::optional<Tensor> context, std::vector<Tensor> weights,
                                        std::vector<Tensor> biases, Tensor order, Tensor counts, bool residual,
                                        int64_t scale_map) {
  const int64_t samples = z.size(0), features = z.size(1);
  Tensor x = empty(z, {samples, features}, z.scalar_type()), ldj = empty(z, {samples}, z.scalar_type());
  if (samples == 0) return {x, ldj};
  with_dtype(z, [&]<typename T>() {
    const Call<T> call(features, weights, biases, order, counts, residual, scale_map);
    const int64_t size = chunk_for<T>(samples);
    for_tasks((samples + size - 1) / size, 1, [&](int64_t begin, int64_t end) {
      made::Chunk<T> chunk(call.net, std::min(size, samples));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i * size, count = std::min(size, samples - row);
        made::invert<T>(chunk, data<T>(z) + row * features, from_row<T>(context, row), count,
                        mutable_data<T>(x) + row * features, mutable_data<T>(ldj) + row);
      }
    });
  });
  return {x, ldj};
}

std::vector<Tensor> made_inverse_backward(std::optional<Tensor> grad_x, std::optional<Tensor> grad_ldj, Tensor x,
                                          std::optional<Tensor> context, std::vector<Tensor> weights,
                                          std::vector<Tensor> biases, Tensor order, Tensor counts, bool residual,
                                          int64_t scale_map) {
  const int64_t samples = x.size(0), D = x.size(1), layers = int64_t(weights.size()), hidden = layers - 1;
  std::vector<Tensor> grads = {empty(x, {samples, D}, x.scalar_type()),
                               empty(x, {samples, weights[0].size(0)}, x.scalar_type())};
  for (int64_t l = 0; l < layers; ++l) {
    grads.push_back(empty(x, shape_of(weights[l]), x.scalar_type()));
    grads.push_back(empty(x, shape_of(biases[l]), x.scalar_type()));
  }
  with_dtype(x, [&]<typename T>() {
    const Call<T> call(D, weights, biases, order, counts, residual, scale_map);
    const made::Network<T>& net = call.net;
    const int64_t size = chunk_for<T>(samples);
    // For the weights' gradients: what each layer reads [N, padded], the features in the order of the steps, and each
    // layer's signal [H, N].
    std::vector<std::unique_ptr<Scratch<T>>> inputs, signals;
    std::vector<int64_t> padded, rows;
    for (int64_t l = 0; l < layers; ++l) {
      padded.push_back(stride_for<T>(net.inputs(l)));
      rows.push_back(l == hidden ? 2 * D : net.sizes[l]);
      inputs.push_back(std::make_unique<Scratch<T>>(samples * padded[l]));
      signals.push_back(std::make_unique<Scratch<T>>(samples * rows[l]));
    }
    for_tasks((samples + size - 1) / size, 1, [&](int64_t begin, int64_t end) {
      made::Chunk<T> chunk(net, std::min(size, samples));
      const int64_t width = chunk.width;
      Scratch<T> params(2 * D * width), solution(D * width);
      std::vector<std::unique_ptr<Scratch<T>>> own;
      for (int64_t n : net.sizes) own.push_back(std::make_unique<Scratch<T>>(n * width));
      const auto same = [](int64_t k) { return k; };
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i * size, count = std::min(size, samples - row);
        made::evaluate<T>(chunk, data<T>(x) + row * D, from_row<T>(context, row), count, params);
        made::solve_transposed<T>(chunk, from_row<T>(grad_x, row), from_row<T>(grad_ldj, row), count, params, own,
                                  solution);
        turn_back<T>(
            solution, width, count, D, [&](int64_t k) { return net.order[k]; }, mutable_data<T>(grads[0]) + row * D, D);
        for (int64_t l = 0; l < layers; ++l) {
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
    for (int64_t l = 0; l < layers; ++l) {
      const T* g = *signals[l];
      const int64_t into = net.inputs(l);
      // the rows of the last layer: s and t of a feature see the same units
      const auto row_of = [&](int64_t r) { return l == hidden ? (r % 2) * D + net.order[r / 2] : r; };
      const auto signal_at = [&](int64_t r) { return l == hidden ? (r % 2) * D + r / 2 : r; };
      std::vector<int64_t> depth;
      for (int64_t k = 0; k <= D && l < hidden; ++k) depth.resize(net.counts[l][k], l == 0 ? k : net.counts[l - 1][k]);
      for (int64_t i = 0; i < D && l == hidden; ++i) depth.insert(depth.end(), 2, net.counts[hidden - 1][i]);
      outer<T>(
          g, samples, signal_at, *inputs[l], padded[l], samples, rows[l], into, [&](int64_t r) { return depth[r]; },
          row_of, l == 0 && !call.is_natural(order) ? net.order.data() : nullptr, T(-1),
          mutable_data<T>(grads[2 + 2 * l]));
      T* by_bias = mutable_data<T>(grads[3 + 2 * l]);
      for (int64_t r = 0; r < rows[l]; ++r)
        by_bias[row_of(r)] = T(-std::accumulate(g + signal_at(r) * samples, g + (signal_at(r) + 1) * samples, 0.0));
    }
  });
  return grads;
}

}  // namespace
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels, CPU, m) {
  m.impl("masked_linear", TORCH_BOX(&genkernels::masked_linear));
  m.impl("masked_linear_grad_input", TORCH_BOX(&genkernels::masked_linear_grad_input));
  m.impl("masked_linear_grad_weight", TORCH_BOX(&genkernels::masked_linear_grad_weight));
  m.impl("made_inverse", TORCH_BOX(&genkernels::made_inverse));
  m.impl("made_inverse_backward", TORCH_BOX(&genkernels::made_inverse_backward));
}
