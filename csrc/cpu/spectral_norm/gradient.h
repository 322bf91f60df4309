// The gradient by the weights: f G + s D, s = −⟨G, f W⟩ / σ (+ the gradient of σ).
//
// First the inner products, then f G + s D, whose G of small layers is then in the inner caches still: pieces of
// kPiece weights, the sums of kSum of them in T, these in fp64. D of a matrix is u vᵀ, made on the way; that of a
// convolution is a product over places (product.h), whose rows are the weight's inputs and taps and whose lanes are
// output channels.
#pragma once

#include "convolution.h"

namespace genkernels {
namespace spectral {

constexpr int64_t kPiece = 32 * 1024;
constexpr int64_t kSum = 4 * 1024;

template <typename S>
struct Gradient {
  using T = arithmetic_t<S>;

  const S *grad, *weight;
  S* out;
  int64_t count;
  T sigma, factor, scale = 0;  // f and s
  bool divides;
  std::vector<double> parts;

  bool copies() const { return factor == T(1) && scale == T(0); }
};

// Σ g · (factor · w)
template <typename S>
double inner_product(const S* g, const S* w, arithmetic_t<S> factor, int64_t n) {
  using T = arithmetic_t<S>;
  using Vec = typename Vector<T>::type;
  constexpr int64_t L = kLanes<T>, kWide = 4;
  double total = 0;
  T* room = std::is_same_v<S, T> ? nullptr : scratch<T>(2, 2 * kSum);
  for (int64_t begin = 0; begin < n; begin += kSum) {
    const int64_t count = std::min(kSum, n - begin);
    const T* a = as_arithmetic(g + begin, room, count);
    const T* b = as_arithmetic(w + begin, room ? room + kSum : nullptr, count);
    Vec sum[kWide] = {};
    int64_t i = 0;
    for (; i + kWide * L <= count; i += kWide * L)
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) sum[j] += load_vector(a + i + j * L) * (factor * load_vector(b + i + j * L));
    T rest = 0;
    for (; i < count; ++i) rest += a[i] * (factor * b[i]);
    alignas(64) T lane[L];
    store_vector<T>((sum[0] + sum[1]) + (sum[2] + sum[3]), lane);
    for (int64_t width = L / 2; width; width /= 2)
      for (int64_t j = 0; j < width; ++j) lane[j] += lane[j + width];
    total += double(lane[0]) + double(rest);
  }
  return total;
}

// to = f g + s x
template <typename S>
void combine(const S* g, arithmetic_t<S> f, arithmetic_t<S> s, const arithmetic_t<S>* x, S* to, int64_t n) {
  using T = arithmetic_t<S>;
  if constexpr (std::is_same_v<S, T>) {
    for (int64_t i = 0; i < n; ++i) to[i] = f * g[i] + s * x[i];
  } else {
    T buffer[512];
    for (int64_t i = 0; i < n; i += 512) {
      const int64_t count = std::min<int64_t>(512, n - i);
      load(g + i, buffer, count);
      for (int64_t j = 0; j < count; ++j) buffer[j] = f * buffer[j] + s * x[i + j];
      store(buffer, to + i, count);
    }
  }
}

// A matrix [before, rows, after], its rows the axis in the middle, so that column (a, b) lies at [a, ·, b].
template <typename T>
struct Outer {
  int64_t rows, after;
  const T *u, *v;

  // Of the axis `axis` of a weight of this shape.
  Outer(const Tensor& w, int64_t axis, const T* u, const T* v) : rows(w.size(axis)), after(1), u(u), v(v) {
    for (int64_t a = axis + 1; a < w.dim(); ++a) after *= w.size(a);
    if (after > 1) return;
    std::swap(this->u, this->v);  // the last axis: the transpose has its rows first
    after = rows;
    rows = w.numel() / after;
  }

  // f(at, count, u of the row, the columns' v) for each row's stretch of weights [begin, end).
  template <typename F>
  void each_row(int64_t begin, int64_t end, F f) const {
    while (begin < end) {
      const int64_t line = begin / after, from = begin % after, count = std::min(after - from, end - begin);
      f(begin, count, u[line % rows], v + line / rows * after + from);
      begin += count;
    }
  }
};

template <typename S>
class Gradients {
  using T = arithmetic_t<S>;

