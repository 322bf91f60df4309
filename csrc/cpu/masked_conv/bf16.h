// The two products of a masked convolution (products.h) in bf16, two multiplications a lane: AVX512-BF16's vdpbf16ps,
// sum += a0·b0 + a1·b1 with bf16 factors and an fp32 sum, half the instructions of fp32.
//
// correlate: the two are neighbouring channels of one pixel. x is staged as 32-bit elements (channel 2i low, 2i + 1
//            high; beyond an odd number of channels zero), a weight is the pair of its two channels. An entry is one
//            live tap of one pair of channels; a weight that only its neighbour keeps alive counts as 0.
// outer:     the two are neighbouring pixels of one row. g is turned as [pair of pixels][channel], and x's two pixels
//            are any two neighbours of a plane of bf16, read as 32 bits. The last pixel of an odd row is multiplied
//            alone, beside zeros.
//
// The instruction takes denormal factors and gives denormal sums as 0, and rounds to nearest even; NaN and infinity are
// as usual. So does vcvtneps2bf16, which rounds the results. Sums are not cut into runs as in fp32: what they lose is
// far below the rounding of the result.
//
// Compiled into the AVX-512 build alone, whose other code needs no AVX512-BF16; `multiplies_pairs` says whether this
// processor may run it.
#pragma once

#include "products.h"

#if defined(__x86_64__)
#  include <immintrin.h>
#endif

namespace genkernels {
namespace masked {

#if defined(__x86_64__) && defined(__AVX512F__)
constexpr bool kHasPairs = true;

inline bool multiplies_pairs() {
  static const bool does = __builtin_cpu_supports("avx512bf16");
  return does;
}

#  define GENKERNELS_PAIRS __attribute__((target("avx512bf16")))

template <int C, int V>
GENKERNELS_PAIRS void correlate_pairs(const uint32_t* x, const int32_t* at, const uint32_t* w, int64_t entries,
                                      const float* shift, float* out, int64_t stride) {
  __m512 acc[C][V];
#  pragma GCC unroll 8
  for (int c = 0; c < C; ++c)
#  pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[c][v] = _mm512_set1_ps(shift[c]);
  for (int64_t e = 0; e < entries; ++e, w += C) {
    const uint32_t* p = x + at[e];
    __m512bh xv[V];
#  pragma GCC unroll 8
    for (int v = 0; v < V; ++v) xv[v] = (__m512bh)_mm512_loadu_si512(p + v * 16);
#  pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const __m512bh we = (__m512bh)_mm512_set1_epi32(int(w[c]));
#  pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[c][v] = _mm512_dpbf16_ps(acc[c][v], xv[v], we);
    }
  }
#  pragma GCC unroll 8
  for (int c = 0; c < C; ++c)
#  pragma GCC unroll 8
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(out + c * stride + v * 16, acc[c][v]);
}

// One pair of pixels, or a single one.
template <int E, int V, bool Whole>
GENKERNELS_PAIRS __attribute__((always_inline)) inline void outer_step(__m512 (&acc)[E][V],
                                                                       const uint16_t* const (&p)[E], int64_t at,
                                                                       const uint32_t* g) {
  __m512bh gv[V];
#  pragma GCC unroll 8
  for (int v = 0; v < V; ++v) gv[v] = (__m512bh)_mm512_loadu_si512(g + v * 16);
#  pragma GCC unroll 8
  for (int e = 0; e < E; ++e) {
    uint32_t pair = 0;
    std::memcpy(&pair, p[e] + at, Whole ? 4 : 2);
    const __m512bh xe = (__m512bh)_mm512_set1_epi32(int(pair));
#  pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[e][v] = _mm512_dpbf16_ps(acc[e][v], gv[v], xe);
  }
}

template <int E, int V>
GENKERNELS_PAIRS void outer_pairs(const uint16_t* const* x, int64_t pitch, const uint32_t* g, int64_t g_stride,
                                  int64_t rows, int64_t width, float* to, int64_t to_stride, bool first) {
  __m512 acc[E][V];
  const uint16_t* p[E];
#  pragma GCC unroll 8
  for (int e = 0; e < E; ++e) {
    p[e] = x[e];
#  pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[e][v] = _mm512_setzero_ps();
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t end = r * pitch + width;
    int64_t i = r * pitch;
    for (; i + 2 <= end; i += 2, g += g_stride) outer_step<E, V, true>(acc, p, i, g);
    if (i < end) {
      outer_step<E, V, false>(acc, p, i, g);
      g += g_stride;
    }
  }
#  pragma GCC unroll 8
  for (int e = 0; e < E; ++e)
#  pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      float* at = to + e * to_stride + v * 16;
      _mm512_storeu_ps(at, first ? acc[e][v] : _mm512_add_ps(acc[e][v], _mm512_loadu_ps(at)));
    }
}

