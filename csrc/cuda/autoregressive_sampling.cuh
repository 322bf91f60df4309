// Sampling from a causal network, pixel by pixel, with every stage's activations kept: x_i ~ p(x_i | x_<i), stages as
// in csrc/common/stages.h.
//
// One launch a block of rows: one thread block draws one sample, all its pixels and stages, with __syncthreads between
// stages. Planes lie in global memory as rings of the rows that are still read (129 kB a sample for 64 channels at
// width 28: they stay in the L2 cache), pixel-major, so that the taps of a kernel row at a pixel are one stretch of
// numbers. Weights, packed [kernel row][column, in][out] by small kernels before it, are read through L1 and L2 by
// consecutive threads.
//
// A row: vertical stages, and what every other stage takes from rows above, for all columns at once (a thread: one
// channel of kColumns pixels). Then, a pixel at a time, the taps to the left and at the centre: the block's threads are
// (slices of the sum) × (channels), slices add up in shared memory in a fixed order. The draw: weights of the
// categories by all threads, their sums in 32 pieces, the search in the cumulative sum by one.
//
// Nothing is read back to the host and nothing is copied from it: descriptors of stages reach the device as kernel
// arguments.
//
// Counted for 7×7 A + 8 × 3×3 B of 64 channels: a pixel passes 9 stages of two barriers, each behind a trip to the L2
// cache for 32 kB of weights (512 clocks at 64 bytes a clock, behind some 300 of latency): an estimate, not a
// measurement, of 0.6 µs, so 784 × 9 × 0.6 µs = 4 ms an image, whatever the batch up to a block an SM. A cluster of 8
// blocks a sample, each holding an eighth of every stage's weights in its shared memory (bf16: 8 × 61 kB), would take
// the trips for weights out of that chain and leave one distributed-shared-memory exchange a stage.
#pragma once

#include "../common/draw.h"
#include "../common/options.h"
#include "common.cuh"

namespace genkernels {
namespace sampling {

// Threads that work on a sample: the more, the shorter each one's sum, which is what a pixel waits for.
constexpr int kBlock = 512;

// Weights that a thread has in flight at a pixel: with kBlock threads, the 128 × 64 of a 3×3 stage's taps to the left
// and at the centre come in one trip to the second-level cache.
template <typename T>
constexpr int kFlightOf = sizeof(T) == 4 ? 16 : 4;

// Pixels of a row that share a thread's loads of weights. fp64 is for checks, not for speed.
template <typename T>
constexpr int kColumnsOf = sizeof(T) == 4 ? 4 : 1;

struct PlaneAt {
  int channels, rows, border, row_length;
  int64_t offset;
};

// What a stage adds to its sums: a kernel row of an input, or a plane as it is.
struct Part {
  int plane;
  int up;          // rows above the current one
  int start;       // element of the plane's row where the stretch of column 0's pixel begins
  int count;       // its length without the centre; 0 for a plane as it is
  int centre;      // channels of the centre tap in a group, times those groups below; see `length`
  int own;         // whether an output sees its own group at the centre
  int beside;      // 1: pixel by pixel, 0: a whole row at once
  int64_t offset;  // of the packed weights [count + centre · groups][width]
};

template <typename T>
struct StageAt {
  int width, made, activation, residual, vertical, condition_map;
  int first_part, last_part;
  int64_t sums;  // in a sample's sums
  const T* bias;
  const T* condition;
};

template <typename T>
struct Problem {
  const PlaneAt* planes;
  const Part* parts;
  const StageAt<T>* stages;
  int stage_count, groups, channels, height, columns, noise_channels, mixture, levels, begin, end;
  T temperature;
  int64_t state_size, sums_size;
  const T* weights;
  const T* noise;     // [N, C or 1 + C, H, W]
  const bool* known;  // [N, C, H, W] or null
  int64_t* image;     // [N, C, H, W]
  T* state;           // [N, state_size]
  T* sums;            // [N, sums_size]
};

template <typename Record>
__global__ void write_record(Record* to, const Record value) {
  if (threadIdx.x == 0) *to = value;
}

// One kernel row of a weight [out, in, kh, kw], as [column, in][out].
template <typename T>
__global__ void __launch_bounds__(kThreads)
    pack_row(const T* __restrict__ weight, const int width, const int channels, const int taps, const int first_tap,
             const int count, T* __restrict__ to) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= static_cast<int64_t>(count) * width) return;
  const int64_t e = at / width, o = at % width;
  to[at] = weight[(o * channels + e % channels) * taps + first_tap + e / channels];
}

