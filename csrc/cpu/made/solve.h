// The blocked triangular solves of `made` for one chunk of samples; made.cpp says how and why.
#pragma once

#include "maps.h"
#include "product.h"

namespace genkernels {
namespace made {

using namespace product;

constexpr int64_t kBlock = 32;  // features of a block

// A network as the solves read it. Hidden units are sorted by degree, features stand in the order of the steps.
template <typename T>
struct Network {
  int64_t features = 0;                   // D
  std::vector<int64_t> sizes;             // units of each hidden layer
  std::vector<const T*> weights, biases;  // of each layer; the last one's rows: a parameter of all features, the next
  int64_t params = 0;                     // of a feature
  std::vector<int64_t> order;             // [D] the feature of each step
  std::vector<const int64_t*> counts;     // of each hidden layer [D + 1]: units known once k features are
  bool residual = false;
  int64_t step = 1;  // −1: the columns of the first weight lie from the last to the first; not for the solves

  int64_t hidden() const { return int64_t(sizes.size()); }
  bool joins(int64_t layer) const { return residual && layer >= 2 && layer % 2 == 0; }
  bool linear(int64_t layer) const { return residual && layer == hidden() - 1; }  // read as it is, no ReLU
  int64_t inputs(int64_t layer) const { return layer == 0 ? features : sizes[layer - 1]; }
  int64_t output(int64_t k) const { return k % params * features + order[k / params]; }  // the k-th, step by step
};

// Everything that one chunk of samples needs, samples side by side.
template <typename T>
struct Chunk {
  const Network<T>& net;
  int64_t width;  // samples, rounded up to whole vectors
  Scratch<T> x;   // [D, width], in the order of the steps
  // [H, width] of each layer: pre-activations while they grow, then activations; and the pre-activations that a
  // residual block adds on, null for other layers
  std::vector<std::unique_ptr<Scratch<T>>> units, values;

  Chunk(const Network<T>& network, int64_t samples)
      : net(network), width(round_up(samples, kLanes<T>)), x(network.features * width) {
    for (int64_t l = 0; l < net.hidden(); ++l) {
      units.push_back(std::make_unique<Scratch<T>>(net.sizes[l] * width));
      values.push_back(net.residual && l % 2 == 0 ? std::make_unique<Scratch<T>>(net.sizes[l] * width) : nullptr);
    }
  }

  T* unit(int64_t layer, int64_t row = 0) { return *units[layer] + row * width; }
  const T* input(int64_t layer, int64_t row = 0) { return layer == 0 ? x + row * width : unit(layer - 1, row); }

  // Rows [from, to) of a layer start as bias (+ context [count, H]).
  void begin(int64_t layer, int64_t from, int64_t to, const T* context, int64_t count) {
    for (int64_t r = from; r < to; ++r) std::fill_n(unit(layer, r), width, net.biases[layer][r]);
    if (layer != 0 || !context) return;
    const int64_t stride = net.sizes[0];
    for (int64_t n = 0; n < count; ++n)
      for (int64_t r = from; r < to; ++r) unit(0, r)[n] += context[n * stride + r];
  }

  // Rows [from, to) have all their terms: joins the block's input, applies the ReLU (a NaN stays).
  void finish(int64_t layer, int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) {
      T* u = unit(layer, r);
      if (net.joins(layer)) {
        const T* v = *values[layer - 2] + r * width;
        for (int64_t n = 0; n < width; ++n) u[n] += v[n];
      }
      if (values[layer]) std::copy_n(u, width, *values[layer] + r * width);
      if (net.linear(layer)) continue;
      for (int64_t n = 0; n < width; ++n) u[n] = u[n] < T(0) ? T(0) : u[n];
    }
  }

  // Rows [from, to) take inputs [begin, end).
  void take(int64_t layer, int64_t from, int64_t to, int64_t begin, int64_t end) {
    if (from >= to || begin >= end) return;
    const int64_t into = net.inputs(layer);
    std::vector<const T*>& w = pointers;
    w.clear();
    for (int64_t r = from; r < to; ++r) w.push_back(net.weights[layer] + r * into + begin);
    multiply(w.data(), to - from, 1, input(layer, begin), width, end - begin, unit(layer, from), width, width);
  }

