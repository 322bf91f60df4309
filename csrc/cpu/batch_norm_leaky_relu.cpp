// Batch normalisation and leaky ReLU on the CPU; genkernels/reference/batch_norm_leaky_relu.py has the maths.
//
// Layout. x [N, C, S]: a channel's N·S numbers lie in N stretches, far apart and often at a distance that sends all of
// them to the same few lines of the caches. So they are gathered, widened, in one stretch of scratch, where every
// further pass finds them: a channel of up to kWhole numbers at once, which then comes from memory a single time.
// Larger ones go piece by piece, and twice.
//
// Sums: pieces of kPiece numbers, a piece in vectors, their moments put together in order in fp64 (Chan et al.,
// "Updating formulae and a pairwise algorithm for computing sample variances", 1979). The same bits for any number of
// threads.
//
// Bytes of channels up to kWhole: forward reads x and writes y; backward reads the gradient and x and writes the
// gradient of x. Beyond it what is read is read twice.
#include <cmath>

#include "common.h"
#include "vector.h"

namespace genkernels {
namespace {

constexpr int64_t kPiece = 8 * 1024, kWhole = 64 * 1024;
constexpr int64_t kWork = 16 * 1024;  // numbers worth a thread

struct Geometry {
  int64_t samples, channels, pixels;

  explicit Geometry(const Tensor& x) : samples(x.size(0)), channels(x.size(1)), pixels(1) {
    for (int64_t d = 2; d < x.dim(); ++d) pixels *= x.size(d);
  }
  int64_t count() const { return samples * pixels; }  // of a channel
  int64_t pieces() const { return (count() + kPiece - 1) / kPiece; }
  int64_t size(int64_t piece) const { return std::min(kPiece, count() - piece * kPiece); }
  bool whole() const { return count() <= kWhole; }

  // Calls f(place in x, place in the channel − begin, how many) for the stretches of numbers [begin, end) of a channel.
  template <typename F>
  void each_stretch(int64_t channel, int64_t begin, int64_t end, F&& f) const {
    int64_t sample = begin / pixels, from = begin % pixels;
    for (int64_t at = begin; at < end; ++sample, from = 0) {
      const int64_t some = std::min(pixels - from, end - at);
      f((sample * channels + channel) * pixels + from, at - begin, some);
      at += some;
    }
  }
};

// value(at) for all of [0, n), added up; `at(p)` is p[i], of one number or of a vector of them.
template <typename T, typename F>
double sum(int64_t n, F&& value) {
  using Vec = typename Vector<T>::type;
  constexpr int64_t L = Vector<T>::kLanes, kWide = 4;
  Vec wide[kWide] = {};
  int64_t i = 0;
  for (; i + kWide * L <= n; i += kWide * L)
#pragma GCC unroll 4
    for (int64_t j = 0; j < kWide; ++j) wide[j] += value([&](const T* p) { return load_vector<T>(p + i + j * L); });
  for (; i + L <= n; i += L) wide[0] += value([&](const T* p) { return load_vector<T>(p + i); });
  double total = 0;
  for (; i < n; ++i) total += double(value([&](const T* p) { return p[i]; }));
  const Vec all = (wide[0] + wide[1]) + (wide[2] + wide[3]);
  for (int64_t l = 0; l < L; ++l) total += double(all[l]);
  return total;
}

// to[i] = value(at) for all of [0, n).
template <typename T, typename F>
void fill(T* to, int64_t n, F&& value) {
  constexpr int64_t L = Vector<T>::kLanes;
  int64_t i = 0;
  for (; i + L <= n; i += L) store_vector<T>(value([&](const T* p) { return load_vector<T>(p + i); }), to + i);
  for (; i < n; ++i) to[i] = value([&](const T* p) { return p[i]; });
}

// The same where `to` may be of half numbers; `room` has place for n.
template <typename S, typename T, typename F>
void fill_narrowed(S* to, T* room, int64_t n, F&& value) {
  if constexpr (std::is_same_v<S, T>) {
    fill<T>(to, n, value);
  } else {
    fill<T>(room, n, value);
    store(room, to, n);
  }
}

template <typename V, typename T>
V leaky(V before, V value, T slope) {
  return before > 0 ? value : slope * value;
}

// Count, mean and the sum of squares around it.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  void add(const Moments& other) {
    if (other.count == 0) return;
    const double total = count + other.count, gap = other.mean - mean;
    squares += other.squares + gap * gap * (count * other.count / total);
    mean += gap * (other.count / total);
    count = total;
  }
};