// Length of a part's stretch for group g: at the centre only groups up to g, or below it, are drawn.
__device__ __forceinline__ int length(const Part& part, int g) {
  return part.count + part.centre * (g + part.own);
}

template <typename T>
__device__ __forceinline__ T* line(T* state, const PlaneAt& p, int i) {
  return state + p.offset + static_cast<int64_t>((i % p.rows + p.rows) % p.rows) * p.row_length;
}

template <typename T>
__device__ __forceinline__ T* at(T* state, const PlaneAt& p, int i, int j) {
  return line(state, p, i) + static_cast<int64_t>(j + p.border) * p.channels;
}

template <typename T>
__device__ __forceinline__ T activate(int activation, T a, T b) {
  if (activation == static_cast<int>(Activation::kGate)) {
    T tanh, unused;
    math::tanh_sech2(a, tanh, unused);
    return tanh * (T(1) / (T(1) + math::exp(-b)));
  }
  if (activation == static_cast<int>(Activation::kRelu)) return a < T(0) ? T(0) : a;
  return a;
}

// Row i of stage k: everything that depends on rows above only. A vertical stage is finished here.
template <typename T>
__device__ __forceinline__ void whole_row(const Problem<T>& q, int k, int i, int64_t n, T* state, T* sums) {
  constexpr int kColumns = kColumnsOf<T>;
  const StageAt<T> s = q.stages[k];
  const bool gate = s.activation == static_cast<int>(Activation::kGate);
  const int tiles = (q.columns + kColumns - 1) / kColumns;
  for (int task = threadIdx.x; task < tiles * s.made; task += kBlock) {
    const int l = task % s.made, first = task / s.made * kColumns;
    for (int half = 0; half <= (gate ? 1 : 0); ++half) {
      const int o = l + half * s.made;
      T sum[kColumns];
      T begin = s.bias ? s.bias[o] : T(0);
      if (s.condition && !s.condition_map) begin += s.condition[n * s.width + o];
#pragma unroll
      for (int p = 0; p < kColumns; ++p) {
        const int j = first + p < q.columns ? first + p : q.columns - 1;
        sum[p] = begin;
        if (s.condition && s.condition_map) sum[p] += s.condition[((n * s.width + o) * q.height + i) * q.columns + j];
      }
      for (int r = s.first_part; r < s.last_part; ++r) {
        const Part part = q.parts[r];
        if (part.beside) continue;
        const PlaneAt plane = q.planes[part.plane];
        const T* from[kColumns];
#pragma unroll
        for (int p = 0; p < kColumns; ++p) {
          const int j = first + p < q.columns ? first + p : q.columns - 1;
          from[p] = part.count ? line(state, plane, i - part.up) + static_cast<int64_t>(j) * plane.channels + part.start
                               : at(state, plane, i, j) + o;
        }
        if (part.count == 0) {
#pragma unroll
          for (int p = 0; p < kColumns; ++p) sum[p] += from[p][0];
          continue;
        }
        const T* w = q.weights + part.offset + o;
#pragma unroll 8
        for (int e = 0; e < part.count; ++e) {
          const T weight = w[static_cast<int64_t>(e) * s.width];
#pragma unroll
          for (int p = 0; p < kColumns; ++p) sum[p] += from[p][e] * weight;
        }
      }
#pragma unroll
      for (int p = 0; p < kColumns; ++p) {
        if (first + p < q.columns) sums[s.sums + static_cast<int64_t>(first + p) * s.width + o] = sum[p];
      }
    }
    if (s.vertical) {
#pragma unroll
      for (int p = 0; p < kColumns; ++p) {
        const int j = first + p;
        if (j >= q.columns) continue;
        const T* own = sums + s.sums + static_cast<int64_t>(j) * s.width + l;
        T value = activate(s.activation, own[0], gate ? own[s.made] : T(0));
        if (s.residual >= 0) value += at(state, q.planes[s.residual], i, j)[l];
        at(state, q.planes[k + 1], i, j)[l] = value;
      }
    }
  }
}

