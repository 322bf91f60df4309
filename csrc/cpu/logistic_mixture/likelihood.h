// The negative log-likelihood of a discretised logistic mixture and its gradient, tile by tile.
#pragma once

#include "../../common/logistic_mixture.h"
#include "chunks.h"

namespace genkernels {
namespace {

// A tile's pixels, and what the two passes make of them.
template <int C, typename T>
struct Tile {
  alignas(64) T lower[C][kTile], flip[C][kTile], upper[C][kTile], inner[C][kTile];  // mixture::Bin
  alignas(64) T x[C][kTile];
  alignas(64) T best[kTile];  // the largest logit
  alignas(64) T denominator[kTile];
  alignas(64) T row[5][kTile];    // widened rows
  alignas(64) T top[kTile];       // max of the joint's linear part
  alignas(64) T evidence[kTile];  // Σ of the joint
  alignas(64) T prior[kTile];     // Σ exp of the logits
};

// What a tile holds for each component: [K, kTile] each, in a thread's scratch.
template <typename T>
struct Components {
  T* linear;  // log of the joint probability but for `factor`; then the joint, relative to the largest linear part
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

}  // namespace
}  // namespace genkernels
