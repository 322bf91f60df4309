// The passes of a residual block: what is done with each map's product. Two-output activations stand interleaved, so a
// thread's 4 rows are whole pairs. Maths: genkernels/reference/_block.py.
#pragma once

#include "network.cuh"

namespace genkernels {
namespace residual {

// Where a number of [images, channels, pixels] stands.
template <typename A>
__device__ __forceinline__ int64_t cell(const Network<A>& net, int image, int channels, int channel, int pixel) {
  return (static_cast<int64_t>(image) * channels + channel) * net.pixels() + pixel;
}

// The bias that map i adds at a pixel: [outputs].
template <typename A>
__device__ __forceinline__ const A* bias_at(const Network<A>& net, int i, int image, int pixel) {
  const Map<A>& m = net.map[i];
  return m.bias + sample_at(net.lanes, image, pixel) * m.bias_pitch;
}

// f(r, up, down, values): for each argument z_r of an activation among 4 rows its outputs' numbers; down where there
// are two outputs.
template <typename A, typename F>
__device__ __forceinline__ void each_argument(bool mirrored, int row, const A (&found)[4], int rows, F&& f) {
  if (mirrored) {
#pragma unroll
    for (int r = 0; r < 4; r += 2) {
      if (r < rows) f((row + r) / 2, row + r, found[r], found[r + 1]);
    }
  } else {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (r < rows) f(row + r, row + r, found[r], A(0));
    }
  }
}

// slope of an activation, of both outputs, times cotangents of them: the cotangent of the argument.
template <typename A>
__device__ __forceinline__ A folded(const Network<A>& net, const A* slope, A up, A down) {
  return net.mirrored ? slope[0] * up + slope[net.pixels()] * down : slope[0] * up;
}

// z = W a + b, the activation's values for the next map, its slopes where they are wanted.
template <typename A>
struct Activate {
  const Network<A>& net;
  int i;
  __device__ __forceinline__ void operator()(int image, int pixel, int row, const A (&found)[4], int rows) {
    const Map<A>& m = net.map[i];
    A* next = net.map[i + 1].in;
    const A a = net.parameters[i];
    const A* bias = bias_at(net, i, image, pixel);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (r >= rows) continue;
      const A z = found[r] + bias[row + r];
      const Point<A> up = point(net.activation, z, a);
      if (m.z != nullptr) m.z[cell(net, image, m.outputs, row + r, pixel)] = z;
      if (net.mirrored) {
        const Point<A> down = point(net.activation, -z, a);
        const int64_t at = cell(net, image, 2 * m.outputs, 2 * (row + r), pixel);
        next[at] = up.value;
        next[at + net.pixels()] = down.value;
        if (m.slope != nullptr) {
          m.slope[at] = up.slope;
          m.slope[at + net.pixels()] = -down.slope;
        }
      } else {
        const int64_t at = cell(net, image, m.outputs, row + r, pixel);
        next[at] = up.value;
        if (m.slope != nullptr) m.slope[at] = up.slope;
      }
    }
  }
};

// to = the product, and a map's bias where there is one.
template <typename A>
struct Store {
  const Network<A>& net;
  A* to;
  int channels;
  int biased;  // the map whose bias it is, or −1
  __device__ __forceinline__ void operator()(int image, int pixel, int row, const A (&found)[4], int rows) {
    const A* bias = biased >= 0 ? bias_at(net, biased, image, pixel) : nullptr;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (r < rows)
        to[cell(net, image, channels, row + r, pixel)] = found[r] + (bias != nullptr ? bias[row + r] : A(0));
    }
  }
};

