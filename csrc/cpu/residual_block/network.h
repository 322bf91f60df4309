// A residual block's maps, packed for both directions, and the product that all of it is built of.
//
// correlate (masked_conv/products.h): out[o][q] = shift[o] + Σ_e w[e][o]·x[q + at_e]: an entry is one channel, or one
// tap of one. So a matrix, a 1×1 and a 3×3 convolution and their transposes are one product with other entries.
#pragma once

#include "../masked_conv/products.h"
#include "curves.h"
#include "grid.h"

namespace genkernels {
namespace block {

// out = W x or Wᵀ x over the columns of a tile.
template <typename T>
struct Product {
  int64_t inputs = 0, outputs = 0, taps = 1, plane = 0;
  std::vector<int32_t> at;  // [inputs·taps]
  std::vector<T> weights;   // blocks of up to kBlock outputs, [entries][outputs of the block]

  static int together(int64_t left) {
    int c = masked::kBlock;
    while (c > left) c /= 2;
    return c;
  }

  // element(output, input, tap); away(tap): how far its column lies.
  template <typename Element, typename Away>
  void pack(int64_t to, int64_t from, int64_t tap_count, int64_t stride, Element&& element, Away&& away) {
    outputs = to, inputs = from, taps = tap_count, plane = stride;
    at.resize(inputs * taps);
    for (int64_t i = 0; i < inputs; ++i)
      for (int64_t t = 0; t < taps; ++t) at[i * taps + t] = int32_t(i * plane + away(t));
    weights.resize(outputs * inputs * taps);
    const int64_t entries = inputs * taps, whole = outputs / masked::kBlock;
    const auto fill = [&](int64_t first, int count) {
      T* w = weights.data() + first * entries;
      for (int64_t i = 0; i < inputs; ++i)
        for (int64_t t = 0; t < taps; ++t, w += count)
          for (int c = 0; c < count; ++c) w[c] = element(first + c, i, t);
    };
    const int64_t grain = std::max<int64_t>(1, 64 * 1024 / (masked::kBlock * entries + 1));
    torch::stable::parallel_for(0, whole, grain, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) fill(b * masked::kBlock, masked::kBlock);
    });
    for (int64_t o = whole * masked::kBlock; o < outputs;) {
      const int count = together(outputs - o);
      fill(o, count);
      o += count;
    }
  }

  // x and to point to column 0 of channel 0; `to` has a stride of `ldo`. columns: whole vectors.
  void run(const T* x, const T* bias, T* to, int64_t ldo, int64_t columns) const {
    constexpr int64_t L = Vector<T>::kLanes;
    const int64_t vectors = columns / L, entries = inputs * taps, step = masked::vectors_beside(masked::kBlock);
    for (int64_t v = 0; v < vectors; v += step)
      for (int64_t o = 0; o < outputs;) {
        const int count = together(outputs - o);
        T shift[masked::kBlock] = {};
        if (bias) std::copy_n(bias + o, count, shift);
        const auto some = [&]<int C>() {
          for (int64_t u = v, end = std::min(vectors, v + step); u < end;) {
            const auto tile = [&]<int V>() {
              masked::correlate_tile<T, C, V>(x + u * L, at.data(), weights.data() + o * entries, entries, shift,
                                              to + o * ldo + u * L, ldo);
              u += V;
            };
            if (end - u >= 3)
              tile.template operator()<3>();
            else if (end - u == 2)
              tile.template operator()<2>();
            else
              tile.template operator()<1>();
          }
        };
        if (count == 8 && masked::kBlock == 8)
          some.template operator()<masked::kBlock>();
        else if (count == 4)
          some.template operator()<4>();
        else if (count == 2)
          some.template operator()<2>();
        else
          some.template operator()<1>();
        o += count;
      }
  }
};

// One map, its weight being [outputs, inputs, k, k].
template <typename T>
struct Map {
  int64_t outputs = 0, inputs = 0, size = 1;
  const T* weight = nullptr;
  const T* bias = nullptr;
  const T* own = nullptr;  // a bias of each sample [N, outputs], instead
  Product<T> forward, transposed;

  int64_t taps() const { return size * size; }
  int64_t count() const { return outputs * inputs * taps(); }
  // columns from a pixel to the one that a tap sees
  int64_t away(int64_t tap, int64_t pitch) const { return (tap / size - size / 2) * pitch + tap % size - size / 2; }
};

template <typename T>
struct Network {
  std::vector<Map<T>> maps;
  const T* parameters = nullptr;
  Nonlinearity activation = Nonlinearity::kRelu;
  Grid grid;

  int64_t count() const { return int64_t(maps.size()); }
  int64_t features() const { return maps[0].inputs; }
  bool mirrored() const { return activation == Nonlinearity::kClipswish; }
  int64_t arguments(int64_t i) const { return maps[i].outputs; }  // of activation i
  int64_t values(int64_t i) const { return maps[i].outputs * (mirrored() ? 2 : 1); }

