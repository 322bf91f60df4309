// Masked convolution on the CPU: y = act(x * (w ⊙ m) + b + c) + r over the live taps alone (van den Oord et al. 2016a,
// 2016b).
//
// Shapes. x [N, Cin, H, W], weight [Cout, Cin, kh, kw], condition [N, Cout] or [N, Cout, H, W], residual [N, Cout', H,
// W]; channels first in and out, nothing is rearranged but a band of rows in scratch (masked_conv.h).
//
// Forward. A task is a band of rows of one image, chosen so that its staged input and its result stay in the
// second-level cache. The weights are packed once a call as [block of output channels][entry][channel], an entry being
// a live tap of an input channel for any of the block: taps that data_channels kills for a whole block are left out
// too. Bias and [N, Cout] condition start the sums; the 4-D condition, the activation and the residual are applied to
// the band before it is stored. Backward. g, the gradient of the pre-activation, is written out where there is an
// activation. grad_x: the same product, taps mirrored. grad_weight: an outer product over pixels, per live tap, in at
// most kParts partial sums over the images; these depend on the shape alone and are added in order, so that bits do not
// depend on the number of threads. A dead tap's is 0.
//
// Saved for backward: x, weight; relu: the output, beside a residual the pre-activation; gate: the pre-activation
// (recomputing it would cost the convolution again).
//
// Flops: 2·N·H·W·(live weights), twice that backward: at a processor's peak this is the floor, the bytes (x and y once)
// hide behind it. fp16 is widened as it is staged. bf16 is multiplied in pairs where the processor does that
// (masked_conv_bf16.h), on one with AMX by torch (masked_conv_torch.h), else widened.
#include "masked_conv.h"

#include "../common/math.h"
#include "masked_conv_bf16.h"
#include "masked_conv_problem.h"
#include "masked_conv_torch.h"

namespace genkernels {
namespace {

using namespace masked;

constexpr int64_t kBandBytes = 384 * 1024;  // of the second-level cache
constexpr int64_t kParts = 16;
constexpr int64_t kLeastItems = 4;  // of the weight's gradient: bands where there are few images

// ---- one convolution over live taps -----------------------------------------------------------------------------

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
void choose_rows(Band& b, int64_t floats_of_x, int64_t floats_of_y, int64_t itemsize, int64_t batch, int64_t threads) {
  const int64_t row = (floats_of_x + floats_of_y) * b.pitch() * itemsize;
  const int64_t halo = (b.up + b.down) * floats_of_x * b.pitch() * itemsize;
  int64_t bands = 1;
  while (bands < b.height && (b.height + bands - 1) / bands * row + halo > kBandBytes) ++bands;
  while (batch * bands < threads && bands < b.height) ++bands;
  b.rows = (b.height + bands - 1) / bands;
}

Band reach_of(const Problem& p, bool mirrored) {
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

// ---- epilogue ---------------------------------------------------------------------------------------------------

template <typename T>
inline T sigmoid(T b, T& complement) {
  const T e = math::exp(-math::abs(b));
  const T near = math::quotient(T(1), T(1) + e), far = e * near;
  complement = b < T(0) ? near : far;
  return b < T(0) ? far : near;
}

template <typename T>
void relu(T* u, int64_t n) {
  for (int64_t i = 0; i < n; ++i) u[i] = u[i] < T(0) ? T(0) : u[i];  // NaN stays
}

template <typename T>
void gate(T* __restrict u, const T* __restrict v, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    T t, slope, complement;
    math::tanh_sech2(u[i], t, slope);
    u[i] = t * sigmoid(v[i], complement);
  }
}

// What follows the product, for rows of one image that lie in `result` [outputs][stride].
template <typename S>
struct Epilogue {
  const Problem& p;
  const S *condition, *residual;  // [N, Cout, H, W] and [N, Cout', H, W], or null
  S *output, *pre;                // pre or null

