// The direction of one pass: z and the log-determinant from x, and the gradients of both, layer by layer over all
// samples; transforms one after the other, ActNorms between them.
//
// Everything lies with the samples side by side, [rows, stride], in one buffer: of each transform what it reads, the
// features in the order of its steps, then the units of its hidden layers, after their ReLU (before it where a residual
// block adds to them), then the parameters, feature by feature. Another order in the next transform is another order of
// rows. It is what the backward pass needs, so it is kept as it is: no more numbers than autograd keeps of the layers
// one by one. A task takes a chunk of samples and, where there are fewer of those than threads, some of the rows; the
// sums are added up in one order whatever the cut.
#pragma once

#include "../sums.h"
#include "call.h"

namespace genkernels {
namespace made {
namespace {

// Numbers from one row to the next: whole vectors in every build, off the powers of two that would put all rows into
// the same few cache sets. genkernels/reference/made.py has the same rule.
inline int64_t stride_of_samples(int64_t samples) {
  const int64_t stride = round_up(samples, 16);
  return stride % 128 == 0 ? stride + 16 : stride;
}

// From this stride on a task copies its samples' inputs together: rows a page apart would cost a translation each.
constexpr int64_t kFar = 256;

template <typename T>
struct Pass {
  const Network<T>& net;
  const int64_t samples, stride;
  std::vector<int64_t> rows, first;         // of each layer, the last giving the parameters; where its rows begin
  std::vector<std::vector<int64_t>> depth;  // of each row: how many inputs it sees
  std::vector<int64_t> outputs;             // where each row of the last layer stands in its weight

  Pass(const Network<T>& network, int64_t count) : net(network), samples(count), stride(stride_of_samples(count)) {
    const int64_t D = net.features, P = net.params, hidden = net.hidden();
    int64_t next = D;
    for (int64_t l = 0; l <= hidden; ++l) {
      rows.push_back(l == hidden ? P * D : net.sizes[l]);
      first.push_back(next);
      next += rows[l];
      std::vector<int64_t> seen;
      for (int64_t k = 0; k <= D && l < hidden; ++k) seen.resize(net.counts[l][k], l == 0 ? k : net.counts[l - 1][k]);
      for (int64_t i = 0; i < D && l == hidden; ++i) seen.insert(seen.end(), P, net.counts[hidden - 1][i]);
      depth.push_back(std::move(seen));
    }
    first.push_back(next);
    for (int64_t r = 0; r < P * D; ++r) outputs.push_back(net.output(r));
  }

  int64_t row_of(int64_t layer, int64_t r) const { return layer == net.hidden() ? outputs[r] : r; }
  int64_t at(int64_t layer, int64_t r = 0) const { return (first[layer] + r) * stride; }
  // Whether a hidden layer's units are kept as they are before their ReLU, and whether a layer reads such ones after
  // it.
  bool raw(int64_t layer) const { return net.residual && layer % 2 == 0; }
  bool curves(int64_t layer) const { return layer > 0 && raw(layer - 1) && !net.linear(layer - 1); }
  int64_t live(int64_t layer) const { return std::accumulate(depth[layer].begin(), depth[layer].end(), int64_t(0)); }

  // Calls body(first sample, how many) for chunks of samples, each number of a chunk costing about `work`.
  template <typename F>
  void for_samples(int64_t work, F&& body) const {
    constexpr int64_t unit = 16;
    const int64_t grain = std::max<int64_t>(1, kWork / (unit * std::max<int64_t>(1, work)));
    for_tasks((samples + unit - 1) / unit, grain,
              [&](int64_t begin, int64_t end) { body(begin * unit, std::min(end * unit, samples) - begin * unit); });
  }

