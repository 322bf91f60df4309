// Discretised logistic mixture on the CPU (Salimans et al., "PixelCNN++", 2017): nll = −Σ_pixels log Σ_k π_k Π_c P_ck,
// its gradient, its draws. common/logistic_mixture.h has the probability of a level.
//
// Layout. params [N, P, S], P = 3·K (C = 1) or 10·K (C = 3): row after row of S pixels, K rows of logits, then for each
// channel K rows of means, K of log-scales and (C = 3) K of coefficients. A tile is kTile neighbouring pixels of one
// sample: every row of it is one contiguous piece, the SIMD lanes are pixels, the loops over components and channels go
// around them, and nothing branches on data. Half storage is widened row by row; fp32 and fp64 are read where they lie.
//
// Forward, a tile: the largest logit; for each component log π_k plus the linear part of log Π_c P_ck, and the factor
// that is left of it; their sums over components, relative to the largest linear part, so that a pixel takes two
// logarithms and a component none. Backward repeats that and keeps each component's derivatives of log P_ck, [9·K or
// 2·K, kTile], within the second-level cache; once the posterior is known they are scaled by it and stored. Saved for
// backward: the inputs alone. A saved log-sum-exp would spare backward that last scaling, but none of the exponentials
// of the levels, all of which the derivatives need.
//
// Bytes: forward reads P·S, backward reads P·S and writes P·S; PixelCNN++'s 16×100×32×32 fp32 is 6.6 MB each.
// Arithmetic: a component takes 3·C + 2 exponentials of 16 instructions, C = 3 also 3 for the tanh; a channel some 115
// vector instructions forward and 150 backward, a tanh 35 more, for one vector of lanes of 12 to 40 bytes a component:
// it is arithmetic, not memory, that sets the time; hence the exponential of its own.
//
// Draws, a chunk: logits are weighed and compared with the noise, then the chosen components' other rows are gathered,
// number by number (a cache line of 16 pixels holds a number that is wanted with a probability of 1 − (1 − 1/K)^16, so
// for K = 10 four fifths of them are read), then each channel is one loop, some 120 vector instructions for 16 lanes.
// What is left is the wait for the gathered lines: a whole chunk of them lets the prefetcher run ahead (25 % quicker
// than a tile of 64), and a sequential pass that selects among all K rows is slower.
//
// The sum over pixels: tiles of a chunk of kChunk pixels in order, in fp64, then the chunks in order: bitwise the same
// for any number of threads.
#if defined(__GNUC__) && !defined(__clang__)
// Both passes turn a select by a constant into two copies of all that follows, each with its blends and its division: a
// sixth of the loops.
#  pragma GCC optimize("no-thread-jumps", "no-tree-pre")
#endif
#include "common.h"

#include "../common/draw.h"
#include "../common/logistic_mixture.h"

