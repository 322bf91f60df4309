// Products with a convolution: matrix products whose right factor is gathered by index.
#pragma once

#include "norms.cuh"

namespace genkernels {
namespace spectral {

// d = ((c·r0 + t0)·r1 + t1)·r2 + t2, stepped by one number again and again: no division in a loop.
struct Counter {
  int radix[3], at[4], by[4];

  __device__ __forceinline__ Counter(const int (&r)[3], int d, int step) : radix{r[0], r[1], r[2]} {
    split(d, at);
    split(step, by);
  }
  __device__ __forceinline__ void split(int d, int (&digits)[4]) const {
#pragma unroll
    for (int a = 2; a >= 0; --a) {
      const int rest = d / radix[a];
      digits[a + 1] = d - rest * radix[a];
      d = rest;
    }
    digits[0] = d;
  }
  __device__ __forceinline__ void advance() {
#pragma unroll
    for (int a = 0; a < 4; ++a) at[a] += by[a];
#pragma unroll
    for (int a = 2; a >= 0; --a) {
      const bool carries = at[a + 1] >= radix[a];
      at[a + 1] -= carries ? radix[a] : 0;
      at[a] += carries;
    }
  }
};

// The right factor of a product: numbers of a vector, picked by a column (fixed for a thread) and a depth.
struct Gather {
  bool spreads, circular;
  int size[3];  // of the vector that is read
  int base[3];  // the column's place
  int by[3];    // how far one step of the depth's digits leads
  int channel;  // the column's
  const Geometry& g;

  __device__ __forceinline__ Gather(Product product, const Geometry& g, int group, int column) : g(g) {
    const bool correlates = product == Product::kCorrelate;
    spreads = product == Product::kSpread;
    circular = g.kind == kCircular;
#pragma unroll
    for (int a = 2; a >= 0; --a) {
      size[a] = spreads ? g.y[a] : g.x[a];
      by[a] = spreads ? -g.dilation[a] : correlates ? g.stride[a] : g.dilation[a];
      const int radix = spreads ? g.x[a] : correlates ? g.kernel[a] : g.y[a];
      const int rest = column / radix, digit = column - rest * radix;
      column = rest;
      base[a] = spreads ? digit + g.padding[a] : digit * (correlates ? g.dilation[a] : g.stride[a]) - g.padding[a];
    }
    channel = group * (spreads ? g.sizes[0] / g.sizes[2] : g.sizes[1]) + column;
  }

  // The output that a tap leads to, if there is one.
  __device__ __forceinline__ bool lands(int a, int place, int& at) const {
    at = place;
    if (g.stride[a] != 1) {
      if (place < 0 || place % g.stride[a] != 0) return false;
      at = place / g.stride[a];
    }
    return at >= 0 && at < size[a];
  }

  template <typename T>
  __device__ __forceinline__ arithmetic_t<T> at(const Source<T>& source, const Counter& depth) const {
    int place[3];
#pragma unroll
    for (int a = 0; a < 3; ++a) place[a] = base[a] + depth.at[a + 1] * by[a];
    const int start = (channel + depth.at[0]) * size[0];
    if (spreads && circular) {  // an input lies also a period before and after itself
      arithmetic_t<T> sum = 0;
      int to[3];
#pragma unroll 1
      for (int i = -1; i <= 1; ++i) {
        if (!lands(0, place[0] + i * g.x[0], to[0])) continue;
#pragma unroll 1
        for (int j = -1; j <= 1; ++j) {
          if (!lands(1, place[1] + j * g.x[1], to[1])) continue;
#pragma unroll 1
          for (int k = -1; k <= 1; ++k) {
            if (lands(2, place[2] + k * g.x[2], to[2]))
              sum += source[((start + to[0]) * size[1] + to[1]) * size[2] + to[2]];
          }
        }
      }
      return sum;
    }
    bool inside = true;
#pragma unroll
    for (int a = 0; a < 3; ++a) {
      if (circular) place[a] += place[a] < 0 ? size[a] : place[a] >= size[a] ? -size[a] : 0;
      inside = inside && (spreads ? lands(a, place[a], place[a]) : place[a] >= 0 && place[a] < size[a]);
    }
    return inside ? source[((start + place[0]) * size[1] + place[1]) * size[2] + place[2]] : 0;
  }
};

// What the threads of a block share in `multiply`; two numbers of padding: a warp's stores to a column then meet each
// bank twice at most.
template <typename A>
struct Tiles {
  A left[kTileDepth][kTileRows + 2], right[kTileDepth][kTileColumns];
};

constexpr int kMicroRows = 2, kMicroColumns = 4;  // of a thread

// Where a thread's sums stand.
struct Place {
  int row, column;  // of the group's product; the first of kMicroRows · kMicroColumns
  Extent extent;
  int group;

