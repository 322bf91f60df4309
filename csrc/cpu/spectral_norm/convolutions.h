// Power iteration on many convolutions at once, one phase after the other: A v; u and its border; Aᵀ u; v and its
// border. σ is ‖Aᵀ u‖, so that no third product is taken, but where that has no direction.
#pragma once

#include "convolution.h"

namespace genkernels {
namespace spectral {

constexpr int64_t kElements = 16 * 1024;  // numbers of a vector that one task divides, lays or folds

template <typename S>
class Convolutions {
  using T = arithmetic_t<S>;
  using Layer = Convolution<S>;

 public:
  explicit Convolutions(std::vector<Layer>& layers) : layers_(layers) {}

  void iterate(int64_t iterations) {
    prepare(iterations);
    std::vector<int64_t> all, apart;
    for (int64_t i = 0; i < int64_t(layers_.size()); ++i) all.push_back(i);
    for (int64_t i = 0; i < iterations; ++i) {
      apply(false, all);
      settle(false, i == 0, false);
      apply(true, all);
      settle(true, i == 0, i + 1 == iterations);
    }
    for (int64_t i : all) {
      if (iterations && has_direction<T>(layers_[i].length_v))
        layers_[i].sigma = T(layers_[i].length_v);
      else
        apart.push_back(i);
    }
    if (apart.empty()) return;
    apply(false, apart);
    for (int64_t i : apart) {
      Layer& c = layers_[i];
      c.sigma = T(inner<T>(c.u(), c.forward().out, c.u_count()));
    }
  }

 private:
  void prepare(int64_t iterations) {
    std::vector<Task> tasks;
    for (int64_t i = 0; i < int64_t(layers_.size()); ++i) {
      Layer& c = layers_[i];
      if (std::is_same_v<S, T>) continue;
      c.gather.weight = c.spread.weight = c.plain;
      for (int64_t at = 0; at < c.weights(); at += kElements) {
        const int64_t some = std::min(kElements, c.weights() - at);
        tasks.push_back({i, 0, 0, at, some, 0, 0, 0, some});
      }
    }
    add_channels(tasks, false);
    add_channels(tasks, true);
    share_out(tasks, cost_of, false, [&](const Task& t) {
      Layer& c = layers_[t.layer];
      if (t.part == 0) {
        if constexpr (!std::is_same_v<S, T>) load(c.weight + t.row, c.plain + t.row, t.rows);
      } else {
        const Source<T>& source = (t.group ? c.transpose() : c.forward()).source;
        if (!source.circular) source.clear(t.row, t.row + t.rows);
        if (t.group == 0) take(t, source, c.given_v, c.v(), iterations == 0);
        if (t.group == 1 && iterations == 0) take(t, source, c.given_u, c.u(), true);
      }
    });
  }

  // Channels of u or v as they were given, laid; `kept`: for good.
  void take(const Task& t, const Source<T>& source, const S* given, T* to, bool kept) {
    const int64_t plane = count_of(source.size);
    for (int64_t c = t.row; c < t.row + t.rows; ++c) {
      if constexpr (std::is_same_v<S, T>) {
        if (kept) load(given + c * plane, to + c * plane, plane);
        source.lay(given + c * plane, c);
      } else {
        load(given + c * plane, to + c * plane, plane);
        source.lay(to + c * plane, c);
      }
    }
  }

  static int64_t cost_of(const Task& t) { return t.cost; }

  // Tasks over the channels of v, or of u, which is group 1; part 1.
  void add_channels(std::vector<Task>& tasks, bool of_u) {
    for (int64_t i = 0; i < int64_t(layers_.size()); ++i) {
      const Source<T>& source = (of_u ? layers_[i].transpose() : layers_[i].forward()).source;
      const Map<T>& map = of_u ? layers_[i].transpose() : layers_[i].forward();
      const int64_t channels = map.groups * map.channels;
      const int64_t each = std::max<int64_t>(1, kElements / (source.plane() + count_of(source.size)));
      for (int64_t c = 0; c < channels; c += each) {
        const int64_t some = std::min(each, channels - c);
        tasks.push_back({i, 1, of_u, c, some, 0, 0, 0, some * (source.plane() + count_of(source.size))});
      }
    }
  }

  // A v, or Aᵀ u: tiles, and where they are circular, their ends.
  void apply(bool transpose, const std::vector<int64_t>& which) {
    std::vector<Task> tasks, folds;
    for (int64_t i : which) {
      const Map<T>& map = transpose ? layers_[i].transpose() : layers_[i].forward();
      const int64_t blocks = divide_up(map.rows, kRowBlock), rows = divide_up(map.rows, blocks);
      int64_t length = 0;
      for (int64_t part = 0; part < int64_t(map.parts.size()); ++part) {
        const Part<T>& p = map.parts[part];
        const int64_t places = count_of(p.places);
        for (int64_t group = 0; group < map.groups; ++group)
          for (int64_t place = 0; place < places; place += kTile)
            for (int64_t row = 0; row < map.rows; row += rows) {
              const int64_t high = std::min(rows, map.rows - row), wide = std::min(kTile, places - place);
              tasks.push_back({i, part, group, row, high, place, wide, length++, high * wide * (p.depth() + 1)});
            }
      }
      if (map.folds) {
        length = 0;
        const int64_t channels = map.groups * map.rows, each = std::max<int64_t>(1, kElements / count_of(map.size));
        for (int64_t c = 0; c < channels; c += each, ++length) {
          const int64_t some = std::min(each, channels - c);
          folds.push_back({i, 0, 0, c, some, 0, 0, length, some * count_of(map.size)});
        }
      }
      layers_[i].lengths.assign(length, Squares{});
    }
    const auto map_of = [&](const Task& t) -> const Map<T>& {
      return transpose ? layers_[t.layer].transpose() : layers_[t.layer].forward();
    };
    share_out(tasks, cost_of, false, [&](const Task& t) {
      const Squares found = run(map_of(t), t);
      if (!map_of(t).folds) layers_[t.layer].lengths[t.length] = found;
    });
    share_out(folds, cost_of, false,
              [&](const Task& t) { layers_[t.layer].lengths[t.length] = fold(map_of(t), t.row, t.row + t.rows); });
  }

  // The product becomes u, or v, of length 1, where it has a direction; and, unless it is the last, what the other map
  // reads.
  void settle(bool of_v, bool first, bool last) {
    std::vector<double> lengths;
    for (Layer& c : layers_) {
      lengths.push_back(length(c.lengths.data(), int64_t(c.lengths.size())));
      if (of_v) c.length_v = lengths.back();
    }
    std::vector<Task> tasks;
    add_channels(tasks, !of_v);
    share_out(tasks, cost_of, false, [&](const Task& t) {
      Layer& c = layers_[t.layer];
      const Source<T>& source = (of_v ? c.forward() : c.transpose()).source;
      const int64_t plane = count_of(source.size);
      T* to = of_v ? c.v() : c.u();
      const T* from = (of_v ? c.transpose() : c.forward()).out;
      if (!has_direction<T>(lengths[t.layer])) {
        if (first) take(t, source, of_v ? c.given_v : c.given_u, to, true);
        return;
      }
      for (int64_t n = t.row; n < t.row + t.rows; ++n) {
        divide(from + n * plane, lengths[t.layer], to + n * plane, plane);
        if (!last) source.lay(to + n * plane, n);
      }
    });
  }

  std::vector<Layer>& layers_;
};

}  // namespace spectral
}  // namespace genkernels