namespace genkernels {
namespace {

constexpr int64_t kTile = 64;
constexpr int64_t kChunk = 256;
constexpr int64_t kGrain = 4096;  // pixels times components below which a second thread does not pay

struct Geometry {
  int64_t samples, pixels, mixtures, rows;  // N, S, K, P
  int channels, levels;
  int64_t chunks() const { return (pixels + kChunk - 1) / kChunk; }
};

Geometry geometry_of(const Tensor& params, int64_t channels, int64_t levels) {
  Geometry g;
  g.samples = params.size(0);
  g.rows = params.size(1);
  g.pixels = 1;
  for (int64_t i = 2; i < params.dim(); ++i) g.pixels *= params.size(i);
  g.channels = int(channels);
  g.levels = int(levels);
  g.mixtures = g.rows / (channels == 1 ? 3 : 10);
  return g;
}

// Runs f(sample, chunk) over everything, in parallel, with one scratch of `floats` numbers a thread's range.
template <typename T, typename F>
void for_each_chunk(const Geometry& g, int64_t floats, F&& f) {
  const int64_t chunks = g.chunks(), each = std::max<int64_t>(1, std::min(g.pixels, kChunk) * g.mixtures * g.channels);
  torch::stable::parallel_for(0, g.samples * chunks, std::max<int64_t>(1, kGrain / each),
                              [&](int64_t from, int64_t to) {
                                std::vector<T> scratch(floats);
                                for (int64_t task = from; task < to; ++task)
                                  f(task / chunks, task % chunks, scratch.data());
                              });
}

// n numbers of a row as T: the tensor itself where it has that type, else `buffer`, filled.
template <typename S, typename T>
const T* read(const S* from, T* buffer, int64_t n) {
  if constexpr (std::is_same_v<S, T>) {
    return from;
  } else {
    load(from, buffer, n);
    return buffer;
  }
}

// A tile's pixels, and what the two passes make of them.
template <int C, typename T>
struct Tile {
  alignas(64) T lower[C][kTile], flip[C][kTile], upper[C][kTile], inner[C][kTile];  // mixture::Bin
  alignas(64) T x[C][kTile];
  alignas(64) T best[kTile];  // the largest logit
  alignas(64) T denominator[kTile];
  alignas(64) T row[5][kTile];  // widened rows
  alignas(64) T top[kTile], evidence[kTile],
      prior[kTile];  // max of the joint's linear part, Σ of the joint, Σ exp of the logits
};

// What a tile holds for each component: [K, kTile] each, in a thread's scratch.
template <typename T>
struct Components {
  T* linear;  // log of the joint probability but for `factor`; then the joint, relative to the tile's largest linear
              // part
  T* factor;
  T* prior;  // exp of the logits, relative to the largest
};
constexpr int64_t kComponentRows = 3;

template <typename T>
Components<T> components(const Geometry& g, T* scratch) {
  const int64_t each = g.mixtures * kTile;
  return {scratch, scratch + each, scratch + 2 * each};
}

// The C levels of each pixel, from x in [−1, 1], with 1/half the distance of two levels.
template <int C, typename T>
void take_levels(const T* x, int64_t stride, int64_t n, T half, Tile<C, T>& tile) {
  const T highest = T(2) * half;
  for (int c = 0; c < C; ++c) {
    const T* __restrict from = x + c * stride;
    T* __restrict lower = tile.lower[c];
    T* __restrict flip = tile.flip[c];
    T* __restrict upper = tile.upper[c];
    T* __restrict inner = tile.inner[c];
    T* __restrict value = tile.x[c];
    for (int64_t t = 0; t < n; ++t) {
      T position = (from[t] + T(1)) * half;
      position = position < T(0) ? T(0) : position;
      position = position > highest ? highest : position;
      const T level = std::nearbyint(position);
      const mixture::Bin<T> bin = mixture::bin_of(level, highest);
      lower[t] = bin.lower;
      flip[t] = bin.flip;
      upper[t] = bin.upper;
      inner[t] = bin.inner;
      value[t] = level / half - T(1);
    }
  }
}

// Channel c of one component over a tile: adds its linear part, multiplies its factor in; Derivative: writes the rows
// of derivatives of log P.
template <int C, int c, bool Derivative, typename T>
void channel_tile(int64_t n, T half, T log_half, const T* __restrict mean, const T* __restrict log_scale,
                  const T* __restrict first, const T* __restrict second, Tile<C, T>& tile, T* __restrict linear,
                  T* __restrict factor, T* __restrict by_mean, T* __restrict by_log_scale, T* __restrict by_first,
                  T* __restrict by_second) {
  const T* __restrict lower = tile.lower[c];
  const T* __restrict flip = tile.flip[c];
  const T* __restrict upper = tile.upper[c];
  const T* __restrict inner = tile.inner[c];
  const T* __restrict x0 = tile.x[0];
  const T* __restrict x1 = tile.x[C == 3 ? 1 : 0];
  T* __restrict denominator = tile.denominator;
  const T step = T(1) / half;
#pragma GCC ivdep
  for (int64_t t = 0; t < n; ++t) {
    T m = mean[t], tanh1 = T(0), sech1 = T(0), tanh2 = T(0), sech2 = T(0);
    if constexpr (c >= 1) {
      mixture::tanh(first[t], tanh1, sech1);
      m += tanh1 * x0[t];
    }
    if constexpr (c == 2) {
      mixture::tanh(second[t], tanh2, sech2);
      m += tanh2 * x1[t];
    }
    const T given = log_scale[t];
    const bool below = given < mixture::kLowestLogScale<T>;
    const T s = math::select(below, mixture::kLowestLogScale<T>, given);
    const T shrink = mixture::exp(-s);
    const mixture::Bin<T> bin = {lower[t], flip[t], upper[t], inner[t]};
    const auto p = mixture::level<Derivative>(bin, m * half + half, shrink * step, -s - log_half);
    linear[t] += p.linear;
    const T whole = c == 0 ? p.numerator : factor[t] * p.numerator;
    if constexpr (Derivative) {
      factor[t] = whole;
      const T d = shrink * p.by_mean;
      by_mean[t] = d;
      by_log_scale[t] = math::select(below, T(0), p.by_log_scale);
      if constexpr (c >= 1) by_first[t] = d * x0[t] * sech1;
      if constexpr (c == 2) by_second[t] = d * x1[t] * sech2;
    } else {
      const T under = c == 0 ? p.denominator : denominator[t] * p.denominator;
      factor[t] = c == C - 1 ? whole / under : whole;
      if constexpr (c < C - 1) denominator[t] = under;
    }
  }
}

// The joint probability π_k Π_c P_ck of each component, relative to one number a pixel, into `of.linear`; slopes [P − K
// rows, kTile] in the rows' own order; the sums in `tile`. The factors lie within [1e-3, 1], so the largest linear part
// keeps the sum a normal number.
template <int C, bool Derivative, typename S, typename T>
void evaluate(const Geometry& g, const S* params, int64_t n, Tile<C, T>& tile, const Components<T>& of, T* slopes) {
  const int64_t K = g.mixtures, width = C == 1 ? 2 : 3;
  const T half = T(0.5) * T(g.levels - 1), log_half = T(std::log(0.5 * (g.levels - 1)));
  const auto row = [&](int64_t r, T* buffer) { return read(params + r * g.pixels, buffer, n); };
  T* __restrict best = tile.best;
  T* __restrict prior = tile.prior;
  T* __restrict top = tile.top;
  T* __restrict evidence = tile.evidence;
  for (int64_t k = 0; k < K; ++k) {
    const T* logit = row(k, tile.row[0]);
    for (int64_t t = 0; t < n; ++t) best[t] = k == 0 || logit[t] > best[t] ? logit[t] : best[t];
  }
  for (int64_t t = 0; t < n; ++t) {
    prior[t] = evidence[t] = T(0);
    top[t] = -std::numeric_limits<T>::infinity();
  }
  for (int64_t k = 0; k < K; ++k) {
    const T* logit = row(k, tile.row[0]);
    T* __restrict linear = of.linear + k * kTile;
    T* __restrict factor = of.factor + k * kTile;
    T* __restrict weight = of.prior + k * kTile;
    for (int64_t t = 0; t < n; ++t) {
      linear[t] = logit[t] - best[t];
      weight[t] = mixture::exp(linear[t]);
      prior[t] += weight[t];
    }
    const auto rest = [&](int64_t c, int64_t r) { return (c * width + r) * K + k; };
    const auto slope = [&](int64_t c, int64_t r) { return Derivative ? slopes + rest(c, r) * kTile : nullptr; };
    const auto read_row = [&](int64_t c, int64_t r, int buffer) { return row(K + rest(c, r), tile.row[buffer]); };
    channel_tile<C, 0, Derivative, T>(n, half, log_half, read_row(0, 0, 1), read_row(0, 1, 2), nullptr, nullptr, tile,
                                      linear, factor, slope(0, 0), slope(0, 1), nullptr, nullptr);
    if constexpr (C == 3) {
      channel_tile<C, 1, Derivative, T>(n, half, log_half, read_row(1, 0, 1), read_row(1, 1, 2), read_row(0, 2, 3),
                                        nullptr, tile, linear, factor, slope(1, 0), slope(1, 1), slope(0, 2), nullptr);
      channel_tile<C, 2, Derivative, T>(n, half, log_half, read_row(2, 0, 1), read_row(2, 1, 2), read_row(1, 2, 3),
                                        read_row(2, 2, 4), tile, linear, factor, slope(2, 0), slope(2, 1), slope(1, 2),
                                        slope(2, 2));
    }
    for (int64_t t = 0; t < n; ++t) top[t] = math::select(linear[t] > top[t], linear[t], top[t]);
  }
  for (int64_t k = 0; k < K; ++k) {
    T* __restrict joint = of.linear + k * kTile;
    const T* __restrict factor = of.factor + k * kTile;
    for (int64_t t = 0; t < n; ++t) {
      joint[t] = mixture::exp(joint[t] - top[t]) * factor[t];
      evidence[t] += joint[t];
    }
  }
}

template <int C, typename S, typename T>
void forward(const Geometry& g, const Tensor& params, const Tensor& x, Tensor& nll) {
  const S* p = data<S>(params);
  const T* pixels = data<T>(x);
  T* out = mutable_data<T>(nll);
  const int64_t chunks = g.chunks();
  std::vector<double> partial(g.samples * chunks, 0.0);
  for_each_chunk<T>(g, kComponentRows * g.mixtures * kTile, [&](int64_t sample, int64_t chunk, T* scratch) {
    Tile<C, T> tile;
    const Components<T> of = components(g, scratch);
    double total = 0;
    const int64_t end = std::min((chunk + 1) * kChunk, g.pixels);
    for (int64_t at = chunk * kChunk; at < end; at += kTile) {
      const int64_t n = std::min(kTile, end - at);
      take_levels<C, T>(pixels + sample * C * g.pixels + at, g.pixels, n, T(0.5) * T(g.levels - 1), tile);
      evaluate<C, false>(g, p + sample * g.rows * g.pixels + at, n, tile, of, static_cast<T*>(nullptr));
      T* __restrict nats = tile.denominator;
      for (int64_t t = 0; t < n; ++t) nats[t] = math::log(tile.prior[t]) - (tile.top[t] + math::log(tile.evidence[t]));
      for (int64_t t = 0; t < n; ++t) total += nats[t];
    }
    partial[sample * chunks + chunk] = total;
  });
  for (int64_t n = 0; n < g.samples; ++n) {
    double total = 0;
    for (int64_t c = 0; c < chunks; ++c) total += partial[n * chunks + c];
    out[n] = T(total);
  }
}

// from · scale as S; through the buffer only where S is half.
template <typename S, typename T>
void write(const T* __restrict from, const T* __restrict scale, S* __restrict to, T* __restrict buffer, int64_t n) {
  if constexpr (std::is_same_v<S, T>) {
    for (int64_t t = 0; t < n; ++t) to[t] = from[t] * scale[t];
  } else {
    for (int64_t t = 0; t < n; ++t) buffer[t] = from[t] * scale[t];
    store(buffer, to, n);
  }
}

template <int C, typename S, typename T>
void backward(const Geometry& g, const Tensor& grad, const Tensor& params, const Tensor& x, Tensor& grad_params) {
  const S* p = data<S>(params);
  const T* pixels = data<T>(x);
  const T* go = data<T>(grad);
  S* out = mutable_data<S>(grad_params);
  const int64_t K = g.mixtures;
  for_each_chunk<T>(g, (kComponentRows * K + g.rows - K) * kTile, [&](int64_t sample, int64_t chunk, T* scratch) {
    Tile<C, T> tile;
    const Components<T> of = components(g, scratch);
    T* slopes = scratch + kComponentRows * K * kTile;
    const int64_t end = std::min((chunk + 1) * kChunk, g.pixels);
    for (int64_t at = chunk * kChunk; at < end; at += kTile) {
      const int64_t n = std::min(kTile, end - at), base = sample * g.rows * g.pixels + at;
      take_levels<C, T>(pixels + sample * C * g.pixels + at, g.pixels, n, T(0.5) * T(g.levels - 1), tile);
      evaluate<C, true>(g, p + base, n, tile, of, slopes);
      const T* __restrict evidence = tile.evidence;
      T* __restrict by_prior = tile.denominator;
      T* __restrict share = tile.row[1];
      for (int64_t t = 0; t < n; ++t) by_prior[t] = T(1) / tile.prior[t];
      for (int64_t k = 0; k < K; ++k) {
        T* __restrict weight = of.linear + k * kTile;  // the joint, and from here on the gradient by it
        const T* __restrict prior = of.prior + k * kTile;
        for (int64_t t = 0; t < n; ++t) {
          const T posterior =
              weight[t] / evidence[t];  // a division: of one component it is 1, and its logit's gradient 0
          weight[t] = -go[sample] * posterior;
          share[t] = -go[sample] * (posterior - prior[t] * by_prior[t]);
        }
        S* to = out + base + k * g.pixels;
        if constexpr (std::is_same_v<S, T>)
          std::memcpy(to, share, n * sizeof(T));
        else
          store(share, to, n);
        for (int64_t r = 1; r < g.rows / K; ++r)
          write(slopes + ((r - 1) * K + k) * kTile, weight, out + base + (r * K + k) * g.pixels, tile.row[0], n);
      }
    }
  });
}

// draw::categorical over a chunk, pixel by pixel the same numbers in the same order, lanes side by side. weights [K,
// kChunk].
template <typename T>
void choose_components(int64_t count, int64_t n, const T* __restrict u, T temperature, T* __restrict weights,
                       int* __restrict chosen) {
  alignas(64) T most[kChunk];
  alignas(64) double total[kChunk], below[kChunk];
  for (int64_t t = 0; t < n; ++t) {
    most[t] = weights[t];
    total[t] = below[t] = 0;
    chosen[t] = 0;
  }
  for (int64_t k = 1; k < count; ++k) {
    const T* __restrict logit = weights + k * kChunk;
    for (int64_t t = 0; t < n; ++t) most[t] = math::select(logit[t] > most[t], logit[t], most[t]);
  }
  if (temperature == T(0)) {
    for (int64_t k = count - 1; k >= 0; --k)  // the first of the largest stays; a NaN takes no comparison, and gives 0
      for (int64_t t = 0; t < n; ++t) chosen[t] = weights[k * kChunk + t] == most[t] ? int(k) : chosen[t];
    for (int64_t k = 0; k < count; ++k)
      for (int64_t t = 0; t < n; ++t) chosen[t] = weights[k * kChunk + t] == weights[k * kChunk + t] ? chosen[t] : 0;
    return;
  }
  for (int64_t k = 0; k < count; ++k) {
    T* __restrict weight = weights + k * kChunk;
    for (int64_t t = 0; t < n; ++t) weight[t] -= most[t];
    if (temperature != T(1))
      for (int64_t t = 0; t < n; ++t) weight[t] /= temperature;
    for (int64_t t = 0; t < n; ++t) weight[t] = math::exp(weight[t]);
    for (int64_t t = 0; t < n; ++t) total[t] += double(weight[t]);
  }
  for (int64_t t = 0; t < n; ++t) total[t] *= double(u[t]);  // the level sought
  for (int64_t k = 0; k + 1 < count; ++k) {
    const T* __restrict weight = weights + k * kChunk;
    for (int64_t t = 0; t < n; ++t) {
      below[t] += double(weight[t]);
      chosen[t] += int(below[t] <= total[t]);
    }
  }
}

// Channel c of a chunk's draws: its levels, as numbers. rows: the chosen components' parameters, mean, log-scale and (C
// = 3) coefficient of each channel; x: the values drawn before.
template <int C, int c, typename T>
void draw_channel(int64_t n, const T (*__restrict rows)[kChunk], const T* __restrict u, T temperature, T half,
                  const T (*__restrict x)[kChunk], T* __restrict level) {
  constexpr int kWidth = C == 1 ? 2 : 3;
#pragma GCC ivdep
  for (int64_t t = 0; t < n; ++t) {
    T mean = rows[c * kWidth][t];
    if constexpr (c == 1) mean += draw::shift(rows[2][t], x[0][t]);
    if constexpr (c == 2) mean = mean + draw::shift(rows[5][t], x[0][t]) + draw::shift(rows[8][t], x[1][t]);
    level[t] = draw::logistic(mean, rows[c * kWidth + 1][t], u[t], temperature, half);
  }
}

// draw::logistic_mixture over a chunk: the chosen components' rows are brought together, and then every channel is one
// loop.
template <int C, typename S, typename T>
void sample(const Geometry& g, const Tensor& params, const Tensor& noise, T temperature, Tensor& index) {
  constexpr int kRows = C == 1 ? 2 : 9;
  const S* p = data<S>(params);
  const T* u = data<T>(noise);
  int64_t* out = mutable_data<int64_t>(index);
  const int64_t K = g.mixtures;
  const T span = T(g.levels - 1), half = T(0.5) * span;
  for_each_chunk<T>(g, K * kChunk, [&](int64_t sample, int64_t chunk, T* weights) {
    alignas(64) int chosen[kChunk];
    alignas(64) T rows[kRows][kChunk], x[C][kChunk], level[kChunk];
    const int64_t at = chunk * kChunk, n = std::min(kChunk, g.pixels - at);
    const S* from = p + sample * g.rows * g.pixels + at;
    const T* given = u + sample * (1 + C) * g.pixels + at;
    for (int64_t k = 0; k < K; ++k) load(from + k * g.pixels, weights + k * kChunk, n);
    choose_components(K, n, given, temperature, weights, chosen);
    for (int64_t r = 0; r < kRows; ++r) {
      const S* row = from + (1 + r) * K * g.pixels;
      for (int64_t t = 0; t < n; ++t) rows[r][t] = static_cast<T>(row[chosen[t] * g.pixels + t]);
    }
    const auto channel = [&]<int c>() {
      draw_channel<C, c>(n, rows, given + (1 + c) * g.pixels, temperature, half, x, level);
      for (int64_t t = 0; t < n; ++t) x[c][t] = draw::place(level[t], span);
      int64_t* __restrict to = out + (sample * C + c) * g.pixels + at;
      for (int64_t t = 0; t < n; ++t) to[t] = draw::index_of(level[t]);
    };
    channel.template operator()<0>();
    if constexpr (C == 3) {
      channel.template operator()<1>();
      channel.template operator()<2>();
    }
  });
}

// ---- dispatch ---------------------------------------------------------------------------------------------------

template <typename F>
void dispatch(const Tensor& params, F&& f) {
  switch (params.scalar_type()) {
    case ScalarType::Float: return f.template operator()<float, float>();
    case ScalarType::Double: return f.template operator()<double, double>();
    case ScalarType::BFloat16: return f.template operator()<BFloat16, float>();
    case ScalarType::Half: return f.template operator()<Half, float>();
    default: STD_TORCH_CHECK(false, "logistic_mixture: no kernel for this dtype of params");
  }
}

ScalarType work_dtype(const Tensor& params) {
  return params.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor logistic_mixture_nll(Tensor params, Tensor x, int64_t levels) {
  const Geometry g = geometry_of(params, x.size(1), levels);
  Tensor nll = empty(params, {g.samples}, work_dtype(params));
  dispatch(params, [&]<typename S, typename T>() {
    if (g.channels == 1)
      forward<1, S, T>(g, params, x, nll);
    else
      forward<3, S, T>(g, params, x, nll);
  });
  return nll;
}

Tensor logistic_mixture_nll_backward(Tensor grad, Tensor params, Tensor x, int64_t levels) {
  const Geometry g = geometry_of(params, x.size(1), levels);
  Tensor grad_params = empty(params, shape_of(params), params.scalar_type());
  dispatch(params, [&]<typename S, typename T>() {
    if (g.channels == 1)
      backward<1, S, T>(g, grad, params, x, grad_params);
    else
      backward<3, S, T>(g, grad, params, x, grad_params);
  });
  return grad_params;
}

Tensor logistic_mixture_sample(Tensor params, Tensor noise, int64_t levels, double temperature) {
  const Geometry g = geometry_of(params, noise.size(1) - 1, levels);
  std::vector<int64_t> shape = shape_of(noise);
  shape[1] = g.channels;
  Tensor index = empty(params, shape, ScalarType::Long);
  dispatch(params, [&]<typename S, typename T>() {
    if (g.channels == 1)
      sample<1, S, T>(g, params, noise, T(temperature), index);
    else
      sample<3, S, T>(g, params, noise, T(temperature), index);
  });
  return index;
}

}  // namespace
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels, CPU, m) {
  m.impl("logistic_mixture_nll", TORCH_BOX(&genkernels::logistic_mixture_nll));
  m.impl("logistic_mixture_nll_backward", TORCH_BOX(&genkernels::logistic_mixture_nll_backward));
  m.impl("logistic_mixture_sample", TORCH_BOX(&genkernels::logistic_mixture_sample));
}
