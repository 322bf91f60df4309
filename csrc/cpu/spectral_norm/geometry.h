// Convolutions as sums over taps, of places in a source with its border laid around it.
//
// Weight [C_y, C_x / groups, *taps]; x, y its input and output. Both directions are correlations:
//
//   gather   y[o] = Σ_{c, t} W[·, c, t] x[c, o·stride + t·dilation − padding]
//   spread   x[i] = Σ_{c, t} W[c, ·, t] y[c, (i + padding − t·dilation) / stride]   over the taps that divide
//
// A spread is cut into one part for each remainder of i by the stride, in each of which the same taps divide. A
// circular one goes to the whole input with its border, whose ends are then folded onto it.
#pragma once

#include "product.h"

namespace genkernels {
namespace spectral {

using Shape = std::array<int64_t, 3>;

inline int64_t count_of(const Shape& s) {
  return s[0] * s[1] * s[2];
}
inline Shape strides_of(const Shape& s) {
  return {s[1] * s[2], s[2], 1};
}
inline int64_t dot(const Shape& a, const Shape& b) {
  return a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
}

enum Kind : int64_t { kMatrix = 0, kConvolution = 1, kCircular = 2 };

// One record of a plan: Geometry of genkernels/reference/spectral_norm.py.
struct Record {
  static constexpr int64_t kLength = 13;
  int64_t kind, axis, groups;
  bool transposed;
  Shape stride, padding, dilation;

  explicit Record(const int64_t* r)
      : kind(r[0]),
        axis(r[1]),
        groups(r[2]),
        transposed(r[3] != 0),
        stride{r[4], r[5], r[6]},
        padding{r[7], r[8], r[9]},
        dilation{r[10], r[11], r[12]} {}
};

// Channels of `size` numbers, laid out as `laid`: place j is number j − before, 0 beyond the ends, or going on at the
// other end.
template <typename T>
struct Source {
  Shape size, laid, before;
  bool circular = false;
  T* to = nullptr;

  int64_t plane() const { return count_of(laid); }

  // The border is zero, and stays so.
  void clear(int64_t begin, int64_t end) const { std::fill_n(to + begin * plane(), (end - begin) * plane(), T(0)); }

  // One channel, over a border that was cleared.
  void lay(const T* from, int64_t channel) const {
    const Shape in = strides_of(size), out = strides_of(laid);
    const auto index = [&](int axis, int64_t j) {
      const int64_t i = j - before[axis], n = size[axis];
      if (i >= 0 && i < n) return i;
      return circular ? ((i % n) + n) % n : int64_t(-1);
    };
    const int64_t first = std::clamp<int64_t>(before[2], 0, laid[2]),
                  last = std::clamp<int64_t>(before[2] + size[2], first, laid[2]);
    for (int64_t j0 = 0; j0 < laid[0]; ++j0)
      for (int64_t j1 = 0; j1 < laid[1]; ++j1) {
        const int64_t i0 = index(0, j0), i1 = index(1, j1);
        if (i0 < 0 || i1 < 0) continue;
        T* row = to + channel * plane() + j0 * out[0] + j1 * out[1];
        const T* given = from + i0 * in[0] + i1 * in[1];
        copy(given + first - before[2], row + first, last - first);
        for (int64_t j = 0; circular && j < first; ++j) row[j] = given[index(2, j)];
        for (int64_t j = last; circular && j < laid[2]; ++j) row[j] = given[index(2, j)];
      }
  }
};

// Places of the destination that have the same taps.
template <typename T>
struct Part {
  Shape places;               // how many along each axis
  Shape step;                 // from one to the next, in the laid source
  Shape to;                   // and in the destination,
  int64_t to_first;           // where the first one is here
  std::vector<int64_t> at;    // of each channel of a group and tap, in the laid source: [depth]
  std::vector<int64_t> at_w;  // and in a row of the weight; none: one after the other
  bool in_place = false;      // whether lanes of places are neighbours in the source, too

  int64_t depth() const { return int64_t(at.size()); }
};

// A linear map of channels: source → destination.
template <typename T>
struct Map {
  Source<T> source;
  int64_t groups, channels, rows;  // of a group: those read and those written
  const T* weight = nullptr;
  int64_t group_step, row_step;  // in the weight
  Shape size;                    // of the destination, or of the whole that is folded onto it
  std::vector<Part<T>> parts;
  bool folds = false;
  Shape folded, before;
  T *out = nullptr, *whole = nullptr;

