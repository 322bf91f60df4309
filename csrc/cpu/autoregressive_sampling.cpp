// Sampling from a causal network, pixel by pixel, with every stage's activations kept: x_i ~ p(x_i | x_<i), stages as
// in csrc/common/stages.h.
//
// Layout. A sample's planes are rings of the rows that are still read, pixel-major ([row][column][channels], zeros
// around): the taps of one kernel row at a pixel are one contiguous stretch of (kw·channels) numbers, so every
// convolution is a plain matrix product with overlapping rows, without a copy. Weights are packed once a call, [kernel
// row][column, in][out], dead ends of each stretch cut off.
//
// A row of the image. First, for all pixels of the row at once: vertical stages, and of every other stage what it takes
// from rows above (and from vertical planes): products of many rows. Then, pixel by pixel, only the taps to the left
// and at the centre are left: products with one row a sample. Last the draw, and the pixel enters plane 0. With C data
// channels drawn one after the other, each has its own group of every stage's outputs, and a sub-step computes one
// group.
//
// Parallel over samples: a thread owns chunks of up to kRows samples, which share each load of a weight. The order of
// every sum is fixed by the network alone, so a sample is bitwise the same in any batch and for any number of threads.
// Sharing a row's products among threads at batch 1 was tried: on a machine that is not idle it waits for the second
// thread longer than it gains.
//
// Counted for the 7×7 A + 8 × 3×3 B network of 64 channels: 166 k multiply-adds a pixel, 40 % of them in the
// pixel-by-pixel part (one pass over the image by dense convolutions: 300 k). At batch 1 that part reads 262 kB of
// weights a pixel, from the second-level cache: the floor.
#include "common.h"
#include "vector.h"

#include "../common/draw.h"
#include "../common/stages.h"

namespace genkernels {
namespace {

using stages::Activation;
using stages::Network;
using stages::Plane;

constexpr int kRows = kRegisters == 32 ? 8 : 6;  // rows of a product that share its weights' loads

// Vectors of outputs that a tile of M rows keeps in registers beside its weights and one input.
constexpr int widest(int m) {
  if (kRegisters == 32) return m >= 5 ? 2 : m >= 3 ? 4 : 8;
  return m >= 3 ? 2 : m == 2 ? 4 : 8;
}

// out[m][v] += Σ_k in[m·in_stride + k] · w[k][v], v < NV vectors.
template <typename T, int M, int NV>
inline void tile(const T* in, int64_t in_stride, int64_t count, const T* w, int64_t w_stride, T* out,
                 int64_t out_stride) {
  using V = typename Vector<T>::unaligned;
  constexpr int L = Vector<T>::kLanes;
  V sum[M][NV];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) sum[m][v] = *reinterpret_cast<const V*>(out + m * out_stride + v * L);
  }
  for (int64_t k = 0; k < count; ++k) {
    V weight[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) weight[v] = *reinterpret_cast<const V*>(w + k * w_stride + v * L);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const T x = in[m * in_stride + k];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sum[m][v] += x * weight[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) *reinterpret_cast<V*>(out + m * out_stride + v * L) = sum[m][v];
  }
}

template <typename T, int M, int NV>
inline void tiles(const T* in, int64_t in_stride, int64_t count, const T* w, int64_t vectors, T* out,
                  int64_t out_stride) {
  constexpr int L = Vector<T>::kLanes;
  const int64_t w_stride = vectors * L;
  int64_t v = 0;
  for (; v + NV <= vectors; v += NV) tile<T, M, NV>(in, in_stride, count, w + v * L, w_stride, out + v * L, out_stride);
  if constexpr (NV > 4)
    if (vectors - v >= 4) tile<T, M, 4>(in, in_stride, count, w + v * L, w_stride, out + v * L, out_stride), v += 4;
  if constexpr (NV > 2)
    if (vectors - v >= 2) tile<T, M, 2>(in, in_stride, count, w + v * L, w_stride, out + v * L, out_stride), v += 2;
  if constexpr (NV > 1)
    if (vectors - v >= 1) tile<T, M, 1>(in, in_stride, count, w + v * L, w_stride, out + v * L, out_stride);
}

