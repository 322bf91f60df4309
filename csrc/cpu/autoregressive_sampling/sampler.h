// A causal network, packed, and its activations: a row of every stage at once, then a pixel at a time.
#pragma once

#include "../../common/math.h"
#include "../../common/stages.h"
#include "product.h"

namespace genkernels {
namespace sampling {
namespace {

using stages::Input;
using stages::Network;
using stages::Plane;
using stages::Stage;

// One kernel row of one input, for one group of outputs.
template <typename T>
struct Product {
  int64_t plane;
  int64_t up;      // rows above the current one
  int64_t start;   // element of the plane's row where the stretch of column 0's pixel begins
  int64_t count;   // its length
  int64_t offset;  // of the packed weights [count][vectors]
};

// Consecutive channels before the activation that lie together in a group's sums.
struct Segment {
  int64_t channel, place, count;
};

template <typename T>
struct Packed {
  int64_t groups, padded, stride;   // groups of outputs, numbers a group, numbers a pixel
  int64_t group_width, group_made;  // live ones, before and after the activation
  std::vector<Segment> segments;
  std::vector<std::vector<Product<T>>> above, beside;  // [group]: whole rows at once; pixel by pixel
  std::vector<int64_t> added_above, added_beside;      // planes
  int64_t sums;                                        // offset in a sample's row of sums
};

template <typename T>
class Sampler {
 public:
  Sampler(const Network& net, const std::vector<Tensor>& tensors, int64_t groups, int64_t columns)
      : net_(net), columns_(columns) {
    for (const Tensor& t : tensors) pointers_.push_back(data<T>(t));
    for (const Stage& s : net.stages) pack(s, s.vertical ? 1 : groups);
  }

  int64_t scratch() const { return sums_; }  // elements a sample

  // Everything of row i that depends on rows above only, for samples first, first + 1, …
  void row(int64_t i, int64_t rows, int64_t first, int64_t samples, T* state, T* sums) const {
    for (size_t k = 0; k < packed_.size(); ++k) {
      const Packed<T>& p = packed_[k];
      const Stage& s = net_.stages[k];
      for (int64_t n = 0; n < samples; ++n) {
        T* mine = state + n * net_.state_size;
        T* to = sums + n * sums_ + p.sums;
        start(s, p, first + n, i, rows, to);
        for (int64_t plane : p.added_above) {
          const Plane& from = net_.planes[plane];
          for (const Segment& g : p.segments)
            for (int64_t j = 0; j < columns_; ++j)
              add(at(mine, from, i, j) + g.channel, to + j * p.stride + g.place, g.count);
        }
      }
      for (int64_t g = 0; g < p.groups; ++g)
        for (const Product<T>& product : p.above[g]) {
          const Plane& from = net_.planes[product.plane];
          for (int64_t n = 0; n < samples; ++n)
            multiply(line(state + n * net_.state_size, from, i - product.up) + product.start, from.channels, columns_,
                     product.count, weights_.data() + product.offset, p.padded / Vector<T>::kLanes,
                     sums + n * sums_ + p.sums + g * p.padded, p.stride);
        }
      if (s.vertical)
        for (int64_t n = 0; n < samples; ++n)
          for (int64_t j = 0; j < columns_; ++j)
            finish(s, p, k + 1, i, j, 0, state + n * net_.state_size, sums + n * sums_ + p.sums);
    }
  }

  // Group g of every other stage at pixel (i, j).
  void pixel(int64_t i, int64_t j, int64_t g, int64_t samples, T* state, T* sums) const {
    for (size_t k = 0; k < packed_.size(); ++k) {
      const Packed<T>& p = packed_[k];
      const Stage& s = net_.stages[k];
      if (s.vertical) continue;
      T* to = sums + p.sums + j * p.stride + g * p.padded;
      for (const Product<T>& product : p.beside[g]) {
        const Plane& from = net_.planes[product.plane];
        multiply(line(state, from, i) + j * from.channels + product.start, net_.state_size, samples, product.count,
                 weights_.data() + product.offset, p.padded / Vector<T>::kLanes, to, sums_);
      }
      for (int64_t n = 0; n < samples; ++n)
        finish(s, p, k + 1, i, j, g, state + n * net_.state_size, sums + n * sums_ + p.sums);
    }
  }

  // The numbers of plane k at pixel (i, j).
  T* values(T* state, int64_t k, int64_t i, int64_t j) const { return at(state, net_.planes[k], i, j); }

 private:
  static T* line(T* state, const Plane& p, int64_t i) {
    return state + p.offset + (i % p.rows + p.rows) % p.rows * p.row_length;
  }
  static T* at(T* state, const Plane& p, int64_t i, int64_t j) {
    return line(state, p, i) + (j + p.border) * p.channels;
  }

  static void add(const T* __restrict from, T* __restrict to, int64_t count) {
    for (int64_t c = 0; c < count; ++c) to[c] += from[c];
  }

  // Bias and condition of a whole row.
  void start(const Stage& s, const Packed<T>& p, int64_t sample, int64_t i, int64_t rows, T* to) const {
    const T* bias = s.bias < 0 ? nullptr : pointers_[s.bias];
    const T* condition = s.condition < 0 ? nullptr : pointers_[s.condition];
    std::fill(to, to + p.stride, T(0));
    for (const Segment& g : p.segments)
      for (int64_t c = 0; c < g.count; ++c) {
        T value = bias ? bias[g.channel + c] : T(0);
        if (condition && !s.condition_map) value += condition[sample * s.width + g.channel + c];
        to[g.place + c] = value;
      }
    for (int64_t j = 1; j < columns_; ++j) std::copy(to, to + p.stride, to + j * p.stride);
    if (condition && s.condition_map)
      for (const Segment& g : p.segments)
        for (int64_t c = 0; c < g.count; ++c) {
          const T* from = condition + ((sample * s.width + g.channel + c) * rows + i) * columns_;
          for (int64_t j = 0; j < columns_; ++j) to[j * p.stride + g.place + c] += from[j];
        }
  }