  template <typename A, typename T>
  void apply(int64_t n, int64_t first, int64_t rows, T* result, int64_t stride, int64_t pitch) const {
    const int64_t left = p.left(), skip = first * p.width, width = p.width, span = (rows - 1) * pitch + width;
    for (int64_t o = 0; o < left; ++o) {
      for (int64_t half = 0; half < p.outputs / left; ++half) {
        const int64_t c = o + half * left, at = (n * p.outputs + c) * p.pixels() + skip;
        if (condition) add_rows(condition + at, result + c * stride, rows, width, pitch);
        if (pre) store_rows<A>(result + c * stride, pre + at, rows, width, pitch);
      }
      T* u = result + o * stride;
      if (p.activation == kRelu) relu(u, span);
      if (p.activation == kGate) gate(u, u + left * stride, span);
      const int64_t at = (n * left + o) * p.pixels() + skip;
      if (residual) add_rows(residual + at, u, rows, width, pitch);
      store_rows<A>(u, output + at, rows, width, pitch);
    }
  }
};

// ---- gradients --------------------------------------------------------------------------------------------------

// g over tiles of one plane; u, v: the state of the channel and, for the gate, of its other half.
template <typename T>
void slope_relu(T* __restrict g, const T* __restrict u, int64_t n) {
  for (int64_t i = 0; i < n; ++i) g[i] = u[i] <= T(0) ? T(0) : g[i];
}
template <typename T>
void slope_gate(T* __restrict ga, T* __restrict gb, const T* __restrict a, const T* __restrict b, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    T t, slope, complement;
    math::tanh_sech2(a[i], t, slope);
    const T s = sigmoid(b[i], complement), g = ga[i];
    ga[i] = g * s * slope;
    gb[i] = g * t * (s * complement);
  }
}

// Sum in 16 lanes, these in double.
template <typename T>
double sum_of(const T* v, int64_t n) {
  T lane[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int64_t l = 0; l < 16; ++l) lane[l] += v[i + l];
  double total = 0;
  for (T l : lane) total += l;
  for (; i < n; ++i) total += v[i];
  return total;
}

// g [N, Cout, H, W] (null where it is the output's gradient itself) and its sums over the pixels [N, Cout] (or null).
template <typename S, typename T>
void pre_gradient(const Problem& p, const S* grad_output, const S* grad_pre, const S* state, S* g, double* sums) {
  constexpr int64_t kTile = 512;
  const int64_t left = p.left(), halves = p.outputs / left, size = p.pixels();
  torch::stable::parallel_for(0, p.batch * left, std::max<int64_t>(1, 16384 / size), [&](int64_t from, int64_t to) {
    T tile[2][kTile], kept[2][kTile], extra[kTile];
    for (int64_t task = from; task < to; ++task) {
      const int64_t n = task / left, o = task % left;
      double total[2] = {0, 0};
      for (int64_t i = 0; i < size; i += kTile) {
        const int64_t count = std::min(kTile, size - i);
        int64_t at[2];
        for (int64_t h = 0; h < halves; ++h) at[h] = (n * p.outputs + o + h * left) * size + i;
        if (grad_output)
          load(grad_output + task * size + i, tile[0], count);
        else
          std::fill_n(tile[0], count, T(0));
        if (p.activation != kNone && grad_output) {
          for (int64_t h = 0; h < halves; ++h) load(state + at[h], kept[h], count);
          if (p.activation == kRelu)
            slope_relu(tile[0], kept[0], count);
          else
            slope_gate(tile[0], tile[1], kept[0], kept[1], count);
        } else if (halves == 2) {
          std::fill_n(tile[1], count, T(0));
        }
        for (int64_t h = 0; h < halves; ++h) {
          if (grad_pre) {
            load(grad_pre + at[h], extra, count);
            for (int64_t j = 0; j < count; ++j) tile[h][j] += extra[j];
          }
          if (g) store(tile[h], g + at[h], count);
          if (sums) total[h] += sum_of(tile[h], count);
        }
      }
      for (int64_t h = 0; sums && h < halves; ++h) sums[n * p.outputs + o + h * left] = total[h];
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

// ---- the operators ----------------------------------------------------------------------------------------------

template <typename F>
void dispatch(const Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f.template operator()<float, float>();
    case ScalarType::Double: return f.template operator()<double, double>();
    case ScalarType::BFloat16: return f.template operator()<BFloat16, float>();
    case ScalarType::Half: return f.template operator()<Half, float>();
    default: STD_TORCH_CHECK(false, "masked_conv: no kernel for this dtype of x");
  }
}

// f<A>(), A being the arithmetic for storage S.
template <typename S, typename T, typename F>
void with_arithmetic(F&& f) {
  if constexpr (kHasPairs && std::is_same_v<S, BFloat16>)
    if (multiplies_pairs()) return f.template operator()<Pairs>();
  f.template operator()<Single<T>>();
}

// The weight as A packs it: itself, or widened into `buffer`.
template <typename S, typename A>
const typename A::Weight* packable(const Tensor& weight, std::vector<typename A::Weight>& buffer) {
  using Weight = typename A::Weight;
  if constexpr (sizeof(S) == sizeof(Weight)) {
    return data<Weight>(weight);
  } else {
    buffer.resize(weight.numel());
    load(data<S>(weight), buffer.data(), int64_t(buffer.size()));
    return buffer.data();
  }
}

std::tuple<Tensor, Tensor> masked_conv(Tensor x, Tensor weight, std::optional<Tensor> bias,
                                       std::optional<Tensor> condition, std::optional<Tensor> residual,
                                       int64_t mask_type, int64_t data_channels, int64_t region, int64_t activation,
                                       bool keep) {
  const Problem p = problem_of(x, weight, mask_type, data_channels, region, activation);
  const bool kept = keep && (activation == kGate || (activation == kRelu && residual.has_value()));
  const bool by_torch = p.batch && torch_is_faster(x);
  const bool passes =
      by_torch && activation == kNone && !condition.has_value() && !residual.has_value();  // torch's is the output
  Tensor output =
      empty(x, passes ? std::vector<int64_t>{0} : std::vector<int64_t>{p.batch, p.left(), p.height, p.width},
            x.scalar_type());
  Tensor pre = empty(x, kept ? std::vector<int64_t>{p.batch, p.outputs, p.height, p.width} : std::vector<int64_t>{0},
                     x.scalar_type());
  if (p.batch == 0) return {output, pre};
  dispatch(x, [&]<typename S, typename T>() {
    const bool flat = condition.has_value() && condition->dim() == 2;
    std::vector<T> shift(p.outputs * (flat ? p.batch : 1), T(0));
    const int64_t per_image = flat ? p.outputs : 0;
    if (flat) load(data<S>(condition), shift.data(), int64_t(shift.size()));
    if (bias.has_value() && !by_torch) {  // torch adds it before it rounds
      std::vector<T> b(p.outputs);
      load(data<S>(bias), b.data(), p.outputs);
      for (size_t i = 0; i < shift.size(); ++i) shift[i] += b[i % p.outputs];
    }
    const Epilogue<S> epilogue{p, flat ? nullptr : data<S>(condition), data<S>(residual), mutable_data<S>(output),
                               kept ? mutable_data<S>(pre) : nullptr};
    if (by_torch) {
      const Tensor product = torch_convolution(p, x, masked_weight<S>(p, weight), bias);
      if (passes) {
        output = product;
        return;
      }
      const S* from = data<S>(product);
      torch::stable::parallel_for(0, p.batch, 1, [&](int64_t begin, int64_t end) {
        T* image = scratch<T>(1, p.outputs * p.pixels());
        for (int64_t n = begin; n < end; ++n) {
          load(from + n * p.outputs * p.pixels(), image, p.outputs * p.pixels());
          for (int64_t o = 0; flat && o < p.outputs; ++o)
            for (int64_t i = 0; i < p.pixels(); ++i) image[o * p.pixels() + i] += shift[n * per_image + o];
          epilogue.template apply<Single<T>>(n, 0, p.height, image, p.pixels(), p.width);
        }
      });
      return;
    }
    with_arithmetic<S, T>([&]<typename A>() {
      std::vector<typename A::Weight> buffer;
      const Packed<A> packed = pack<A>(p, packable<S, A>(weight, buffer), false);
      const bool alone = activation == kNone && !epilogue.condition && !epilogue.residual && !kept;
      S* straight = alone && goes_straight<S>(packed) ? mutable_data<S>(output) : nullptr;
      convolve(
          packed, data<S>(x), p.batch, straight, [&](int64_t n, int64_t o) { return shift[n * per_image + o]; },
          [&](int64_t n, int64_t first, int64_t rows, T* result, int64_t stride) {
            epilogue.template apply<A>(n, first, rows, result, stride, packed.band.pitch());
          });
    });
  });
  return {output, pre};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> masked_conv_backward(
    std::optional<Tensor> grad_output, std::optional<Tensor> grad_pre, std::optional<Tensor> state, Tensor x,
    Tensor weight, int64_t mask_type, int64_t data_channels, int64_t region, int64_t activation, int64_t condition_rank,
    bool want_x, bool want_weight, bool want_bias, bool want_condition) {
  const Problem p = problem_of(x, weight, mask_type, data_channels, region, activation);
  const ScalarType dtype = x.scalar_type();
  const std::vector<int64_t> whole{p.batch, p.outputs, p.height, p.width}, flat{p.batch, p.outputs}, nothing{0};
  const bool by_torch = p.batch && torch_is_faster(x);  // which makes the tensors of its results itself
  Tensor grad_x = empty(x, want_x && !by_torch ? shape_of(x) : nothing, dtype);
  Tensor grad_w = empty(x, want_weight && !by_torch ? shape_of(weight) : nothing, dtype);
  Tensor grad_bias = empty(x, want_bias ? std::vector<int64_t>{p.outputs} : nothing, dtype);
  Tensor grad_condition = empty(x, !want_condition ? nothing : condition_rank == 4 ? whole : flat, dtype);
  // with no activation g is the output's gradient, unless it must be handed out
  const bool full = want_condition && condition_rank == 4;
  const bool made = full || activation != kNone || !grad_output.has_value() || grad_pre.has_value();
  Tensor g = full ? grad_condition : made ? empty(x, whole, dtype) : *grad_output;
  const bool flat_condition = want_condition && condition_rank == 2;
  const bool bias_by_torch = by_torch && want_bias && !flat_condition;  // on the way, where nothing else is summed
  const bool summed = flat_condition || (want_bias && !bias_by_torch);
  dispatch(x, [&]<typename S, typename T>() {
    std::vector<double> sums(summed ? p.batch * p.outputs : 0);
    if (made || summed)
      pre_gradient<S, T>(p, data<S>(grad_output), data<S>(grad_pre), data<S>(state),
                         made ? mutable_data<S>(g) : nullptr, summed ? sums.data() : nullptr);
    if (want_bias && !bias_by_torch) {
      std::vector<T> total(p.outputs);
      for (int64_t o = 0; o < p.outputs; ++o) {
        double sum = 0;
        for (int64_t n = 0; n < p.batch; ++n) sum += sums[n * p.outputs + o];
        total[o] = T(sum);
      }
      store(total.data(), mutable_data<S>(grad_bias), p.outputs);
    }
    if (flat_condition && p.batch) {
      const std::vector<T> each(sums.begin(), sums.end());
      store(each.data(), mutable_data<S>(grad_condition), p.batch * p.outputs);
    }
    if (p.batch == 0) {
      if (want_weight) std::fill_n(mutable_data<S>(grad_w), weight.numel(), S(0.0f));
      return;
    }
    if (by_torch) {
      if (!want_x && !want_weight && !bias_by_torch) return;
      const auto found = torch_backward(p, g, x, masked_weight<S>(p, weight), want_x, want_weight, bias_by_torch);
      if (want_x) grad_x = std::get<0>(found);
      if (want_weight) grad_w = masked_weight<S>(p, std::get<1>(found));
      if (bias_by_torch) grad_bias = std::get<2>(found);
      return;
    }
    with_arithmetic<S, T>([&]<typename A>() {
      if (want_x) {
        std::vector<typename A::Weight> buffer;
        const Packed<A> packed = pack<A>(p, packable<S, A>(weight, buffer), true);
        S* to = mutable_data<S>(grad_x);
        convolve(
            packed, data<S>(g), p.batch, goes_straight<S>(packed) ? to : nullptr, [](int64_t, int64_t) { return T(0); },
            [&](int64_t n, int64_t first, int64_t rows, T* result, int64_t stride) {
              for (int64_t i = 0; i < p.inputs; ++i)
                store_rows<A>(result + i * stride, to + (n * p.inputs + i) * p.pixels() + first * p.width, rows,
                              p.width, packed.band.pitch());
            });
      }
      if (want_weight) grad_weight<S, A>(p, data<S>(g), data<S>(x), mutable_data<S>(grad_w));
    });
  });
  return {grad_x, grad_w, grad_bias, grad_condition};
}

}  // namespace
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels, CPU, m) {
  m.impl("masked_conv", TORCH_BOX(&genkernels::masked_conv));
  m.impl("masked_conv_backward", TORCH_BOX(&genkernels::masked_conv_backward));
}
