// A masked convolution over whole tensors, band by band: the forward product, the mirrored one that gives the gradient
// of x, and the gradient of the weight. masked_conv.cpp says how the work is cut.
#pragma once

#include "problem.h"
#include "products.h"

namespace genkernels {
namespace masked {
namespace {

constexpr int64_t kBandBytes = 384 * 1024;  // of the second-level cache
constexpr int64_t kParts = 16;
constexpr int64_t kLeastItems = 4;  // of the weight's gradient: bands where there are few images

// The geometry and packed weights of the forward product, or of the mirrored one that gives the gradient of x.
template <typename A>
struct Packed {
  struct Block {
    int64_t first;
    int channels;
    int64_t entries, at, weights;  // offsets into the two arrays below
  };
  int64_t inputs, outputs, planes;  // a plane holds A::kChannels channels
  Band band;
  std::vector<Block> blocks;
  std::vector<int32_t> at;
  std::vector<typename A::Staged> weights;
};

// Rows a band: all that fit in the cache, and fewer where there would be no work for some thread.
inline void choose_rows(Band& b, int64_t floats_of_x, int64_t floats_of_y, int64_t itemsize, int64_t batch,
                        int64_t threads) {
  const int64_t row = (floats_of_x + floats_of_y) * b.pitch() * itemsize;
  const int64_t halo = (b.up + b.down) * floats_of_x * b.pitch() * itemsize;
  int64_t bands = 1;
  while (bands < b.height && (b.height + bands - 1) / bands * row + halo > kBandBytes) ++bands;
  while (batch * bands < threads && bands < b.height) ++bands;
  b.rows = (b.height + bands - 1) / bands;
}

inline Band reach_of(const Problem& p, bool mirrored) {
  Band b{p.height, p.width, 0, 0, 0, 0};
  for (const Tap& t : p.taps) {
    const int64_t row = t.row - p.kh / 2, column = t.column - p.kw / 2;
    b.up = std::max(b.up, mirrored ? row : -row);
    b.down = std::max(b.down, mirrored ? -row : row);
    b.left = std::max(b.left, mirrored ? column : -column);
    b.right = std::max(b.right, mirrored ? -column : column);
  }
  return b;
}

template <typename A>
Packed<A> pack(const Problem& p, const typename A::Weight* weight, bool mirrored) {
  using Staged = typename A::Staged;
  Packed<A> k;
  k.inputs = mirrored ? p.outputs : p.inputs;
  k.outputs = mirrored ? p.inputs : p.outputs;
  k.planes = (k.inputs + A::kChannels - 1) / A::kChannels;
  k.band = reach_of(p, mirrored);
  choose_rows(k.band, k.planes, k.outputs, sizeof(Staged), p.batch, torch::stable::get_num_threads());
  const int64_t plane = k.band.plane(), pitch = k.band.pitch(), taps = int64_t(p.taps.size()), area = p.kh * p.kw;
  // from one channel of the product to the next one in the weight
  const int64_t output_step = mirrored ? area : p.inputs * area, input_step = mirrored ? p.inputs * area : area;
  int64_t most = 0;
  for (int64_t first = 0; first < k.outputs;) {
    int channels = kBlock;
    while (channels > k.outputs - first) channels /= 2;
    k.blocks.push_back({first, channels, 0, int64_t(k.blocks.size()) * k.planes * taps, most});
    most += channels * k.planes * taps;
    first += channels;
  }
  k.at.resize(k.blocks.size() * k.planes * taps);
  k.weights.resize(most);
  torch::stable::parallel_for(0, int64_t(k.blocks.size()), 2, [&](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; ++n) {
      auto& block = k.blocks[n];
      int32_t* at = &k.at[block.at];
      Staged* w = &k.weights[block.weights];
      for (int64_t i = 0; i < k.planes; ++i)
        for (const Tap& t : p.taps) {
          const int64_t first = i * A::kChannels, count = std::min(A::kChannels, k.inputs - first);
          const auto* from = weight + block.first * output_step + first * input_step + t.row * p.kw + t.column;
          bool any = !t.centre;
          for (int c = 0; c < block.channels; ++c) {
            Staged element(0);
            for (int64_t j = 0; j < A::kChannels; ++j) {
              const int64_t o = block.first + c, from_j = first + j;
              if (j >= count || (t.centre && !p.live(mirrored ? from_j : o, mirrored ? o : from_j, t))) continue;
              any = true;
              A::place(element, j, from[c * output_step + j * input_step]);
            }
            w[c] = element;
          }
          if (!any) continue;
          const int64_t away = (t.row - p.kh / 2) * pitch + t.column - p.kw / 2;
          at[block.entries++] = int32_t(i * plane + (mirrored ? -away : away));
          w += block.channels;
        }
    }
  });
  return k;
}

// Whether the product can be written where it belongs: pixels lie as the tensor has them, nothing is rounded, and no
// block of channels writes more vectors than it is asked for (a whole block's tiles come in every size).
template <typename S, typename A>
bool goes_straight(const Packed<A>& k) {
  return std::is_same_v<S, typename A::Sum> && k.band.pitch() == k.band.width && k.outputs % kBlock == 0;
}

// Runs the product band by band; finish(image, first row, rows, result [outputs][stride], stride) stores what it gave.
// shift(image, o) starts the sum of output channel o. straight: the tensor of the result where that is all there is to
// do, else null.
template <typename S, typename A, typename Shift, typename Finish>
void convolve(const Packed<A>& k, const S* x, int64_t batch, S* straight, Shift&& shift, Finish&& finish) {
  using T = typename A::Sum;
  const Band& b = k.band;
  const int64_t bands = (b.height + b.rows - 1) / b.rows, plane = b.plane(), L = Vector<T>::kLanes;
  const int64_t stride = (b.span() + L * kMostVectors + 15) / 16 * 16;
  torch::stable::parallel_for(0, batch * bands, 1, [&](int64_t from, int64_t to) {
    auto* staged = scratch<typename A::Staged>(0, k.planes * plane + L * kMostVectors);
    T* result = scratch<T>(1, k.outputs * stride);
    for (int64_t task = from; task < to; ++task) {
      const int64_t n = task / bands, first = task % bands * b.rows, rows = std::min(b.rows, b.height - first);
      for (int64_t i = 0; i < k.planes; ++i)
        A::stage_channels(x + n * k.inputs * b.height * b.width, i, k.inputs, b, first, rows, staged + i * plane);
      const int64_t vectors = ((rows - 1) * b.pitch() + b.width + L - 1) / L;
      // a tile's pixels stay in the first-level cache while the blocks of weights pass by
      const int64_t step = vectors_beside(kBlock);
      const auto run = [&](int64_t from_vector, int64_t till_vector, T* to, int64_t to_stride) {
        for (int64_t v = from_vector; v < till_vector; v += step)
          for (const auto& block : k.blocks) {
            T start[kBlock];
            for (int c = 0; c < block.channels; ++c) start[c] = shift(n, block.first + c);
            for (int64_t u = v, end = std::min(till_vector, v + step); u < end;)
              u += correlate<A>(block.channels, end - u, staged + b.origin() + u * L, &k.at[block.at],
                                &k.weights[block.weights], block.entries, start, to + block.first * to_stride + u * L,
                                to_stride);
          }
      };
      if constexpr (std::is_same_v<S, T>)
        if (straight) {
          const int64_t pixels = b.height * b.width, whole = rows * b.width / L, rest = rows * b.width - whole * L;
          T* to = straight + n * k.outputs * pixels + first * b.width;
          run(0, whole, to, pixels);
          if (rest == 0) continue;
          run(whole, vectors, result, stride);
          for (int64_t o = 0; o < k.outputs; ++o)
            store_row(result + o * stride + whole * L, to + o * pixels + whole * L, rest);
          continue;
        }
      run(0, vectors, result, stride);
      finish(n, first, rows, result, stride);
    }
  });
}

template <typename S, typename A>
void grad_weight(const Problem& p, const S* g, const S* x, S* to) {
  using T = typename A::Sum;
  constexpr int64_t L = Vector<T>::kLanes, kGroup = kOuterVectors * L;
  Band b = reach_of(p, false);
  choose_rows(b, p.inputs, p.outputs, sizeof(T), p.batch, kLeastItems);
  const int64_t bands = (b.height + b.rows - 1) / b.rows, plane = b.plane(), pitch = b.pitch(), items = p.batch * bands;
  const int64_t taps = int64_t(p.taps.size()), entries = p.inputs * taps, padded = entries + 8;
  const int64_t stride = (p.outputs + L - 1) / L * L, parts = std::min(kParts, items);
  const int64_t each = (p.width + A::kPixels - 1) / A::kPixels;  // elements of g in a row
  // pixels whose g stays in the first-level cache while the entries pass by
  const int64_t few =
      std::max<int64_t>(1, std::min(b.rows, 24 * 1024 / (std::min(kGroup, stride) * int64_t(sizeof(T))) / each));
  std::vector<int64_t> at(padded, 0);
  for (int64_t i = 0, e = 0; i < p.inputs; ++i)
    for (const Tap& t : p.taps) at[e++] = i * plane + (t.row - p.kh / 2) * pitch + t.column - p.kw / 2;
  std::unique_ptr<T[]> sums(new T[parts * padded * stride]);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t from, int64_t till) {
    auto* staged = scratch<typename A::Pixel>(0, p.inputs * plane + L * kMostVectors);
    auto* turned = scratch<typename A::Staged>(1, b.rows * each * stride);
    for (int64_t part = from; part < till; ++part) {
      bool fresh = true;
      for (int64_t item = items * part / parts; item < items * (part + 1) / parts; ++item) {
        const int64_t n = item / bands, first = item % bands * b.rows, rows = std::min(b.rows, b.height - first);
        for (int64_t i = 0; i < p.inputs; ++i)
          A::stage_pixels(x + (n * p.inputs + i) * p.pixels(), b, first, rows, staged + i * plane);
        stage_transposed<A>(g + n * p.outputs * p.pixels(), p.outputs, b, first, rows, turned, stride, kGroup);
        for (int64_t r = 0; r < rows; r += few, fresh = false)
          for (int64_t o = 0; o < stride; o += kGroup) {
            const int64_t across = std::min(kGroup, stride - o);
            const int vectors = int(across / L), together = entries_beside(vectors);
            for (int64_t e = 0; e < entries; e += together) {
              const typename A::Pixel* from_x[8];
              for (int j = 0; j < together; ++j) from_x[j] = staged + b.origin() + r * pitch + at[e + j];
              outer<A>(vectors, from_x, pitch, turned + rows * each * o + r * each * across, across,
                       std::min(few, rows - r), p.width, &sums[(part * padded + e) * stride + o], stride, fresh);
            }
          }
      }
    }
  });
  torch::stable::parallel_for(0, entries, 16, [&](int64_t from, int64_t till) {
    for (int64_t part = 1; part < parts; ++part) {
      const T* more = &sums[part * padded * stride];
      for (int64_t i = from * stride; i < till * stride; ++i) sums[i] += more[i];
    }
  });
  constexpr int64_t kTogether = 16;  // output channels: a line of the sums
  torch::stable::parallel_for(0, (p.outputs + kTogether - 1) / kTogether, 1, [&](int64_t from, int64_t till) {
    const int64_t area = p.kh * p.kw, row = p.inputs * area;
    std::vector<T> rows(kTogether * row);
    for (int64_t o = from * kTogether; o < std::min(p.outputs, till * kTogether); o += kTogether) {
      const int64_t count = std::min(kTogether, p.outputs - o);
      const T* sum = &sums[o];
      for (int64_t i = 0; i < p.inputs; ++i)
        for (const Tap& t : p.taps) {
          T* at = &rows[i * area + t.row * p.kw + t.column];
          for (int64_t c = 0; c < count; ++c) at[c * row] = p.live(o + c, i, t) ? sum[c] : T(0);
          sum += stride;
        }
      store(rows.data(), to + o * row, count * row);
    }
  });
}

}  // namespace
}  // namespace masked
}  // namespace genkernels