// Group g of stage k at pixel (i, j). `partial` holds two numbers a thread; every thread of the block comes here.
template <typename T>
__device__ __forceinline__ void one_pixel(const Problem<T>& q, int k, int i, int j, int g, T* state, const T* sums,
                                          T* partial) {
  constexpr int kFlight = kFlightOf<T>;
  const StageAt<T> s = q.stages[k];
  const bool gate = s.activation == static_cast<int>(Activation::kGate);
  const int made = s.made / q.groups;
  int lanes = 1;
  while (lanes < made && lanes < kBlock) lanes *= 2;
  const int slices = kBlock / lanes, lane = threadIdx.x % lanes, slice = threadIdx.x / lanes;
  for (int first = 0; first < made; first += lanes) {
    const bool live = first + lane < made;
    const int l = g * made + (live ? first + lane : 0);
    T a = 0, b = 0;
    for (int r = s.first_part; r < s.last_part; ++r) {
      const Part part = q.parts[r];
      if (!part.beside) continue;
      const PlaneAt plane = q.planes[part.plane];
      if (part.count + part.centre == 0) {
        if (slice == 0) {
          const T* from = at(state, plane, i, j) + l;
          a += from[0];
          if (gate) b += from[s.made];
        }
        continue;
      }
      const T* from = line(state, plane, i) + static_cast<int64_t>(j) * plane.channels + part.start;
      const T* w = q.weights + part.offset + l;
      const int count = length(part, g);
      for (int begin = slice; begin < count; begin += slices * kFlight) {
        T x[kFlight], first_half[kFlight], other_half[kFlight];
#pragma unroll
        for (int u = 0; u < kFlight; ++u) {
          const int e = begin + u * slices;
          const T* row = w + static_cast<int64_t>(e) * s.width;
          x[u] = e < count ? from[e] : T(0);
          first_half[u] = e < count ? row[0] : T(0);
          other_half[u] = gate && e < count ? row[s.made] : T(0);
        }
#pragma unroll
        for (int u = 0; u < kFlight; ++u) {
          a += x[u] * first_half[u];
          b += x[u] * other_half[u];
        }
      }
    }
    partial[threadIdx.x] = a;
    partial[kBlock + threadIdx.x] = b;
    __syncthreads();
    if (slice == 0 && live) {
      const T* before = sums + s.sums + static_cast<int64_t>(j) * s.width + l;
      a = before[0];
      b = gate ? before[s.made] : T(0);
      for (int m = 0; m < slices; ++m) {
        a += partial[m * lanes + lane];
        b += partial[kBlock + m * lanes + lane];
      }
      T value = activate(s.activation, a, b);
      if (s.residual >= 0) value += at(state, q.planes[s.residual], i, j)[l];
      at(state, q.planes[k + 1], i, j)[l] = value;
    }
    __syncthreads();
  }
}

// What the threads of a draw tell one another of their pieces of the categories, and at the end what holds for all of
// them.
constexpr int kPieces = 32, kNone = -1, kUnordered = -2;

template <typename T>
struct Pieces {
  T most[kPieces + 1];
  int first[kPieces + 1];
  double sum[kPieces];
};