  T* destination() const { return folds ? whole : out; }
  bool is_straight(const Part<T>& p) const { return p.places == size; }  // places are the destination's, in order
};

// Places of a tile that follow one another along the last axis.
struct Stretch {
  int64_t at, count, from, to;
};

template <typename T>
std::vector<Stretch> stretches(const Part<T>& p, int64_t begin, int64_t count) {
  std::vector<Stretch> found;
  for (int64_t n = 0; n < count;) {
    const int64_t place = begin + n, o2 = place % p.places[2], row = place / p.places[2];
    const Shape o{row / p.places[1], row % p.places[1], o2};
    const int64_t more = std::min(count - n, p.places[2] - o2);
    found.push_back({n, more, dot(o, p.step), p.to_first + dot(o, p.to)});
    n += more;
  }
  return found;
}

// ---- the two maps of a convolution ------------------------------------------------------------------------------

struct Tap {
  int64_t at, index;  // in the laid source, and among the kernel's
};

template <typename T>
void add_part(Map<T>& map, Part<T> p, const std::vector<Tap>& taps, int64_t channel_step) {
  for (int64_t c = 0; c < map.channels; ++c)
    for (const Tap& t : taps) {
      p.at.push_back(c * map.source.plane() + t.at);
      if (channel_step) p.at_w.push_back(c * channel_step + t.index);
    }
  p.in_place = p.step[2] == 1 && p.places[2] % kLanes<T> == 0;
  map.parts.push_back(std::move(p));
}

// x → y
template <typename T>
Map<T> gather_map(const Record& g, int64_t inputs, int64_t rows, const Shape& kernel, const Shape& x, const Shape& y) {
  Map<T> map;
  map.groups = g.groups;
  map.channels = inputs;
  map.rows = rows;
  map.row_step = inputs * count_of(kernel);
  map.group_step = rows * map.row_step;
  map.size = y;
  map.source.size = x;
  map.source.before = g.padding;
  map.source.circular = g.kind == kCircular;
  for (int a = 0; a < 3; ++a) map.source.laid[a] = (y[a] - 1) * g.stride[a] + g.dilation[a] * (kernel[a] - 1) + 1;
  const Shape pitch = strides_of(map.source.laid);
  Part<T> p;
  p.places = y;
  p.to = strides_of(y);
  p.to_first = 0;
  for (int a = 0; a < 3; ++a) p.step[a] = g.stride[a] * pitch[a];
  std::vector<Tap> taps;
  for (int64_t t0 = 0; t0 < kernel[0]; ++t0)
    for (int64_t t1 = 0; t1 < kernel[1]; ++t1)
      for (int64_t t2 = 0; t2 < kernel[2]; ++t2)
        taps.push_back({t0 * g.dilation[0] * pitch[0] + t1 * g.dilation[1] * pitch[1] + t2 * g.dilation[2], 0});
  add_part(map, std::move(p), taps, 0);
  return map;
}

// y → x
template <typename T>
Map<T> spread_map(const Record& g, int64_t inputs, int64_t rows, const Shape& kernel, const Shape& x, const Shape& y) {
  struct Remainder {
    int64_t first, count;
    std::vector<Tap> taps;
  };
  Map<T> map;
  map.groups = g.groups;
  map.channels = rows;
  map.rows = inputs;
  map.row_step = count_of(kernel);
  map.group_step = rows * inputs * map.row_step;
  map.folds = g.kind == kCircular;
  map.folded = x;
  map.before = g.padding;
  map.source.size = y;
  std::vector<Remainder> remainders[3];
  for (int a = 0; a < 3; ++a) {
    const int64_t s = g.stride[a], padding = map.folds ? 0 : g.padding[a];
    map.size[a] = map.folds ? (y[a] - 1) * s + g.dilation[a] * (kernel[a] - 1) + 1 : x[a];
    int64_t lowest = 0, highest = y[a] - 1;
    for (int64_t first = 0; first < std::min(s, map.size[a]); ++first) {
      Remainder r{first, divide_up(map.size[a] - first, s), {}};
      for (int64_t t = 0; t < kernel[a]; ++t) {
        const int64_t distance = first + padding - t * g.dilation[a];
        if (distance % s) continue;
        r.taps.push_back({distance / s, t});
        lowest = std::min(lowest, distance / s);
        highest = std::max(highest, distance / s + r.count - 1);
      }
      remainders[a].push_back(std::move(r));
    }
    map.source.before[a] = -lowest;
    map.source.laid[a] = highest - lowest + 1;
  }
  const Shape pitch = strides_of(map.source.laid), to = strides_of(map.size);
  const int64_t origin = dot(map.source.before, pitch);
  for (const Remainder& r0 : remainders[0])
    for (const Remainder& r1 : remainders[1])
      for (const Remainder& r2 : remainders[2]) {
        Part<T> p;
        p.places = {r0.count, r1.count, r2.count};
        p.step = pitch;
        p.to = {g.stride[0] * to[0], g.stride[1] * to[1], g.stride[2]};
        p.to_first = r0.first * to[0] + r1.first * to[1] + r2.first;
        std::vector<Tap> taps;
        for (const Tap& t0 : r0.taps)
          for (const Tap& t1 : r1.taps)
            for (const Tap& t2 : r2.taps)
              taps.push_back({origin + t0.at * pitch[0] + t1.at * pitch[1] + t2.at,
                              (t0.index * kernel[1] + t1.index) * kernel[2] + t2.index});
        add_part(map, std::move(p), taps, inputs * map.row_step);
      }
  return map;
}

}  // namespace spectral
}  // namespace genkernels