// The same for any number of rows and of vectors; w is [count][vectors].
template <typename T>
void multiply(const T* in, int64_t in_stride, int64_t rows, int64_t count, const T* w, int64_t vectors, T* out,
              int64_t out_stride) {
  while (rows > 0) {
    const int64_t m = std::min<int64_t>(rows, kRows);
    switch (m) {
      case 1: tiles<T, 1, widest(1)>(in, in_stride, count, w, vectors, out, out_stride); break;
      case 2: tiles<T, 2, widest(2)>(in, in_stride, count, w, vectors, out, out_stride); break;
      case 3: tiles<T, 3, widest(3)>(in, in_stride, count, w, vectors, out, out_stride); break;
      case 4: tiles<T, 4, widest(4)>(in, in_stride, count, w, vectors, out, out_stride); break;
      case 5: tiles<T, 5, widest(5)>(in, in_stride, count, w, vectors, out, out_stride); break;
      case 6: tiles<T, 6, widest(6)>(in, in_stride, count, w, vectors, out, out_stride); break;
      case 7:
        if constexpr (kRows >= 7) tiles<T, 7, widest(7)>(in, in_stride, count, w, vectors, out, out_stride);
        break;
      case 8:
        if constexpr (kRows >= 8) tiles<T, 8, widest(8)>(in, in_stride, count, w, vectors, out, out_stride);
        break;
    }
    in += m * in_stride;
    out += m * out_stride;
    rows -= m;
  }
}

// ---- the network, packed ----------------------------------------------------------------------------------------

// One kernel row of one input, for one group of outputs.
template <typename T>
struct Product {
  int64_t plane;
  int64_t up;      // rows above the current one
  int64_t start;   // element of the plane's row where the stretch of column 0's pixel begins
  int64_t count;   // its length
  int64_t offset;  // of the packed weights [count][vectors]
};

// Consecutive channels before the activation that lie together in a group's sums.
struct Segment {
  int64_t channel, place, count;
};

template <typename T>
struct Packed {
  int64_t groups, padded, stride;   // groups of outputs, numbers a group, numbers a pixel
  int64_t group_width, group_made;  // live ones, before and after the activation
  std::vector<Segment> segments;
  std::vector<std::vector<Product<T>>> above, beside;  // [group]: whole rows at once; pixel by pixel
  std::vector<int64_t> added_above, added_beside;      // planes
  int64_t sums;                                        // offset in a sample's row of sums
};

template <typename T>
class Sampler {
 public:
  Sampler(const Network& net, const std::vector<Tensor>& tensors, int64_t groups, int64_t columns)
      : net_(net), columns_(columns) {
    for (const Tensor& t : tensors) pointers_.push_back(data<T>(t));
    for (const stages::Stage& s : net.stages) pack(s, s.vertical ? 1 : groups);
  }

  int64_t scratch() const { return sums_; }  // elements a sample

  // Everything of row i that depends on rows above only, for samples first, first + 1, …
  void row(int64_t i, int64_t rows, int64_t first, int64_t samples, T* state, T* sums) const {
    for (size_t k = 0; k < packed_.size(); ++k) {
      const Packed<T>& p = packed_[k];
      const stages::Stage& s = net_.stages[k];
      for (int64_t n = 0; n < samples; ++n) {
        T* mine = state + n * net_.state_size;
        T* to = sums + n * sums_ + p.sums;
        start(s, p, first + n, i, rows, to);
        for (int64_t plane : p.added_above) {
          const Plane& from = net_.planes[plane];
          for (const Segment& g : p.segments)
            for (int64_t j = 0; j < columns_; ++j)
              add(at(mine, from, i, j) + g.channel, to + j * p.stride + g.place, g.count);
        }
      }
      for (int64_t g = 0; g < p.groups; ++g)
        for (const Product<T>& product : p.above[g]) {
          const Plane& from = net_.planes[product.plane];
          for (int64_t n = 0; n < samples; ++n)
            multiply(line(state + n * net_.state_size, from, i - product.up) + product.start, from.channels, columns_,
                     product.count, weights_.data() + product.offset, p.padded / Vector<T>::kLanes,
                     sums + n * sums_ + p.sums + g * p.padded, p.stride);
        }
      if (s.vertical)
        for (int64_t n = 0; n < samples; ++n)
          for (int64_t j = 0; j < columns_; ++j)
            finish(s, p, k + 1, i, j, 0, state + n * net_.state_size, sums + n * sums_ + p.sums);
    }
  }

