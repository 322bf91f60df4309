// The kernel of `invertible_residual`: x from y = x + g(x), and w from w = ∇ − Jᵀ w, by Anderson's iteration with plain
// steps as a safeguard (genkernels/reference/_fixed_point.py). Products and layout: residual_block/network.cuh.
//
// One launch does it all, and no host is asked. A block goes with its 8 (64) samples of matrices, or with one image of
// convolutions, through all iterations until every one of them is done; from sm_90 on a cluster of up to 8 blocks
// shares the products of an image, of which the first does the rest. Samples of a block decide by themselves: what one
// that is done still computes goes nowhere.
//
// An iteration, beside the products: one read of r for its size and norm; one of x, r, the last point and up to 5
// differences of r, which leaves the new differences and the 20 sums of the least squares in fp64; γ by one thread a
// sample; and one of all differences for the next point: 29 D numbers of a sample in all at depth 5, out of the second
// cache, beside the F multiply-adds of g. A sample's history is a mask of those that count, so that nothing is cleared
// where it begins anew.
#pragma once

#include "residual_block/gradients.cuh"

namespace genkernels {
namespace residual {

constexpr int kHistory = 5;  // steps that are looked back on, at most

template <typename A>
struct Solve {
  const A* y;           // [G, channels] as all of these
  A *x, *r;             // the point and y − x − g(x) there
  A *last_x, *last_r;   // of the last point that was not taken back
  A *dx, *dr;           // [depth, G, channels]: differences of points, oldest replaced by newest
  A *best, *negative;   // the point of the smallest residual; −best, or null
  int* stops;           // [G]: for the other blocks of a cluster
  A* residual;          // [samples], or null where none of the three is wanted
  int64_t* iterations;  // [samples]
  bool* converged;      // [samples]
  A rtol, atol;
  bool relative;  // atol counts times the largest of y where that is below 1
  int max_iterations, depth;
  int64_t samples;
};

// r = y − x − the product and a map's bias where there is one.
template <typename A>
struct Residual {
  const Network<A>& net;
  const Solve<A>& s;
  int biased;  // as in Store
  __device__ __forceinline__ void operator()(int image, int pixel, int row, const A (&found)[4], int rows) {
    const A* bias = biased >= 0 ? bias_at(net, biased, image, pixel) : nullptr;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (r >= rows) continue;
      const int64_t at = cell(net, image, net.map[0].inputs, row + r, pixel);
      s.r[at] = s.y[at] - s.x[at] - (found[r] + (bias != nullptr ? bias[row + r] : A(0)));
    }
  }
};

// Waits for the blocks of a cluster, or where it is one for its threads; what was written before is seen after.
__device__ __forceinline__ void wait_for(int ranks) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (ranks > 1) {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    return;
  }
#endif
  __syncthreads();
}

// The largest over the threads of a lane, NaN where any is; as lane_sum.
__device__ __forceinline__ double larger(double a, double b) {
  return b > a || b != b ? b : a;
}
__device__ __forceinline__ double lane_max(double value, int lanes, double* shared) {
  const int thread = threadIdx.x;
  __syncthreads();
  shared[thread] = value;
  for (int half = kThreads / 2; half >= lanes; half /= 2) {
    __syncthreads();
    if (thread < half) shared[thread] = larger(shared[thread], shared[thread + half]);
  }
  __syncthreads();
  return shared[thread % lanes];
}

// Sums of five numbers over the threads of each lane, for threads 0 to lanes − 1; shared: 5 · kThreads.
__device__ __forceinline__ void lane_sums(double (&value)[5], int lanes, double* shared) {
  const int thread = threadIdx.x, within = thread % 32, width = lanes < 32 ? lanes : 32;
  for (int offset = 16; offset >= lanes; offset /= 2) {
#pragma unroll
    for (int q = 0; q < 5; ++q) value[q] += __shfl_xor_sync(0xffffffffu, value[q], offset);
  }
  __syncthreads();
  if (within < width) {
#pragma unroll
    for (int q = 0; q < 5; ++q) shared[q * kThreads + thread / 32 * width + within] = value[q];
  }
  __syncthreads();
  if (thread >= lanes) return;
  const int count = lanes < 32 ? kThreads / 32 : kThreads / lanes;
#pragma unroll
  for (int q = 0; q < 5; ++q) {
    value[q] = 0;
    for (int i = 0; i < count; ++i) value[q] += shared[q * kThreads + thread + i * lanes];
  }
}