  // What is left of group g at a pixel once its sums are complete: planes added, the activation, the residual.
  void finish(const Stage& s, const Packed<T>& p, int64_t plane, int64_t i, int64_t j, int64_t g, T* state,
              T* sums) const {
    T* __restrict from = sums + j * p.stride + g * p.padded;
    T* __restrict to = at(state, net_.planes[plane], i, j) + g * p.group_made;
    const int64_t count = p.group_made;
    for (int64_t added : p.added_beside)
      add(at(state, net_.planes[added], i, j) + g * p.group_width, from, p.group_width);
    if (s.is(Activation::kGate)) {
      for (int64_t c = 0; c < count; ++c) {
        T tanh, unused;
        math::tanh_sech2(from[c], tanh, unused);
        to[c] = tanh * (T(1) / (T(1) + math::exp(-from[count + c])));
      }
    } else if (s.is(Activation::kRelu)) {
      for (int64_t c = 0; c < count; ++c) to[c] = from[c] < T(0) ? T(0) : from[c];
    } else {
      std::copy(from, from + count, to);
    }
    if (s.residual >= 0) add(at(state, net_.planes[s.residual], i, j) + g * count, to, count);
  }

  void pack(const Stage& s, int64_t groups) {
    constexpr int64_t L = Vector<T>::kLanes;
    Packed<T> p;
    p.groups = groups;
    p.group_width = s.width / groups;
    p.group_made = s.made / groups;
    p.padded = (p.group_width + L - 1) / L * L;
    p.stride = groups * p.padded;
    p.above.resize(groups);
    p.beside.resize(groups);
    p.sums = sums_;
    sums_ += p.stride * columns_;
    for (int64_t g = 0; g < groups; ++g) {
      if (s.is(Activation::kGate)) {
        p.segments.push_back({g * p.group_made, g * p.padded, p.group_made});
        p.segments.push_back({s.made + g * p.group_made, g * p.padded + p.group_made, p.group_made});
      } else {
        p.segments.push_back({g * p.group_width, g * p.padded, p.group_width});
      }
    }
    for (int64_t plane : net_.added(s))
      (s.vertical || net_.planes[plane].vertical ? p.added_above : p.added_beside).push_back(plane);
    for (const Input& in : net_.inputs(s))
      for (int64_t g = 0; g < groups; ++g)
        for (int64_t y = 0; y <= in.kh / 2; ++y) pack(s, in, p, g, y);
    packed_.push_back(std::move(p));
  }

  // Kernel row y of an input, for group g.
  void pack(const Stage& s, const Input& in, Packed<T>& p, int64_t g, int64_t y) {
    const Plane& from = net_.planes[in.plane];
    const int64_t channels = from.channels, taps = in.kh * in.kw, up = in.kh / 2 - y;
    const bool whole = up > 0 || from.vertical;  // complete when the row begins
    if (s.vertical && !whole) return;            // such weights are 0
    int64_t end = in.kw * channels;              // of the stretch, over (kernel column, channel)
    if (up == 0 && !s.vertical) {
      end = (in.kw / 2 + 1) * channels;
      // at the centre: groups up to one's own, in the image before one's own
      if (!from.vertical) end -= channels - channels / p.groups * (g + (in.plane != 0));
    }
    const T* w = pointers_[in.tensor] + y * in.kw;
    const int64_t columns = in.kw * channels, first_segment = p.segments.size() / p.groups * g,
                  last_segment = p.segments.size() / p.groups * (g + 1);
    std::vector<char> live(columns, 0);
    for (int64_t k = first_segment; k < last_segment; ++k)
      for (int64_t o = 0; o < p.segments[k].count; ++o) {
        const T* row = w + (p.segments[k].channel + o) * channels * taps;
        for (int64_t x = 0; x < in.kw; ++x)
          for (int64_t c = 0; c < channels; ++c) live[x * channels + c] |= row[c * taps + x] != T(0);
      }
    int64_t begin = 0;
    while (begin < end && !live[begin]) ++begin;
    while (end > begin && !live[end - 1]) --end;
    if (begin == end) return;
    Product<T> product{in.plane, up, (from.border - in.kw / 2) * channels + begin, end - begin,
                       static_cast<int64_t>(weights_.size())};
    weights_.resize(weights_.size() + product.count * p.padded, T(0));
    for (int64_t k = first_segment; k < last_segment; ++k) {
      // sixteen outputs side by side: their rows are read in order, and what is written is contiguous
      for (int64_t o = 0; o < p.segments[k].count; o += 16) {
        const int64_t lanes = std::min<int64_t>(16, p.segments[k].count - o);
        const T* row = w + (p.segments[k].channel + o) * channels * taps;
        T* to = weights_.data() + product.offset + p.segments[k].place - g * p.padded + o;
        for (int64_t e = begin; e < end; ++e) {
          const T* tap = row + e % channels * taps + e / channels;
          for (int64_t l = 0; l < lanes; ++l) to[(e - begin) * p.padded + l] = tap[l * channels * taps];
        }
      }
    }
    (whole ? p.above : p.beside)[g].push_back(product);
  }

  const Network& net_;
  int64_t columns_, sums_ = 0;
  std::vector<const T*> pointers_;
  std::vector<Packed<T>> packed_;
  std::vector<T> weights_;
};

}  // namespace
}  // namespace sampling
}  // namespace genkernels
