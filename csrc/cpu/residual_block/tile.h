// One tile of samples: the block's values and slopes, and products of its Jacobian and the transposed one, all of it in
// the caches of one core.
#pragma once

#include "network.h"

#include <numeric>

namespace genkernels {
namespace block {

// Planes of `channels` channels, zeros at first; at() is column 0 of channel 0.
template <typename T>
class Planes {
 public:
  Planes(const Grid& grid, int64_t channels) : memory_(channels * grid.plane() + 64), at_(memory_ + grid.origin()) {
    std::fill_n(static_cast<T*>(memory_), channels * grid.plane() + 64, T(0));
  }
  T* at() { return at_; }
  const T* at() const { return at_; }

 private:
  Scratch<T> memory_;
  T* at_;
};

template <typename T>
class Tile {
 public:
  explicit Tile(const Network<T>& network)
      : net(network), grid(network.grid), plane(grid.plane()), columns(grid.columns()), keep_(grid.keep<T>()) {
    widest_ = net.features();
    for (int64_t i = 0; i < net.count(); ++i) {
      inputs_.push_back(std::make_unique<Planes<T>>(grid, net.maps[i].inputs));
      widest_ = std::max({widest_, net.maps[i].inputs, net.maps[i].outputs});
      if (i + 1 == net.count()) break;
      arguments_.push_back(std::make_unique<Planes<T>>(grid, net.arguments(i)));
      slopes_.push_back(std::make_unique<Planes<T>>(grid, net.values(i)));
    }
    for (auto& room : rooms_) room = std::make_unique<Planes<T>>(grid, widest_);
  }

  const Network<T>& net;
  const Grid grid;
  const int64_t plane;
  int64_t columns;

  T* input(int64_t i) { return inputs_[i]->at(); }        // of map i; of the first one x
  T* argument(int64_t i) { return arguments_[i]->at(); }  // of activation i
  T* slope(int64_t i) { return slopes_[i]->at(); }
  T* room(int i) { return rooms_[i]->at(); }
  const T* keep() const { return keep_.empty() ? nullptr : keep_.data(); }
  int64_t last() const { return net.count() - 1; }

  // Which of the batch's samples lie in the tile, from the first slot on: some from `first` on, or these.
  void hold(int64_t first, int64_t some) {
    held_.resize(some);
    std::iota(held_.begin(), held_.end(), first);
  }
  void hold(const std::vector<int64_t>& samples, int64_t some) {
    held_.assign(samples.begin(), samples.begin() + some);
  }
  const std::vector<int64_t>& held() const { return held_; }

  // Only the first `samples` of the tile from here on.
  void narrow(int64_t samples) {
    Grid some = grid;
    some.samples = samples;
    const int64_t before = columns;
    columns = some.columns();
    if (grid.reach == 0 || columns >= before) return;
    const int64_t strip = std::min(grid.reach * (grid.pitch() + 1), before - columns);  // seen from the last row
    for (int64_t i = 1; i < net.count(); ++i)
      for (int64_t c = 0; c < net.maps[i].inputs; ++c) std::fill_n(input(i) + c * plane + columns, strip, T(0));
    for (int r = 0; r < 2; ++r)
      for (int64_t c = 0; c < widest_; ++c) std::fill_n(room(r) + c * plane + columns, strip, T(0));
  }

  // g at input(0) into `value` (null: not wanted), with what it takes to differentiate.
  void linearize(T* value) { run(value, true); }
  // g at input(0) alone.
  void evaluate(T* value) { run(value, false); }

  // The slopes of activation i, where they are wanted, and the inputs of the next map, from the arguments.
  void activate_all(int64_t i, bool slopes = true) {
    T *z = argument(i), *a = input(i + 1), *d = slopes ? slope(i) : nullptr;
    const int64_t h = net.arguments(i);
    const auto half = [&](int64_t c, T sign, int64_t to) {
      activate(net.activation, z + c * plane, sign, net.parameters[i], keep(), a + to * plane,
               slopes ? d + to * plane : nullptr, columns);
    };
    for (int64_t c = 0; c < h; ++c) {
      half(c, T(1), c);
      if (net.mirrored()) half(c, T(-1), h + c);
    }
  }

