// Gradients of a residual block's maps, biases and parameters, summed tile by tile.
#pragma once

#include "tile.h"

namespace genkernels {
namespace block {

// Σ over columns of g[o][q]·x[i][q + away(tap)], in a layout of its own: [entries][outputs].
template <typename T>
struct Outer {
  int64_t outputs = 0, inputs = 0, taps = 1, stride = 0;
  std::vector<int64_t> at;  // [entries + 8]
  std::vector<T> sums;      // [entries + 8][stride]
  bool fresh = true;

  template <typename Away>
  void shape(int64_t to, int64_t from, int64_t tap_count, int64_t plane, Away&& away) {
    outputs = to, inputs = from, taps = tap_count, stride = round_up(to, Vector<T>::kLanes);
    const int64_t entries = inputs * taps;
    at.assign(entries + 8, 0);
    for (int64_t i = 0; i < inputs; ++i)
      for (int64_t t = 0; t < taps; ++t) at[i * taps + t] = i * plane + away(t);
    sums.assign((entries + 8) * stride, T(0));
  }

  // `turned` is scratch of `columns`·stride numbers and 16 more vectors.
  void add(const T* g, int64_t plane, const T* x, int64_t columns, T* turned) {
    constexpr int64_t L = Vector<T>::kLanes, kGroup = masked::kOuterVectors * L;
    for (int64_t o = 0; o < stride; o += kGroup)
      turn(g, plane, o, std::min(kGroup, stride - o), columns, turned + o * columns);
    const int64_t entries = inputs * taps;
    const int64_t few = std::max<int64_t>(16, 24 * 1024 / (std::min(kGroup, stride) * int64_t(sizeof(T))));
    for (int64_t q = 0; q < columns; q += few, fresh = false)
      for (int64_t o = 0; o < stride; o += kGroup) {
        const int64_t across = std::min(kGroup, stride - o);
        const int vectors = int(across / L), together = masked::entries_beside(vectors);
        for (int64_t e = 0; e < entries; e += together) {
          const T* from[8];
          for (int j = 0; j < together; ++j) from[j] = x + q + at[e + j];
          masked::outer<masked::Single<T>>(vectors, from, columns, turned + o * columns + q * across, across,
                                           int64_t(1), std::min(few, columns - q), &sums[e * stride + o], stride,
                                           fresh);
        }
      }
  }

  void join(const Outer& other) {
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += other.sums[i];
  }

  // to [outputs, inputs, taps] += the sums
  void give(T* to) const {
    const int64_t entries = inputs * taps;
    for (int64_t first = 0; first < outputs; first += 16)  // a cache line of the sums at a time
      for (int64_t e = 0; e < entries; ++e)
        for (int64_t o = first, end = std::min(first + 16, outputs); o < end; ++o)
          to[o * entries + e] += sums[e * stride + o];
  }

 private:
  // to[q][c] = g[first + c][q] for c < across, 0 beyond the outputs
  void turn(const T* g, int64_t plane, int64_t first, int64_t across, int64_t columns, T* to) const {
    for (int64_t q = 0; q < columns; q += 16) {
      const int64_t n = std::min<int64_t>(16, columns - q);
      for (int64_t c = 0; c < across; c += 16) {
        T square[16][16];
        for (int64_t k = 0; k < 16; ++k) {
          if (first + c + k < outputs && c + k < across)
            masked::load_row(g + (first + c + k) * plane + q, square[k], n);  // copy_n is a slow `rep movs` here
          else
            std::fill_n(square[k], 16, T(0));
        }
        masked::transpose(square, to + q * across + c, across, n, std::min<int64_t>(16, across - c));
      }
    }
  }
};

template <typename T>
struct Sums {
  std::vector<Outer<T>> maps;
  std::vector<std::vector<T>> biases;
  std::vector<T*> own;  // where a bias of each sample has its gradient at once
  std::vector<double> parameters;
  std::vector<T> turned, row;

  void shape(const Network<T>& net, const std::vector<T*>& by_bias) {
    const Grid& grid = net.grid;
    int64_t widest = 0;
    for (const Map<T>& m : net.maps) {
      maps.emplace_back().shape(m.outputs, m.inputs, m.taps(), grid.plane(),
                                [&](int64_t t) { return m.away(t, grid.pitch()); });
      own.push_back(m.own ? by_bias[own.size()] : nullptr);
      biases.emplace_back(m.own ? 0 : m.outputs, T(0));
      widest = std::max(widest, maps.back().stride);
    }
    parameters.assign(net.maps.size() - 1, 0.0);
    row.resize(grid.columns());
    turned.resize((grid.columns() + 16) * (widest + 64));
  }