template <typename T>
Moments moments_of(const T* x, int64_t n) {
  Moments m{double(n)};
  m.mean = sum<T>(n, [&](auto at) { return at(x); }) / double(n);
  const T mean = T(m.mean);
  const double off = m.mean - double(mean);  // what the rounding of the mean adds to every square
  m.squares = sum<T>(n,
                     [&](auto at) {
                       const auto d = at(x) - mean;
                       return d * d;
                     }) -
              off * off * double(n);
  return m;
}

// Of a channel: y before the leaky ReLU is (x − mean) · scale + shift.
template <typename T>
struct Line {
  T mean, inverse, scale, shift;

  Line(double mean, double variance, double eps, const T* weight, const T* bias, int64_t channel)
      : mean(T(mean)), inverse(T(1 / std::sqrt(variance + eps))) {
    scale = weight ? inverse * weight[channel] : inverse;
    shift = bias ? bias[channel] : T(0);
  }
};

template <typename S, typename T>
struct Forward {
  const Geometry& g;
  const S* x;
  const T *weight, *bias;
  T eps, slope;
  S* y;
  T *mean, *variance;

  // Numbers [begin, end) of a channel, gathered.
  void gather(int64_t channel, int64_t begin, int64_t end, T* to) const {
    g.each_stretch(channel, begin, end, [&](int64_t from, int64_t place, int64_t n) {
      if constexpr (std::is_same_v<S, T>)  // short ones are not worth a call
        fill<T>(to + place, n, [&](auto at) { return at(x + from); });
      else
        load(x + from, to + place, n);
    });
  }

  void apply(int64_t channel, int64_t begin, int64_t end, const T* gathered, T* room) const {
    const Line<T> line(mean[channel], variance[channel], eps, weight, bias, channel);
    g.each_stretch(channel, begin, end, [&](int64_t to, int64_t from, int64_t n) {
      const T* values = gathered + from;
      fill_narrowed(y + to, room, n, [&](auto at) {
        const auto before = (at(values) - line.mean) * line.scale + line.shift;
        return leaky(before, before, slope);
      });
    });
  }

  void settle(int64_t channel, const Moments* parts, int64_t count) const {
    Moments all;
    for (int64_t p = 0; p < count; ++p) all.add(parts[p]);
    mean[channel] = T(all.mean);
    variance[channel] = all.squares < 0 ? T(0) : T(all.squares / all.count);
  }

  void run() const {
    const int64_t pieces = g.pieces();
    if (g.whole()) {
      const int64_t grain = std::max<int64_t>(1, kWork / g.count());
      torch::stable::parallel_for(0, g.channels, grain, [&](int64_t begin, int64_t end) {
        std::vector<T> gathered(g.count()), room(std::is_same_v<S, T> ? 0 : g.pixels);
        std::vector<Moments> parts(pieces);
        for (int64_t c = begin; c < end; ++c) {
          gather(c, 0, g.count(), gathered.data());
          for (int64_t p = 0; p < pieces; ++p) parts[p] = moments_of(gathered.data() + p * kPiece, g.size(p));
          settle(c, parts.data(), pieces);
          apply(c, 0, g.count(), gathered.data(), room.data());
        }
      });
      return;
    }
    std::vector<Moments> parts(g.channels * pieces);
    const auto each_piece = [&](auto f) {
      torch::stable::parallel_for(0, g.channels * pieces, 1, [&](int64_t begin, int64_t end) {
        std::vector<T> gathered(kPiece), room(std::is_same_v<S, T> ? 0 : kPiece);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t c = task / pieces, p = task % pieces, at = p * kPiece;
          gather(c, at, at + g.size(p), gathered.data());
          f(c, p, gathered.data(), room.data());
        }
      });
    };
    each_piece(
        [&](int64_t c, int64_t p, const T* gathered, T*) { parts[c * pieces + p] = moments_of(gathered, g.size(p)); });
    for (int64_t c = 0; c < g.channels; ++c) settle(c, parts.data() + c * pieces, pieces);
    each_piece([&](int64_t c, int64_t p, const T* gathered, T* room) {
      apply(c, p * kPiece, p * kPiece + g.size(p), gathered, room);
    });
  }
};

