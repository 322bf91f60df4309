// log|det(I + J)| of a residual block on the CPU; the head of genkernels/reference/log_det_series.py has the maths.
//
// One loop over tiles of samples, and all of a tile's work in the caches of one core: the forward pass, the slopes,
// every term of the series, the sums, the gradients. A tile is some columns side by side (residual_block/grid.h):
// samples of a fully connected block, pixels of an image with zeros around. Matrices, 1×1 and 3×3 convolutions and
// their transposes are one product over columns (residual_block/network.h), packed once a call.
//
// Flops, in passes g of the block: forward 1 + P·terms, or 1 + D where a fully connected block has so few features that
// its Jacobian is cheaper whole (residual_block/jacobian.h: each power is then D² numbers a sample); backward 1 (the
// pass anew) + 2 P (tangents and cotangents) + 1 + 1 + P (the weights' gradients), and with the exact first term a
// product by M forward and three backward. Bytes: the arguments and results; what lies between never leaves the caches
// (a tile of 48 columns and 128 channels: 24 kB a plane of channels). The floor is the flops.
//
// A sample's numbers depend on no other sample; sums over samples are made in parts that follow from the batch's size,
// so that neither the number of threads nor anything else changes a bit. Half numbers are computed in fp32.
#include "residual_block/gradient.h"
#include "residual_block/jacobian.h"
#include "residual_block/trace.h"
#include "residual_block/trace_map.h"

#include <cmath>

namespace genkernels {
namespace block {
namespace {

// log|det A| of a matrix [n, n], which becomes its inverse: elimination with row exchanges.
double invert(std::vector<double>& a, std::vector<double>& inverse, int64_t n) {
  inverse.assign(n * n, 0.0);
  for (int64_t i = 0; i < n; ++i) inverse[i * n + i] = 1;
  double log_det = 0;
  for (int64_t k = 0; k < n; ++k) {
    int64_t pivot = k;
    for (int64_t i = k + 1; i < n; ++i)
      if (std::fabs(a[i * n + k]) > std::fabs(a[pivot * n + k])) pivot = i;
    if (pivot != k) {
      std::swap_ranges(a.begin() + k * n, a.begin() + (k + 1) * n, a.begin() + pivot * n);
      std::swap_ranges(inverse.begin() + k * n, inverse.begin() + (k + 1) * n, inverse.begin() + pivot * n);
    }
    const double p = a[k * n + k];
    log_det += std::log(std::fabs(p));
    for (int64_t j = 0; j < n; ++j) a[k * n + j] /= p, inverse[k * n + j] /= p;
    for (int64_t i = 0; i < n; ++i) {
      const double f = a[i * n + k];
      if (i == k || f == 0) continue;
      for (int64_t j = 0; j < n; ++j) a[i * n + j] -= f * a[k * n + j];
      for (int64_t j = 0; j < n; ++j) inverse[i * n + j] -= f * inverse[k * n + j];
    }
  }
  return log_det;
}

// Where a sample's feature is: [D] offsets from its first column on channel 0.
template <typename T>
std::vector<int64_t> places(const Tile<T>& tile) {
  std::vector<int64_t> found;
  for (int64_t c = 0; c < tile.net.features(); ++c)
    for (int64_t y = 0; y < tile.grid.height; ++y)
      for (int64_t i = 0; i < tile.grid.width; ++i) found.push_back(c * tile.plane + y * tile.grid.pitch() + i);
  return found;
}

// The whole Jacobian of every sample of a tile.
template <typename T>
void whole(Tile<T>& tile, int64_t from, int64_t count, int64_t batch, T* w, T* log_det, T* sums) {
  const std::vector<int64_t> at = places(tile);
  const int64_t n = int64_t(at.size());
  std::vector<std::vector<double>> matrices(count, std::vector<double>(n * n));
  Planes<T> unit(tile.grid, tile.net.features());
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t s = 0; s < count; ++s) unit.at()[tile.grid.first(s) + at[i]] = T(1);
    tile.pull(unit.at(), w);
    for (int64_t s = 0; s < count; ++s) {
      unit.at()[tile.grid.first(s) + at[i]] = T(0);
      for (int64_t j = 0; j < n; ++j) matrices[s][i * n + j] = double(w[tile.grid.first(s) + at[j]]) + (i == j);
    }
  }
  std::vector<double> inverse;
  for (int64_t s = 0; s < count; ++s) {
    log_det[from + s] = T(invert(matrices[s], inverse, n));
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) sums[(i * batch + from + s) * n + j] = T(inverse[i * n + j]);
  }
}

