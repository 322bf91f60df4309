// Power iteration on convolutions, and the weight's gradient D, by the product of product.h.
//
// A task is a tile of kTile places by up to kRowBlock channels. Where rows of places are whole vectors, they are read
// where they lie; else a tile's sources are laid side by side first, kRun of them at a time. Layers go together, one
// phase after the other: A v; u and its border; Aᵀ u; v and its border; σ is ‖Aᵀ u‖, so that no third product is taken.
#pragma once

#include "geometry.h"

namespace genkernels {
namespace spectral {

constexpr int64_t kRowBlock = 128;
constexpr int64_t kElements = 16 * 1024;  // numbers of a vector that one task divides, lays or folds

template <typename S>
struct Convolution {
  using T = arithmetic_t<S>;

  const S* weight;
  bool transposed;
  int64_t groups, outputs, inputs, taps;  // of the weight: [groups · outputs, inputs, taps]
  Map<T> gather, spread;
  const S *given_u, *given_v;
  T *x, *y, *plain = nullptr;  // what u and v become: the results themselves, or scratch beside half numbers
  std::vector<Squares> lengths;
  double length_v = 0;
  T sigma = 0, factor = 1;

  Map<T>& forward() { return transposed ? spread : gather; }
  Map<T>& transpose() { return transposed ? gather : spread; }
  T* u() const { return transposed ? x : y; }
  T* v() const { return transposed ? y : x; }
  int64_t x_count() const { return groups * inputs * count_of(gather.source.size); }
  int64_t y_count() const { return groups * outputs * count_of(gather.size); }
  int64_t u_count() const { return transposed ? x_count() : y_count(); }
  int64_t v_count() const { return transposed ? y_count() : x_count(); }
  int64_t weights() const { return groups * outputs * inputs * taps; }

  // What memory safety asks of the sizes; the rest is checked above.
  void shape(const Record& g, const Tensor& w, const Tensor& u, const Tensor& v) {
    const Tensor &tx = g.transposed ? u : v, &ty = g.transposed ? v : u;
    const int64_t dims = w.dim() - 2;
    bool fine = dims >= 1 && dims <= 3 && tx.dim() == dims + 1 && ty.dim() == dims + 1 && g.groups > 0;
    fine = fine && w.size(0) % g.groups == 0 && ty.size(0) == w.size(0) && tx.size(0) == w.size(1) * g.groups;
    Shape kernel{1, 1, 1}, sx{1, 1, 1}, sy{1, 1, 1};
    for (int64_t a = 0; fine && a < dims; ++a) {
      const int64_t at = 3 - dims + a;
      kernel[at] = w.size(2 + a);
      sx[at] = tx.size(1 + a);
      sy[at] = ty.size(1 + a);
      fine = g.stride[at] > 0 && g.dilation[at] > 0 && kernel[at] > 0 && sx[at] > 0 && sy[at] > 0;
    }
    require(fine, "spectral_norm: a convolution's weight, u and v must fit together");
    weight = data<S>(w);
    transposed = g.transposed;
    groups = g.groups;
    outputs = w.size(0) / groups;
    inputs = w.size(1);
    taps = count_of(kernel);
    given_u = data<S>(u);
    given_v = data<S>(v);
    const bool flat = taps == 1 && g.stride == Shape{1, 1, 1} && g.padding == Shape{0, 0, 0} && sx == sy;
    if (flat) sx = sy = {1, 1, count_of(sx)};
    gather = gather_map<T>(g, inputs, outputs, kernel, sx, sy);
    spread = spread_map<T>(g, inputs, outputs, kernel, sx, sy);
  }
  int64_t scratch_size() const {
    int64_t size = 2 * (x_count() + y_count()) + 2 * weights();
    size += groups * inputs * (gather.source.plane() + (spread.folds ? count_of(spread.size) : 0));
    return size + groups * outputs * spread.source.plane();
  }
  void allocate(Arena<T>& arena, S* u, S* v) {
    if constexpr (std::is_same_v<S, T>) {
      (transposed ? x : y) = u;
      (transposed ? y : x) = v;
    } else {
      arena.need(x, x_count());
      arena.need(y, y_count());
      arena.need(plain, weights());
    }
    for (Map<T>* map : {&gather, &spread}) {
      arena.need(map->source.to, groups * map->channels * map->source.plane());
      arena.need(map->out, map == &gather ? y_count() : x_count());
      if (map->folds) arena.need(map->whole, groups * map->rows * count_of(map->size));
    }
    for (Part<T>& p : spread.parts) arena.need(p.packed, groups * inputs * p.depth());
  }