// The cotangent of map i − 1's result from that of the values behind it.
template <typename A>
struct Pull {
  const Network<A>& net;
  int i;
  __device__ __forceinline__ void operator()(int image, int pixel, int row, const A (&found)[4], int rows) {
    const Map<A>& m = net.map[i - 1];
    const int base = image % net.images, values = net.map[i].inputs;
    each_argument(net.mirrored, row, found, rows, [&](int argument, int value, A up, A down) {
      m.out[cell(net, image, m.outputs, argument, pixel)] =
          folded(net, m.slope + cell(net, base, values, value, pixel), up, down);
    });
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Of gradients. bent: [slots · G, outputs]: first tangents of an activation's arguments, in the end what the slopes
// give to the arguments' gradient, a slot for each probe and the last one for the trace; images of probes are G +
// those.

// t = W q: a tangent of arguments, and the next map's input.
template <typename A>
struct Tangent {
  const Network<A>& net;
  int i;
  __device__ __forceinline__ void operator()(int image, int pixel, int row, const A (&found)[4], int rows) {
    const Map<A>& m = net.map[i];
    A* next = net.map[i + 1].in;
    const int base = image % net.images, values = net.map[i + 1].inputs;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (r >= rows) continue;
      m.bent[cell(net, image - net.images, m.outputs, row + r, pixel)] = found[r];
      const int value = net.mirrored ? 2 * (row + r) : row + r;
      const A* slope = m.slope + cell(net, base, values, value, pixel);
      A* to = next + cell(net, image, values, value, pixel);
      to[0] = slope[0] * found[r];
      if (net.mirrored) to[net.pixels()] = slope[net.pixels()] * found[r];
    }
  }
};

// What slopes give: their derivatives by the argument and by the parameter, `up` and `down` being gradients by the
// slopes. What nothing is asked of stays 0, though a curvature there be infinite.
template <typename A>
__device__ __forceinline__ A bend(const Network<A>& net, int layer, A z, A up, A down, A& by_parameter) {
  const A a = net.parameters[layer];
  A by_z = 0;
  if (up != A(0)) {
    const Point<A> p = point(net.activation, z, a);
    by_z = p.curvature * up;
    by_parameter += p.slope_by * up;
  }
  if (net.mirrored && down != A(0)) {
    const Point<A> p = point(net.activation, -z, a);
    by_z += p.curvature * down;
    by_parameter -= p.slope_by * down;
  }
  return by_z;
}

// The cotangent of map i − 1's result for a sum of the series, and with the tangent what the slopes give.
template <typename A>
struct Cotangent {
  const Network<A>& net;
  int i;
  A by_parameter = 0;
  __device__ __forceinline__ void operator()(int image, int pixel, int row, const A (&found)[4], int rows) {
    const Map<A>& m = net.map[i - 1];
    const int base = image % net.images, values = net.map[i].inputs;
    each_argument(net.mirrored, row, found, rows, [&](int argument, int value, A up, A down) {
      m.out[cell(net, image, m.outputs, argument, pixel)] =
          folded(net, m.slope + cell(net, base, values, value, pixel), up, down);
      A& bent = m.bent[cell(net, image - net.images, m.outputs, argument, pixel)];
      const A z = m.z[cell(net, base, m.outputs, argument, pixel)], t = bent;
      bent = bend(net, i - 1, z, t * up, t * down, by_parameter);
    });
  }
};

// The same of the trace: first · each · M d is the gradient by the slopes of a layer.
template <typename A>
struct Traced {
  const Network<A>& net;
  int layer, values, slot;  // slot: its first image in bent
  const A* each;            // [G, lanes]
  A first, by_parameter = 0;
  __device__ __forceinline__ void operator()(int image, int pixel, int row, const A (&found)[4], int rows) {
    const Map<A>& m = net.map[layer];
    const A weight = first * each[sample_at(net.lanes, image, pixel)];
    each_argument(net.mirrored, row, found, rows, [&](int argument, int, A up, A down) {
      const A z = m.z[cell(net, image, m.outputs, argument, pixel)];
      m.bent[cell(net, slot + image, m.outputs, argument, pixel)] =
          bend(net, layer, z, weight * up, weight * down, by_parameter);
    });
  }
};

// The gradient by map i − 1's result, of everything.
template <typename A>
struct Delta {
  const Network<A>& net;
  int i, slots;
  A by_parameter = 0;
  __device__ __forceinline__ void operator()(int image, int pixel, int row, const A (&found)[4], int rows) {
    const Map<A>& m = net.map[i - 1];
    const int values = net.map[i].inputs;
    const A a = net.parameters[i - 1];
    each_argument(net.mirrored, row, found, rows, [&](int argument, int value, A up, A down) {
      const A z = m.z[cell(net, image, m.outputs, argument, pixel)];
      A sum = folded(net, m.slope + cell(net, image, values, value, pixel), up, down);
      A bent = 0;
      for (int s = 0; s < slots; ++s) bent += m.bent[cell(net, s * net.images + image, m.outputs, argument, pixel)];
      m.out[cell(net, image, m.outputs, argument, pixel)] = sum + bent;
      if (up != A(0)) by_parameter += point(net.activation, z, a).value_by * up;
      if (net.mirrored && down != A(0)) by_parameter += point(net.activation, -z, a).value_by * down;
    });
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// The trace of a block of three maps, Σ d₂ᵀ M d₁, M by classes of pixels

constexpr int kClasses = 9;

template <typename A>
struct Trace {
  const A *push, *pull;  // [classes, values of layer 0, padded values of layer 1] and the reverse; null: none
  int classes;           // 1 or 9
};

// The rectangle of a class of pixels: 3 · (its row's) + (its column's), 0 for the first, 2 for the last, 1 between.
GK_HOST_DEVICE inline Columns of_class(Columns c, int number, int classes) {
  if (classes == 1) return c;
  const int row = number / 3, column = number % 3;
  c.y = row == 0 ? 0 : row == 1 ? 1 : c.height - 1;
  c.x = column == 0 ? 0 : column == 1 ? 1 : c.width - 1;
  c.height = row == 1 ? c.height - 2 : 1;
  c.width = column == 1 ? c.width - 2 : 1;
  return c;
}

// M d₁, or Mᵀ d₂, of all classes.
template <typename A, bool kLarge, typename Epilogue>
__device__ __forceinline__ void trace_product(const Network<A>& net, const Trace<A>& trace, bool across,
                                              const Share<A>& share, A* shared, Epilogue& epilogue) {
  const int rows = net.map[across ? 1 : 2].inputs, depth = net.map[across ? 2 : 1].inputs;
  int rank = share.rank;
  for (int c = 0; c < trace.classes; ++c) {
    const Columns columns = of_class(share.columns, c, trace.classes);
    if (columns.area() <= 0) continue;
    const A* weight = (across ? trace.pull : trace.push) + static_cast<int64_t>(c) * depth * padded(rows);
    const Product<A> p{weight, rows, depth, 1, net.map[across ? 1 : 0].slope, net.height, net.width};
    run<A, kLarge>(p, columns, rank, share.ranks, shared, epilogue);
    // blocks go on where the last class ended, so that none has many small ones
    rank = (rank + share.ranks - tiles<A, kLarge>(rows, columns.count()) % share.ranks) % share.ranks;
  }
}

// d₂ · (M d₁) summed over the thread's rows: [G, rows / 4 rounded up, pixels].
template <typename A>
struct TraceDot {
  const Network<A>& net;
  A* parts;
  __device__ __forceinline__ void operator()(int image, int pixel, int row, const A (&found)[4], int rows) {
    const int values = net.map[2].inputs;
    A sum = 0;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (r < rows) sum += net.map[1].slope[cell(net, image, values, row + r, pixel)] * found[r];
    }
    parts[cell(net, image, padded(values) / 4, row / 4, pixel)] = sum;
  }
};

}  // namespace residual
}  // namespace genkernels