  __device__ __forceinline__ bool inside(int i, int j) const {
    return row + i < extent.rows && column + j < extent.columns;
  }
  __device__ __forceinline__ int64_t at(int i, int j) const {
    return (static_cast<int64_t>(group) * extent.rows + row + i) * extent.columns + column + j;
  }
};

__device__ __forceinline__ Place place_of(Product product, const Geometry& g, int block) {
  Place place;
  place.extent = extent(product, g);
  const int column_tile = block % place.extent.column_tiles(), above = block / place.extent.column_tiles();
  place.group = above / place.extent.row_tiles();
  place.row = above % place.extent.row_tiles() * kTileRows + threadIdx.x / 16 * kMicroRows;
  place.column = column_tile * kTileColumns + threadIdx.x % 16 * kMicroColumns;
  return place;
}

// sum = left · right, a tile of a block. left: for kCorrelate y, else the weight.
template <typename T>
__device__ __forceinline__ void multiply(Product product, const Geometry& g, const Place& place, const T* left,
                                         const Source<T>& right, Tiles<arithmetic_t<T>>& tiles,
                                         arithmetic_t<T> (&sum)[kMicroRows][kMicroColumns]) {
  using A = arithmetic_t<T>;
  constexpr int kLefts = kTileRows * kTileDepth / kThreads, kRights = kTileColumns * kTileDepth / kThreads;
  constexpr int kLeftStep = kThreads / kTileDepth, kRightStep = kThreads / kTileColumns;
  const bool spreads = product == Product::kSpread, correlates = product == Product::kCorrelate;
  const int depth = place.extent.depth;
  const int first_row = place.row - threadIdx.x / 16 * kMicroRows;
  const int first_column = place.column - threadIdx.x % 16 * kMicroColumns;

  // the left factor: a thread has one depth and some rows; a row's numbers are neighbours, but those of one y channel
  // to the next where rows are x channels
  const int left_depth = threadIdx.x % kTileDepth, left_row = threadIdx.x / kTileDepth;
  const int run = spreads ? g.taps() : depth;
  const int64_t pitch = run, skip = spreads ? static_cast<int64_t>(g.sizes[1] - 1) * run : 0;
  left += static_cast<int64_t>(place.group) * place.extent.rows * depth;
  // the right factor: one column and some depths
  const int right_depth = threadIdx.x / kTileColumns, right_column = threadIdx.x % kTileColumns;
  const Gather gather(product, g, place.group, least(first_column + right_column, place.extent.columns - 1));
  Counter digits(correlates ? g.y : g.kernel, right_depth, kRightStep);

  T left_numbers[kLefts];
  A right_numbers[kRights];
  const auto fetch = [&](int base) {
    const int d = base + left_depth;
    const int64_t offset = d + (spreads ? d / run * skip : 0);
#pragma unroll
    for (int i = 0; i < kLefts; ++i) {
      const int row = least(first_row + left_row + i * kLeftStep, place.extent.rows - 1);
      left_numbers[i] = d < depth ? left[row * pitch + offset] : T(0);
    }
#pragma unroll
    for (int i = 0; i < kRights; ++i) {
      right_numbers[i] = base + right_depth + i * kRightStep < depth ? gather.at(right, digits) : A(0);
      digits.advance();
    }
  };

#pragma unroll
  for (int i = 0; i < kMicroRows; ++i)
#pragma unroll
    for (int j = 0; j < kMicroColumns; ++j) sum[i][j] = 0;
#pragma unroll 1
  for (int base = -kTileDepth; base < depth; base += kTileDepth) {
    if (base >= 0) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kLefts; ++i)
        tiles.left[left_depth][left_row + i * kLeftStep] = static_cast<A>(left_numbers[i]);
#pragma unroll
      for (int i = 0; i < kRights; ++i) tiles.right[right_depth + i * kRightStep][right_column] = right_numbers[i];
      __syncthreads();
    }
    if (base + kTileDepth < depth) fetch(base + kTileDepth);
    if (base < 0) continue;
    A part[kMicroRows][kMicroColumns] = {};  // sums of a tile's depth first: fewer roundings one upon the other
#pragma unroll 8
    for (int d = 0; d < kTileDepth; ++d) {
      const auto l = *reinterpret_cast<const Vector<A, kMicroRows>*>(&tiles.left[d][threadIdx.x / 16 * kMicroRows]);
      Vector<A, kMicroColumns> r;
      constexpr int kPart = 16 / sizeof(A);
#pragma unroll
      for (int from = 0; from < kMicroColumns; from += kPart) {
        const auto some =
            *reinterpret_cast<const Vector<A, kPart>*>(&tiles.right[d][threadIdx.x % 16 * kMicroColumns + from]);
#pragma unroll
        for (int j = 0; j < kPart; ++j) r.lane[from + j] = some.lane[j];
      }
#pragma unroll
      for (int i = 0; i < kMicroRows; ++i)
#pragma unroll
        for (int j = 0; j < kMicroColumns; ++j) part[i][j] += l.lane[i] * r.lane[j];
    }
#pragma unroll
    for (int i = 0; i < kMicroRows; ++i)
#pragma unroll
      for (int j = 0; j < kMicroColumns; ++j) sum[i][j] += part[i][j];
  }
}