  std::vector<const T*> pointers;
};

// x from z (both [count, D] in data order) and log_det = Σ log dx/dz.
template <typename T>
void invert(Chunk<T>& c, Map<T>& map, const T* z, const T* context, int64_t count, T* x_out, T* log_det) {
  const Network<T>& net = c.net;
  const int64_t D = net.features, P = net.params, last = net.hidden() - 1, width = c.width, into = net.sizes[last];
  Scratch<T> params(P * kBlock * width), given(kBlock * width);
  std::vector<double> total(width, 0.0);
  std::vector<const T*> w(P * kBlock);
  for (int64_t l = 0; l <= last; ++l) {  // units that see no feature
    const int64_t rows = net.counts[l][0];
    c.begin(l, 0, rows, context, count);
    if (l > 0) c.take(l, 0, rows, 0, net.counts[l - 1][0]);
    c.finish(l, 0, rows);
  }
  for (int64_t a = 0; a < D; a += kBlock) {
    const int64_t b = std::min(a + kBlock, D);
    // what is known before the block, in whole products
    for (int64_t l = 0; l <= last; ++l) {
      const int64_t from = net.counts[l][a], to = net.counts[l][b];
      c.begin(l, from, to, context, count);
      c.take(l, from, to, 0, l == 0 ? a : net.counts[l - 1][a]);
    }
    const int64_t known = net.counts[last][a];
    for (int64_t k = 0; k < (b - a) * P; ++k) {
      const int64_t row = net.output(a * P + k);
      w[k] = net.weights[last + 1] + row * into;
      std::fill_n(params + k * width, width, net.biases[last + 1][row]);
    }
    multiply(w.data(), (b - a) * P, 1, c.unit(last), width, known, static_cast<T*>(params), width, width);
    for (const T*& row : w) row += known;  // what is left of each within the block
    turn(z, D, count, b - a, [&](int64_t k) { return net.order[a + k]; }, static_cast<T*>(given), width);
    // feature by feature
    for (int64_t i = a; i < b; ++i) {
      T* p = params + (i - a) * P * width;
      const int64_t more = net.counts[last][i] - known;
      if (more > 0) multiply(w.data() + (i - a) * P, P, 1, c.unit(last, known), width, more, p, width, width);
      map.invert(p, given + (i - a) * width, c.x + i * width, total.data());
      for (int64_t l = 0; l <= last; ++l) {
        const int64_t from = net.counts[l][i], to = net.counts[l][i + 1];
        c.take(l, from, to, l == 0 ? a : net.counts[l - 1][a], l == 0 ? i + 1 : net.counts[l - 1][i + 1]);
        c.finish(l, from, to);
      }
    }
    turn_back(c.x + a * width, width, count, b - a, [&](int64_t k) { return net.order[a + k]; }, x_out, D);
  }
  for (int64_t n = 0; n < count; ++n) log_det[n] = T(total[n]);
}

// All units from a known x [count, D], and the features' parameters into params [D, P, width], in the order of the
// steps.
template <typename T>
void evaluate(Chunk<T>& c, const T* x, const T* context, int64_t count, T* params) {
  const Network<T>& net = c.net;
  const int64_t D = net.features, P = net.params, last = net.hidden() - 1, width = c.width;
  turn(x, D, count, D, [&](int64_t k) { return net.order[k]; }, static_cast<T*>(c.x), width);
  std::vector<const T*> w;
  std::vector<int64_t> depth;
  for (int64_t l = 0; l <= last; ++l) {
    w.clear(), depth.clear();
    for (int64_t k = 0; k <= D; ++k)
      for (int64_t r = k == 0 ? 0 : net.counts[l][k - 1]; r < net.counts[l][k]; ++r) {
        w.push_back(net.weights[l] + r * net.inputs(l));
        depth.push_back(l == 0 ? k : net.counts[l - 1][k]);
      }
    c.begin(l, 0, net.sizes[l], context, count);
    staircase(
        w.data(), net.sizes[l], 1, c.input(l), width, [&](int64_t r) { return depth[r]; }, c.unit(l), width, width);
    c.finish(l, 0, net.sizes[l]);
  }
  w.clear();
  for (int64_t k = 0; k < D * P; ++k) {
    const int64_t row = net.output(k);
    w.push_back(net.weights[last + 1] + row * net.sizes[last]);
    std::fill_n(params + k * width, width, net.biases[last + 1][row]);
  }
  staircase(
      w.data(), D * P, 1, c.unit(last), width, [&](int64_t k) { return net.counts[last][k / P]; }, params, width,
      width);
}

// The transposed solve by back substitution: λ into solution [D, width], the cotangents of the parameters over params,
// those of every hidden layer's pre-activations into signals [H, width]. grad_x [count, D] and grad_ldj [count] may be
// null.
template <typename T>
void solve_transposed(Chunk<T>& c, Map<T>& map, const T* grad_x, const T* grad_ldj, int64_t count, T* params,
                      std::vector<std::unique_ptr<Scratch<T>>>& signals, T* solution) {
  const Network<T>& net = c.net;
  const int64_t D = net.features, P = net.params, last = net.hidden() - 1, width = c.width;
  Scratch<T> given(D * width), by_ldj(width);
  if (grad_x)
    turn(grad_x, D, count, D, [&](int64_t k) { return net.order[k]; }, static_cast<T*>(given), width);
  else
    std::fill_n(static_cast<T*>(given), D * width, T(0));
  for (int64_t n = 0; n < width; ++n) by_ldj[n] = grad_ldj && n < count ? grad_ldj[n] : T(0);
  const auto signal = [&](int64_t layer, int64_t row) -> T* { return *signals[layer] + row * width; };

  // Columns [from, to) of the layer above each hidden layer (layer −1: of the first layer, for x), packed
  // [rows, to − from], from the row `first` on. The last layer's rows come in the order of the steps, a feature's
  // parameters side by side.
  int64_t widest = D;
  for (int64_t size : net.sizes) widest = std::max(widest, size);
  std::vector<std::vector<T>> panels(net.hidden() + 1);
  std::vector<const T*> w(widest);
  struct Span {
    int64_t from, to, first;
  };
  std::vector<Span> spans(net.hidden() + 1);
  const auto pack = [&](int64_t layer, int64_t from, int64_t to, int64_t first) {
    const int64_t columns = to - from, stride = net.inputs(layer + 1);
    spans[layer + 1] = {from, to, first};
    std::vector<T>& panel = panels[layer + 1];
    if (columns <= 0) return;
    if (layer == last) {
      panel.resize((D - first) * P * columns);
      for (int64_t k = first * P; k < D * P; ++k)
        std::copy_n(net.weights[last + 1] + net.output(k) * stride + from, columns,
                    panel.data() + (k - first * P) * columns);
    } else {
      const int64_t rows = net.sizes[layer + 1];
      panel.resize(std::max<int64_t>(rows - first, 0) * columns);
      for (int64_t r = first; r < rows; ++r)
        std::copy_n(net.weights[layer + 1] + r * stride + from, columns, panel.data() + (r - first) * columns);
    }
  };
  // out rows [from, to) of `layer` += panelᵀ · signals of rows [begin, end) above (of features, for the last hidden
  // layer).
  const auto take = [&](int64_t layer, int64_t from, int64_t to, int64_t begin, int64_t end, T* out) {
    const Span& span = spans[layer + 1];
    if (from >= to || begin >= end) return;
    const int64_t columns = span.to - span.from;
    const int64_t rows = layer == last ? P : 1;  // of one in [begin, end)
    const T* panel = panels[layer + 1].data() + (begin - span.first) * rows * columns;
    for (int64_t j = from; j < to; ++j) w[j - from] = panel + (j - span.from);
    multiply(w.data(), to - from, columns, layer == last ? params + begin * P * width : signal(layer + 1, begin), width,
             (end - begin) * rows, out, width, width);
  };
  const auto finish = [&](int64_t layer, int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) {
      T* g = signal(layer, r);
      if (!net.linear(layer)) {
        const T* u = c.unit(layer, r);
        for (int64_t n = 0; n < width; ++n) g[n] = u[n] == T(0) ? T(0) : g[n];
      }
      if (layer + 2 <= last && net.joins(layer + 2)) {
        const T* above = signal(layer + 2, r);
        for (int64_t n = 0; n < width; ++n) g[n] += above[n];
      }
    }
  };