 public:
  Gradients(std::vector<Gradient<S>>& layers, const T* by_sigma) : layers_(layers), by_sigma_(by_sigma) {}

  // s of layers `which`.
  void scales(const std::vector<int64_t>& which) {
    pieces_.clear();
    std::vector<Piece> wanted;
    for (int64_t i : which)
      for (int64_t p = 0; p < divide_up(layers_[i].count, kPiece); ++p) {
        pieces_.push_back({i, p});
        if (layers_[i].divides) wanted.push_back({i, p});
      }
    for (int64_t i : which) layers_[i].parts.assign(divide_up(layers_[i].count, kPiece), 0.0);
    share_out(
        wanted, [&](const Piece& p) { return size(p); }, false,
        [&](const Piece& p) {
          Gradient<S>& l = layers_[p.layer];
          const int64_t at = p.index * kPiece;
          l.parts[p.index] = inner_product(l.grad + at, l.weight + at, l.factor, size(p));
        });
    for (int64_t i : which) {
      Gradient<S>& l = layers_[i];
      double total = 0;
      for (double part : l.parts) total += part;
      l.scale = (l.divides ? T(-total / double(l.sigma)) : T(0)) + (by_sigma_ ? by_sigma_[i] : T(0));
    }
  }

  // Then the gradients of these, as matrices.
  template <typename OuterOf>
  void matrices(OuterOf outer_of) {
    share_out(
        pieces_, [&](const Piece& p) { return size(p); }, true,
        [&](const Piece& p) {
          const Gradient<S>& l = layers_[p.layer];
          const int64_t begin = p.index * kPiece;
          if (l.copies()) return multiply(l.grad + begin, T(1), l.out + begin, size(p));
          outer_of(p.layer).each_row(begin, begin + size(p), [&](int64_t at, int64_t count, T u, const T* v) {
            combine(l.grad + at, l.factor, l.scale * u, v, l.out + at, count);
          });
        });
  }

 private:
  int64_t size(const Piece& p) const { return std::min(kPiece, layers_[p.layer].count - p.index * kPiece); }

  std::vector<Gradient<S>>& layers_;
  const T* by_sigma_;
  std::vector<Piece> pieces_;
};

// ---- convolutions -----------------------------------------------------------------------------------------------

// Rows of D are inputs and taps, its columns output channels.
template <typename S>
struct ConvolutionGradient {
  using T = arithmetic_t<S>;

  Convolution<S> layer;
  Gradient<S>* gradient;
  const S *x, *y;                            // as they were given
  T *plain_x = nullptr, *plain_y = nullptr;  // and as T, beside half numbers
  T* turned;                                 // y [groups, places, outputs, up to whole vectors]
  std::vector<int64_t> at, lines;            // of each place: in the laid x, and in `turned`

  int64_t line() const { return round_up(layer.outputs, kLanes<T>); }
  int64_t places() const { return count_of(layer.gather.size); }
  int64_t scratch_size() const { return layer.x_count() + 2 * layer.y_count() + layer.gather.source.plane(); }

  void allocate(Arena<T>& arena) {
    x = layer.transposed ? layer.given_u : layer.given_v;
    y = layer.transposed ? layer.given_v : layer.given_u;
    if constexpr (!std::is_same_v<S, T>) {
      arena.need(plain_x, layer.x_count());
      arena.need(plain_y, layer.y_count());
    }
    arena.need(layer.gather.source.to, layer.groups * layer.inputs * layer.gather.source.plane());
    arena.need(turned, layer.groups * places() * line());
    const Part<T>& p = layer.gather.parts[0];
    for (int64_t n = 0; n < places(); ++n) {
      const int64_t row = n / p.places[2];
      at.push_back(dot({row / p.places[1], row % p.places[1], n % p.places[2]}, p.step));
      lines.push_back(n * line());
    }
  }

