// M of the exact first term, tr J = Σ d₂ᵀ M d₁, of the weights alone, and the weights' gradients for that of M.
//
//   M[k][o][i] = W₂[o][i] Σ_t Σ_c W₁[i][c][t] W₃[c][o][−t]
//
// over the taps t that stay inside for pixels of class k; lanes are i. An activation of [z, −z] has the rows of W₁ and
// of W₂ twice.
#pragma once

#include "curves.h"
#include "network.h"

namespace genkernels {
namespace block {

template <typename T>
struct TraceMap {
  Numbers<T> w1, w2, w3;
  int64_t arguments, channels, outputs;  // rows of W₁, its channels, rows of W₂
  int64_t columns, rows, taps, count;    // of M; how many there are
  std::vector<T> turned;                 // W₁ as [channels, taps, i]

  TraceMap(const std::vector<Tensor>& weights, bool mirrored) {
    require(weights.size() == 3 && weights[1].size(1) * weights[0].size(0) > 0,
            "log_det_series: the trace's map is of three maps");
    w1 = Numbers<T>(weights[0]), w2 = Numbers<T>(weights[1]), w3 = Numbers<T>(weights[2]);
    arguments = weights[0].size(0), channels = weights[0].size(1), outputs = weights[1].size(0);
    columns = arguments * (mirrored ? 2 : 1), rows = outputs * (mirrored ? 2 : 1);
    taps = channels ? weights[0].numel() / (arguments * channels) : 1, count = taps == 9 ? 9 : 1;
    require(weights[1].numel() == outputs * columns && weights[2].numel() == channels * rows * taps &&
                (taps == 1 || taps == 9),
            "log_det_series: the trace's weights must fit together");
    turned.resize(channels * taps * columns);
    for (int64_t i = 0; i < columns; ++i)
      for (int64_t e = 0; e < channels * taps; ++e) turned[e * columns + i] = w1[i % arguments * channels * taps + e];
  }

  // W₃[c][o][−t]
  int64_t across(int64_t c, int64_t o, int64_t t) const { return (c * rows + o) * taps + taps - 1 - t; }

  // Row o of Σ_c W₁ W₃ for each tap, [taps][columns].
  void products(int64_t o, T* room) const {
    std::fill_n(room, taps * columns, T(0));
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t t = 0; t < taps; ++t)
        add(w3[across(c, o, t)], &turned[(c * taps + t) * columns], room + t * columns);
  }

  // f(tap) for those that stay inside for pixels of class k: of three a line, the first row or column of pixels leaves
  // out the first one, the last the last one.
  template <typename F>
  void inside(int64_t k, F&& f) const {
    const int64_t y0 = count == 9 && k / 3 == 0, y1 = count == 1 ? 1 : k / 3 == 2 ? 2 : 3;
    const int64_t x0 = count == 9 && k % 3 == 0, x1 = count == 1 ? 1 : k % 3 == 2 ? 2 : 3;
    for (int64_t y = y0; y < y1; ++y)
      for (int64_t x = x0; x < x1; ++x) f(3 * y + x);
  }

  // to += by · row
  void add(T by, const T* row, T* to) const {
    for (int64_t i = 0; i < columns; ++i) to[i] += by * row[i];
  }
};

template <typename T>
Tensor trace_map(const std::vector<Tensor>& weights, bool mirrored) {
  const TraceMap<T> of(weights, mirrored);
  const int64_t columns = of.columns;
  Result<T> map(weights[0], {of.count, of.rows, columns});
  T* to = map;
  torch::stable::parallel_for(0, of.rows, 16, [&](int64_t begin, int64_t end) {
    std::vector<T> room(of.taps * columns);
    for (int64_t o = begin; o < end; ++o) {
      of.products(o, room.data());
      const T* weight = of.w2 + o % of.outputs * columns;
      for (int64_t k = 0; k < of.count; ++k) {
        T* out = to + (k * of.rows + o) * columns;
        std::fill_n(out, columns, T(0));
        of.inside(k, [&](int64_t t) { of.add(T(1), &room[t * columns], out); });
        for (int64_t i = 0; i < columns; ++i) out[i] *= weight[i];
      }
    }
  });
  return map.done();
}

// Gradients of the three weights for `grad` of M. Those of W₁ are sums over rows of M, made in parts that follow from
// their number.
template <typename T>
std::vector<Tensor> trace_map_backward(const Tensor& grad, const std::vector<Tensor>& weights, bool mirrored) {
  const TraceMap<T> of(weights, mirrored);
  const int64_t columns = of.columns, rows = of.rows, taps = of.taps, size = of.channels * taps * columns;
  require(grad.numel() == of.count * rows * columns, "log_det_series: the gradient must be the trace map's");
  const Numbers<T> by(grad);
  const int64_t parts = std::clamp<int64_t>(of.outputs / 32, 1, 8);
  std::vector<Result<T>> out;
  std::vector<T*> to;
  out.reserve(3);
  for (const Tensor& w : weights) to.push_back(out.emplace_back(w, shape_of(w)));
  std::vector<T> first(parts * size, T(0));  // of W₁, as `turned`
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> room(taps * columns), by_taps(taps * columns), sum(columns), middle(columns);
    for (int64_t part = begin; part < end; ++part)
      for (int64_t r = of.outputs * part / parts; r < of.outputs * (part + 1) / parts; ++r) {
        const T* weight = of.w2 + r * columns;
        std::fill(middle.begin(), middle.end(), T(0));
        for (int64_t o = r; o < rows; o += of.outputs) {
          of.products(o, room.data());
          std::fill(by_taps.begin(), by_taps.end(), T(0));
          for (int64_t k = 0; k < of.count; ++k) {
            const T* g = by + (k * rows + o) * columns;
            std::fill(sum.begin(), sum.end(), T(0));
            of.inside(k, [&](int64_t t) {
              of.add(T(1), &room[t * columns], sum.data());
              of.add(T(1), g, &by_taps[t * columns]);
            });
            for (int64_t i = 0; i < columns; ++i) middle[i] += g[i] * sum[i];
          }
          for (int64_t t = 0; t < taps; ++t)
            for (int64_t i = 0; i < columns; ++i) by_taps[t * columns + i] *= weight[i];
          for (int64_t c = 0; c < of.channels; ++c)
            for (int64_t t = 0; t < taps; ++t) {
              const int64_t e = (c * taps + t) * columns, w = of.across(c, o, t);
              of.add(of.w3[w], &by_taps[t * columns], &first[part * size + e]);
              for (int64_t i = 0; i < columns; ++i) sum[i] = by_taps[t * columns + i] * of.turned[e + i];
              to[2][w] = T(sum_of(sum.data(), columns));
            }
        }
        std::copy(middle.begin(), middle.end(), to[1] + r * columns);
      }
  });
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t e = 0; e < size; ++e) first[e] += first[part * size + e];
  std::fill_n(to[0], weights[0].numel(), T(0));
  const int64_t entries = of.channels * taps;
  for (int64_t i = 0; i < columns; ++i)
    for (int64_t e = 0; e < entries; ++e) to[0][i % of.arguments * entries + e] += first[e * columns + i];
  std::vector<Tensor> found;
  for (Result<T>& r : out) found.push_back(r.done());
  return found;
}

}  // namespace block
}  // namespace genkernels