  void mask(T* x, int64_t channels) const {
    if (keep_.empty()) return;
    for (int64_t c = 0; c < channels; ++c) {
      T* row = x + c * plane;
      for (int64_t q = 0; q < columns; ++q) row[q] = keep_[q] != T(0) ? row[q] : T(0);
    }
  }

  // w (cotangents of the outputs of activation i) times the slopes, those of z and −z together: into the first planes
  // of w itself.
  void through(int64_t i, T* w) {
    const T* d = slope(i);
    const int64_t h = net.arguments(i);
    const T* k = keep();
    for (int64_t c = 0; c < h; ++c) {
      T* row = w + c * plane;
      const T *slopes = d + c * plane, *further = row + h * plane, *others = slopes + h * plane;
      if (net.mirrored())
        for (int64_t q = 0; q < columns; ++q) {
          const T found = row[q] * slopes[q] + further[q] * others[q];
          row[q] = k == nullptr || k[q] != T(0) ? found : T(0);
        }
      else if (k)
        for (int64_t q = 0; q < columns; ++q) row[q] = k[q] != T(0) ? row[q] * slopes[q] : T(0);
      else
        for (int64_t q = 0; q < columns; ++q) row[q] *= slopes[q];
    }
  }

  // z (tangents of the arguments of activation i) times the slopes: in place, those of −z behind them.
  void along(int64_t i, T* z) const { along(i, z, z); }
  void along(int64_t i, const T* z, T* to) const {
    const T *d = slopes_[i]->at(), *k = keep();
    const int64_t h = net.arguments(i);
    for (int64_t c = net.values(i) - 1; c >= 0; --c) {  // downwards: `to` may be z
      const T *slopes = d + c * plane, *row = z + c % h * plane;
      T* out = to + c * plane;
      if (k)
        for (int64_t q = 0; q < columns; ++q) out[q] = k[q] != T(0) ? slopes[q] * row[q] : T(0);
      else
        for (int64_t q = 0; q < columns; ++q) out[q] = slopes[q] * row[q];
    }
  }

  // to = Jᵀ w; both rooms are overwritten. `to` may be w.
  void pull(const T* w, T* to) {
    const T* from = w;
    for (int64_t i = last(); i > 0; --i) {
      T* next = room(i % 2);
      net.maps[i].transposed.run(from, nullptr, next, plane, columns);
      through(i - 1, next);
      from = next;
    }
    net.maps[0].transposed.run(from, nullptr, to, plane, columns);
    mask(to, net.features());
  }

  // sums[q] = Σ_c a[c][q]·b[c][q]
  void dots(const T* a, const T* b, int64_t channels, T* sums) const {
    std::fill_n(sums, columns, T(0));
    for (int64_t c = 0; c < channels; ++c) {
      const T *p = a + c * plane, *r = b + c * plane;
      for (int64_t q = 0; q < columns; ++q) sums[q] += p[q] * r[q];
    }
  }

 private:
  void run(T* value, bool slopes) {
    for (int64_t i = 0; i < net.count(); ++i) {
      const Map<T>& m = net.maps[i];
      T* to = i == last() ? value : argument(i);
      if (to == nullptr) return;
      m.forward.run(input(i), m.bias, to, plane, columns);
      if (m.own) add_own(m, to);
      if (i == last()) return mask(to, net.features());
      activate_all(i, slopes);
    }
  }

  void add_own(const Map<T>& m, T* to) const {
    for (int64_t s = 0; s < int64_t(held_.size()); ++s) {
      const T* bias = m.own + held_[s] * m.outputs;
      for (int64_t c = 0; c < m.outputs; ++c)
        grid.rows_of(s, [&](int64_t row) {
          for (int64_t q = 0; q < grid.width; ++q) to[c * plane + row + q] += bias[c];
        });
    }
  }

  std::vector<T> keep_;
  std::vector<int64_t> held_;
  int64_t widest_ = 0;
  std::vector<std::unique_ptr<Planes<T>>> inputs_, arguments_, slopes_;
  std::unique_ptr<Planes<T>> rooms_[2];
};

}  // namespace block
}  // namespace genkernels