  // Group g of every other stage at pixel (i, j).
  void pixel(int64_t i, int64_t j, int64_t g, int64_t samples, T* state, T* sums) const {
    for (size_t k = 0; k < packed_.size(); ++k) {
      const Packed<T>& p = packed_[k];
      const stages::Stage& s = net_.stages[k];
      if (s.vertical) continue;
      T* to = sums + p.sums + j * p.stride + g * p.padded;
      for (const Product<T>& product : p.beside[g]) {
        const Plane& from = net_.planes[product.plane];
        multiply(line(state, from, i) + j * from.channels + product.start, net_.state_size, samples, product.count,
                 weights_.data() + product.offset, p.padded / Vector<T>::kLanes, to, sums_);
      }
      for (int64_t n = 0; n < samples; ++n)
        finish(s, p, k + 1, i, j, g, state + n * net_.state_size, sums + n * sums_ + p.sums);
    }
  }

  // The numbers of plane k at pixel (i, j).
  T* values(T* state, int64_t k, int64_t i, int64_t j) const { return at(state, net_.planes[k], i, j); }

 private:
  static T* line(T* state, const Plane& p, int64_t i) {
    return state + p.offset + (i % p.rows + p.rows) % p.rows * p.row_length;
  }
  static T* at(T* state, const Plane& p, int64_t i, int64_t j) {
    return line(state, p, i) + (j + p.border) * p.channels;
  }

  static void add(const T* __restrict from, T* __restrict to, int64_t count) {
    for (int64_t c = 0; c < count; ++c) to[c] += from[c];
  }

  // Bias and condition of a whole row.
  void start(const stages::Stage& s, const Packed<T>& p, int64_t sample, int64_t i, int64_t rows, T* to) const {
    const T* bias = s.bias < 0 ? nullptr : pointers_[s.bias];
    const T* condition = s.condition < 0 ? nullptr : pointers_[s.condition];
    std::fill(to, to + p.stride, T(0));
    for (const Segment& g : p.segments)
      for (int64_t c = 0; c < g.count; ++c) {
        T value = bias ? bias[g.channel + c] : T(0);
        if (condition && !s.condition_map) value += condition[sample * s.width + g.channel + c];
        to[g.place + c] = value;
      }
    for (int64_t j = 1; j < columns_; ++j) std::copy(to, to + p.stride, to + j * p.stride);
    if (condition && s.condition_map)
      for (const Segment& g : p.segments)
        for (int64_t c = 0; c < g.count; ++c) {
          const T* from = condition + ((sample * s.width + g.channel + c) * rows + i) * columns_;
          for (int64_t j = 0; j < columns_; ++j) to[j * p.stride + g.place + c] += from[j];
        }
  }

  // What is left of group g at a pixel once its sums are complete: planes added, the activation, the residual.
  void finish(const stages::Stage& s, const Packed<T>& p, int64_t plane, int64_t i, int64_t j, int64_t g, T* state,
              T* sums) const {
    T* __restrict from = sums + j * p.stride + g * p.padded;
    T* __restrict to = at(state, net_.planes[plane], i, j) + g * p.group_made;
    const int64_t count = p.group_made;
    for (int64_t added : p.added_beside)
      add(at(state, net_.planes[added], i, j) + g * p.group_width, from, p.group_width);
    if (s.activation == Activation::kGate) {
      for (int64_t c = 0; c < count; ++c) {
        T tanh, unused;
        math::tanh_sech2(from[c], tanh, unused);
        to[c] = tanh * (T(1) / (T(1) + math::exp(-from[count + c])));
      }
    } else if (s.activation == Activation::kRelu) {
      for (int64_t c = 0; c < count; ++c) to[c] = from[c] < T(0) ? T(0) : from[c];
    } else {
      std::copy(from, from + count, to);
    }
    if (s.residual >= 0) add(at(state, net_.planes[s.residual], i, j) + g * count, to, count);
  }

  void pack(const stages::Stage& s, int64_t groups) {
    constexpr int64_t L = Vector<T>::kLanes;
    Packed<T> p;
    p.groups = groups;
    p.group_width = s.width / groups;
    p.group_made = s.made / groups;
    p.padded = (p.group_width + L - 1) / L * L;
    p.stride = groups * p.padded;
    p.above.resize(groups);
    p.beside.resize(groups);
    p.sums = sums_;
    sums_ += p.stride * columns_;
    for (int64_t g = 0; g < groups; ++g) {
      if (s.activation == Activation::kGate) {
        p.segments.push_back({g * p.group_made, g * p.padded, p.group_made});
        p.segments.push_back({s.made + g * p.group_made, g * p.padded + p.group_made, p.group_made});
      } else {
        p.segments.push_back({g * p.group_width, g * p.padded, p.group_width});
      }
    }
    for (int64_t plane : s.added)
      (s.vertical || net_.planes[plane].vertical ? p.added_above : p.added_beside).push_back(plane);
    for (const stages::Input& in : s.inputs)
      for (int64_t g = 0; g < groups; ++g)
        for (int64_t y = 0; y <= in.kh / 2; ++y) pack(s, in, p, g, y);
    packed_.push_back(std::move(p));
  }

