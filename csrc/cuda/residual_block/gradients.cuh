// The gradients of a residual block's maps, biases and parameters: sums over all samples and pixels, in an order that
// depends on shapes alone.
#pragma once

#include "copies.cuh"
#include "passes.cuh"

namespace genkernels {
namespace residual {

// ---------------------------------------------------------------------------------------------------------------------
// Weights: Σ left ⊗ right over the columns, cut into `parts` of `chunk` columns, each of which leaves its own sum

template <typename A>
struct Outer {
  const A *left, *right;  // [images, outputs, height, width], [images, inputs, height, width]
  A* to;                  // [parts, outputs, inputs, taps], in the order of the tensor
  const A* each;          // [images, lanes] factors of columns, or null
  int outputs, inputs, kernel, output_half, input_half;
  int parts, first;  // blocks: parts times tiles, from `first` on
  int chunk;
  Columns columns;

  GK_HOST_DEVICE inline int taps() const { return kernel * kernel; }
  GK_HOST_DEVICE inline int down() const { return (outputs + 63) / 64; }
  GK_HOST_DEVICE inline int tiles() const { return down() * ((inputs * taps() + 63) / 64); }
};

constexpr int kOuters = 24, kClassOuters = 9;
template <typename A>
struct Outers {
  Outer<A> all[kOuters];
  int count, height, width, lanes;
  A factor;  // of those with `each`
};

template <typename A>
__global__ void __launch_bounds__(kThreads) outer_products(const __grid_constant__ Outers<A> work) {
  constexpr int kDepth = sizeof(A) == 4 ? 16 : 8, kPitch = 68, kAcross = kThreads / kDepth, kLoads = 64 / kAcross;
  alignas(32) __shared__ A left[2][kDepth * kPitch];
  alignas(32) __shared__ A right[2][kDepth * kPitch];
  int which = 0;
  while (which + 1 < work.count && static_cast<int>(blockIdx.x) >= work.all[which + 1].first) ++which;
  const Outer<A>& o = work.all[which];
  const int index = static_cast<int>(blockIdx.x) - o.first, part = index / o.tiles(), tile = index % o.tiles();
  const int row0 = tile % o.down() * 64, column0 = tile / o.down() * 64, all = o.inputs * o.taps();
  const int pixels = work.height * work.width, thread = threadIdx.x;

  // this thread's place in depth, and the rows and columns that it loads there
  const int k = thread % kDepth, across = thread / kDepth;
  const int begin = part * o.chunk + k;
  const int64_t last = static_cast<int64_t>(part + 1) * o.chunk;
  const int end = last < o.columns.count() ? static_cast<int>(last) : o.columns.count();
  Place at(o.columns, begin < end ? begin : 0);
  int source[kLoads], shift_y[kLoads], shift_x[kLoads];
#pragma unroll
  for (int l = 0; l < kLoads; ++l) {
    const int column = column0 + across + l * kAcross, input = column / o.taps(), tap = column - input * o.taps();
    shift_y[l] = o.kernel == 3 ? tap / 3 - 1 : 0;
    shift_x[l] = o.kernel == 3 ? tap % 3 - 1 : 0;
    source[l] = column < all ? input * pixels + shift_y[l] * work.width + shift_x[l] : 0;
  }
  A held_left[kLoads], held_right[kLoads];
  int position = begin;
  const auto fetch = [&] {
    const bool live = position < end;
    const int64_t pixel = at.y * work.width + at.x;
    const A* l_from = o.left + static_cast<int64_t>(at.image) * o.outputs * pixels + pixel;
    const A* r_from = o.right + static_cast<int64_t>(at.image) * o.inputs * pixels + pixel;
    A factor = 1;
    if (o.each != nullptr && live) factor = work.factor * o.each[sample_at(work.lanes, at.image, pixel)];
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      const int row = row0 + across + l * kAcross;
      held_left[l] = live && row < o.outputs ? factor * l_from[row * pixels] : A(0);
      const int y = at.y + shift_y[l], x = at.x + shift_x[l];
      const bool inside =
          live && column0 + across + l * kAcross < all && y >= 0 && y < work.height && x >= 0 && x < work.width;
      held_right[l] = inside ? r_from[source[l]] : A(0);
    }
    position += kDepth;
    at.x += kDepth;
    while (at.x >= o.columns.x + o.columns.width) {
      at.x -= o.columns.width;
      if (++at.y == o.columns.y + o.columns.height) {
        at.y = o.columns.y;
        at.image += o.columns.stride;
      }
    }
  };

