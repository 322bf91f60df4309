// The two products of a masked convolution over live taps, in registers, and the scratch that they read.
//
// correlate: out[o][q] = shift[o] + Σ_e w[e][o] · x[q + at_e], an entry e being one live tap of one input channel. Lanes are pixels; C
//            output channels by V vectors of pixels are held in registers. Serves the forward pass and, with the roles of the channels
//            swapped and the taps mirrored, the gradient of x.
// outer:     acc[e][o] += Σ_q x[q + at_e] · g[q][o]. Lanes are output channels; E entries by V vectors of channels are held. Serves the
//            gradient of the weight.
//
// Staged image. A band of rows is copied to scratch with zeros around, channel by channel, so that no product asks where the border is:
// row r starts at lead + (r + up)·pitch, where pitch = W + the wider of the left and right reach; the zeros between two rows serve both.
// A pixel's place is q = r·pitch + w, a tap is a constant distance from it, and vectors of pixels run on from one row into the next.
#pragma once

#include "common.h"

#include <memory>

namespace genkernels {
namespace masked {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 16;
#endif

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
  static constexpr int64_t kLanes = kVectorBytes / sizeof(T);
};

template <typename T>
inline typename Vector<T>::type load_vector(const T* from) {
  return *reinterpret_cast<const typename Vector<T>::unaligned*>(from);
}
template <typename T>
inline void store_vector(typename Vector<T>::type value, T* to) {
  *reinterpret_cast<typename Vector<T>::unaligned*>(to) = value;
}

// Memory of one thread, kept from call to call: fresh pages cost more than they hold. Slots grow and are never freed. What a tile reads
// beyond a staged plane is left over from earlier, and the lanes that see it are thrown away.
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

// ---- correlate ------------------------------------------------------------------------------------------------------------

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
void correlate_tile(const T* x, const int32_t* at, const T* w, int64_t entries, const T* shift, T* out, int64_t stride) {
  using Vec = typename Vector<T>::type;
  constexpr int64_t L = Vector<T>::kLanes;
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
int64_t correlate_some(int64_t left, const Staged* x, const int32_t* at, const Staged* w, int64_t entries, const Sum* shift, Sum* out,
                       int64_t stride) {
  constexpr int V = vectors_beside(C);
  constexpr int Half = (V + 1) / 2;
  if (left > Half) return A::template correlate<C, V>(x, at, w, entries, shift, out, stride), V;
  if (left > 1) return A::template correlate<C, Half>(x, at, w, entries, shift, out, stride), Half;
  return A::template correlate<C, 1>(x, at, w, entries, shift, out, stride), 1;
}

template <typename A, typename Staged, typename Sum>
int64_t correlate(int channels, int64_t left, const Staged* x, const int32_t* at, const Staged* w, int64_t entries, const Sum* shift,
                  Sum* out, int64_t stride) {
  switch (channels) {
    case 8:
      if constexpr (kBlock == 8) return correlate_some<A, 8>(left, x, at, w, entries, shift, out, stride);
    case 4: return correlate_some<A, 4>(left, x, at, w, entries, shift, out, stride);
    case 2: return correlate_some<A, 2>(left, x, at, w, entries, shift, out, stride);
    default: return correlate_some<A, 1>(left, x, at, w, entries, shift, out, stride);
  }
}

// ---- outer ----------------------------------------------------------------------------------------------------------------

constexpr int kOuterVectors = kRegisters == 32 ? 4 : 2;  // of output channels, at most
constexpr int entries_beside(int vectors) { return vectors == kOuterVectors ? 6 : 8; }

// x: a pointer an entry, to pixel 0 of the first row. g [rows·width][g_stride]. to [E][to_stride], overwritten or added to.
template <typename T, int E, int V>
void outer_tile(const T* const* x, int64_t pitch, const T* g, int64_t g_stride, int64_t rows, int64_t width, T* to, int64_t to_stride,
                bool first) {
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
void outer(int vectors, const Pixel* const* x, int64_t pitch, const Staged* g, int64_t g_stride, int64_t rows, int64_t width, Sum* to,
           int64_t to_stride, bool first) {
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

// ---- staging --------------------------------------------------------------------------------------------------------------

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

// Rows [first - up, first + count + down) of one plane; read(pixel, to) writes a row of the image from that pixel on.
template <typename T, typename Read>
void stage_rows(const Band& b, int64_t first, int64_t count, T* to, Read&& read) {
  const int64_t pitch = b.pitch(), gap = pitch - b.width;
  for (int64_t i = 0; i < b.left; ++i) to[i] = T(0);
  to += b.left;
  for (int64_t r = first - b.up; r < first + count + b.down; ++r, to += pitch) {
    if (r < 0 || r >= b.height) {
      for (int64_t i = 0; i < pitch; ++i) to[i] = T(0);
      continue;
    }
    read(r * b.width, to);
    for (int64_t i = 0; i < gap; ++i) to[b.width + i] = T(0);
  }
}

template <typename S, typename T>
void stage_plane(const S* image, const Band& b, int64_t first, int64_t count, T* to) {
  stage_rows(b, first, count, to, [&](int64_t pixel, T* row) {
    if constexpr (std::is_same_v<S, T>)
      for (int64_t i = 0; i < b.width; ++i) row[i] = image[pixel + i];
    else
      load(image + pixel, row, b.width);
  });
}

// Pixels of `count` rows, channels last, in groups of `group` channels, the last one padded with zeros to `stride` channels in all:
// [group][pixel][channel]. With A::kPixels = 2 an element holds two neighbours of a row, the last of an odd row beside a zero. In blocks
// of 16 elements, whose lines stay in the cache while the channels pass by.
template <typename A, typename S>
void stage_transposed(const S* image, int64_t channels, const Band& b, int64_t first, int64_t count, typename A::Staged* to, int64_t stride,
                      int64_t group) {
  const int64_t plane = b.height * b.width, width = b.width % A::kPixels ? b.width : count * b.width, lines = count * b.width / width;
  const int64_t each = (width + A::kPixels - 1) / A::kPixels;
  const S* from = image + first * b.width;
  typename A::Staged row[16];
  for (int64_t c0 = 0; c0 < stride; c0 += group) {
    const int64_t across = std::min(group, stride - c0);
    for (int64_t line = 0; line < lines; ++line)
      for (int64_t q = 0; q < each; q += 16, to += 16 * across) {
        const int64_t n = std::min<int64_t>(16, each - q);
        for (int64_t c = c0; c < std::min(channels, c0 + across); ++c) {
          A::read_pixels(from + c * plane + line * width + q * A::kPixels, row, std::min(n * A::kPixels, width - q * A::kPixels));
          typename A::Staged* column = to + c - c0;
          for (int64_t i = 0; i < n; ++i) column[i * across] = row[i];
        }
        for (int64_t i = 0; i < n; ++i)
          for (int64_t c = std::max(channels, c0); c < c0 + across; ++c) to[i * across + c - c0] = typename A::Staged(0);
        if (n < 16) to -= (16 - n) * across;
      }
  }
}

// ---- arithmetic -----------------------------------------------------------------------------------------------------------

// One product a lane: storage S is widened to T as it is staged. Pairs (masked_conv_bf16.h) has the same members.
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
  static void stage_channels(const S* image, int64_t i, int64_t, const Band& b, int64_t first, int64_t count, Staged* to) {
    stage_plane(image + i * b.height * b.width, b, first, count, to);
  }
  template <typename S>
  static void stage_pixels(const S* image, const Band& b, int64_t first, int64_t count, Pixel* to) {
    stage_plane(image, b, first, count, to);
  }
  template <typename S>
  static void read_pixels(const S* from, Staged* to, int64_t n) {
    load(from, to, n);
  }
  template <int C, int V>
  static void correlate(const T* x, const int32_t* at, const T* w, int64_t entries, const T* shift, T* out, int64_t stride) {
    correlate_tile<T, C, V>(x, at, w, entries, shift, out, stride);
  }
  template <int E, int V>
  static void outer(const T* const* x, int64_t pitch, const T* g, int64_t g_stride, int64_t rows, int64_t width, T* to, int64_t to_stride,
                    bool first) {
    outer_tile<T, E, V>(x, pitch, g, g_stride, rows, width, to, to_stride, first);
  }
};

}  // namespace masked
}  // namespace genkernels
