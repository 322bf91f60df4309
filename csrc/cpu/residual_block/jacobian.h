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
  // without a product. Both rooms are overwritten.
  void find(Tile<T>& tile) {
    plane_ = tile.plane, columns_ = tile.columns;
    for (int64_t j = 0; j < features_; ++j) {
      const Map<T>& first = tile.net.maps[0];
      T* tangent = tile.room(0);
      for (int64_t c = 0; c < first.outputs; ++c)
        std::fill_n(tangent + c * plane_, columns_, first.weight[c * features_ + j]);
      for (int64_t i = 1;; ++i) {
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

}  // namespace block
}  // namespace genkernels