using Found = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using FoundAndKept = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Nothing is kept without `keep`.
template <typename T>
FoundAndKept series(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                    const Tensor& parameters, const std::optional<Tensor>& trace_map,
                    const std::optional<Tensor>& probes, const std::vector<double>& terms, int64_t activation,
                    bool keep) {
  Given<T> given("log_det_series", x, weights, biases, parameters, activation);
  Network<T>& net = given.net;
  const int64_t batch = x.size(0), channels = net.features(), size = channels * net.grid.pixels();
  const int64_t count = probes.has_value() ? probes->size(0) : size, n = int64_t(terms.size());
  require(!probes.has_value() || probes->numel() == count * x.numel(), "log_det_series: probes must be P times like x");
  require(!keep || (net.grid.flat && net.features() <= kMostWhole && probes.has_value()),
          "log_det_series: only a fully connected block of few features keeps what its gradient needs");
  const bool small = keep || (probes.has_value() && Jacobian<T>::pays(net, count * n));
  given.cut(batch);
  net.pack(true, !small);
  const Numbers<T> points(x), noise = probes.has_value() ? Numbers<T>(*probes) : Numbers<T>();
  std::vector<int64_t> shape = shape_of(x);
  Result<T> value(x, shape);
  shape.insert(shape.begin(), count);
  Result<T> sums(x, shape);
  const ScalarType work = Dtype<T>::kType;
  Tensor log_det = empty(x, {batch}, work), shrink = empty(x, {count, batch}, work);
  T *to_log_det = mutable_data<T>(log_det), *to_shrink = mutable_data<T>(shrink);
  Kept<T> kept(net, count);
  Tensor memory = empty(x, keep ? kept.shape(batch) : std::vector<int64_t>{0}, work);
  kept.at = mutable_data<T>(memory);
  const bool exact = trace_map.has_value() && n > 0;
  std::optional<Trace<T>> trace;
  if (exact) trace.emplace(*trace_map, net, false);
  std::vector<double> totals(batch);
  const int64_t tiles = batch ? (batch + net.grid.samples - 1) / net.grid.samples : 0;
  if (!probes.has_value()) std::fill_n(to_shrink, count * batch, T(0));
  T *to_value = value, *to_sums = sums;
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    Tile<T> tile(net);
    Planes<T> v(net.grid, channels), w(net.grid, channels), s(net.grid, channels);
    std::optional<TraceRoom<T>> room;
    if (exact) room.emplace(*trace);
    std::optional<Jacobian<T>> jacobian;
    if (small) jacobian.emplace(net);
    std::vector<T> dots(tile.columns);
    std::vector<double> total(net.grid.samples);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t from = t * net.grid.samples, some = std::min(net.grid.samples, batch - from);
      net.grid.stage(static_cast<const T*>(points), channels, from, some, tile.input(0));
      tile.hold(from, some);
      tile.linearize(w.at());
      net.grid.unstage(w.at(), channels, from, some, to_value);
      if (!probes.has_value()) {
        whole(tile, from, some, batch, w.at(), to_log_det, to_sums);
        continue;
      }
      if (small)
        jacobian->find(tile, [&](int64_t j, int64_t i, T* tangents) {
          for (int64_t p = 0; keep && p < count; ++p)
            kept.add(tile, tangents, from, some, p, i, noise + p * batch * size, j);
        });
      for (int64_t i = 0; keep && i < tile.last(); ++i) kept.store(tile, tile.argument(i), from, some, 0, i);
      std::fill(total.begin(), total.end(), 0.0);
      if (exact) add_trace(tile, *trace, *room, terms[0], total.data());
      for (int64_t p = 0; p < count; ++p) {
        net.grid.stage(noise + p * batch * size, channels, from, some, v.at());
        net.grid.stage(noise + p * batch * size, channels, from, some, w.at());
        for (int64_t c = 0; c < channels; ++c) std::fill_n(s.at() + c * tile.plane, tile.columns, T(0));
        for (int64_t k = 1; k <= n; ++k) {
          const double sign = k % 2 ? 1 : -1;
          const bool counts = !(exact && k == 1);
          if (counts) {
            const T factor = T(sign * terms[k - 1] / double(count));
            for (int64_t c = 0; c < channels; ++c) {
              T* to = s.at() + c * tile.plane;
              const T* add = w.at() + c * tile.plane;
              for (int64_t q = 0; q < tile.columns; ++q) to[q] += factor * add[q];
            }
          }
          if (small)
            jacobian->pull(w.at());
          else
            tile.pull(w.at(), w.at());
          if (!counts) continue;
          tile.dots(w.at(), v.at(), channels, dots.data());
          for (int64_t g = 0; g < some; ++g)
            total[g] += sign * terms[k - 1] / double(k * count) * net.grid.sum(dots.data(), g);
        }
        net.grid.unstage(s.at(), channels, from, some, to_sums + p * batch * size);
        tile.dots(v.at(), v.at(), channels, dots.data());
        std::vector<double> before(some);
        for (int64_t g = 0; g < some; ++g) before[g] = net.grid.sum(dots.data(), g);
        tile.dots(w.at(), w.at(), channels, dots.data());
        for (int64_t g = 0; g < some; ++g)
          to_shrink[p * batch + from + g] = T(std::pow(net.grid.sum(dots.data(), g) / (before[g] > 0 ? before[g] : 1.0),
                                                       0.5 / double(std::max<int64_t>(n, 1))));
      }
      for (int64_t g = 0; g < some; ++g) totals[from + g] = total[g];
    }
  });
  for (int64_t s = 0; probes.has_value() && s < batch; ++s) to_log_det[s] = T(totals[s]);
  return {value.done(), log_det, sums.done(), shrink, memory};
}