  // The weight for both maps: rows of outputs as they are, rows of inputs packed; of output channels [begin, end).
  void pack(int64_t begin, int64_t end) {
    constexpr int64_t kTogether = 16;
    const int64_t row = inputs * taps;
    if constexpr (!std::is_same_v<S, T>) load(weight + begin * row, plain + begin * row, (end - begin) * row);
    for (Part<T>& p : spread.parts) {
      const int64_t some = int64_t(p.taps.size());
      for (int64_t c0 = 0; c0 < inputs; c0 += kTogether)
        for (int64_t channel = begin; channel < end; ++channel) {
          const int64_t group = channel / outputs, o = channel % outputs, c1 = std::min(c0 + kTogether, inputs);
          const T* from = gather.parts[0].weight + channel * row + c0 * taps;
          T* to = p.packed + ((group * inputs + c0) * outputs + o) * some;
          for (int64_t c = c0; c < c1; ++c, from += taps, to += outputs * some)
            for (int64_t t = 0; t < some; ++t) to[t] = from[p.taps[t]];
        }
    }
  }
  void aim() {
    if constexpr (std::is_same_v<S, T>)
      gather.parts[0].weight = weight;
    else
      gather.parts[0].weight = plain;
    for (Part<T>& p : spread.parts) p.weight = p.packed;
  }
};

// ---- a tile -----------------------------------------------------------------------------------------------------

struct Task {
  int64_t layer, part, group, row, rows, place, places, length, cost;
};

template <typename T>
void fill_tile(const Part<T>& p, const std::vector<Stretch>& places, const T* source, int64_t begin, int64_t end,
               T* to) {
  for (int64_t k = begin; k < end; ++k, to += kTile) {
    const T* from = source + p.at[k];
    for (const Stretch& s : places) {
      const T* row = from + s.from;
      if (p.step[2] == 1)  // whole vectors: what they write beyond a stretch, the next one overwrites
        for (int64_t j = 0; j < s.count; j += kLanes<T>) store_vector<T>(load_vector(row + j), to + s.at + j);
      else
        for (int64_t j = 0; j < s.count; ++j) to[s.at + j] = row[j * p.step[2]];
    }
  }
}

template <typename T>
Squares run(const Map<T>& map, const Task& task) {
  constexpr int64_t L = kLanes<T>;
  const Part<T>& p = map.parts[task.part];
  const int64_t depth = p.depth(), vectors = divide_up(task.places, L);
  T* out = scratch<T>(1, (task.rows + kRun + 1) * kTile);
  T* side = out + task.rows * kTile;
  const T* source = map.source.to + task.group * map.channels * map.source.plane();
  const std::vector<Stretch> places = stretches(p, task.place, task.places);
  const T* w[kRowBlock];
  for (int64_t r = 0; r < task.rows; ++r) w[r] = p.weight + (task.group * map.rows + task.row + r) * depth;
  const T* lanes[kTile / L];
  if (depth == 0) std::fill_n(out, task.rows * kTile, T(0));
  if (p.in_place) {
    for (const Stretch& s : places)
      for (int64_t j = 0; j < s.count; j += L) lanes[(s.at + j) / L] = source + s.from + j;
    product<T, false>({w, nullptr, lanes, p.at.data(), depth}, true, task.rows, vectors, out);
  } else {
    int64_t at[kRun];
    for (int64_t k = 0; k < kRun; ++k) at[k] = k * kTile;
    for (int64_t v = 0; v < vectors; ++v) lanes[v] = side + v * L;
    for (int64_t k = 0; k < depth; k += kRun) {
      const int64_t deep = std::min(kRun, depth - k);
      fill_tile(p, places, source, k, k + deep, side);
      product<T, false>({w, nullptr, lanes, at, deep}, k == 0, task.rows, vectors, out);
      for (int64_t r = 0; r < task.rows; ++r) w[r] += deep;
    }
  }
  T* to = map.destination() + (task.group * map.rows + task.row) * count_of(map.size);
  const bool straight = map.is_straight(p);
  for (int64_t r = 0; r < task.rows; ++r, to += count_of(map.size)) {
    const T* row = out + r * kTile;
    if (straight) {
      copy(row, to + task.place, task.places);
      continue;
    }
    for (const Stretch& s : places)
      for (int64_t j = 0; j < s.count; ++j) to[s.to + j * p.to[2]] = row[s.at + j];
  }
  if (map.folds) return {};
  for (int64_t r = 1; r < task.rows && task.places < kTile; ++r)
    for (int64_t j = 0; j < task.places; ++j) out[r * task.places + j] = out[r * kTile + j];
  return squares(out, task.rows * task.places);
}

// Channels [begin, end) of the whole, folded onto the input.
template <typename T>
Squares fold(const Map<T>& map, int64_t begin, int64_t end) {
  const Shape &n = map.folded, &size = map.size;
  const auto wrapped = [&](int axis, int64_t j) {
    const int64_t i = (j - map.before[axis]) % n[axis];
    return i < 0 ? i + n[axis] : i;
  };
  T* to = map.out + begin * count_of(n);
  std::fill_n(to, (end - begin) * count_of(n), T(0));
  const T* from = map.whole + begin * count_of(size);
  for (int64_t c = begin; c < end; ++c, to += count_of(n))
    for (int64_t j0 = 0; j0 < size[0]; ++j0)
      for (int64_t j1 = 0; j1 < size[1]; ++j1) {
        T* row = to + (wrapped(0, j0) * n[1] + wrapped(1, j1)) * n[2];
        for (int64_t j2 = 0, i = wrapped(2, 0); j2 < size[2]; ++j2, i = i + 1 == n[2] ? 0 : i + 1) row[i] += *from++;
      }
  return squares(map.out + begin * count_of(n), (end - begin) * count_of(n));
}

// ---- many convolutions at once ----------------------------------------------------------------------------------

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
      c.aim();
      const int64_t channels = c.groups * c.outputs, each = std::max<int64_t>(1, kElements / (c.inputs * c.taps));
      for (int64_t o = 0; o < channels; o += each) {
        const int64_t some = std::min(each, channels - o);
        tasks.push_back({i, 0, 0, o, some, 0, 0, 0, 4 * some * c.inputs * c.taps});
      }
    }
    add_channels(tasks, false);
    add_channels(tasks, true);
    share_out(tasks, cost_of, false, [&](const Task& t) {
      Layer& c = layers_[t.layer];
      if (t.part == 0) {
        c.pack(t.row, t.row + t.rows);
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
