// The two products of a masked convolution over live taps, in registers, and the scratch that they read.
//
// correlate: out[o][q] = shift[o] + Σ_e w[e][o] · x[q + at_e], an entry e being one live tap of one input channel.
//            Lanes are pixels; C output channels by V vectors of pixels are held in registers. Serves the forward pass
//            and, with the roles of the channels swapped and the taps mirrored, the gradient of x.
// outer:     acc[e][o] += Σ_q x[q + at_e] · g[q][o]. Lanes are output channels; E entries by V vectors of channels are
//            held. Serves the gradient of the weight.
//
// Staged image. A band of rows is copied to scratch with zeros around, channel by channel, so that no product asks
// where the border is: row r starts at lead + (r + up)·pitch, where pitch = W + the wider of the left and right reach;
// the zeros between two rows serve both. A pixel's place is q = r·pitch + w, a tap is a constant distance from it, and
// vectors of pixels run on from one row into the next.
#pragma once

#include "../common.h"
#include "../vector.h"

#include <memory>

namespace genkernels {
namespace masked {

// Memory of one thread, kept from call to call: fresh pages cost more than they hold. Slots grow and are never freed.
// What a tile reads beyond a staged plane is left over from earlier, and the lanes that see it are thrown away.
template <typename T>
T* scratch(int slot, int64_t count) {
  struct Slot {
    std::unique_ptr<char[]> memory;
    size_t bytes = 0;
  };
  thread_local Slot slots[3];
  Slot& s = slots[slot];
  const size_t wanted = count * sizeof(T) + 64;
  if (s.bytes < wanted) {
    s.memory.reset(new char[wanted]());
    s.bytes = wanted;
  }
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(s.memory.get()) + 63) & ~uintptr_t(63));
}

// ---- correlate --------------------------------------------------------------------------------------------------

constexpr int kBlock = kRegisters == 32 ? 8 : 4;  // output channels in registers
constexpr int kMostVectors = 8;                   // beside a single channel
constexpr int vectors_beside(int channels) {
  if (channels == 8) return 3;
  if (channels == 4) return kRegisters == 32 ? 6 : 3;
  if (channels == 2) return kRegisters == 32 ? 8 : 5;
  return kMostVectors;
}

// Sums are cut into runs of kRun entries that start from zero: a rounding then is one of a short sum's.
constexpr int64_t kRun = 96;

template <typename T, int C, int V>
void correlate_tile(const T* x, const int32_t* at, const T* w, int64_t entries, const T* shift, T* out,
                    int64_t stride) {
  using Vec = typename Vector<T>::type;
  constexpr int64_t L = Vector<T>::kLanes;
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) __builtin_prefetch(out + c * stride + v * L, 1);
  int64_t e = 0;
  do {
    const int64_t end = entries - e < kRun + kRun / 2 ? entries : e + kRun;
    const bool first = e == 0;
    Vec acc[C][V];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[c][v] = Vec{};
    for (; e < end; ++e) {
      const T* p = x + at[e];
      const T* we = w + e * C;
      Vec xv[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) xv[v] = load_vector(p + v * L);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[c][v] += xv[v] * we[c];
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        T* to = out + c * stride + v * L;
        store_vector<T>(first ? acc[c][v] + shift[c] : acc[c][v] + load_vector(to), to);
      }
  } while (e < entries);
}

// `left` vectors, as many as fit at once; returns how many were done. A: the arithmetic, Single or Pairs.
template <typename A, int C, typename Staged, typename Sum>
int64_t correlate_some(int64_t left, const Staged* x, const int32_t* at, const Staged* w, int64_t entries,
                       const Sum* shift, Sum* out, int64_t stride) {
  constexpr int V = vectors_beside(C);
  constexpr int Half = (V + 1) / 2;
  if (left > Half) return A::template correlate<C, V>(x, at, w, entries, shift, out, stride), V;
  if (left > 1) return A::template correlate<C, Half>(x, at, w, entries, shift, out, stride), Half;
  return A::template correlate<C, 1>(x, at, w, entries, shift, out, stride), 1;
}