// g' and g' · (x − mean), added up.
struct Pair {
  double plain = 0, times = 0;
};

template <typename S, typename T>
struct Backward {
  const Geometry& g;
  const S *grad, *x;
  const T *weight, *bias, *mean, *variance;
  T eps, slope;
  S* by_x;
  T *by_weight, *by_bias;

  Line<T> line(int64_t channel) const { return Line<T>(mean[channel], variance[channel], eps, weight, bias, channel); }

  // x − mean and g' of numbers [begin, end) of a channel.
  void gather(int64_t channel, int64_t begin, int64_t end, T* centred, T* slopes, T* room) const {
    const Line<T> l = line(channel);
    g.each_stretch(channel, begin, end, [&](int64_t from, int64_t at, int64_t n) {
      T *d = centred + at, *to = slopes + at;
      const T *values = read(x + from, room, n), *of_y = read(grad + from, room + g.pixels, n);
      fill<T>(d, n, [&](auto at) { return at(values) - l.mean; });
      fill<T>(to, n, [&](auto at) { return leaky(at(d) * l.scale + l.shift, at(of_y), slope); });
    });
  }

  static const T* read(const S* from, T* room, int64_t n) {
    if constexpr (std::is_same_v<S, T>) return from;
    load(from, room, n);
    return room;
  }

  static Pair pair_of(const T* centred, const T* slopes, int64_t n) {
    return {sum<T>(n, [&](auto at) { return at(slopes); }),
            sum<T>(n, [&](auto at) { return at(slopes) * at(centred); })};
  }

  void settle(int64_t channel, const Pair* parts, int64_t count) const {
    Pair all;
    for (int64_t p = 0; p < count; ++p) all.plain += parts[p].plain, all.times += parts[p].times;
    by_bias[channel] = T(all.plain);
    by_weight[channel] = T(all.times * double(line(channel).inverse));
  }

  void apply(int64_t channel, int64_t begin, int64_t end, const T* centred, const T* slopes, T* room) const {
    const Line<T> l = line(channel);
    const T each = T(1) / T(g.count());
    const T constant = by_bias[channel] * each, slant = by_weight[channel] * each * l.inverse;
    g.each_stretch(channel, begin, end, [&](int64_t to, int64_t from, int64_t n) {
      const T *d = centred + from, *of_y = slopes + from;
      fill_narrowed(by_x + to, room, n, [&](auto at) { return l.scale * (at(of_y) - constant - slant * at(d)); });
    });
  }

