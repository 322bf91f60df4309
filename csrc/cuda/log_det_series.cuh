// Kernels of `log_det_series`: the passes of its forward (the definition is genkernels/reference/log_det_series.py) and
// what ends them. Products and layout: residual_block/network.cuh.
//
//   log|det(I + J)| ≈ Σ_k c_k (−1)^{k+1} / k · vᵀ w_k,   w_0 = v,   w_k = Jᵀ w_{k−1}
//
// Two sums of the w go along, the one that the gradient takes and Σ_k ±c_k / (k P) w_k, so that one dot product with v
// in the end gives the log-determinant whatever the number of terms.
//
// Counts. F being the multiply-adds of g for all samples, of map i F_i: forward (1 + n P) F for n terms, and for an
// exact trace h₁ h₂ a pixel; backward, at most, F again, P (2F − F_L − F_1) for tangents and cotangents, F for the
// gradient and (1 + P) F for the weights. Bytes: a term writes each number of a vector between the maps once and reads
// it once for 64 rows of the next map's product (16 where it has at most 32), and reads a slope; w, the two sums and v
// are D numbers each. Weights come from the second-level cache. From some 30 channels on the products are bound by
// arithmetic: of 4 by 4 numbers a thread has five loads from shared memory for 16 multiply-adds, about 0.8 of what the
// units could do.
//
// Saved for backward: the arguments and the sums; slopes are computed anew, which costs less than to keep them.
#pragma once

#include "residual_block/gradients.cuh"

namespace genkernels {
namespace residual {

constexpr int kTerms = 32;  // of one launch: their weights travel as arguments

template <typename A>
struct Series {
  A* value;            // [G, channels]
  const A* v;          // [P · G, channels]
  A *sums, *weighted;  // like v; null: not wanted
  A* parts;            // of the trace
  Trace<A> trace;
  int probes;
  int head;    // passes before the first term: maps, and the trace; 0 where an earlier launch did them
  int before;  // terms that earlier launches did
  A sum_of[kTerms + 1], dot_of[kTerms + 1];  // of w_before, w_before + 1, ...
};

// w_k, and its share of the two sums.
template <typename A>
struct Term {
  const Network<A>& net;
  const Series<A>& s;
  int turn;  // k − before, from 1
  __device__ __forceinline__ void operator()(int image, int pixel, int row, const A (&found)[4], int rows) {
    const int channels = net.map[0].inputs;
    A* w = net.map[net.maps - 1].out;
    const bool first = s.before + turn == 1;
    const A by_sum = s.sum_of[turn], by_dot = s.dot_of[turn];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (r >= rows) continue;
      const int64_t at = cell(net, image, channels, row + r, pixel);
      w[at] = found[r];
      if (s.sums == nullptr) continue;
      // a term that is not there multiplies nothing
      const A sum = by_sum != A(0) ? by_sum * found[r] : A(0), dot = by_dot != A(0) ? by_dot * found[r] : A(0);
      if (first) {
        s.sums[at] = sum + (s.sum_of[0] != A(0) ? s.sum_of[0] * s.v[at] : A(0));
        s.weighted[at] = dot;
      } else {
        s.sums[at] += sum;
        s.weighted[at] += dot;
      }
    }
  }
};

// Passes begin to end: maps, the trace, then the maps of each term in reverse. alone: each block does them all for its
// own image; else a launch does one.
template <typename A, bool kLarge>
__global__ void __launch_bounds__(kThreads, kBlocks<A>)
    series_passes(const __grid_constant__ Network<A> net, const __grid_constant__ Series<A> s, const bool alone,
                  const int begin, const int end) {
  alignas(32) __shared__ A shared[kNumbers<A, kLarge>];
  for (int phase = begin; phase < end; ++phase) {
    const bool head = phase < s.head;
    const Share<A> share(net, alone, 0, head ? 1 : s.probes);
    const auto go = [&](const Product<A>& p, auto& epilogue) {
      run<A, kLarge>(p, share.columns, share.rank, share.ranks, shared, epilogue);
    };
    if (head && phase == net.maps) {
      TraceDot<A> to{net, s.parts};
      trace_product<A, kLarge>(net, s.trace, false, share, shared, to);
    } else if (head && phase == net.maps - 1) {
      const Map<A>& m = net.map[phase];
      Store<A> to{net, s.value, m.outputs, phase};
      go(Product<A>::push(net, phase, m.in), to);
    } else if (head) {
      Activate<A> to{net, phase};
      go(Product<A>::push(net, phase, net.map[phase].in), to);
    } else {
      const int turn = (phase - s.head) / net.maps, i = net.maps - 1 - (phase - s.head) % net.maps;
      const bool begins = i == net.maps - 1 && s.before + turn == 0;
      const Product<A> p = Product<A>::pull(net, i, begins ? s.v : net.map[i].out);
      if (i > 0) {
        Pull<A> to{net, i};
        go(p, to);
      } else {
        Term<A> to{net, s, turn + 1};
        go(p, to);
      }
    }
  }
}

// log_det [samples] and shrink [P, samples], a block an image. w: the last vectors.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    series_finish(const __grid_constant__ Network<A> net, const int channels, const A* __restrict__ v,
                  const A* __restrict__ w, const A* __restrict__ weighted, const int probes,
                  const A* __restrict__ parts,
                  const int traced,  // numbers of `parts` for an image
                  const A first, const int terms, const int64_t samples, A* __restrict__ log_det,
                  A* __restrict__ shrink) {
  __shared__ double shared[kThreads];
  const int lanes = net.lanes, lane = threadIdx.x % lanes, begin = threadIdx.x, image = blockIdx.x;
  const int64_t sample = static_cast<int64_t>(image) * lanes + lane;
  const int numbers = channels * net.pixels();
  const bool writes = threadIdx.x < lanes && sample < samples;
  double total = 0;
  for (int p = 0; p < probes; ++p) {
    const int64_t base = (static_cast<int64_t>(p) * net.images + image) * numbers;
    double before = 0, after = 0;
    for (int e = begin; e < numbers; e += kThreads) {  // kThreads is a multiple of lanes: always this thread's lane
      const double at_v = static_cast<double>(v[base + e]), at_w = static_cast<double>(w[base + e]);
      before += at_v * at_v;
      after += at_w * at_w;
      if (weighted != nullptr) total += static_cast<double>(weighted[base + e]) * at_v;
    }
    before = lane_sum(before, lanes, shared);
    after = lane_sum(after, lanes, shared);
    if (writes)
      shrink[p * samples + sample] =
          static_cast<A>(::pow(after / (before > 0 ? before : 1.0), 0.5 / (terms > 0 ? terms : 1)));
  }
  double trace = 0;
  if (parts != nullptr) {
    for (int e = begin; e < traced; e += kThreads)
      trace += static_cast<double>(parts[static_cast<int64_t>(image) * traced + e]);
    total += first * trace;
  }
  total = lane_sum(total, lanes, shared);
  if (writes) log_det[sample] = static_cast<A>(total);
}

}  // namespace residual
}  // namespace genkernels