template <typename A, typename Staged, typename Sum>
int64_t correlate(int channels, int64_t left, const Staged* x, const int32_t* at, const Staged* w, int64_t entries,
                  const Sum* shift, Sum* out, int64_t stride) {
  switch (channels) {
    case 8:
      if constexpr (kBlock == 8) return correlate_some<A, 8>(left, x, at, w, entries, shift, out, stride);
    case 4: return correlate_some<A, 4>(left, x, at, w, entries, shift, out, stride);
    case 2: return correlate_some<A, 2>(left, x, at, w, entries, shift, out, stride);
    default: return correlate_some<A, 1>(left, x, at, w, entries, shift, out, stride);
  }
}

// ---- outer ------------------------------------------------------------------------------------------------------

constexpr int kOuterVectors = kRegisters == 32 ? 4 : 2;  // of output channels, at most
constexpr int entries_beside(int vectors) {
  return vectors == kOuterVectors ? 6 : 8;
}

// x: a pointer an entry, to pixel 0 of the first row. g [rows·width][g_stride]. to [E][to_stride], overwritten or added
// to.
template <typename T, int E, int V>
void outer_tile(const T* const* x, int64_t pitch, const T* g, int64_t g_stride, int64_t rows, int64_t width, T* to,
                int64_t to_stride, bool first) {
  using Vec = typename Vector<T>::type;
  constexpr int64_t L = Vector<T>::kLanes;
  Vec acc[E][V] = {};
  const T* p[E];
  for (int e = 0; e < E; ++e) p[e] = x[e];
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = r * pitch; i < r * pitch + width; ++i, g += g_stride) {
      Vec gv[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) gv[v] = load_vector(g + v * L);
#pragma GCC unroll 8
      for (int e = 0; e < E; ++e)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[e][v] += gv[v] * p[e][i];
    }
  }
#pragma GCC unroll 8
  for (int e = 0; e < E; ++e)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      T* at = to + e * to_stride + v * L;
      store_vector<T>(first ? acc[e][v] : acc[e][v] + load_vector(at), at);
    }
}

template <typename A, typename Pixel, typename Staged, typename Sum>
void outer(int vectors, const Pixel* const* x, int64_t pitch, const Staged* g, int64_t g_stride, int64_t rows,
           int64_t width, Sum* to, int64_t to_stride, bool first) {
  switch (vectors) {
    case 4:
      if constexpr (kOuterVectors == 4)
        return A::template outer<entries_beside(4), 4>(x, pitch, g, g_stride, rows, width, to, to_stride, first);
    case 3:
      if constexpr (kOuterVectors == 4)
        return A::template outer<entries_beside(3), 3>(x, pitch, g, g_stride, rows, width, to, to_stride, first);
    case 2: return A::template outer<entries_beside(2), 2>(x, pitch, g, g_stride, rows, width, to, to_stride, first);
    default: return A::template outer<entries_beside(1), 1>(x, pitch, g, g_stride, rows, width, to, to_stride, first);
  }
}

// ---- staging ----------------------------------------------------------------------------------------------------

// How a band of up to `rows` rows of a plane lies in scratch.
struct Band {
  int64_t height, width;          // of the image
  int64_t up, down, left, right;  // reach of the live taps
  int64_t rows = 0;
  int64_t pitch() const { return width + std::max(left, right); }
  int64_t origin() const { return left + up * pitch(); }
  int64_t span() const { return (rows - 1) * pitch() + width; }  // from the first pixel's place to the last one's
  // an odd number of cache lines, lest all channels fall into one set of the cache
  int64_t plane() const {
    const int64_t lines = (left + (up + rows + down) * pitch() + right + 15) / 16;
    return (lines | 1) * 16;
  }
};

// f(i, constant count) over [0, n) in pieces of 16, then of 8, 4, 2 and 1: rows are short, and loops of unknown length
// would spend their time in what is left over behind the last whole vector.
template <typename F>
inline void in_pieces(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) f(i, std::integral_constant<int, 16>());
  if (n & 8) f(i, std::integral_constant<int, 8>()), i += 8;
  if (n & 4) f(i, std::integral_constant<int, 4>()), i += 4;
  if (n & 2) f(i, std::integral_constant<int, 2>()), i += 2;
  if (n & 1) f(i, std::integral_constant<int, 1>());
}