  // x [N, D] to [D, stride] in the order of the steps, zeros beyond the samples; and back.
  void turn_in(const T* x, T* to) const {
    const int64_t D = net.features;
    for_samples(4 * D, [&](int64_t n, int64_t count) {
      const int64_t end = n + count == samples ? stride : n + count;
      for (int64_t k = 0; k < D; ++k) {
        const T* from = x + n * D + net.order[k];
        T* row = to + k * stride;
        for (int64_t i = 0; i < count; ++i) row[n + i] = from[i * D];
        std::fill(row + n + count, row + end, T(0));
      }
    });
  }
  void turn_out(const T* from, T* x) const {
    const int64_t D = net.features;
    for_samples(4 * D, [&](int64_t n, int64_t count) {
      turn_back(from + n, stride, count, D, [&](int64_t k) { return net.order[k]; }, x + n * D, D);
    });
  }
};

// The inputs of a chunk as `multiply` takes them: where they lie, or copied together, after their ReLU if they lie
// there before it. stride < 0: from the last row on.
template <typename T>
struct Near {
  Scratch<T> copy;
  const T* act;
  int64_t ld;
  Near(const T* from, int64_t stride, int64_t rows, int64_t width, bool raw)
      : copy(raw || std::abs(stride) >= kFar ? rows * width : 0), act(from), ld(stride) {
    if (!raw && std::abs(stride) < kFar) return;
    for (int64_t k = 0; k < rows; ++k) {
      const T* row = from + k * stride;
      T* to = copy + k * width;
      if (raw)
        for (int64_t n = 0; n < width; ++n) to[n] = row[n] < T(0) ? T(0) : row[n];
      else
        std::copy_n(row, width, to);
    }
    act = copy;
    ld = width;
  }
};

// One layer: its rows of `units` from those of the layer before, or from x.
template <typename T>
void run_layer(const Pass<T>& p, int64_t layer, const T* context, T* units) {
  const Network<T>& net = p.net;
  const int64_t rows = p.rows[layer], into = net.inputs(layer), stride = p.stride;
  const int64_t groups = (rows + kGroup - 1) / kGroup, step = layer == 0 ? net.step : 1;
  const bool hidden = layer < net.hidden(), joins = hidden && net.joins(layer), curved = hidden && !p.raw(layer);
  const std::vector<int64_t>& depth = p.depth[layer];
  const T* inputs = layer == 0 ? units : units + p.at(layer - 1);
  const Cut<T> cut(p.samples, groups, p.live(layer) + rows);
  for_tasks(cut.chunks * cut.parts, cut.grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % cut.parts, n0 = task / cut.parts * cut.size;
      const int64_t count = std::min(cut.size, p.samples - n0), width = round_up(count, kLanes<T>);
      const int64_t last = n0 + count == p.samples ? stride - n0 : count;  // zeros from `count` up to here
      const Near<T> near(inputs + n0, stride, into, width, p.curves(layer));
      for (int64_t g = part; g < groups; g += cut.parts) {
        const int64_t from = g * kGroup, high = std::min(kGroup, rows - from);
        T* out = units + p.at(layer, from) + n0;
        const T* w[kGroup];
        for (int64_t r = 0; r < high; ++r) {
          const int64_t row = p.row_of(layer, from + r);
          w[r] = net.weights[layer] + row * into + (step < 0 ? into - 1 : 0);
          std::fill_n(out + r * stride, width, net.biases[layer][row]);
        }
        if (context && layer == 0)
          for (int64_t n = 0; n < count; ++n)
            for (int64_t r = 0; r < high; ++r) out[r * stride + n] += context[(n0 + n) * rows + from + r];
        staircase<T>(w, high, step, near.act, near.ld, [&](int64_t r) { return depth[from + r]; }, out, stride, width);
        for (int64_t r = 0; r < high; ++r) {
          T* u = out + r * stride;
          if (joins) {
            const T* v = units + p.at(layer - 2, from + r) + n0;
            for (int64_t n = 0; n < width; ++n) u[n] += v[n];
          }
          if (curved)
            for (int64_t n = 0; n < width; ++n) u[n] = u[n] < T(0) ? T(0) : u[n];
          std::fill(u + count, u + last, T(0));
        }
      }
    }
  });
}

// column: of the first weight in the order of the steps, or null where that is the data's.
//
// The signals of what a layer reads from those that it has itself, the first layer's added to what lies there. The
// deepest column comes first and the rows from the last one backwards, over panels of packed columns.
template <typename T>
void run_back(const Pass<T>& p, int64_t layer, const T* units, const int64_t* column, T* signals) {
  const Network<T>& net = p.net;
  const int64_t rows = p.rows[layer], into = net.inputs(layer), stride = p.stride, below = layer - 1;
  const int64_t groups = (into + kGroup - 1) / kGroup, top = net.hidden() - 1;
  const std::vector<int64_t>& depth = p.depth[layer];
  std::vector<int64_t> live(into);  // rows that see a column: the last live[k] of them
  for (int64_t k = 0; k < into; ++k) live[k] = depth.end() - std::upper_bound(depth.begin(), depth.end(), k);
  T* target = layer == 0 ? signals : signals + p.at(below);
  const Cut<T> cut(p.samples, groups, p.live(layer) + into);
  for_tasks(cut.chunks * cut.parts, cut.grain, [&](int64_t begin, int64_t end) {
    Scratch<T> panel(kGroup * rows);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % cut.parts, n0 = task / cut.parts * cut.size;
      const int64_t width = round_up(std::min(cut.size, p.samples - n0), kLanes<T>);
      const Near<T> near(signals + p.at(layer, rows - 1) + n0, -stride, rows, width, false);
      for (int64_t g = part; g < groups; g += cut.parts) {
        const int64_t from = g * kGroup, columns = std::min(kGroup, into - from);
        for (int64_t r = 0; r < live[from]; ++r) {
          const T* row = net.weights[layer] + p.row_of(layer, rows - 1 - r) * into;
          T* to = panel + r * columns;
          if (layer > 0 || !column)
            std::copy_n(row + from, columns, to);
          else
            for (int64_t j = 0; j < columns; ++j) to[j] = row[column[from + j]];
        }
        const T* w[kGroup];
        for (int64_t j = 0; j < columns; ++j) w[j] = panel + (columns - 1 - j);  // ascending in live rows
        T* out = target + from * stride + n0;
        for (int64_t j = 0; j < columns && layer > 0; ++j) std::fill_n(out + j * stride, width, T(0));
        staircase<T>(
            w, columns, columns, near.act, near.ld, [&](int64_t j) { return live[from + columns - 1 - j]; },
            out + (columns - 1) * stride, -stride, width);
        for (int64_t j = 0; j < columns && layer > 0; ++j) {
          T* s = out + j * stride;
          if (!net.linear(below)) {
            const T* u = units + p.at(below, from + j) + n0;
            for (int64_t n = 0; n < width; ++n) s[n] = u[n] <= T(0) ? T(0) : s[n];
          }
          if (below + 2 <= top && net.joins(below + 2)) {
            const T* above = signals + p.at(below + 2, from + j) + n0;
            for (int64_t n = 0; n < width; ++n) s[n] += above[n];
          }
        }
      }
    }
  });
}