  A sum[4][4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[r][j] = A(0);
  }
  const int tr = thread / 16, tc = thread % 16;
  fetch();
  for (int base = part * o.chunk, buffer = 0; base < end; base += kDepth, buffer ^= 1) {
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      left[buffer][k * kPitch + across + l * kAcross] = held_left[l];
      right[buffer][k * kPitch + across + l * kAcross] = held_right[l];
    }
    __syncthreads();
    if (base + kDepth < end) fetch();
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const Vector<A, 4> a = *reinterpret_cast<const Vector<A, 4>*>(&left[buffer][d * kPitch + 4 * tr]);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const A b = right[buffer][d * kPitch + tc + 16 * j];
#pragma unroll
        for (int r = 0; r < 4; ++r) sum[r][j] += a.lane[r] * b;
      }
    }
  }
  A* to = o.to + static_cast<int64_t>(part) * o.outputs * all;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int column = column0 + tc + 16 * j;
    if (column >= all) continue;
    const int input = column / o.taps(), tap = column - input * o.taps();
    const int64_t place = static_cast<int64_t>(in_tensor(input, o.input_half)) * o.taps() + tap;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = row0 + 4 * tr + r;
      if (row < o.outputs) to[static_cast<int64_t>(in_tensor(row, o.output_half)) * all + place] = sum[r][j];
    }
  }
}

// to = Σ parts [parts, count].
template <typename S>
struct PartSum {
  const arithmetic_t<S>* from;
  S* to;
  int64_t count;
  int parts, first;
};
template <typename S>
struct PartSums {
  PartSum<S> all[kOuters];
  int count;
};

template <typename S>
__global__ void __launch_bounds__(kThreads) sum_parts(const __grid_constant__ PartSums<S> work) {
  using A = arithmetic_t<S>;
  int which = 0;
  while (which + 1 < work.count && static_cast<int>(blockIdx.x) >= work.all[which + 1].first) ++which;
  const PartSum<S>& p = work.all[which];
  const int64_t e = static_cast<int64_t>(static_cast<int>(blockIdx.x) - p.first) * kThreads + threadIdx.x;
  if (e >= p.count) return;
  A sum = 0;
  for (int i = 0; i < p.parts; ++i) sum += p.from[i * p.count + e];
  p.to[e] = static_cast<S>(sum);
}

// ---------------------------------------------------------------------------------------------------------------------
// Biases and parameters: to[row] = Σ from[image, row, ...], a block a row

template <typename S>
struct RowSum {
  const arithmetic_t<S>* from;  // [images, rows, inner]
  S* to;
  int64_t inner;
  int images, rows, first;
};
template <typename S>
struct RowSums {
  RowSum<S> all[kMaps + 1];
  int count;
};

template <typename S>
__global__ void __launch_bounds__(kThreads) sum_images(const __grid_constant__ RowSums<S> work) {
  __shared__ double shared[kThreads];
  int which = 0;
  while (which + 1 < work.count && static_cast<int>(blockIdx.x) >= work.all[which + 1].first) ++which;
  const RowSum<S>& r = work.all[which];
  const int row = static_cast<int>(blockIdx.x) - r.first;
  double sum = 0;
  int64_t image = threadIdx.x / r.inner, at = threadIdx.x - image * r.inner;
  while (image < r.images) {
    sum += static_cast<double>(r.from[(image * r.rows + row) * r.inner + at]);
    at += kThreads;
    if (at >= r.inner) {
      const int64_t whole = at / r.inner;
      image += whole;
      at -= whole * r.inner;
    }
  }
  sum = lane_sum(sum, 1, shared);
  if (threadIdx.x == 0) r.to[row] = static_cast<S>(sum);
}

// ---------------------------------------------------------------------------------------------------------------------
// The passes, of which a block of threads does those of its own image one after the other (alone) or a launch one