FoundAndKept log_det_series_keeping(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases,
                                    Tensor parameters, std::optional<Tensor> trace_map, Tensor probes,
                                    std::vector<double> terms, int64_t activation) {
  if (arithmetic_dtype(x) == ScalarType::Double)
    return series<double>(x, weights, biases, parameters, trace_map, probes, terms, activation, true);
  return series<float>(x, weights, biases, parameters, trace_map, probes, terms, activation, true);
}

Found log_det_series(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases, Tensor parameters,
                     std::optional<Tensor> trace_map, std::optional<Tensor> probes, std::vector<double> terms,
                     int64_t activation) {
  const auto [value, log_det, sums, shrink, _] =
      arithmetic_dtype(x) == ScalarType::Double
          ? series<double>(x, weights, biases, parameters, trace_map, probes, terms, activation, false)
          : series<float>(x, weights, biases, parameters, trace_map, probes, terms, activation, false);
  return {value, log_det, sums, shrink};
}

// ---- backward ---------------------------------------------------------------------------------------------------

// What a thread needs beside its tile to differentiate the series.
template <typename T>
struct Tangents {
  std::vector<std::unique_ptr<Planes<T>>> of_arguments, of_inputs, by_slope;
  Planes<T> vector, sum;

  explicit Tangents(const Network<T>& net) : vector(net.grid, net.features()), sum(net.grid, net.features()) {
    for (int64_t i = 0; i + 1 < net.count(); ++i) {
      of_arguments.push_back(std::make_unique<Planes<T>>(net.grid, net.arguments(i)));
      of_inputs.push_back(std::make_unique<Planes<T>>(net.grid, net.values(i)));
      by_slope.push_back(std::make_unique<Planes<T>>(net.grid, net.values(i)));
    }
  }
};