// The draw of group g (of all channels from a mixture) at pixel (i, j), into the image and into plane 0.
template <typename T>
__device__ __forceinline__ void draw_pixel(const Problem<T>& q, int i, int j, int g, int64_t n, T* state, T* scratch,
                                           Pieces<T>& pieces) {
  const int64_t size = static_cast<int64_t>(q.height) * q.columns, place = static_cast<int64_t>(i) * q.columns + j;
  const T* parameters = at(state, q.planes[q.stage_count], i, j) + (q.mixture ? 0 : g * q.levels);
  const T* noise = q.noise + n * q.noise_channels * size + place;
  T* plane0 = at(state, q.planes[0], i, j);
  int64_t* image = q.image + n * q.channels * size + place;
  const bool* known = q.known ? q.known + n * q.channels * size + place : nullptr;
  if (q.mixture) {
    if (threadIdx.x == 0) {
      int drawn[3] = {0, 0, 0}, fixed[3] = {-1, -1, -1};
#pragma unroll
      for (int c = 0; c < 3; ++c) {
        if (c < q.channels && known && known[c * size]) fixed[c] = static_cast<int>(image[c * size]);
      }
      const int mixtures = q.planes[q.stage_count].channels / (q.channels == 1 ? 3 : 10);
      draw::logistic_mixture(parameters, 1, mixtures, q.channels, q.levels, q.temperature, noise, size, drawn, fixed);
#pragma unroll
      for (int c = 0; c < 3; ++c) {
        if (c < q.channels) {
          image[c * size] = drawn[c];
          plane0[c] = T(2) * T(drawn[c]) / T(q.levels - 1) - T(1);
        }
      }
    }
    __syncthreads();
    return;
  }
  // in pieces of neighbouring categories, one a thread: 256 in a row would take longer than the stages
  const int each = (q.levels + kPieces - 1) / kPieces, piece = threadIdx.x;
  const int from = piece * each, to = from + each < q.levels ? from + each : q.levels;
  if (piece < kPieces) {
    int first = kNone;
    T most = T(0);
    bool ordered = true;
    for (int c = from; c < to; ++c) {
      const T logit = parameters[c];
      ordered &= logit == logit;
      if (first == kNone || logit > most) {
        most = logit;
        first = c;
      }
    }
    pieces.most[piece] = most;
    pieces.first[piece] = ordered ? first : kUnordered;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int first = kNone;
    T most = T(0);
    bool ordered = true;
#pragma unroll 4
    for (int p = 0; p < kPieces; ++p) {
      if (pieces.first[p] == kNone) continue;
      ordered &= pieces.first[p] != kUnordered;
      if (first == kNone || pieces.most[p] > most) {
        most = pieces.most[p];
        first = pieces.first[p];
      }
    }
    pieces.most[kPieces] = most;
    pieces.first[kPieces] = ordered ? first : 0;  // NaN among the logits: 0
  }
  __syncthreads();
  if (q.temperature != T(0)) {
    for (int c = threadIdx.x; c < q.levels; c += kBlock)
      scratch[c] = math::exp((parameters[c] - pieces.most[kPieces]) / q.temperature);
    __syncthreads();
    if (piece < kPieces) {
      double sum = 0;
      for (int c = from; c < to; ++c) sum += double(scratch[c]);
      pieces.sum[piece] = sum;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    int drawn = pieces.first[kPieces];
    if (q.temperature != T(0)) {  // as draw::categorical, past whole pieces first
      double total = 0, below = 0;
#pragma unroll 4
      for (int p = 0; p < kPieces; ++p) total += pieces.sum[p];
      const double level = double(noise[g * size]) * total;
      int p = 0;
      while (p < kPieces - 1 && below + pieces.sum[p] <= level) below += pieces.sum[p++];
      for (drawn = p * each; drawn < q.levels - 1; ++drawn) {
        below += double(scratch[drawn]);
        if (!(below <= level)) break;
      }
      drawn = drawn < q.levels ? drawn : q.levels - 1;
    }
    if (known && known[g * size]) drawn = static_cast<int>(image[g * size]);
    image[g * size] = drawn;
    plane0[g] = T(2) * T(drawn) / T(q.levels - 1) - T(1);
  }
  __syncthreads();
}

template <typename T>
__global__ void __launch_bounds__(kBlock, 1) sample_rows(const Problem<T> q) {
  __shared__ T partial[2 * kBlock];
  __shared__ Pieces<T> pieces;
  const int64_t n = blockIdx.x;
  T* state = q.state + n * q.state_size;
  T* sums = q.sums + n * q.sums_size;
  T* scratch = sums + q.sums_size - q.levels;
  for (int i = q.begin; i < q.end; ++i) {
    for (int k = 0; k < q.stage_count; ++k) {
      whole_row(q, k, i, n, state, sums);
      __syncthreads();
    }
    for (int j = 0; j < q.columns; ++j) {
      for (int g = 0; g < q.groups; ++g) {
        for (int k = 0; k < q.stage_count; ++k) {
          if (!q.stages[k].vertical) one_pixel(q, k, i, j, g, state, sums, partial);
        }
        draw_pixel(q, i, j, g, n, state, scratch, pieces);
      }
    }
  }
}

}  // namespace sampling
}  // namespace genkernels