template <typename A>
struct Gradient {
  int probes;  // 0 where the log-determinant has no gradient
  Trace<A> trace;
  const A* each;    // [G, lanes] gradients of log-determinants
  A first;          // the weight of the first term
  A* grad_x;        // [G, channels], or null
  A* by_parameter;  // [3, maps − 1, slots]
  int slots;

  GK_HOST_DEVICE inline bool traced() const { return trace.push != nullptr && probes > 0; }
  GK_HOST_DEVICE inline int phases(int maps) const {
    return maps - 1 + (probes > 0 ? 2 * (maps - 1) : 0) + (traced() ? 2 : 0) + maps - (grad_x == nullptr ? 1 : 0);
  }
};

// What a pass is, of which maps.
enum class Pass { kActivate, kTangent, kTrace, kCotangent, kDelta };
struct Step {
  Pass pass;
  int i;
};
template <typename A>
GK_HOST_DEVICE inline Step step_of(const Gradient<A>& g, int maps, int phase) {
  if (phase < maps - 1) return {Pass::kActivate, phase};
  phase -= maps - 1;
  if (g.probes > 0) {
    if (phase < maps - 1) return {Pass::kTangent, phase};
    phase -= maps - 1;
    if (g.traced()) {
      if (phase < 2) return {Pass::kTrace, phase};
      phase -= 2;
    }
    if (phase < maps - 1) return {Pass::kCotangent, maps - 1 - phase};
    phase -= maps - 1;
  }
  return {Pass::kDelta, maps - 1 - phase};
}

template <typename A, bool kLarge>
__global__ void __launch_bounds__(kThreads, kLarge ? 1 : kBlocks<A>)
    gradient_passes(const __grid_constant__ Network<A> net, const __grid_constant__ Gradient<A> g, const bool alone,
                    const int begin, const int end) {
  alignas(32) __shared__ A shared[kNumbers<A, kLarge>];
  __shared__ double sums[kThreads];
  const auto keep = [&](int kind, int layer, A value) {  // what the parameter of a layer gets of this block
    const double sum = lane_sum(static_cast<double>(value), 1, sums);
    if (threadIdx.x == 0)
      g.by_parameter[(static_cast<int64_t>(kind) * (net.maps - 1) + layer) * g.slots + blockIdx.x] =
          static_cast<A>(sum);
  };
  for (int phase = begin; phase < end; ++phase) {
    const Step step = step_of(g, net.maps, phase);
    const int i = step.i;
    const bool probes = step.pass == Pass::kTangent || step.pass == Pass::kCotangent;
    const Share<A> share(net, alone, probes ? net.images : 0, probes ? g.probes : 1);
    const auto go = [&](const Product<A>& p, auto& epilogue) {
      run<A, kLarge>(p, share.columns, share.rank, share.ranks, shared, epilogue);
    };
    if (step.pass == Pass::kActivate) {
      Activate<A> to{net, i};
      go(Product<A>::push(net, i, net.map[i].in), to);
    } else if (step.pass == Pass::kTangent) {
      Tangent<A> to{net, i};
      go(Product<A>::push(net, i, net.map[i].in), to);
    } else if (step.pass == Pass::kTrace) {
      const int layer = 1 - i;
      Traced<A> to{net, layer, net.map[layer + 1].inputs, g.probes * net.images, g.each, g.first};
      trace_product<A, kLarge>(net, g.trace, layer == 0, share, shared, to);
      keep(2, layer, to.by_parameter);
    } else if (step.pass == Pass::kCotangent) {
      Cotangent<A> to{net, i};
      go(Product<A>::pull(net, i, net.map[i].out), to);
      keep(1, i - 1, to.by_parameter);
    } else if (i > 0) {
      Delta<A> to{net, i, g.probes + (g.traced() ? 1 : 0)};
      go(Product<A>::pull(net, i, net.map[i].out), to);
      keep(0, i - 1, to.by_parameter);
    } else {
      Store<A> to{net, g.grad_x, net.map[0].inputs, -1};
      go(Product<A>::pull(net, 0, net.map[0].out), to);
    }
  }
}

}  // namespace residual
}  // namespace genkernels