  void pack(bool forwards, bool backwards) {
    const int64_t plane = grid.plane(), pitch = grid.pitch(), ways = int64_t(forwards) + int64_t(backwards);
    torch::stable::parallel_for(0, ways * count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t job = begin; job < end; ++job) {
        Map<T>& m = maps[job / ways];
        if (forwards && job % ways == 0)
          m.forward.pack(
              m.outputs, m.inputs, m.taps(), plane,
              [&](int64_t o, int64_t i, int64_t t) { return m.weight[(o * m.inputs + i) * m.taps() + t]; },
              [&](int64_t t) { return m.away(t, pitch); });
        else
          m.transposed.pack(
              m.inputs, m.outputs, m.taps(), plane,
              [&](int64_t i, int64_t o, int64_t t) { return m.weight[(o * m.inputs + i) * m.taps() + t]; },
              [&](int64_t t) { return -m.away(t, pitch); });
      }
    });
  }
};

// A tensor's numbers in the type that is computed in; a copy where it is stored in half.
template <typename T>
class Numbers {
 public:
  Numbers() = default;
  explicit Numbers(const Tensor& t) {
    with_dtype<float, double, BFloat16, Half>("genkernels: a residual block's tensors", t, [&]<typename S>() {
      require((std::is_same_v<arithmetic_t<S>, T>), "genkernels: a kernel must be given contiguous ", Dtype<T>::kName,
              " here, or what is computed in it, got another dtype");
      if constexpr (std::is_same_v<S, T>) {
        at_ = data<T>(t);
      } else if constexpr (std::is_same_v<arithmetic_t<S>, T>) {
        copy_.resize(t.numel());
        load(data<S>(t), copy_.data(), t.numel());
        at_ = copy_.data();
      }
    });
  }
  operator const T*() const { return at_; }

 private:
  const T* at_ = nullptr;
  std::vector<T> copy_;
};

// Room for a result in the type that is computed in, and the result as it is stored.
template <typename T>
class Result {
 public:
  Result(const Tensor& like, const std::vector<int64_t>& shape) : tensor_(empty(like, shape)) {
    if (tensor_.scalar_type() == Dtype<T>::kType)
      at_ = mutable_data<T>(tensor_);
    else
      copy_.resize(tensor_.numel()), at_ = copy_.data();
  }
  operator T*() { return at_; }
  Tensor done() {
    if (!copy_.empty()) {
      if constexpr (std::is_same_v<T, float>) {
        if (tensor_.scalar_type() == ScalarType::BFloat16)
          store(copy_.data(), mutable_data<BFloat16>(tensor_), tensor_.numel());
        else
          store(copy_.data(), mutable_data<Half>(tensor_), tensor_.numel());
      }
    }
    return tensor_;
  }

 private:
  Tensor tensor_;
  T* at_ = nullptr;
  std::vector<T> copy_;
};

// What an operator is given, as numbers.
template <typename T>
struct Given {
  std::vector<Numbers<T>> weights, biases;
  Numbers<T> parameters;
  Network<T> net;

  Given(const char* who, const Tensor& x, const std::vector<Tensor>& w, const std::vector<Tensor>& b,
        const Tensor& parameters_of, int64_t activation)
      : parameters(parameters_of) {
    require(w.size() >= 2 && b.size() == w.size() && parameters_of.numel() == int64_t(w.size()) - 1, who,
            ": weights, biases and parameters must be of one number of maps, two or more");
    require(activation >= 0 && activation <= int64_t(Nonlinearity::kClipswish), who, ": there is no such activation");
    net.activation = Nonlinearity(activation);
    net.parameters = parameters;
    Grid& grid = net.grid;
    grid.lanes = Vector<T>::kLanes;
    grid.flat = x.dim() == 2;
    if (!grid.flat) grid.height = x.size(2), grid.width = x.size(3);
    int64_t width = x.size(1);
    weights.reserve(w.size()), biases.reserve(w.size());
    for (size_t i = 0; i < w.size(); ++i) {
      weights.emplace_back(w[i]);
      biases.emplace_back(b[i]);
      Map<T> m;
      m.outputs = w[i].size(0), m.inputs = w[i].size(1);
      m.size = grid.flat ? 1 : w[i].size(2);
      const bool own = b[i].dim() == 2;
      require(w[i].dim() == x.dim() && m.inputs == width && b[i].numel() == (own ? x.size(0) : 1) * m.outputs &&
                  w[i].numel() == m.count(),
              who, ": weights and biases must fit together");
      m.weight = weights[i];
      (own ? m.own : m.bias) = biases[i];
      if (m.size == 3) grid.reach = 1;
      width = m.outputs * (net.mirrored() ? 2 : 1);
      net.maps.push_back(std::move(m));
    }
    require(net.maps.back().outputs == x.size(1), who, ": the last map must have as many outputs as x has channels");
  }

  // Samples a tile: as many columns as keep a tile's planes in the second-level cache and fill its vectors. A fully
  // connected block's are samples: two or three vectors of the product, whichever fills more of the tiles that four
  // threads take at a time.
  void cut(int64_t batch) {
    Grid& grid = net.grid;
    const int64_t wanted = 3 * 16;  // columns: whole steps of the product
    const int64_t each = grid.rows() * grid.pitch();
    const auto spent = [&](int64_t samples) { return round_up(batch, 4 * samples); };
    grid.samples = !grid.flat ? 4 * wanted / each : spent(32) < spent(wanted) ? 32 : wanted;
    grid.samples = std::max<int64_t>(1, std::min(grid.samples, std::max<int64_t>(batch, 1)));
    for (const Map<T>& m : net.maps)
      require(std::max(m.inputs, m.outputs) * grid.plane() < (int64_t(1) << 31),
              "genkernels: a residual block's channels times the pixels of an image must stay below 2^31");
  }
};

}  // namespace block
}  // namespace genkernels
