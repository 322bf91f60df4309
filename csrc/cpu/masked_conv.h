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

// `left` vectors, as many as fit at once; returns how many were done.
template <typename T, int C>
int64_t correlate_some(int64_t left, const T* x, const int32_t* at, const T* w, int64_t entries, const T* shift, T* out, int64_t stride) {
  constexpr int V = vectors_beside(C);
  constexpr int Half = (V + 1) / 2;
  if (left > Half) return correlate_tile<T, C, V>(x, at, w, entries, shift, out, stride), V;
  if (left > 1) return correlate_tile<T, C, Half>(x, at, w, entries, shift, out, stride), Half;
  return correlate_tile<T, C, 1>(x, at, w, entries, shift, out, stride), 1;
}

template <typename T>
int64_t correlate(int channels, int64_t left, const T* x, const int32_t* at, const T* w, int64_t entries, const T* shift, T* out,
                  int64_t stride) {
  switch (channels) {
    case 8:
      if constexpr (kBlock == 8) return correlate_some<T, 8>(left, x, at, w, entries, shift, out, stride);
    case 4: return correlate_some<T, 4>(left, x, at, w, entries, shift, out, stride);
    case 2: return correlate_some<T, 2>(left, x, at, w, entries, shift, out, stride);
    default: return correlate_some<T, 1>(left, x, at, w, entries, shift, out, stride);
  }
}

// ---- outer ----------------------------------------------------------------------------------------------------------------

constexpr int kOuterVectors = kRegisters == 32 ? 4 : 2;  // of output channels, at most
constexpr int entries_beside(int vectors) { return vectors == kOuterVectors ? 6 : 8; }

// x: a pointer an entry, to pixel 0 of the first row. g [rows·width][g_stride]. acc [E][g_stride], overwritten or added to.
template <typename T, int E, int V>
void outer_tile(const T* const* x, int64_t pitch, const T* g, int64_t g_stride, int64_t rows, int64_t width, T* to, bool first) {
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
      T* at = to + e * g_stride + v * L;
      store_vector<T>(first ? acc[e][v] : acc[e][v] + load_vector(at), at);
    }
}

template <typename T>
void outer(int vectors, const T* const* x, int64_t pitch, const T* g, int64_t g_stride, int64_t rows, int64_t width, T* to, bool first) {
  switch (vectors) {
    case 4:
      if constexpr (kOuterVectors == 4) return outer_tile<T, entries_beside(4), 4>(x, pitch, g, g_stride, rows, width, to, first);
    case 3:
      if constexpr (kOuterVectors == 4) return outer_tile<T, entries_beside(3), 3>(x, pitch, g, g_stride, rows, width, to, first);
    case 2: return outer_tile<T, entries_beside(2), 2>(x, pitch, g, g_stride, rows, width, to, first);
    default: return outer_tile<T, entries_beside(1), 1>(x, pitch, g, g_stride, rows, width, to, first);
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

// Rows [first - up, first + count + down) of one plane.
template <typename S, typename T>
void stage_plane(const S* image, const Band& b, int64_t first, int64_t count, T* to) {
  const int64_t pitch = b.pitch(), gap = pitch - b.width;
  for (int64_t i = 0; i < b.left; ++i) to[i] = T(0);
  to += b.left;
  for (int64_t r = first - b.up; r < first + count + b.down; ++r, to += pitch) {
    if (r < 0 || r >= b.height) {
      for (int64_t i = 0; i < pitch; ++i) to[i] = T(0);
      continue;
    }
    const S* row = image + r * b.width;
    if constexpr (std::is_same_v<S, T>)
      for (int64_t i = 0; i < b.width; ++i) to[i] = row[i];
    else
      load(row, to, b.width);
    for (int64_t i = 0; i < gap; ++i) to[b.width + i] = T(0);
  }
}

// Pixels of `count` rows from `first` on, channels last and padded with zeros: to [count·W][stride]. In blocks of 16 pixels, whose lines
// stay in the cache while the channels pass by.
template <typename S, typename T>
void stage_transposed(const S* image, int64_t channels, const Band& b, int64_t first, int64_t count, T* to, int64_t stride) {
  const int64_t pixels = count * b.width, plane = b.height * b.width;
  const S* from = image + first * b.width;
  T row[16];
  for (int64_t q = 0; q < pixels; q += 16) {
    const int64_t n = std::min<int64_t>(16, pixels - q);
    for (int64_t c = 0; c < channels; ++c) {
      load(from + c * plane + q, row, n);
      T* column = to + q * stride + c;
      for (int64_t i = 0; i < n; ++i) column[i * stride] = row[i];
    }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = channels; c < stride; ++c) to[(q + i) * stride + c] = T(0);
  }
}

}  // namespace masked
}  // namespace genkernels