  for (int64_t b = D; b > 0;) {
    const int64_t a = std::max<int64_t>(0, (b - 1) / kBlock * kBlock);
    for (int64_t l = last; l >= 0; --l) {
      const int64_t from = net.counts[l][a], to = net.counts[l][b];
      pack(l, from, to, l == last ? a : net.counts[l + 1][a]);
      std::fill_n(signal(l, from), (to - from) * width, T(0));
      take(l, from, to, l == last ? b : net.counts[l + 1][b], l == last ? D : net.sizes[l + 1], signal(l, from));
    }
    pack(-1, a, b, net.counts[0][a]);
    std::fill_n(solution + a * width, (b - a) * width, T(0));
    take(-1, a, b, net.counts[0][b], net.sizes[0], solution + a * width);
    for (int64_t i = b - 1; i >= a; --i) {
      for (int64_t l = last; l >= 0; --l) {
        const int64_t from = net.counts[l][i], to = net.counts[l][i + 1];
        take(l, from, to, l == last ? i + 1 : net.counts[l + 1][i], l == last ? b : net.counts[l + 1][b],
             signal(l, from));
        finish(l, from, to);
      }
      T* out = solution + i * width;
      // above, a unit of degree i + 1 sees outputs from i + 1 on; here, feature i is seen by units of degree i + 1 on
      take(-1, i, i + 1, net.counts[0][i], net.counts[0][b], out);
      const bool unseen = !grad_x && i == D - 1;  // nothing sees the last feature's x, which may be infinite
      for (int64_t n = 0; n < width; ++n) out[n] = given[i * width + n] - out[n];
      map.backward(params + i * P * width, c.x + i * width, unseen ? nullptr : out, by_ldj, out);
    }
    b = a;
  }
  for (int64_t l = last; l >= 0; --l) {  // units that see no feature
    const int64_t rows = net.counts[l][0];
    pack(l, 0, rows, 0);
    std::fill_n(signal(l, 0), rows * width, T(0));
    take(l, 0, rows, 0, l == last ? D : net.sizes[l + 1], signal(l, 0));
    finish(l, 0, rows);
  }
}

}  // namespace made
}  // namespace genkernels