  void outer(int64_t map, const Tile<T>& tile, const T* g, const T* x) {
    maps[map].add(g, tile.plane, x, tile.columns, turned.data());
  }
  void bias(int64_t map, const Tile<T>& tile, const T* g) {
    const int64_t outputs = tile.net.maps[map].outputs;
    if (own[map] == nullptr) {
      for (int64_t c = 0; c < outputs; ++c) biases[map][c] += T(sum_of(g + c * tile.plane, tile.columns));
      return;
    }
    for (int64_t s = 0; s < int64_t(tile.held().size()); ++s)
      for (int64_t c = 0; c < outputs; ++c)
        own[map][tile.held()[s] * outputs + c] = T(tile.grid.sum(g + c * tile.plane, s));
  }
};

// Adds to `sums` the gradients of ⟨by_value, g(x)⟩ + Σ_i ⟨by_slope[i], slopes of activation i⟩ of a linearized tile,
// and leaves that of x in `by_value`. by_slope[i] null: none.
template <typename T>
void differentiate(Tile<T>& tile, Sums<T>& sums, T* by_value, const std::vector<T*>& by_slope, bool wants_x = true) {
  const Network<T>& net = tile.net;
  const T* from = by_value;
  for (int64_t i = tile.last(); i >= 0; --i) {
    const Map<T>& m = net.maps[i];
    sums.outer(i, tile, from, tile.input(i));
    sums.bias(i, tile, from);
    if (i == 0 && !wants_x) return;
    if (i == 0) {
      m.transposed.run(from, nullptr, by_value, tile.plane, tile.columns);  // two maps or more: `from` is another plane
      return tile.mask(by_value, net.features());
    }
    T* next = tile.room(i % 2);
    m.transposed.run(from, nullptr, next, tile.plane, tile.columns);
    const int64_t h = net.arguments(i - 1);
    const T *z = tile.argument(i - 1), *d = tile.slope(i - 1), *s = by_slope[i - 1];
    const T a = net.parameters[i - 1];
    for (int64_t c = 0; c < h; ++c) {
      T* row = next + c * tile.plane;
      sums.parameters[i - 1] += bend(net.activation, z + c * tile.plane, T(1), a, tile.keep(), d + c * tile.plane, row,
                                     s ? s + c * tile.plane : nullptr, false, row, sums.row.data(), tile.columns);
      if (!net.mirrored()) continue;
      const int64_t other = (h + c) * tile.plane;
      sums.parameters[i - 1] += bend(net.activation, z + c * tile.plane, T(-1), a, tile.keep(), d + other, next + other,
                                     s ? s + other : nullptr, true, row, sums.row.data(), tile.columns);
    }
    from = next;
  }
}

// The gradients of all maps and parameters: zeros, in which each part has its share in the end.
template <typename T>
class Gradients {
 public:
  Gradients(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, const Tensor& parameters)
      : count_(int64_t(weights.size())), by_parameters_(parameters, shape_of(parameters)) {
    all_.reserve(2 * count_);
    for (const Tensor& w : weights) by_weight_.push_back(zeroed(w));
    for (const Tensor& b : biases) by_bias_.push_back(zeroed(b));
  }

  const std::vector<T*>& by_bias() const { return by_bias_; }

  // Adds the parts up, first to last.
  void give(std::vector<Sums<T>>& parts) {
    torch::stable::parallel_for(0, count_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (size_t p = 0; p < parts.size(); ++p) {
          if (p) parts[0].maps[i].join(parts[p].maps[i]);
          for (size_t c = 0; c < parts[p].biases[i].size(); ++c) by_bias_[i][c] += parts[p].biases[i][c];
        }
        if (!parts.empty()) parts[0].maps[i].give(by_weight_[i]);
      }
    });
    T* to = by_parameters_;
    for (int64_t i = 0; i + 1 < count_; ++i) {
      double total = 0;
      for (const Sums<T>& part : parts) total += part.parameters[i];
      to[i] = T(total);
    }
  }

  void append_to(std::vector<Tensor>& out) {
    for (Result<T>& r : all_) out.push_back(r.done());
    out.push_back(by_parameters_.done());
  }

 private:
  T* zeroed(const Tensor& like) {
    T* at = all_.emplace_back(like, shape_of(like));
    std::fill_n(at, like.numel(), T(0));
    return at;
  }

  int64_t count_;
  std::vector<Result<T>> all_;
  std::vector<T*> by_weight_, by_bias_;
  Result<T> by_parameters_;
};

// Into how many parts the tiles of a batch go: sums are kept for each, and added up in the end.
inline int64_t parts_of(int64_t tiles) {
  return std::min<int64_t>(16, std::max(std::min<int64_t>(tiles, 4), tiles / 4));
}

}  // namespace block
}  // namespace genkernels