// The tangents of the arguments and of the inputs along `vector`.
template <typename T>
void push(Tile<T>& tile, Tangents<T>& t) {
  const T* from = t.vector.at();
  for (int64_t i = 0; i < tile.last(); ++i) {
    T *z = t.of_arguments[i]->at(), *a = t.of_inputs[i]->at();
    tile.net.maps[i].forward.run(from, nullptr, z, tile.plane, tile.columns);
    tile.along(i, z, a);
    from = a;
  }
}

// Adds the gradient of sᵀ J v by the weights, and that by the slopes to t.by_slope; `sum` holds s times what the
// sample's log-determinant weighs, the tangents are those along v.
template <typename T>
void add_product(Tile<T>& tile, Sums<T>& sums, Tangents<T>& t) {
  const Network<T>& net = tile.net;
  const T* k = tile.keep();
  const T* w = t.sum.at();
  for (int64_t i = tile.last(); i > 0; --i) {
    sums.outer(i, tile, w, t.of_inputs[i - 1]->at());
    T* next = tile.room(i % 2);
    net.maps[i].transposed.run(w, nullptr, next, tile.plane, tile.columns);
    const int64_t h = net.arguments(i - 1);
    for (int64_t c = 0; c < net.values(i - 1); ++c) {
      const T *b = next + c * tile.plane, *z = t.of_arguments[i - 1]->at() + c % h * tile.plane;
      T* to = t.by_slope[i - 1]->at() + c * tile.plane;
      for (int64_t q = 0; q < tile.columns; ++q) to[q] += k == nullptr || k[q] != T(0) ? b[q] * z[q] : T(0);
    }
    tile.through(i - 1, next);
    w = next;
  }
  sums.outer(0, tile, w, t.vector.at());
}

