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
#include "autoregressive_sampling/sampler.h"

#include "../common/autoregressive_sampling.h"
#include "../common/draw.h"

namespace genkernels {
namespace sampling {
namespace {

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
  const int64_t size = t.height * t.columns, place = i * t.columns + j;
  const int64_t first = t.head == Head::kCategorical ? c : 0;
  const int64_t last = t.head == Head::kCategorical ? c + 1 : t.channels;
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
  } else if (t.head == Head::kCategorical) {
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

// The backend of common/autoregressive_sampling.h.
struct Cpu {
  template <typename T>
  static void sample(const Task& t, const Network& net, const Tensor& image, const Tensor& state, const Tensor& noise,
                     const std::optional<Tensor>& known, const std::vector<Tensor>& tensors);
};

template <typename T>
void Cpu::sample(const Task& t, const Network& net, const Tensor& image, const Tensor& state, const Tensor& noise,
                 const std::optional<Tensor>& known, const std::vector<Tensor>& tensors) {
  const Images<T> io{mutable_data<int64_t>(image), data<T>(noise), data<bool>(known)};
  T* const caches = mutable_data<T>(state);
  const int64_t groups = t.groups;
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
      T* mine = caches + first * net.state_size;
      for (int64_t i = t.begin; i < t.end; ++i) {
        sampler.row(i, t.height, first, samples, mine, sums.data());
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

}  // namespace
}  // namespace sampling
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels, CPU, m) {
  using namespace genkernels::sampling;
  m.impl("autoregressive_sampling", TORCH_BOX(&autoregressive_sampling<Cpu>));
}