template <typename S, typename T>
inline void load_row(const S* from, T* to, int64_t n) {
  in_pieces(n, [&](int64_t i, auto count) { load(from + i, to + i, count()); });
}
template <typename S, typename T>
inline void store_row(const T* from, S* to, int64_t n) {
  in_pieces(n, [&](int64_t i, auto count) { store(from + i, to + i, count()); });
}

// Rows [first - up, first + count + down) of one plane; read(pixel, to, n) writes n of the image from that pixel on.
template <typename T, typename Read>
void stage_rows(const Band& b, int64_t first, int64_t count, T* to, Read&& read) {
  const int64_t pitch = b.pitch(), gap = pitch - b.width;
  if (gap + b.up + b.down == 0) return read(first * b.width, to, count * b.width);
  for (int64_t i = 0; i < b.left; ++i) to[i] = T(0);
  to += b.left;
  for (int64_t r = first - b.up; r < first + count + b.down; ++r, to += pitch) {
    if (r < 0 || r >= b.height) {
      for (int64_t i = 0; i < pitch; ++i) to[i] = T(0);
      continue;
    }
    read(r * b.width, to, b.width);
    for (int64_t i = 0; i < gap; ++i) to[b.width + i] = T(0);
  }
}

template <typename S, typename T>
void stage_plane(const S* image, const Band& b, int64_t first, int64_t count, T* to) {
  stage_rows(b, first, count, to, [&](int64_t pixel, T* row, int64_t n) { load_row(image + pixel, row, n); });
}

// Rows of a tensor's plane against rows that lie `pitch` apart in scratch: added to them, or stored from them.
template <typename S, typename T>
void add_rows(const S* from, T* to, int64_t rows, int64_t width, int64_t pitch) {
  if (pitch == width) width *= rows, rows = 1;
  for (int64_t r = 0; r < rows; ++r, from += width, to += pitch)
    in_pieces(width, [&](int64_t i, auto count) {
      T given[count()];
      load(from + i, given, count());
      for (int j = 0; j < count(); ++j) to[i + j] += given[j];
    });
}
template <typename A, typename S, typename T>
void store_rows(const T* from, S* to, int64_t rows, int64_t width, int64_t pitch) {
  if (pitch == width) width *= rows, rows = 1;
  for (int64_t r = 0; r < rows; ++r, from += pitch, to += width) A::store(from, to, width);
}

// to[i·stride + c] = from[c][i], i < n, c < columns; of four bytes an element in the AVX-512 build columns is
// always 16.
template <typename T>
inline void transpose(const T (&from)[16][16], T* to, int64_t stride, int64_t n, int64_t columns) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    constexpr __mmask16 kAll =
        0xffff;  // the forms without a mask start from an undefined vector, of which some g++ warn
    __m512i a[16], b[16];
#  pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from[i]);
#  pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_maskz_unpacklo_epi32(kAll, a[i], a[i + 1]);
      b[i + 1] = _mm512_maskz_unpackhi_epi32(kAll, a[i], a[i + 1]);
    }
#  pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4)
#  pragma GCC unroll 16
      for (int j = 0; j < 2; ++j) {  // a[i + k]: columns k, k + 4, k + 8, k + 12 of rows i to i + 3
        a[i + 2 * j] = _mm512_maskz_unpacklo_epi64(__mmask8(kAll), b[i + j], b[i + 2 + j]);
        a[i + 2 * j + 1] = _mm512_maskz_unpackhi_epi64(__mmask8(kAll), b[i + j], b[i + 2 + j]);
      }
#  pragma GCC unroll 16
    for (int k = 0; k < 4; ++k) {
      const __m512i even_low = _mm512_maskz_shuffle_i32x4(kAll, a[k], a[4 + k], 0x88);
      const __m512i odd_low = _mm512_maskz_shuffle_i32x4(kAll, a[k], a[4 + k], 0xdd);
      const __m512i even = _mm512_maskz_shuffle_i32x4(kAll, a[8 + k], a[12 + k], 0x88);
      const __m512i odd = _mm512_maskz_shuffle_i32x4(kAll, a[8 + k], a[12 + k], 0xdd);
      b[k] = _mm512_maskz_shuffle_i32x4(kAll, even_low, even, 0x88);
      b[k + 4] = _mm512_maskz_shuffle_i32x4(kAll, odd_low, odd, 0x88);
      b[k + 8] = _mm512_maskz_shuffle_i32x4(kAll, even_low, even, 0xdd);
      b[k + 12] = _mm512_maskz_shuffle_i32x4(kAll, odd_low, odd, 0xdd);
    }