// γ of a sample from its sums: gram[i (i + 1) / 2 + j] = ⟨Δr_i, Δr_j⟩, right[i] = ⟨Δr_i, r⟩. Columns are scaled to norm
// 1, and 10⁻¹⁰ is added to the diagonal.
template <typename A>
__device__ __forceinline__ void least_squares(const double (&gram)[15], const double (&right)[5], A* gamma) {
  double scale[5], m[5][5], g[5];
#pragma unroll
  for (int i = 0; i < 5; ++i) {
    const double norm = ::sqrt(gram[i * (i + 1) / 2 + i]);
    scale[i] = norm > 0 && norm <= 1.7e308 ? norm : 1.0;
  }
#pragma unroll
  for (int i = 0; i < 5; ++i) {
    g[i] = right[i] / scale[i];
#pragma unroll
    for (int j = 0; j <= i; ++j) m[i][j] = gram[i * (i + 1) / 2 + j] / scale[i] / scale[j] + (i == j ? 1e-10 : 0.0);
  }
  bool usable = true;
#pragma unroll
  for (int j = 0; j < 5; ++j) {  // m = L D Lᵀ below the diagonal and on it
    usable = usable && m[j][j] > 0;
#pragma unroll
    for (int i = j + 1; i < 5; ++i) {
      const double factor = m[i][j] / m[j][j];
#pragma unroll
      for (int k = j + 1; k <= i; ++k) m[i][k] -= factor * m[k][j];
      g[i] -= factor * g[j];
    }
  }
#pragma unroll
  for (int i = 4; i >= 0; --i) {
    g[i] /= m[i][i];
#pragma unroll
    for (int j = 0; j < i; ++j) g[j] -= m[i][j] * g[i];
  }
#pragma unroll
  for (int i = 0; i < 5; ++i) usable = usable && g[i] - g[i] == 0;
#pragma unroll
  for (int i = 0; i < 5; ++i) gamma[i] = usable ? static_cast<A>(g[i] / scale[i]) : A(0);
}

// What a block knows of each of its samples.
template <typename A>
struct Samples {
  A gamma[kLargeTile][kHistory];
  A limit[kLargeTile], best[kLargeTile], norm[kLargeTile];
  int taken[kLargeTile];
  unsigned char history[kLargeTile];  // differences that count, a bit each
  bool done[kLargeTile], plain[kLargeTile], accepted[kLargeTile], better[kLargeTile];
};