  // Kernel row y of an input, for group g.
  void pack(const stages::Stage& s, const stages::Input& in, Packed<T>& p, int64_t g, int64_t y) {
    const Plane& from = net_.planes[in.plane];
    const int64_t channels = from.channels, taps = in.kh * in.kw, up = in.kh / 2 - y;
    const bool whole = up > 0 || from.vertical;  // complete when the row begins
    if (s.vertical && !whole) return;            // such weights are 0
    int64_t end = in.kw * channels;              // of the stretch, over (kernel column, channel)
    if (up == 0 && !s.vertical) {
      end = (in.kw / 2 + 1) * channels;
      // at the centre: groups up to one's own, in the image before one's own
      if (!from.vertical) end -= channels - channels / p.groups * (g + (in.plane != 0));
    }
    const T* w = pointers_[in.tensor] + y * in.kw;
    const int64_t columns = in.kw * channels, first_segment = p.segments.size() / p.groups * g,
                  last_segment = p.segments.size() / p.groups * (g + 1);
    std::vector<char> live(columns, 0);
    for (int64_t k = first_segment; k < last_segment; ++k)
      for (int64_t o = 0; o < p.segments[k].count; ++o) {
        const T* row = w + (p.segments[k].channel + o) * channels * taps;
        for (int64_t x = 0; x < in.kw; ++x)
          for (int64_t c = 0; c < channels; ++c) live[x * channels + c] |= row[c * taps + x] != T(0);
      }
    int64_t begin = 0;
    while (begin < end && !live[begin]) ++begin;
    while (end > begin && !live[end - 1]) --end;
    if (begin == end) return;
    Product<T> product{in.plane, up, (from.border - in.kw / 2) * channels + begin, end - begin,
                       static_cast<int64_t>(weights_.size())};
    weights_.resize(weights_.size() + product.count * p.padded, T(0));
    for (int64_t k = first_segment; k < last_segment; ++k) {
      // sixteen outputs side by side: their rows are read in order, and what is written is contiguous
      for (int64_t o = 0; o < p.segments[k].count; o += 16) {
        const int64_t lanes = std::min<int64_t>(16, p.segments[k].count - o);
        const T* row = w + (p.segments[k].channel + o) * channels * taps;
        T* to = weights_.data() + product.offset + p.segments[k].place - g * p.padded + o;
        for (int64_t e = begin; e < end; ++e) {
          const T* tap = row + e % channels * taps + e / channels;
          for (int64_t l = 0; l < lanes; ++l) to[(e - begin) * p.padded + l] = tap[l * channels * taps];
        }
      }
    }
    (whole ? p.above : p.beside)[g].push_back(product);
  }

  const Network& net_;
  int64_t columns_, sums_ = 0;
  std::vector<const T*> pointers_;
  std::vector<Packed<T>> packed_;
  std::vector<T> weights_;
};

// ---- the loop over pixels ---------------------------------------------------------------------------------------

struct Task {
  int64_t batch, channels, rows, columns, noise_channels;
  stages::Head head;
  int64_t levels, begin, end;
  double temperature;
};

template <typename T>
struct Images {
  int64_t* image;     // [N, C, H, W]
  const T* noise;     // [N, C or 1 + C, H, W]
  const bool* known;  // [N, C, H, W] or null
};

// `draw::categorical` with the weights computed side by side into `scratch` [count], which vectorises.
template <typename T>
int categorical(const T* logits, int count, T temperature, T u, T* __restrict scratch) {
  if (temperature == T(0)) return draw::categorical(logits, 1, count, temperature, u);
  T most = logits[0];
  for (int k = 1; k < count; ++k) most = logits[k] > most ? logits[k] : most;
  for (int k = 0; k < count; ++k) scratch[k] = math::exp((logits[k] - most) / temperature);
  return draw::share(scratch, count, u);
}