GENKERNELS_PAIRS inline void store_rounded(const float* from, BFloat16* to, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 valid = n - i < 16 ? __mmask16((1u << (n - i)) - 1) : __mmask16(0xffff);
    _mm256_mask_storeu_epi16(to + i, valid, (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(valid, from + i)));
  }
}

#  undef GENKERNELS_PAIRS

// Single's counterpart.
struct Pairs {
  using Staged = uint32_t;
  using Pixel = uint16_t;
  using Weight = uint16_t;
  using Sum = float;
  static constexpr int64_t kChannels = 2, kPixels = 2;

  static void place(Staged& element, int64_t j, Weight w) { element |= uint32_t(w) << (16 * j); }
  // Channels 2i and 2i + 1 of `channels`.
  static void stage_channels(const BFloat16* image, int64_t i, int64_t channels, const Band& b, int64_t first,
                             int64_t count, Staged* to) {
    const uint16_t* low = reinterpret_cast<const uint16_t*>(image) + 2 * i * b.height * b.width;
    const uint16_t* high = low + b.height * b.width;
    const bool both = 2 * i + 1 < channels;
    stage_rows(b, first, count, to, [&](int64_t pixel, Staged* row, int64_t n) {
      const uint16_t *l = low + pixel, *h = high + pixel;
      in_pieces(n, [&](int64_t j, auto length) {
        for (int k = 0; k < length(); ++k) row[j + k] = uint32_t(l[j + k]) | (both ? uint32_t(h[j + k]) << 16 : 0);
      });
    });
  }
  static void stage_pixels(const BFloat16* image, const Band& b, int64_t first, int64_t count, Pixel* to) {
    stage_plane(reinterpret_cast<const uint16_t*>(image), b, first, count, to);
  }
  static void read_pixels(const BFloat16* from, Staged* to, int64_t n) {
    const int64_t pairs = n / 2;
    in_pieces(pairs, [&](int64_t i, auto count) { std::memcpy(to + i, from + 2 * i, count() * sizeof(Staged)); });
    if (n & 1) to[pairs] = reinterpret_cast<const uint16_t*>(from)[n - 1];
  }
  static void store(const float* from, BFloat16* to, int64_t n) { store_rounded(from, to, n); }
  template <int C, int V>
  static void correlate(const uint32_t* x, const int32_t* at, const uint32_t* w, int64_t entries, const float* shift,
                        float* out, int64_t stride) {
    correlate_pairs<C, V>(x, at, w, entries, shift, out, stride);
  }
  template <int E, int V>
  static void outer(const uint16_t* const* x, int64_t pitch, const uint32_t* g, int64_t g_stride, int64_t rows,
                    int64_t width, float* to, int64_t to_stride, bool first) {
    outer_pairs<E, V>(x, pitch, g, g_stride, rows, width, to, to_stride, first);
  }
};

#else
constexpr bool kHasPairs = false;
using Pairs = void;
inline bool multiplies_pairs() {
  return false;
}
#endif

}  // namespace masked
}  // namespace genkernels
