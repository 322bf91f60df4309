// The Jacobian of each sample of a fully connected block of few features, whole: D products of the chain, after which
// every further power of it is D×D numbers a sample.
#pragma once

#include "tile.h"

namespace genkernels {
namespace block {

constexpr int64_t kMostWhole = 16;  // features: 16² planes of 48 columns lie in the second-level cache

template <typename T>
class Jacobian {
 public:
  // Whether it costs less than `products` products of the chain.
  static bool pays(const Network<T>& net, int64_t products) {
    return net.grid.flat && net.features() <= kMostWhole && net.features() < products;
  }

  explicit Jacobian(const Network<T>& net) : features_(net.features()), of_(net.grid, features_ * features_) {}

  // Of a linearized tile: column j is the tangent of the output along e_j. The first map takes that to its own column,
  // without a product. Both rooms are overwritten. visit(j, i, planes): the tangents of the arguments of activation i.
  template <typename Visit>
  void find(Tile<T>& tile, Visit&& visit) {
    plane_ = tile.plane, columns_ = tile.columns;
    for (int64_t j = 0; j < features_; ++j) {
      const Map<T>& first = tile.net.maps[0];
      T* tangent = tile.room(0);
      for (int64_t c = 0; c < first.outputs; ++c)
        std::fill_n(tangent + c * plane_, columns_, first.weight[c * features_ + j]);
      for (int64_t i = 1;; ++i) {
        visit(j, i - 1, tangent);
        tile.along(i - 1, tangent);
        const bool last = i == tile.last();
        T* next = last ? of_.at() + j * plane_ : tile.room(i % 2);
        tile.net.maps[i].forward.run(tangent, nullptr, next, last ? features_ * plane_ : plane_, columns_);
        if (last) break;
        tangent = next;
      }
    }
  }

  // w = Jᵀ w, in place.
  void pull(T* w) const {
    alignas(64) T found[kMostWhole][kStrip];
    for (int64_t q = 0; q < columns_; q += kStrip) {
      for (int64_t j = 0; j < features_; ++j) {
        T sums[kStrip] = {};
        for (int64_t i = 0; i < features_; ++i) {
          const T *row = of_.at() + (i * features_ + j) * plane_ + q, *by = w + i * plane_ + q;
          for (int64_t k = 0; k < kStrip; ++k) sums[k] += row[k] * by[k];
        }
        std::copy_n(sums, kStrip, found[j]);
      }
      for (int64_t j = 0; j < features_; ++j) std::copy_n(found[j], kStrip, w + j * plane_ + q);
    }
  }

 private:
  static constexpr int64_t kStrip = Vector<T>::kLanes;

  int64_t features_, plane_ = 0, columns_ = 0;
  Planes<T> of_;  // J[i][j] at plane i·D + j
};

// What a fully connected block's gradient would compute anew: of each activation's arguments the values and the
// tangents along the probes, sixteen samples side by side: [N / 16, 1 + P, Σ arguments, 16], zeros beyond the last one.
template <typename T>
struct Kept {
  static constexpr int64_t kBeside = 16;

  T* at = nullptr;
  int64_t vectors = 0, rows = 0;
  std::vector<int64_t> first;  // row of each activation's first argument

  Kept(const Network<T>& net, int64_t probes) : vectors(1 + probes) {
    for (int64_t i = 0; i + 1 < net.count(); ++i) {
      first.push_back(rows);
      rows += net.arguments(i);
    }
  }
  std::vector<int64_t> shape(int64_t batch) const { return {(batch + kBeside - 1) / kBeside, vectors, rows, kBeside}; }

  // f(of the tile, of what is kept, how many) for each sixteen samples and each argument of activation i, of a tile
  // that begins with sample `from`.
  template <typename F>
  void each(const Tile<T>& tile, T* planes, int64_t from, int64_t some, int64_t vector, int64_t i, F&& f) const {
    for (int64_t q = 0; q < some; q += kBeside) {
      T* kept = at + (((from + q) / kBeside * vectors + vector) * rows + first[i]) * kBeside;
      const int64_t n = std::min(kBeside, some - q);
      for (int64_t c = 0; c < tile.net.arguments(i); ++c, kept += kBeside) {
        if (n == kBeside)
          f(planes + c * tile.plane + q, kept, std::integral_constant<int64_t, kBeside>());
        else
          f(planes + c * tile.plane + q, kept, n);
      }
    }
  }

  void store(const Tile<T>& tile, T* planes, int64_t from, int64_t some, int64_t vector, int64_t i) const {
    each(tile, planes, from, some, vector, i, [](const T* row, T* kept, auto n) {
      std::copy_n(row, int64_t(n), kept);
      std::fill(kept + int64_t(n), kept + kBeside, T(0));
    });
  }
  // What is left of the tile's columns becomes zeros.
  void load(const Tile<T>& tile, T* planes, int64_t from, int64_t some, int64_t vector, int64_t i) const {
    each(tile, planes, from, some, vector, i,
         [](T* row, const T* kept, auto n) { std::copy_n(kept, int64_t(n), row); });
    for (int64_t c = 0; some < tile.columns && c < tile.net.arguments(i); ++c)
      std::fill(planes + c * tile.plane + some, planes + c * tile.plane + tile.columns, T(0));
  }
  // The tangents along a probe [N, D], from those along its e_j in turn.
  void add(const Tile<T>& tile, T* tangents, int64_t from, int64_t some, int64_t p, int64_t i, const T* probe,
           int64_t j) const {
    const int64_t features = tile.net.features();
    for (int64_t q = 0; q < some; q += kBeside) {
      const int64_t n = std::min(kBeside, some - q);
      T v[kBeside] = {};
      for (int64_t k = 0; k < n; ++k) v[k] = probe[(from + q + k) * features + j];
      const auto add = [&](const T* row, T* kept) {
        constexpr int64_t L = Vector<T>::kLanes;
        for (int64_t k = 0; k < kBeside; k += L) {
          const auto by = load_vector(v + k) * load_vector(row + k);
          store_vector<T>(j ? load_vector(kept + k) + by : by, kept + k);
        }
      };
      each(tile, tangents + q, from + q, n, 1 + p, i, [&](const T* row, T* kept, auto count) {
        if constexpr (std::is_same_v<decltype(count), int64_t>) {
          T some_of[kBeside] = {};
          std::copy_n(row, count, some_of);
          add(some_of, kept);
        } else {
          add(row, kept);
        }
      });
    }
  }
};

}  // namespace block
}  // namespace genkernels