// A sample's draws at one pixel: data channels from `c` on, one of them, or all of them from a mixture.
template <typename T>
void draw_pixel(const Task& t, const Images<T>& io, int64_t n, int64_t i, int64_t j, int64_t c, const T* parameters,
                int64_t width, T* plane0, T* scratch) {
  const int64_t size = t.rows * t.columns, place = i * t.columns + j;
  const int64_t first = t.head == stages::Head::kCategorical ? c : 0;
  const int64_t last = t.head == stages::Head::kCategorical ? c + 1 : t.channels;
  int drawn[3], fixed[3];
  bool all = true;
  for (int64_t k = first; k < last; ++k) {
    const int64_t at = (n * t.channels + k) * size + place;
    fixed[k - first] = io.known && io.known[at] ? static_cast<int>(io.image[at]) : -1;
    all = all && fixed[k - first] >= 0;
  }
  const T* noise = io.noise + n * t.noise_channels * size + place;
  if (all) {
    std::copy(fixed, fixed + (last - first), drawn);
  } else if (t.head == stages::Head::kCategorical) {
    drawn[0] =
        categorical(parameters + c * t.levels, static_cast<int>(t.levels), T(t.temperature), noise[c * size], scratch);
  } else {
    const int mixtures = static_cast<int>(width / (t.channels == 1 ? 3 : 10));
    draw::logistic_mixture(parameters, 1, mixtures, static_cast<int>(t.channels), static_cast<int>(t.levels),
                           T(t.temperature), noise, size, drawn, fixed);
  }
  for (int64_t k = first; k < last; ++k) {
    io.image[(n * t.channels + k) * size + place] = drawn[k - first];
    plane0[k] = T(2) * T(drawn[k - first]) / T(t.levels - 1) - T(1);
  }
}

template <typename T>
void sample(const Task& t, const Network& net, const Images<T>& io, const std::vector<Tensor>& tensors, T* state) {
  const int64_t groups = t.head == stages::Head::kCategorical ? t.channels : 1;
  const Sampler<T> sampler(net, tensors, groups, t.columns);
  const int64_t last = net.planes.size() - 1, width = net.planes[last].channels;
  // as many chunks as keep every thread at work, of as many samples as share a weight's load
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t wanted = (t.batch + kRows - 1) / kRows;
  const int64_t chunks = std::min(t.batch, (wanted + threads - 1) / threads * threads);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t from, int64_t to) {
    std::vector<T> sums, scratch(t.levels);
    for (int64_t chunk = from; chunk < to; ++chunk) {
      const int64_t first = t.batch * chunk / chunks, samples = t.batch * (chunk + 1) / chunks - first;
      sums.resize(samples * sampler.scratch());
      T* mine = state + first * net.state_size;
      for (int64_t i = t.begin; i < t.end; ++i) {
        sampler.row(i, t.rows, first, samples, mine, sums.data());
        for (int64_t j = 0; j < t.columns; ++j)
          for (int64_t g = 0; g < groups; ++g) {
            sampler.pixel(i, j, g, samples, mine, sums.data());
            for (int64_t n = 0; n < samples; ++n) {
              T* own = mine + n * net.state_size;
              draw_pixel(t, io, first + n, i, j, g, sampler.values(own, last, i, j), width,
                         sampler.values(own, 0, i, j), scratch.data());
            }
          }
      }
    }
  });
}

void autoregressive_sampling(Tensor image, Tensor state, Tensor noise, std::optional<Tensor> known,
                             std::vector<Tensor> tensors, std::vector<int64_t> plan, int64_t head, int64_t levels,
                             double temperature, int64_t begin, int64_t end) {
  const Network net = stages::read_checked(image, state, noise, known, tensors, plan, head, levels, begin, end);
  if (image.numel() == 0 || begin >= end) return;
  const Task task{
      image.size(0), image.size(1), image.size(2), image.size(3), noise.size(1), static_cast<stages::Head>(head),
      levels,        begin,         end,           temperature};
  const auto run = [&]<typename T>() {
    sample<T>(task, net, {mutable_data<int64_t>(image), data<T>(noise), data<bool>(known)}, tensors,
              mutable_data<T>(state));
  };
  if (noise.scalar_type() == ScalarType::Double) return run.template operator()<double>();
  run.template operator()<float>();
}

}  // namespace
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels, CPU, m) {
  m.impl("autoregressive_sampling", TORCH_BOX(&genkernels::autoregressive_sampling));
}
