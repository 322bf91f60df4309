// The network of a residual block as the kernels have it, and the product that all of its passes are made of.
//
// Layout. Everything is [image, channel, pixel]. An image of a convolution is a sample; of matrices it is a tile of
// `lanes` samples, one a pixel (8, or 64 for many of them; absent ones are 0), so that a matrix is a 1×1 convolution. A
// batch of vectors has P images for each image of samples: vector p·G + g. Of an activation with two outputs a number
// (CLipSwish), φ(z_j) and φ(−z_j) are the channels 2j and 2j + 1: the weights are arranged so (`arrange`), and one
// thread has both to fold.
//
// The product. rows × columns, columns being the pixels of some images and depth (tap, channel): an implicit GEMM that
// reads its left factor as [depth, rows] (arranged so, rows padded to 4) and gathers its right one from images with
// zeros around. A block of 256 threads computes a tile of it, 4 rows and TC columns a thread, `kDepth` deep at a time
// through two buffers in shared memory: the next depth is loaded while one is multiplied. What is done with a result
// (bias and activation, slopes, sums) is an epilogue, called with 4 neighbouring rows of a column.
#pragma once

#include "../common.cuh"
#include "curves.cuh"

// nvcc has it as a macro: the argument stays in constant memory, though its arrays are indexed at run time.
#ifndef __grid_constant__
#  define __grid_constant__
#endif

namespace genkernels {
namespace residual {

constexpr int kMaps = 16;  // their pointers travel as kernel arguments
constexpr int kSmallTile = 8, kLargeTile = 64;

// Blocks that share a multiprocessor, at least: named, since ptxas by itself was seen to spill for more.
template <typename A>
constexpr int kBlocks = sizeof(A) == 4 ? 2 : 1;

GK_HOST_DEVICE inline int padded(int rows) {
  return (rows + 3) / 4 * 4;
}

// One map. With G images of samples and V = G, or (1 + P)·G where a gradient has P probes:
template <typename A>
struct Map {
  const A *push, *pull;         // [taps · inputs, padded outputs], [taps · outputs, padded inputs], taps mirrored
  const A* bias;                // [padded outputs], or [samples, padded outputs]: each sample's own
  A *in, *out;                  // [V, inputs], [V, outputs]: what it is applied to; cotangents of what it gives
  A *z, *slope, *bent;          // [G, outputs], [G, values], [slots · G, outputs]: of the activation behind it
  int inputs, outputs, kernel;  // channels; 1 or 3
  int bias_pitch;               // from one sample's own bias to the next one's; 0 where they have one in common
};

template <typename A>
struct Network {
  Map<A> map[kMaps];
  const A* parameters;  // [maps − 1]
  int maps, images;     // G
  int height, width, lanes;
  bool mirrored;
  Nonlinearity activation;

