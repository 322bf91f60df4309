// Power iteration on many matrices at once, one phase after the other.
#pragma once

#include "matrix.h"

namespace genkernels {
namespace spectral {

template <typename S>
class Matrices {
  using T = arithmetic_t<S>;

 public:
  explicit Matrices(std::vector<Matrix<S>>& layers) : layers_(layers) {
    for (size_t i = 0; i < layers.size(); ++i) {
      (layers[i].turned ? turned_ : straight_).push_back(int64_t(i));
      for (int64_t b = 0; b < layers[i].blocks; ++b) blocks_.push_back({int64_t(i), b});
    }
  }

  // Power iterations and the norm; of none, that of the vectors given.
  void iterate(int64_t iterations) {
    for (int64_t i = 0; i < iterations; ++i) {
      if (!straight_.empty()) once(i + 1 == iterations);
      if (!turned_.empty()) once_turned();
    }
    if (iterations) return;
    products_with_v(straight_);
    products_with_v(turned_);
    for (Matrix<S>& m : layers_) m.sigma = T(inner(m.u, m.raw, m.rows));
  }

  // f(layer, first row, rows) for every block, as the threads had them, the last one first.
  template <typename F>
  void backwards(F f) {
    each_block(blocks_, true,
               [&](Matrix<S>& m, int64_t b) { f(m, b * m.each, std::min(m.each, m.rows - b * m.each)); });
  }

 private:
  template <typename F>
  void each_block(const std::vector<Piece>& blocks, bool reversed, F f) {
    const auto cost = [&](const Piece& p) { return layers_[p.layer].each * layers_[p.layer].columns; };
    share_out(blocks, cost, reversed, [&](const Piece& p) { f(layers_[p.layer], p.index); });
  }

  void once(bool last) {
    each_block(blocks_of(straight_), false, [](Matrix<S>& m, int64_t b) { sweep(m, b, Sweep::kBoth); });
    for (int64_t i : straight_) {
      Matrix<S>& m = layers_[i];
      const Squares s = squares(m.raw, m.rows);
      m.length_u = length(&s, 1);
      int exponent = 0;
      const double part = std::frexp(m.length_u, &exponent);
      const bool fine = has_direction<T>(m.length_u);
      for (int64_t b = 0; b < m.blocks; ++b)
        m.join[b] = fine ? T(std::ldexp(1.0 / part, m.exponent[b] - exponent)) : T(0);
    }
    join_all(straight_);
    std::vector<int64_t> apart;
    for (int64_t i : straight_) {
      Matrix<S>& m = layers_[i];
      if (has_direction<T>(m.length_u)) divide(m.raw, m.length_u, m.u, m.rows);
      if (has_direction<T>(m.length_u) && has_direction<T>(m.length_v)) {
        divide(m.next, m.length_v, m.v, m.columns);
        m.sigma = T(m.length_v);
      } else {
        apart.push_back(i);
      }
    }
    if (apart.empty()) return;
    products_with_u(apart);
    std::vector<int64_t> without;
    for (int64_t i : apart) {
      Matrix<S>& m = layers_[i];
      m.sigma = T(m.length_v);
      if (has_direction<T>(m.length_v))
        divide(m.next, m.length_v, m.v, m.columns);
      else
        without.push_back(i);
    }
    if (!last || without.empty()) return;
    products_with_v(without);
    for (int64_t i : without) layers_[i].sigma = T(inner(layers_[i].u, layers_[i].raw, layers_[i].rows));
  }

  // Of the transpose, whose u is v here and wanted first: two reads.
  void once_turned() {
    products_with_u(turned_);
    for (int64_t i : turned_) {
      Matrix<S>& m = layers_[i];
      if (has_direction<T>(m.length_v)) divide(m.next, m.length_v, m.v, m.columns);
    }
    products_with_v(turned_);
    for (int64_t i : turned_) {
      Matrix<S>& m = layers_[i];
      const Squares s = squares(m.raw, m.rows);
      m.length_u = length(&s, 1);
      const bool fine = has_direction<T>(m.length_u);
      m.sigma = fine ? T(m.length_u) : T(inner(m.u, m.raw, m.rows));
      if (fine) divide(m.raw, m.length_u, m.u, m.rows);
    }
  }

  // next = Wᵀu
  void products_with_u(const std::vector<int64_t>& which) {
    each_block(blocks_of(which), false, [](Matrix<S>& m, int64_t b) { sweep(m, b, Sweep::kTranspose); });
    for (int64_t i : which) std::fill(layers_[i].join.begin(), layers_[i].join.end(), T(1));
    join_all(which);
  }

  // raw = W v
  void products_with_v(const std::vector<int64_t>& which) {
    each_block(blocks_of(which), false, [](Matrix<S>& m, int64_t b) { sweep(m, b, Sweep::kForward); });
  }

  void join_all(const std::vector<int64_t>& which) {
    std::vector<Piece> tiles;
    for (int64_t i : which)
      for (size_t t = 0; t < layers_[i].lengths.size(); ++t) tiles.push_back({i, int64_t(t)});
    const auto cost = [&](const Piece& p) {
      return (layers_[p.layer].blocks + 4) * std::min(kColumns, layers_[p.layer].columns);
    };
    share_out(tiles, cost, false, [&](const Piece& p) { join(layers_[p.layer], p.index); });
    for (int64_t i : which) layers_[i].length_v = length(layers_[i].lengths.data(), int64_t(layers_[i].lengths.size()));
  }

  std::vector<Piece> blocks_of(const std::vector<int64_t>& which) const {
    std::vector<Piece> some;
    for (int64_t i : which)
      for (int64_t b = 0; b < layers_[i].blocks; ++b) some.push_back({i, b});
    return some;
  }

  std::vector<Matrix<S>>& layers_;
  std::vector<int64_t> straight_, turned_;
  std::vector<Piece> blocks_;
};

}  // namespace spectral
}  // namespace genkernels
