// How a weight acts on one sample, and how its layer is cut into blocks.
#pragma once

#include "../common.cuh"

namespace genkernels {
namespace spectral {

constexpr int kLayers = 30;  // of one launch: arguments of a kernel are 4 KB at most
constexpr int kArgumentBytes = 4096 - 128;

enum Kind : short { kMatrix, kConvolution, kCircular };

// How a weight acts on one sample. A convolution maps x [x channels, x...] to y [y channels, y...], a transposed one y
// to x; axes that a weight lacks stand first and have size 1.
struct Geometry {
  // a matrix: rows M, columns K, and the distance of rows, all numbers of a row being neighbours in runs of so many;
  // else y's channels, x's channels of a group, groups
  int sizes[3];
  int x[3], y[3], kernel[3], padding[3];
  short stride[3], dilation[3];
  Kind kind;
  bool transposed;

  GK_HOST_DEVICE inline int taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  GK_HOST_DEVICE inline int x_places() const { return x[0] * x[1] * x[2]; }
  GK_HOST_DEVICE inline int y_places() const { return y[0] * y[1] * y[2]; }
  GK_HOST_DEVICE inline int x_numbers() const { return sizes[1] * sizes[2] * x_places(); }
  GK_HOST_DEVICE inline int y_numbers() const { return sizes[0] * y_places(); }
  // Numbers of u and of v.
  GK_HOST_DEVICE inline int u_numbers() const {
    return kind == kMatrix ? sizes[0] : transposed ? x_numbers() : y_numbers();
  }
  GK_HOST_DEVICE inline int v_numbers() const {
    return kind == kMatrix ? sizes[1] : transposed ? y_numbers() : x_numbers();
  }
  GK_HOST_DEVICE inline int64_t numbers() const {
    return static_cast<int64_t>(sizes[0]) * sizes[1] * (kind == kMatrix ? 1 : taps());
  }
};

GK_HOST_DEVICE inline int cuts(int64_t count, int64_t size) {
  return static_cast<int>((count + size - 1) / size);
}
GK_HOST_DEVICE inline int least(int a, int b) {
  return a < b ? a : b;
}

// Numbers of a thread's run.
template <typename T>
constexpr int kRun = 16 / sizeof(T);

// How blocks share out a matrix in `left`: kThreads / across rows of threads, each with so many rows of W.
struct RowCut {
  int across, rows_a_thread;
  GK_HOST_DEVICE inline int rows_a_block() const { return kThreads / across * rows_a_thread; }
};
template <typename T>
GK_HOST_DEVICE inline RowCut row_cut(const Geometry& g) {
  int across = 32;
  while (across < kThreads && across * kRun<T> < g.sizes[1]) across *= 2;
  return {across, g.sizes[0] > 4 ? 8 : 1};
}

// And in `right`: `down` threads share a column; a block takes so many tiles of kThreads / down columns, few enough
// blocks that what they leave behind is little to combine.
struct ColumnCut {
  int down, tiles_a_block;
  GK_HOST_DEVICE inline int columns() const { return kThreads / down; }
};
template <typename T>
GK_HOST_DEVICE inline ColumnCut column_cut(const Geometry& g) {
  const int partials = cuts(g.sizes[0], row_cut<T>(g).rows_a_block());
  const int down = partials >= 8 ? 8 : partials >= 4 ? 4 : partials >= 2 ? 2 : 1;
  return {down, cuts(cuts(g.sizes[1], kThreads / down), 256)};
}

// The three matrix products of a convolution, [rows, depth] by [depth, columns] for each group.
//   kConvolve   y = W x: rows y channels, columns y places, depth (x channel, tap)
//   kSpread     x = Wᵀ y: rows x channels, columns x places, depth (y channel, tap)
//   kCorrelate  D of W's shape: rows y channels, columns (x channel, tap), depth y places
enum class Product { kConvolve, kSpread, kCorrelate };
constexpr int kTileRows = 32, kTileColumns = 64, kTileDepth = 32;

struct Extent {
  int rows, columns, depth;
  GK_HOST_DEVICE inline int row_tiles() const { return cuts(rows, kTileRows); }
  GK_HOST_DEVICE inline int column_tiles() const { return cuts(columns, kTileColumns); }
};
GK_HOST_DEVICE inline Extent extent(Product product, const Geometry& g) {
  const int y_channels = g.sizes[0] / g.sizes[2];
  switch (product) {
    case Product::kConvolve: return {y_channels, g.y_places(), g.sizes[1] * g.taps()};
    case Product::kSpread: return {g.sizes[1], g.x_places(), y_channels * g.taps()};
    default: return {y_channels, g.sizes[1] * g.taps(), g.y_places()};
  }
}
GK_HOST_DEVICE inline int tiles(Product product, const Geometry& g) {
  const Extent e = extent(product, g);
  return e.row_tiles() * e.column_tiles() * g.sizes[2];
}

// Blocks of a layer in each launch.
template <typename T>
GK_HOST_DEVICE inline int left_blocks(const Geometry& g) {
  if (g.kind == kMatrix) return cuts(g.sizes[0], row_cut<T>(g).rows_a_block());
  return tiles(g.transposed ? Product::kSpread : Product::kConvolve, g);
}
template <typename T>
GK_HOST_DEVICE inline int right_blocks(const Geometry& g) {
  if (g.kind != kMatrix) return tiles(g.transposed ? Product::kConvolve : Product::kSpread, g);
  const ColumnCut cut = column_cut<T>(g);
  return cuts(g.sizes[1], static_cast<int64_t>(cut.columns()) * cut.tiles_a_block);
}
// Numbers of a block of `finish` and of `gradient`, and of one of `inner`, of which a layer has at most 256.
template <typename T>
constexpr int kChunk = kThreads * kRun<T> * 4;
template <typename T>
GK_HOST_DEVICE inline int64_t inner_chunk(int64_t numbers) {
  return static_cast<int64_t>(cuts(numbers, 256 * kChunk<T>)) * kChunk<T>;
}
template <typename T>
GK_HOST_DEVICE inline int inner_blocks(int64_t numbers) {
  return cuts(numbers, inner_chunk<T>(numbers));
}
template <typename T>
GK_HOST_DEVICE inline int gradient_blocks(const Geometry& g) {
  return g.kind == kMatrix ? cuts(g.numbers(), kChunk<T>) : tiles(Product::kCorrelate, g);
}

}  // namespace spectral
}  // namespace genkernels