// out = W · vector by this block's tile, and its piece; `dot`: also the sum of products with another vector.
template <typename T>
__device__ __forceinline__ void apply(Product product, const Layer<T>& layer, int block, const Source<T>& vector,
                                      const Source<T>* dot, arithmetic_t<T>* out, Piece<arithmetic_t<T>>* pieces,
                                      Tiles<arithmetic_t<T>>& tiles) {
  using A = arithmetic_t<T>;
  A sum[kMicroRows][kMicroColumns];
  const Place place = place_of(product, layer.geometry, block);
  multiply(product, layer.geometry, place, layer.weight, vector, tiles, sum);
  const auto number = [&](int i) {
    const int r = i / kMicroColumns, c = i % kMicroColumns;
    return place.inside(r, c) ? sum[r][c] : A(0);
  };
  A products = 0;
#pragma unroll
  for (int i = 0; i < kMicroRows * kMicroColumns; ++i) {
    const int r = i / kMicroColumns, c = i % kMicroColumns;
    if (!place.inside(r, c)) continue;
    const int at = static_cast<int>(place.at(r, c));
    out[at] = sum[r][c];
    if (dot != nullptr) products += sum[r][c] * (*dot)[at];
  }
  A largest = 0, squares = 0;
#pragma unroll
  for (int i = 0; i < kMicroRows * kMicroColumns; ++i) {
    const A size = math::abs(number(i));
    largest = size > largest ? size : largest;
  }
  const A unit = largest > A(0) ? largest : A(1);
#pragma unroll
  for (int i = 0; i < kMicroRows * kMicroColumns; ++i) {
    const A ratio = number(i) / unit;
    squares += ratio * ratio;
  }
  const Piece<A> all = block_combine(Piece<A>{largest, squares, products});
  if (threadIdx.x == 0) pieces[block] = all;
}

}  // namespace spectral
}  // namespace genkernels