// transposed: w = y − Jᵀ w, J being that at map[0].in; else x = y − g(x), x being map[0].in.
template <typename A, bool kLarge, bool kTransposed>
__global__ void __launch_bounds__(kThreads, kLarge ? 1 : kBlocks<A>)
    fixed_point(const __grid_constant__ Network<A> net, const __grid_constant__ Solve<A> s, const int ranks) {
  alignas(32) __shared__ A shared[kNumbers<A, kLarge>];
  __shared__ double sums[5 * kThreads];
  __shared__ Samples<A> at;
  const int thread = threadIdx.x, lanes = net.lanes, lane = thread % lanes;
  const int image = static_cast<int>(blockIdx.x) / ranks, rank = static_cast<int>(blockIdx.x) % ranks;
  const int numbers = net.map[0].inputs * net.pixels(), last = net.maps - 1;
  const int64_t base = static_cast<int64_t>(image) * numbers, all = static_cast<int64_t>(net.images) * numbers;
  const int64_t sample = static_cast<int64_t>(image) * lanes + lane;
  const Columns columns{image, 1, 1, 0, 0, net.height, net.width};
  const auto go = [&](const Product<A>& p, auto& epilogue) {
    run<A, kLarge>(p, columns, rank, ranks, shared, epilogue);
    wait_for(ranks);
  };

  double most = 0;
  for (int e = thread; e < numbers; e += kThreads) most = larger(most, ::fabs(static_cast<double>(s.y[base + e])));
  most = lane_max(most, lanes, sums);
  if (thread < lanes) {
    const A size = static_cast<A>(most);
    at.limit[lane] = (s.relative && size < A(1) ? s.atol * size : s.atol) + s.rtol * size;
    at.best[lane] = static_cast<A>(INFINITY);
    at.norm[lane] = 0;
    at.taken[lane] = 0;
    at.history[lane] = 0;
    at.done[lane] = sample >= s.samples;
    at.plain[lane] = true;
  }
  if (kTransposed) {
    for (int i = 0; i < last; ++i) {
      Activate<A> to{net, i};
      go(Product<A>::push(net, i, net.map[i].in), to);
    }
  }

  for (int step = 1; step <= s.max_iterations; ++step) {
    if constexpr (kTransposed) {
      for (int i = last; i > 0; --i) {
        Pull<A> to{net, i};
        go(Product<A>::pull(net, i, i == last ? s.x : net.map[i].out), to);
      }
      Residual<A> to{net, s, -1};
      go(Product<A>::pull(net, 0, net.map[0].out), to);
    } else {
      for (int i = 0; i < last; ++i) {
        Activate<A> to{net, i};
        go(Product<A>::push(net, i, net.map[i].in), to);
      }
      Residual<A> to{net, s, last};
      go(Product<A>::push(net, last, net.map[last].in), to);
    }
    bool stop = true;
    if (rank == 0) {
      double size = 0, square = 0;
      for (int e = thread; e < numbers; e += kThreads) {
        const double r = static_cast<double>(s.r[base + e]);
        size = larger(size, ::fabs(r));
        square += r * r;
      }
      size = lane_max(size, lanes, sums);
      square = lane_sum(square, lanes, sums);
      const int slot = s.depth > 0 ? (step - 1) % s.depth : 0;
      if (thread < lanes) {
        const A norm = static_cast<A>(::sqrt(square)), most_r = static_cast<A>(size);
        const bool plain = at.plain[lane], open = !at.done[lane];
        const bool accepted = step == 1 || s.depth == 0 || plain || norm <= at.norm[lane];
        at.taken[lane] += open ? 1 : 0;
        at.better[lane] = step == 1 || (open && most_r < at.best[lane]);  // the first is kept, whatever it is
        if (open && most_r < at.best[lane]) at.best[lane] = most_r;
        at.done[lane] = !open || most_r <= at.limit[lane] || (!(most_r - most_r == A(0)) && plain);
        at.accepted[lane] = accepted;
        at.plain[lane] = step == 1 || s.depth == 0 || !accepted;
        if (accepted) at.norm[lane] = norm;
        at.history[lane] = accepted && step > 1 ? at.history[lane] | (1 << slot) : 0;
      }
      __syncthreads();
      for (int l = 0; l < lanes; ++l) stop = stop && at.done[l];
      stop = stop || step == s.max_iterations;
      const bool accepted = at.accepted[lane], better = at.better[lane], bold = step > 1 && s.depth > 0;
      const int history = at.history[lane];
      double part[4][5];  // Gram's lower triangle, then the right side
#pragma unroll
      for (int q = 0; q < 20; ++q) part[q / 5][q % 5] = 0;
      for (int e = thread; e < numbers; e += kThreads) {
        const int64_t here = base + e;
        const A x = s.x[here], r = s.r[here];
        if (better) {
          s.best[here] = x;
          if (s.negative != nullptr) s.negative[here] = -x;
        }
        if (stop) continue;
        if (!bold) {
          s.last_x[here] = x;
          s.last_r[here] = r;
          s.x[here] = x + r;
          continue;
        }
        A last_r = s.last_r[here];
        if (accepted) {
          s.dx[slot * all + here] = x - s.last_x[here];
          s.dr[slot * all + here] = r - last_r;
          s.last_x[here] = x;
          s.last_r[here] = last_r = r;
        }
        double d[5];
#pragma unroll
        for (int j = 0; j < 5; ++j) d[j] = (history >> j & 1) != 0 ? static_cast<double>(s.dr[j * all + here]) : 0.0;
#pragma unroll
        for (int i = 0; i < 5; ++i) {
#pragma unroll
          for (int j = 0; j <= i; ++j) part[(i * (i + 1) / 2 + j) / 5][(i * (i + 1) / 2 + j) % 5] += d[i] * d[j];
          part[3][i] += d[i] * static_cast<double>(last_r);
        }
      }
      if (bold && !stop) {
#pragma unroll
        for (int q = 0; q < 4; ++q) lane_sums(part[q], lanes, sums);
        if (thread < lanes) {
          double gram[15];
#pragma unroll
          for (int q = 0; q < 15; ++q) gram[q] = part[q / 5][q % 5];
          least_squares(gram, part[3], at.gamma[lane]);
        }
        __syncthreads();
        for (int e = thread; e < numbers; e += kThreads) {
          const int64_t here = base + e;
          A far = 0;
#pragma unroll
          for (int j = 0; j < 5; ++j) {
            if ((history >> j & 1) != 0) far += (s.dx[j * all + here] + s.dr[j * all + here]) * at.gamma[lane][j];
          }
          s.x[here] = s.last_x[here] + s.last_r[here] - far;
        }
      }
      if (ranks > 1 && thread == 0) s.stops[image] = stop ? 1 : 0;
    }
    wait_for(ranks);
    if (rank != 0) stop = *static_cast<volatile int*>(s.stops + image) != 0;
    if (stop) break;
  }
  if (rank == 0 && thread < lanes && sample < s.samples && s.residual != nullptr) {
    const A best = at.best[lane];
    s.residual[sample] = best < static_cast<A>(INFINITY) ? best : static_cast<A>(NAN);
    s.iterations[sample] = at.taken[lane];
    s.converged[sample] = best <= at.limit[lane];
  }
}

}  // namespace residual
}  // namespace genkernels
