// Draws from a discretised logistic mixture, chunk by chunk.
#pragma once

#include "../../common/draw.h"
#include "chunks.h"

namespace genkernels {
namespace {

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

}  // namespace
}  // namespace genkernels