  void prepare() {
    const Source<T>& source = layer.gather.source;
    const T *from_x = as_arithmetic(x, plain_x, layer.x_count()), *from_y = as_arithmetic(y, plain_y, layer.y_count());
    if (!source.circular) source.clear(0, layer.groups * layer.inputs);
    for (int64_t c = 0; c < layer.groups * layer.inputs; ++c) source.lay(from_x + c * count_of(source.size), c);
    for (int64_t g = 0; g < layer.groups; ++g, from_y += layer.outputs * places())
      turn(from_y, turned + g * places() * line());
  }

  // [outputs, places] → [places, line]
  void turn(const T* from, T* to) const {
    constexpr int64_t kSquare = 16;
    for (int64_t n0 = 0; n0 < places(); n0 += kSquare)
      for (int64_t o0 = 0; o0 < layer.outputs; o0 += kSquare) {
        const int64_t n1 = std::min(n0 + kSquare, places()), o1 = std::min(o0 + kSquare, layer.outputs);
        for (int64_t n = n0; n < n1; ++n)
          for (int64_t o = o0; o < o1; ++o) to[n * line() + o] = from[o * places() + n];
      }
  }

  // Rows [row, row + rows) of a group, columns [column, column + columns).
  void run(int64_t group, int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    const Map<T>& map = layer.gather;
    const Part<T>& p = map.parts[0];
    const T *w[kRowBlock], *lanes[kTile / kLanes<T>];
    const T* source = map.source.to + group * layer.inputs * map.source.plane();
    for (int64_t r = 0; r < rows; ++r) w[r] = source + p.at[row + r];
    const int64_t vectors = divide_up(columns, kLanes<T>);
    for (int64_t v = 0; v < vectors; ++v) lanes[v] = turned + group * places() * line() + column + v * kLanes<T>;
    T* d = scratch<T>(1, rows * kTile);
    product<T, true>({w, at.data(), lanes, lines.data(), places()}, true, rows, vectors, d);
    T line_of_d[kRowBlock];
    const int64_t depth = p.depth();
    for (int64_t o = 0; o < columns; ++o) {
      const int64_t begin = (group * layer.outputs + column + o) * depth + row;
      for (int64_t r = 0; r < rows; ++r) line_of_d[r] = d[r * kTile + o];
      combine(gradient->grad + begin, gradient->factor, gradient->scale, line_of_d, gradient->out + begin, rows);
    }
  }
};

template <typename S>
void convolution_gradients(std::vector<ConvolutionGradient<S>>& layers) {
  std::vector<Task> prepare, products;
  for (int64_t i = 0; i < int64_t(layers.size()); ++i) {
    ConvolutionGradient<S>& c = layers[i];
    const int64_t depth = c.layer.inputs * c.layer.taps, outputs = c.layer.outputs;
    if (c.gradient->copies()) {
      for (int64_t at = 0; at < c.gradient->count; at += kPiece) {
        const int64_t some = std::min(kPiece, c.gradient->count - at);
        prepare.push_back({i, 1, 0, at, some, 0, 0, 0, some});
      }
      continue;
    }
    prepare.push_back({i, 0, 0, 0, 0, 0, 0, 0, c.scratch_size()});
    const int64_t rows = divide_up(depth, divide_up(depth, kRowBlock));
    for (int64_t group = 0; group < c.layer.groups; ++group)
      for (int64_t row = 0; row < depth; row += rows)
        for (int64_t column = 0; column < outputs; column += kTile) {
          const int64_t high = std::min(rows, depth - row), wide = std::min(kTile, outputs - column);
          products.push_back({i, 0, group, row, high, column, wide, 0, high * wide * (c.places() + 1)});
        }
  }
  const auto cost = [](const Task& t) { return t.cost; };
  share_out(prepare, cost, false, [&](const Task& t) {
    ConvolutionGradient<S>& c = layers[t.layer];
    if (t.part)
      multiply(c.gradient->grad + t.row, arithmetic_t<S>(1), c.gradient->out + t.row, t.rows);
    else
      c.prepare();
  });
  share_out(products, cost, false,
            [&](const Task& t) { layers[t.layer].run(t.group, t.row, t.rows, t.place, t.places); });
}

}  // namespace spectral
}  // namespace genkernels