  GK_HOST_DEVICE inline int pixels() const { return height * width; }
};

// Which sample an image's pixel is of.
__device__ __forceinline__ int64_t sample_at(int lanes, int image, int64_t pixel) {
  return static_cast<int64_t>(image) * lanes + (lanes > 1 ? pixel : 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Columns

// The pixels of a rectangle in the images first, first + stride, ...
struct Columns {
  int first, stride, images;
  int y, x, height, width;
  GK_HOST_DEVICE inline int area() const { return height * width; }
  GK_HOST_DEVICE inline int count() const { return images * area(); }
};

struct Place {
  int image, y, x;
  __device__ __forceinline__ Place(const Columns& c, int column) {
    const int i = column / c.area(), rest = column - i * c.area(), row = rest / c.width;
    image = c.first + i * c.stride;
    y = c.y + row;
    x = c.x + rest - row * c.width;
  }
};

// What a block has to do of a pass over vectors [from, from + vectors · G): its own image alone, or every gridDim-th
// tile of all.
template <typename A>
struct Share {
  Columns columns;
  int rank, ranks;
  __device__ __forceinline__ Share(const Network<A>& net, bool alone, int from, int vectors)
      : columns{alone ? from + static_cast<int>(blockIdx.x) : from,
                alone ? net.images : 1,
                alone ? vectors : vectors * net.images,
                0,
                0,
                net.height,
                net.width},
        rank(alone ? 0 : blockIdx.x),
        ranks(alone ? 1 : gridDim.x) {}
};

// ---------------------------------------------------------------------------------------------------------------------
// Product

template <typename A>
struct Product {
  const A* weight;  // [taps · inputs, padded rows]
  int rows, inputs, kernel;
  const A* in;  // [images, inputs, height, width]
  int height, width;

  static __device__ __forceinline__ Product push(const Network<A>& net, int i, const A* in) {
    const Map<A>& m = net.map[i];
    return {m.push, m.outputs, m.inputs, m.kernel, in, net.height, net.width};
  }
  static __device__ __forceinline__ Product pull(const Network<A>& net, int i, const A* in) {
    const Map<A>& m = net.map[i];
    return {m.pull, m.inputs, m.outputs, m.kernel, in, net.height, net.width};
  }
};

template <typename A, int TC, int CT>
struct Tile {
  static constexpr int kDepth = sizeof(A) == 4 ? 16 : 8;
  static constexpr int kRows = 4 * kThreads / CT, kColumns = TC * CT;
  static constexpr int kNumbers = 2 * kDepth * (kRows + kColumns);
  GK_HOST_DEVICE static inline int count(int rows, int columns) {
    return (rows + kRows - 1) / kRows * ((columns + kColumns - 1) / kColumns);
  }
};
// 64 rows by 64 columns, or 16 by 128 where there are few rows; 128 by 8 for a tile of eight samples.
template <typename A>
using Square = Tile<A, 4, 16>;
template <typename A>
using Flat = Tile<A, 2, 64>;
template <typename A>
using Narrow = Tile<A, 1, 8>;

template <typename A, bool kLarge>
constexpr int kNumbers =
    kLarge ? (Flat<A>::kNumbers > Square<A>::kNumbers ? Flat<A>::kNumbers : Square<A>::kNumbers) : Narrow<A>::kNumbers;

template <typename A, bool kLarge>
GK_HOST_DEVICE inline int tiles(int rows, int columns) {
  if (!kLarge) return Narrow<A>::count(rows, columns);
  return rows <= 32 ? Flat<A>::count(rows, columns) : Square<A>::count(rows, columns);
}

// All threads of the block call it; shared: T::kNumbers.
template <typename A, int TC, int CT, typename Epilogue>
__device__ __forceinline__ void multiply(const Product<A>& p, const Columns& columns, int first_row, int first_column,
                                         A* shared, Epilogue& epilogue) {
  using T = Tile<A, TC, CT>;
  constexpr int kDepth = T::kDepth, kRows = T::kRows, kColumns = T::kColumns;
  constexpr int kStep = kThreads / kColumns < kDepth ? kThreads / kColumns : kDepth;  // in depth, of a thread's loads
  constexpr int kGathers = kDepth / kStep;
  constexpr int kRuns = kDepth * kRows / 4, kLoads = (kRuns + kThreads - 1) / kThreads;
  A* left = shared;                        // [2, kDepth, kRows]
  A* right = shared + 2 * kDepth * kRows;  // [2, kDepth, kColumns]
  const int thread = threadIdx.x, count = columns.count(), depth = p.kernel * p.kernel * p.inputs;
  const int pixels = p.height * p.width, stride = padded(p.rows);

  // the column that this thread gathers, the depths being kStep apart
  const int mine = thread % kColumns, begin = thread / kColumns;
  const bool gathers = begin < kStep && first_column + mine < count;
  const Place at(columns, gathers ? first_column + mine : 0);
  const A* source = p.in + static_cast<int64_t>(at.image) * p.inputs * pixels + at.y * p.width + at.x;
  int tap = 0, channel = begin;

  A gathered[kGathers];
  Vector<A, 4> loaded[kLoads];
  const auto fetch = [&](int k0) {
#pragma unroll
    for (int l = 0; l < kGathers; ++l) {
      while (channel >= p.inputs) {
        channel -= p.inputs;
        ++tap;
      }
      int dy = 0, dx = 0;
      bool inside = gathers && k0 + begin + l * kStep < depth;
      if (p.kernel == 3) {
        dy = tap / 3 - 1;
        dx = tap - tap / 3 * 3 - 1;
        inside = inside && at.y + dy >= 0 && at.y + dy < p.height && at.x + dx >= 0 && at.x + dx < p.width;
      }
      gathered[l] = inside ? source[channel * pixels + dy * p.width + dx] : A(0);
      channel += kStep;
    }
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      const int run = thread + l * kThreads, k = run / (kRows / 4), row = first_row + run % (kRows / 4) * 4;
      if ((kRuns % kThreads == 0 || run < kRuns) && k0 + k < depth && row < stride) {
        loaded[l] = *reinterpret_cast<const Vector<A, 4>*>(p.weight + static_cast<int64_t>(k0 + k) * stride + row);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) loaded[l].lane[j] = A(0);
      }
    }
  };

  const int tr = thread / CT, tc = thread % CT;
  A sum[4][TC];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int j = 0; j < TC; ++j) sum[r][j] = A(0);
  }
  fetch(0);
  for (int k0 = 0, buffer = 0; k0 < depth; k0 += kDepth, buffer ^= 1) {
    A* l_at = left + buffer * kDepth * kRows;
    A* r_at = right + buffer * kDepth * kColumns;
#pragma unroll
    for (int l = 0; l < kGathers; ++l) {
      if (begin < kStep) r_at[(begin + l * kStep) * kColumns + mine] = gathered[l];
    }
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      const int run = thread + l * kThreads;
      if (kRuns % kThreads == 0 || run < kRuns) reinterpret_cast<Vector<A, 4>*>(l_at)[run] = loaded[l];
    }
    __syncthreads();
    if (k0 + kDepth < depth) fetch(k0 + kDepth);
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      const Vector<A, 4> a = *reinterpret_cast<const Vector<A, 4>*>(l_at + k * kRows + 4 * tr);
#pragma unroll
      for (int j = 0; j < TC; ++j) {
        const A b = r_at[k * kColumns + tc + j * CT];
#pragma unroll
        for (int r = 0; r < 4; ++r) sum[r][j] += a.lane[r] * b;
      }
    }
  }
  const int row = first_row + 4 * tr;
