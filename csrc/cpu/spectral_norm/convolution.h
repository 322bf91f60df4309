// A convolution of one sample, and tiles of its two products, by the product of product.h.
//
// A task is a tile of kTile places by up to kRowBlock channels. Where rows of places are whole vectors, they are read
// where they lie; else a tile's sources are laid side by side first, kRun of them at a time. The weight is read where
// it lies, whichever way it is gone through.
#pragma once

#include "geometry.h"

namespace genkernels {
namespace spectral {

constexpr int64_t kRowBlock = 128;

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
    int64_t size = 2 * (x_count() + y_count()) + (std::is_same_v<S, T> ? 0 : weights());
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
    if constexpr (std::is_same_v<S, T>) gather.weight = spread.weight = weight;
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
  const T *w[kRowBlock], *lanes[kTile / L];
  const T* weight = map.weight + task.group * map.group_step + task.row * map.row_step;
  for (int64_t r = 0; r < task.rows; ++r) w[r] = weight + r * map.row_step;
  // of products `deep` from k on, w's rows beginning there where they are not looked up
  const auto multiply = [&](int64_t k, int64_t deep, const int64_t* at) {
    if (p.at_w.empty())
      product<T, false>({w, nullptr, lanes, at, deep}, k == 0, task.rows, vectors, out);
    else
      product<T, true>({w, p.at_w.data() + k, lanes, at, deep}, k == 0, task.rows, vectors, out);
  };
  if (depth == 0) std::fill_n(out, task.rows * kTile, T(0));
  if (p.in_place) {
    for (const Stretch& s : places)
      for (int64_t j = 0; j < s.count; j += L) lanes[(s.at + j) / L] = source + s.from + j;
    multiply(0, depth, p.at.data());
  } else {
    int64_t at[kRun];
    for (int64_t k = 0; k < kRun; ++k) at[k] = k * kTile;
    for (int64_t v = 0; v < vectors; ++v) lanes[v] = side + v * L;
    for (int64_t k = 0; k < depth; k += kRun) {
      const int64_t deep = std::min(kRun, depth - k);
      fill_tile(p, places, source, k, k + deep, side);
      multiply(k, deep, at);
      for (int64_t r = 0; r < task.rows && p.at_w.empty(); ++r) w[r] += deep;
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

}  // namespace spectral
}  // namespace genkernels