template <typename T>
std::vector<Tensor> series_backward(const std::optional<Tensor>& grad_value, const std::optional<Tensor>& grad_log_det,
                                    const Tensor& x, const std::vector<Tensor>& weights,
                                    const std::vector<Tensor>& biases, const Tensor& parameters,
                                    const std::optional<Tensor>& trace_map, const std::optional<Tensor>& probes,
                                    const Tensor& sums_of, const std::optional<Tensor>& kept_of, double first,
                                    int64_t activation) {
  Given<T> given("log_det_series", x, weights, biases, parameters, activation);
  Network<T>& net = given.net;
  const int64_t batch = x.size(0), channels = net.features(), size = channels * net.grid.pixels();
  const int64_t count = probes.has_value() ? probes->size(0) : size, maps = net.count();
  require(sums_of.numel() == count * x.numel() && (!grad_log_det.has_value() || grad_log_det->numel() == batch) &&
              (!grad_value.has_value() || grad_value->numel() == x.numel()),
          "log_det_series: gradients and sums must fit to x");
  given.cut(batch);
  net.pack(!kept_of.has_value(), true);
  const Numbers<T> pass = kept_of.has_value() ? Numbers<T>(*kept_of) : Numbers<T>();
  Kept<T> kept(net, count);
  if (kept_of.has_value()) {
    require(kept_of->numel() == (batch + 15) / 16 * kept.vectors * kept.rows * kept.kBeside,
            "log_det_series: what was kept must fit to x and the probes");
    kept.at = const_cast<T*>(static_cast<const T*>(pass));
  }
  const auto numbers = [](const std::optional<Tensor>& t) { return t.has_value() ? Numbers<T>(*t) : Numbers<T>(); };
  const Numbers<T> points(x), noise = numbers(probes), known(sums_of), by_value = numbers(grad_value),
                              by_log_det = numbers(grad_log_det);
  const bool counts = grad_log_det.has_value(), exact = counts && trace_map.has_value();
  std::optional<Trace<T>> trace;
  if (exact) trace.emplace(*trace_map, net, true);
  Result<T> by_x(x, shape_of(x));
  const int64_t tiles = batch ? (batch + net.grid.samples - 1) / net.grid.samples : 0, parts = parts_of(tiles);
  std::vector<Sums<T>> sums(parts);
  Gradients<T> gradients(weights, biases, parameters);
  const int64_t of_map = exact ? trace->count * trace->rows * trace->wide : 0;
  std::vector<T> by_map(parts * of_map, T(0));
  T* to_x = by_x;
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    Tile<T> tile(net);
    Planes<T> delta(net.grid, channels);
    std::optional<Tangents<T>> tangents;
    if (counts) tangents.emplace(net);
    std::optional<TraceRoom<T>> room;
    std::vector<T> weight(tile.columns);
    if (exact) room.emplace(*trace);
    const std::vector<int64_t> at = probes.has_value() ? std::vector<int64_t>() : places(tile);
    std::vector<T*> by_slope(maps - 1, nullptr);
    for (int64_t part = begin; part < end; ++part) {
      sums[part].shape(net, gradients.by_bias());
      for (int64_t t = tiles * part / parts; t < tiles * (part + 1) / parts; ++t) {
        const int64_t from = t * net.grid.samples, some = std::min(net.grid.samples, batch - from);
        net.grid.stage(static_cast<const T*>(points), channels, from, some, tile.input(0));
        tile.hold(from, some);
        if (kept.at == nullptr) tile.linearize(nullptr);
        for (int64_t i = 0; kept.at && i < tile.last(); ++i) {
          kept.load(tile, tile.argument(i), from, some, 0, i);
          tile.activate_all(i);
        }
        if (counts) {
          std::fill(weight.begin(), weight.end(), T(0));
          for (int64_t g = 0; g < some; ++g)
            net.grid.rows_of(
                g, [&](int64_t row) { std::fill_n(weight.begin() + row, net.grid.width, by_log_det[from + g]); });
          for (int64_t i = 0; i + 1 < maps; ++i) {
            by_slope[i] = tangents->by_slope[i]->at();
            for (int64_t c = 0; c < net.values(i); ++c) std::fill_n(by_slope[i] + c * tile.plane, tile.columns, T(0));
          }
          for (int64_t p = 0; p < count; ++p) {
            T *v = tangents->vector.at(), *s = tangents->sum.at();
            if (probes.has_value())
              net.grid.stage(noise + p * batch * size, channels, from, some, v);
            else
              for (int64_t g = 0; g < some; ++g) v[net.grid.first(g) + at[p]] = T(1);
            net.grid.stage(known + p * batch * size, channels, from, some, s);
            for (int64_t c = 0; c < channels; ++c)
              for (int64_t q = 0; q < tile.columns; ++q) s[c * tile.plane + q] *= weight[q];
            if (kept.at == nullptr) push(tile, *tangents);
            for (int64_t i = 0; kept.at && i < tile.last(); ++i) {
              T* z = tangents->of_arguments[i]->at();
              kept.load(tile, z, from, some, 1 + p, i);
              tile.along(i, z, tangents->of_inputs[i]->at());
            }
            add_product(tile, sums[part], *tangents);
            if (!probes.has_value())
              for (int64_t g = 0; g < some; ++g) v[net.grid.first(g) + at[p]] = T(0);
          }
          if (exact) {
            for (T& w : weight) w *= T(first);
            add_trace_gradient(tile, *trace, *room, by_slope[0], by_slope[1], weight.data(), &by_map[part * of_map]);
          }
        }
        if (grad_value.has_value())
          net.grid.stage(static_cast<const T*>(by_value), channels, from, some, delta.at());
        else
          for (int64_t c = 0; c < channels; ++c) std::fill_n(delta.at() + c * tile.plane, tile.columns, T(0));
        differentiate(tile, sums[part], delta.at(), by_slope);
        net.grid.unstage(delta.at(), channels, from, some, to_x);
      }
    }
  });
  gradients.give(sums);
  std::vector<Tensor> out{by_x.done()};
  gradients.append_to(out);
  if (trace_map.has_value()) {
    Result<T> by_trace(*trace_map, shape_of(*trace_map));
    T* to = by_trace;
    std::fill_n(to, trace_map->numel(), T(0));
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t r = 0; exact && r < trace->count * trace->rows; ++r)
        for (int64_t i = 0; i < trace->columns; ++i)
          to[r * trace->columns + i] += by_map[part * of_map + r * trace->wide + i];
    out.push_back(by_trace.done());
  }
  return out;
}