#pragma unroll
  for (int j = 0; j < TC; ++j) {
    const int column = first_column + tc + j * CT;
    if (row >= p.rows || column >= count) continue;
    const Place place(columns, column);
    const A found[4] = {sum[0][j], sum[1][j], sum[2][j], sum[3][j]};
    epilogue(place.image, place.y * p.width + place.x, row, found, p.rows - row);
  }
  __syncthreads();  // the next tile writes where this one is still read
}

// The tiles rank, rank + ranks, ... of a product.
template <typename A, bool kLarge, typename Epilogue>
__device__ __forceinline__ void run(const Product<A>& p, const Columns& columns, int rank, int ranks, A* shared,
                                    Epilogue& epilogue) {
  const int all = tiles<A, kLarge>(p.rows, columns.count());
  const auto each = [&]<int TC, int CT>(Tile<A, TC, CT>) {
    using T = Tile<A, TC, CT>;
    const int down = (p.rows + T::kRows - 1) / T::kRows;
    for (int tile = rank; tile < all; tile += ranks)
      multiply<A, TC, CT>(p, columns, tile % down * T::kRows, tile / down * T::kColumns, shared, epilogue);
  };
  if constexpr (!kLarge) {
    each(Narrow<A>{});
  } else if (p.rows <= 32) {
    each(Flat<A>{});
  } else {
    each(Square<A>{});
  }
}

}  // namespace residual
}  // namespace genkernels