// The rows of what comes before a transform, by feature, or behind the last one: an ActNorm's bias and log-scale, or
// nothing.
template <typename T>
struct Norm {
  const T *bias = nullptr, *log_scale = nullptr;

  void apply(int64_t feature, T* row, int64_t count) const {
    if (!bias) return;
    const T b = bias[feature], scale = math::exp(log_scale[feature]);
    for (int64_t n = 0; n < count; ++n) row[n] = (row[n] + b) * scale;
  }
};

// One transform: `next(step)` is the row for its value, which is the feature's of that step. units: its rows of the
// buffer, the first of them given.
template <typename T, typename Next>
void transform(const Pass<T>& p, const AffineMaps& maps, const T* context, T* units, Next next, double* log_det) {
  const Network<T>& net = p.net;
  const int64_t D = net.features, hidden = net.hidden(), stride = p.stride;
  for (int64_t l = 0; l <= hidden; ++l) run_layer<T>(p, l, context, units);
  p.for_samples(32 * D, [&](int64_t n0, int64_t count) {
    double* total = log_det + n0;
    with_scale_map(maps.map, [&]<ScaleMap M>() {
      for (int64_t i = 0; i < D; ++i) {
        const T *s = units + p.at(hidden, 2 * i) + n0, *t = s + stride, *v = units + i * stride + n0;
        T* z = next(i) + n0;
#pragma GCC ivdep
        for (int64_t n = 0; n < count; ++n) {
          T log_scale, scale, slope;
          scale_map<M>(s[n], T(maps.constant), log_scale, scale, slope);
          z[n] = v[n] * scale + t[n];
          total[n] += double(log_scale);
        }
      }
    });
  });
}

