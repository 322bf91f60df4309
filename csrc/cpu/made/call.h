// The network of one call, as the solves and the passes of `made` read it.
#pragma once

#include "linear.h"
#include "solve.h"

namespace genkernels {
namespace made {
namespace {

// How the columns of the first layer's weight are wanted: in the order of the steps, or in that or its reverse, which
// `net.step` tells, or as they lie.
enum class Columns { kSorted, kEitherWay, kAsTheyLie };

// Every count and index that memory is addressed by is checked here, for nothing above reads their values.
template <typename T>
struct Call {
  Network<T> net;
  Scratch<T> first;  // that weight where it does not lie so

  Call(const Layers& layers, int64_t features, int64_t params, Columns columns = Columns::kSorted)
      : first(gathers(layers.order, columns) ? layers.weights[0].size(0) * features : 0) {
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
    if (columns == Columns::kEitherWay && is_natural(layers.order, true)) net.step = -1;
    if (gathers(layers.order, columns)) {
      gather_columns<T>(net.weights[0], net.sizes[0], features, net.order, first, features);
      net.weights[0] = first;
    }
  }

  static bool gathers(const Tensor& order, Columns columns) {
    const bool either = columns == Columns::kEitherWay && is_natural(order, true);
    return columns != Columns::kAsTheyLie && !either && !is_natural(order);
  }

  static bool is_natural(const Tensor& order, bool backwards = false) {
    const int64_t *o = data<int64_t>(order), D = order.size(0);
    for (int64_t i = 0; i < D; ++i)
      if (o[i] != (backwards ? D - 1 - i : i)) return false;
    return true;
  }
};

}  // namespace
}  // namespace made
}  // namespace genkernels