#  pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      if (i < n) _mm512_storeu_si512(to + i * stride, b[i]);
    return;
  }
#endif
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < columns; ++c) to[i * stride + c] = from[c][i];
}

// Pixels of `count` rows, channels last, in groups of `group` channels, the last one padded with zeros to `stride`
// channels in all: [group][pixel][channel]. With A::kPixels = 2 an element holds two neighbours of a row, the last of
// an odd row beside a zero.
template <typename A, typename S>
void stage_transposed(const S* image, int64_t channels, const Band& b, int64_t first, int64_t count,
                      typename A::Staged* to, int64_t stride, int64_t group) {
  const int64_t plane = b.height * b.width, width = b.width % A::kPixels ? b.width : count * b.width,
                lines = count * b.width / width;
  const int64_t each = (width + A::kPixels - 1) / A::kPixels;
  const S* from = image + first * b.width;
  for (int64_t c0 = 0; c0 < stride; c0 += group) {
    const int64_t across = std::min(group, stride - c0);
    for (int64_t line = 0; line < lines; ++line)
      for (int64_t q = 0; q < each; q += 16) {
        const int64_t n = std::min<int64_t>(16, each - q), pixel = line * width + q * A::kPixels;
        for (int64_t c = c0; c < c0 + across; c += 16) {
          typename A::Staged square[16][16];
          for (int64_t k = 0; k < 16; ++k) {
            if (c + k < channels)
              A::read_pixels(from + (c + k) * plane + pixel, square[k],
                             std::min(n * A::kPixels, width - q * A::kPixels));
            else
              std::fill_n(square[k], 16, typename A::Staged(0));
          }
          transpose(square, to + c - c0, across, n, std::min<int64_t>(16, c0 + across - c));
        }
        to += n * across;
      }
  }
}

// ---- arithmetic -------------------------------------------------------------------------------------------------

// One product a lane: storage S is widened to T as it is staged. Pairs (bf16.h) has the same members.
template <typename T>
struct Single {
  using Staged = T;  // an element of a staged plane, of a packed weight, of g turned
  using Pixel = T;   // an element of the planes that the weight's gradient reads
  using Weight = T;  // what the weight is packed from
  using Sum = T;
  static constexpr int64_t kChannels = 1;  // of x in an element of correlate
  static constexpr int64_t kPixels = 1;    // of g in an element of outer

  static void place(Staged& element, int64_t, Weight w) { element = w; }
  template <typename S>
  static void stage_channels(const S* image, int64_t i, int64_t, const Band& b, int64_t first, int64_t count,
                             Staged* to) {
    stage_plane(image + i * b.height * b.width, b, first, count, to);
  }
  template <typename S>
  static void stage_pixels(const S* image, const Band& b, int64_t first, int64_t count, Pixel* to) {
    stage_plane(image, b, first, count, to);
  }
  template <typename S>
  static void read_pixels(const S* from, Staged* to, int64_t n) {
    load_row(from, to, n);
  }
  template <typename S>
  static void store(const T* from, S* to, int64_t n) {
    store_row(from, to, n);
  }
  template <int C, int V>
  static void correlate(const T* x, const int32_t* at, const T* w, int64_t entries, const T* shift, T* out,
                        int64_t stride) {
    correlate_tile<T, C, V>(x, at, w, entries, shift, out, stride);
  }
  template <int E, int V>
  static void outer(const T* const* x, int64_t pitch, const T* g, int64_t g_stride, int64_t rows, int64_t width, T* to,
                    int64_t to_stride, bool first) {
    outer_tile<T, E, V>(x, pitch, g, g_stride, rows, width, to, to_stride, first);
  }
};

}  // namespace masked
}  // namespace genkernels