  void run() const {
    const int64_t pieces = g.pieces(), wide = std::is_same_v<S, T> ? 0 : 2 * g.pixels;
    if (g.whole()) {
      const int64_t grain = std::max<int64_t>(1, kWork / g.count());
      torch::stable::parallel_for(0, g.channels, grain, [&](int64_t begin, int64_t end) {
        std::vector<T> centred(g.count()), slopes(g.count()), room(wide);
        std::vector<Pair> parts(pieces);
        for (int64_t c = begin; c < end; ++c) {
          gather(c, 0, g.count(), centred.data(), slopes.data(), room.data());
          for (int64_t p = 0; p < pieces; ++p)
            parts[p] = pair_of(centred.data() + p * kPiece, slopes.data() + p * kPiece, g.size(p));
          settle(c, parts.data(), pieces);
          apply(c, 0, g.count(), centred.data(), slopes.data(), room.data());
        }
      });
      return;
    }
    std::vector<Pair> parts(g.channels * pieces);
    const auto each_piece = [&](auto f) {
      torch::stable::parallel_for(0, g.channels * pieces, 1, [&](int64_t begin, int64_t end) {
        std::vector<T> centred(kPiece), slopes(kPiece), room(wide);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t c = task / pieces, p = task % pieces, at = p * kPiece;
          gather(c, at, at + g.size(p), centred.data(), slopes.data(), room.data());
          f(c, p, centred.data(), slopes.data(), room.data());
        }
      });
    };
    each_piece([&](int64_t c, int64_t p, const T* centred, const T* slopes, T*) {
      parts[c * pieces + p] = pair_of(centred, slopes, g.size(p));
    });
    for (int64_t c = 0; c < g.channels; ++c) settle(c, parts.data() + c * pieces, pieces);
    each_piece([&](int64_t c, int64_t p, const T* centred, const T* slopes, T* room) {
      apply(c, p * kPiece, p * kPiece + g.size(p), centred, slopes, room);
    });
  }
};

void require_channels(const Geometry& g, const std::optional<Tensor>& t) {
  require(!t || t->numel() == g.channels, "batch_norm_leaky_relu: weight, bias and statistics must be [C]");
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_leaky_relu(Tensor x, std::optional<Tensor> weight,
                                                         std::optional<Tensor> bias, double eps,
                                                         double negative_slope) {
  require(x.dim() >= 2, "batch_norm_leaky_relu: x must be [N, C, ...]");
  const Geometry g(x);
  for (const auto& t : {weight, bias}) require_channels(g, t);
  Tensor y = empty(x), mean = empty(x, {g.channels}, arithmetic_dtype(x)),
         variance = empty(x, {g.channels}, arithmetic_dtype(x));
  if (g.count() == 0) return {y, torch::stable::zero_(mean), torch::stable::zero_(variance)};
  with_dtype<float, double, BFloat16, Half>("batch_norm_leaky_relu: x", x, [&]<typename S>() {
    using T = arithmetic_t<S>;
    Forward<S, T>{g,
                  data<S>(x),
                  data<T>(weight),
                  data<T>(bias),
                  T(eps),
                  T(negative_slope),
                  mutable_data<S>(y),
                  mutable_data<T>(mean),
                  mutable_data<T>(variance)}
        .run();
  });
  return {y, mean, variance};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_leaky_relu_backward(Tensor grad, Tensor x, std::optional<Tensor> weight,
                                                                  std::optional<Tensor> bias, Tensor mean,
                                                                  Tensor variance, double eps, double negative_slope) {
  require(x.dim() >= 2 && shape_of(grad) == shape_of(x),
          "batch_norm_leaky_relu: x must be [N, C, ...], and a gradient of its shape");
  const Geometry g(x);
  for (const std::optional<Tensor>& t : {weight, bias, std::optional(mean), std::optional(variance)})
    require_channels(g, t);
  Tensor by_x = empty(x), by_weight = empty(mean), by_bias = empty(mean);
  if (g.count() == 0) return {by_x, torch::stable::zero_(by_weight), torch::stable::zero_(by_bias)};
  with_dtype<float, double, BFloat16, Half>("batch_norm_leaky_relu: x", x, [&]<typename S>() {
    using T = arithmetic_t<S>;
    Backward<S, T>{g,
                   data<S>(grad),
                   data<S>(x),
                   data<T>(weight),
                   data<T>(bias),
                   data<T>(mean),
                   data<T>(variance),
                   T(eps),
                   T(negative_slope),
                   mutable_data<S>(by_x),
                   mutable_data<T>(by_weight),
                   mutable_data<T>(by_bias)}
        .run();
  });
  return {by_x, by_weight, by_bias};
}

}  // namespace
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels, CPU, m) {
  m.impl("batch_norm_leaky_relu", TORCH_BOX(&genkernels::batch_norm_leaky_relu));
  m.impl("batch_norm_leaky_relu_backward", TORCH_BOX(&genkernels::batch_norm_leaky_relu_backward));
}