std::vector<Tensor> log_det_series_backward(std::optional<Tensor> grad_value, std::optional<Tensor> grad_log_det,
                                            Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases,
                                            Tensor parameters, std::optional<Tensor> trace_map,
                                            std::optional<Tensor> probes, Tensor sums, double first,
                                            int64_t activation) {
  if (arithmetic_dtype(x) == ScalarType::Double)
    return series_backward<double>(grad_value, grad_log_det, x, weights, biases, parameters, trace_map, probes, sums,
                                   std::nullopt, first, activation);
  // the log-determinant's gradient is in fp32 whatever x is stored in: Numbers takes either
  return series_backward<float>(grad_value, grad_log_det, x, weights, biases, parameters, trace_map, probes, sums,
                                std::nullopt, first, activation);
}

std::vector<Tensor> log_det_series_kept_backward(std::optional<Tensor> grad_value, std::optional<Tensor> grad_log_det,
                                                 Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases,
                                                 Tensor parameters, std::optional<Tensor> trace_map, Tensor probes,
                                                 Tensor sums, Tensor kept, double first, int64_t activation) {
  if (arithmetic_dtype(x) == ScalarType::Double)
    return series_backward<double>(grad_value, grad_log_det, x, weights, biases, parameters, trace_map, probes, sums,
                                   kept, first, activation);
  return series_backward<float>(grad_value, grad_log_det, x, weights, biases, parameters, trace_map, probes, sums, kept,
                                first, activation);
}

Tensor log_det_series_trace_map(std::vector<Tensor> weights, int64_t activation) {
  const bool mirrored = Nonlinearity(activation) == Nonlinearity::kClipswish;
  if (arithmetic_dtype(weights[0]) == ScalarType::Double) return trace_map<double>(weights, mirrored);
  return trace_map<float>(weights, mirrored);
}

std::vector<Tensor> log_det_series_trace_map_backward(Tensor grad, std::vector<Tensor> weights, int64_t activation) {
  const bool mirrored = Nonlinearity(activation) == Nonlinearity::kClipswish;
  if (arithmetic_dtype(weights[0]) == ScalarType::Double) return trace_map_backward<double>(grad, weights, mirrored);
  return trace_map_backward<float>(grad, weights, mirrored);
}

}  // namespace
}  // namespace block
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels, CPU, m) {
  using namespace genkernels::block;
  m.impl("log_det_series", TORCH_BOX(&log_det_series));
  m.impl("log_det_series_backward", TORCH_BOX(&log_det_series_backward));
  m.impl("log_det_series_trace_map", TORCH_BOX(&log_det_series_trace_map));
  m.impl("log_det_series_trace_map_backward", TORCH_BOX(&log_det_series_trace_map_backward));
  m.impl("log_det_series_keeping", TORCH_BOX(&log_det_series_keeping));
  m.impl("log_det_series_kept_backward", TORCH_BOX(&log_det_series_kept_backward));
}