// The value that a transform gives to the feature of a step once more.
template <typename T>
void value_of(const Pass<T>& p, const AffineMaps& maps, const T* units, int64_t step, T* z) {
  const T *s = units + p.at(p.net.hidden(), 2 * step), *t = s + p.stride, *v = units + step * p.stride;
  with_scale_map(maps.map, [&]<ScaleMap M>() {
#pragma GCC ivdep
    for (int64_t n = 0; n < p.samples; ++n) {
      T log_scale, scale, slope;
      scale_map<M>(s[n], T(maps.constant), log_scale, scale, slope);
      z[n] = v[n] * scale + t[n];
    }
  });
}

// Into `signals`, of the layout of `units`, the gradients by all that the transform has computed and by what it reads,
// from those of its values, [D, stride] in the order of its steps or null, and of the log-determinant.
template <typename T>
void transform_backward(const Pass<T>& p, const AffineMaps& maps, const T* by_z, const T* by_log_det, const T* units,
                        const int64_t* column, T* signals) {
  const Network<T>& net = p.net;
  const int64_t D = net.features, hidden = net.hidden(), stride = p.stride;
  p.for_samples(32 * D, [&](int64_t n0, int64_t count) {
    const int64_t width = n0 + count == p.samples ? stride - n0 : count;
    with_scale_map(maps.map, [&]<ScaleMap M>() {
      for (int64_t i = 0; i < D; ++i) {
        const T *s = units + p.at(hidden, 2 * i) + n0, *v = units + i * stride + n0, *by_log = by_log_det + n0;
        T *by_s = signals + p.at(hidden, 2 * i) + n0, *by_t = by_s + stride, *by_v = signals + i * stride + n0;
        if (!by_z) {  // x may be infinite, and multiplies nothing
          std::fill_n(by_v, width, T(0));
          std::fill_n(by_t, width, T(0));
        }
        const T* given = by_z ? by_z + i * stride + n0 : by_v;
#pragma GCC ivdep
        for (int64_t n = 0; n < width; ++n) {
          T log_scale, scale, slope;
          scale_map<M>(s[n], T(maps.constant), log_scale, scale, slope);
          if (by_z) {
            by_t[n] = given[n];
            by_v[n] = given[n] * scale;
            by_s[n] = (given[n] * v[n] * scale + by_log[n]) * slope;
          } else {
            by_s[n] = by_log[n] * slope;
          }
        }
      }
    });
  });
  for (int64_t l = hidden; l >= 0; --l) run_back<T>(p, l, units, column, signals);
}

// The gradients of a transform's weights and biases.
template <typename T>
void layers_backward(const Pass<T>& p, const T* units, const T* signals, const int64_t* column,
                     const std::pair<T*, T*>* by_layers) {
  const Network<T>& net = p.net;
  for (int64_t l = 0; l <= net.hidden(); ++l) {
    const auto [by_weight, by_bias] = by_layers[l];
    const int64_t into = net.inputs(l), padded = stride_for<T>(into), N = p.samples;
    const T *from = l == 0 ? units : units + p.at(l - 1), *g = signals + p.at(l);
    Scratch<T> inputs(N * padded);
    p.for_samples(4 * into, [&](int64_t n0, int64_t count) {
      T* to = inputs + n0 * padded;
      turn_back<T>(from + n0, p.stride, count, into, [](int64_t k) { return k; }, to, padded);
      for (int64_t n = 0; n < count; ++n) {
        if (p.curves(l))
          for (int64_t k = 0; k < into; ++k) to[n * padded + k] = to[n * padded + k] < T(0) ? T(0) : to[n * padded + k];
        std::fill(to + n * padded + into, to + (n + 1) * padded, T(0));
      }
    });
    outer<T>(
        g, p.stride, [](int64_t r) { return r; }, inputs, padded, N, p.rows[l], into,
        [&](int64_t r) { return p.depth[l][r]; }, [&](int64_t r) { return p.row_of(l, r); }, l == 0 ? column : nullptr,
        T(1), by_weight);
    for_tasks(p.rows[l], std::max<int64_t>(1, kWork / 4 / N), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* row = g + r * p.stride;
        by_bias[p.row_of(l, r)] = T(sum_lanes<T>(N, [&](int64_t n) { return row[n]; }));
      }
    });
  }
}

}  // namespace
}  // namespace made
}  // namespace genkernels
