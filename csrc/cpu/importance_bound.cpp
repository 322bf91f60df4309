// The importance-weighted bound and the Gaussian terms under it on the CPU; genkernels/reference/importance_bound.py
// has the maths, csrc/common/importance_bound.h its arithmetic.
//
// The bound: rows among threads; a row's peak, then its exponentials, which lie where the weights will, then these. It
// stays in the first cache. Backward: rows among threads, one pass, or two where the weights have a gradient.
//
// The Gaussian: blocks of samples of one example among threads, each of which finds the example's scales anew; a sample
// is a row of D numbers, in tiles (rows.h). Backward: tiles of one example's columns among threads, which run down its
// samples; kStep of them are added up in T, these sums in fp64, as are kStep runs of a row. Nothing depends on the
// number of threads.
//
// Bytes: log-weights once, weights once; backward weights once, the gradient once. The Gaussian reads ε and writes z;
// its backward reads ε and the gradient of z.
#include "../common/importance_bound.h"
#include "rows.h"
#include "sums.h"
#include "vector.h"

namespace genkernels {
namespace {

using importance::Options;
using importance::Samples;

constexpr int64_t kStep = 16, kBlock = 4096;

// Calls f(values, results, done) for runs of kSumLanes numbers of a row, each of which it takes to a result. The last
// one goes back to fill its lanes, of which `done` are known already; where a row has fewer, −∞ stands before them.
// Rows are short: number by number their rest would cost more than all that is whole.
template <typename T, typename F>
inline void for_each_run(const T* from, T* to, int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes) f(from + i, to + i, int64_t(0));
  if (i == n) return;
  const int64_t done = kSumLanes - (n - i);
  if (i > 0) return f(from + i - done, to + i - done, done);
  alignas(64) T values[kSumLanes], results[kSumLanes];
  std::fill_n(values, kSumLanes, -std::numeric_limits<T>::infinity());
  std::copy_n(from, n, values + done);
  f(values, results, done);
  std::copy_n(results + done, n, to);
}

// lane[0] = join of all lanes, by halves.
template <typename T, typename F>
inline T joined(T* lane, F&& join) {
#pragma GCC unroll 8
  for (int64_t half = kSumLanes / 2; half > 0; half /= 2) {
#pragma GCC ivdep
    for (int64_t l = 0; l < half; ++l) lane[l] = join(lane[l], lane[l + half]);
  }
  return lane[0];
}

// The largest of a row, or a NaN where there is one. Vectors by name: the compiler makes none of the loop over lanes.
template <typename T>
T peak_of(const T* values, int64_t n) {
  using V = typename Vector<T>::type;
  constexpr int64_t kLanes = Vector<T>::kLanes;
  T peak = values[0];
  if (n < kLanes) {
    for (int64_t i = 1; i < n; ++i) peak = importance::larger(peak, values[i]);
    return peak;
  }
  V peaks = load_vector(values + n - kLanes);  // some of them a second time
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) {
    const V v = load_vector(values + i);
    peaks = (v > peaks) | (v != v) ? v : peaks;
  }
  alignas(64) T lane[kSumLanes];
  std::fill_n(lane, kSumLanes, peak);
  store_vector(peaks, lane);
  return joined(lane, [](T a, T b) __attribute__((always_inline)) { return importance::larger(a, b); });
}

// share = e^{ℓ − peak}, and their sum: of kStep runs in T, of these in fp64.
template <typename T>
T exponentials(const T* log_weight, T peak, int64_t n, T* share) {
  double total = 0;
  for (int64_t at = 0; at < n; at += kStep * kSumLanes) {
    alignas(64) T lane[kSumLanes] = {};
    for_each_run(log_weight + at, share + at, std::min(n - at, kStep * kSumLanes),
                 [&](const T* from, T* to, int64_t done) __attribute__((always_inline)) {
#pragma GCC ivdep
                   for (int64_t l = 0; l < kSumLanes; ++l) {
                     const T e = math::exp(from[l] - peak);
                     to[l] = e;
                     lane[l] += l < done ? T(0) : e;
                   }
                 });
    total += joined(lane, [](T a, T b) __attribute__((always_inline)) { return a + b; });
  }
  return T(total);
}

// Calls f(std::bool_constant<...>{}...) with the flags as constants.
template <typename F>
void with_flags(F&& f) {
  f();
}
template <typename F, typename... Flags>
void with_flags(F&& f, bool first, Flags... others) {
  const auto next = [&](auto constant) {
    with_flags([&](auto... constants) { f(constant, constants...); }, others...);
  };
  if (first)
    next(std::true_type{});
  else
    next(std::false_type{});
}

// The backend of common/importance_bound.h.
struct Cpu {
  template <typename S>
  static void bound(const Rows& rows, const Tensor& log_w, const Tensor& bound, const Tensor& weights);
  template <typename S>
  static void bound_backward(const Rows& rows, const std::optional<Tensor>& grad_bound,
                             const std::optional<Tensor>& grad_weights, const Tensor& weights, const Tensor& by_log_w);
  template <typename S>
  static void reparameterize(const Samples& samples, bool prior, const Tensor& noise, const Tensor& mean,
                             const Tensor& log_scale, const Tensor& z, const Tensor& ratio);
  template <typename S>
  static void reparameterize_backward(const Samples& samples, const Options& options,
                                      const std::optional<Tensor>& grad_z, const std::optional<Tensor>& grad_ratio,
                                      const Tensor& noise, const Tensor& mean, const Tensor& log_scale,
                                      const Tensor& by_mean, const Tensor& by_log_scale);
};

inline int64_t grain_of(int64_t length) {
  return std::max<int64_t>(1, kPart / std::max<int64_t>(1, length));
}

// Calls f(first, how many) for blocks of rows among threads: many short rows are widened and narrowed as one.
template <typename S, typename F>
void for_each_block(const Rows& rows, F&& f) {
  const int64_t step = std::max<int64_t>(1, kBlock / rows.length);
  torch::stable::parallel_for(0, rows.count, grain_of(rows.length), [&](int64_t begin, int64_t end) {
    std::vector<arithmetic_t<S>> room(std::is_same_v<S, arithmetic_t<S>> ? 0 : step * rows.length);
    for (int64_t n = begin; n < end; n += step) f(n, std::min(step, end - n), room.data());
  });
}

template <typename S>
void Cpu::bound(const Rows& rows, const Tensor& log_w, const Tensor& bound, const Tensor& weights) {
  using T = arithmetic_t<S>;
  const S* from = data<S>(log_w);
  T *to_bound = mutable_data<T>(bound), *to = mutable_data<T>(weights);
  const int64_t count = rows.length;
  const double log_count = std::log(static_cast<double>(count));
  for_each_block<S>(rows, [&](int64_t first, int64_t some, T* room) {
    const T* log_weight = widened(from + first * count, room, some * count);
    T* share = to + first * count;
    for (int64_t n = first; n < first + some; ++n, log_weight += count, share += count) {
      const T peak = peak_of(log_weight, count);
      T total = 0;
      if (importance::is_finite(peak)) {
        total = exponentials(log_weight, peak, count, share);
#pragma GCC ivdep
        for (int64_t k = 0; k < count; ++k) share[k] /= total;
      } else {
        std::fill_n(share, count, importance::weight_without_peak(peak));
      }
      to_bound[n] = importance::bound_of(peak, total, log_count);
    }
  });
}

template <typename S>
void Cpu::bound_backward(const Rows& rows, const std::optional<Tensor>& grad_bound,
                         const std::optional<Tensor>& grad_weights, const Tensor& weights, const Tensor& by_log_w) {
  using T = arithmetic_t<S>;
  const T *by_bound = data<T>(grad_bound), *by_weights = data<T>(grad_weights), *from = data<T>(weights);
  S* to = mutable_data<S>(by_log_w);
  const int64_t count = rows.length;
  for_each_block<S>(rows, [&](int64_t first, int64_t some, T* room) {
    narrowed(to + first * count, room, some * count, [&](T* out) {
      for (int64_t n = first; n < first + some; ++n, out += count) {
        const T* w = from + n * count;
        T slope = by_bound ? by_bound[n] : T(0);
        if (by_weights) {
          const T* g = by_weights + n * count;
          slope -= T(sum_lanes<T>(count, [&](int64_t k) __attribute__((always_inline)) { return g[k] * w[k]; }));
#pragma GCC ivdep
          for (int64_t k = 0; k < count; ++k) out[k] = (slope + g[k]) * w[k];
        } else {
#pragma GCC ivdep
          for (int64_t k = 0; k < count; ++k) out[k] = slope * w[k];
        }
      }
    });
  });
}

// The scales of one example, [D], and their logarithms' sum.
template <typename S, typename T>
double scales_of(const S* log_scale, int64_t width, T* scale) {
  double sum = 0;
  for_each_tile(0, width, [&](int64_t at, int64_t n) {
    Room<T> room;
    const T* s = widened(log_scale + at, room, n);
    sum += sum_lanes<T>(n, [&](int64_t i) __attribute__((always_inline)) { return s[i]; });
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) scale[at + i] = math::exp(s[i]);
  });
  return sum;
}

template <typename S>
void Cpu::reparameterize(const Samples& samples, bool prior, const Tensor& noise, const Tensor& mean,
                         const Tensor& log_scale, const Tensor& z, const Tensor& ratio) {
  using T = arithmetic_t<S>;
  const S *from = data<S>(noise), *from_mean = data<S>(mean), *from_scale = data<S>(log_scale);
  S* to = mutable_data<S>(z);
  T* to_ratio = mutable_data<T>(ratio);
  const int64_t width = samples.width, step = std::max<int64_t>(1, std::min(samples.count, grain_of(width)));
  const int64_t blocks = (samples.count + step - 1) / step, grain = grain_of(width * step);
  with_flags(
      [&](auto with_prior) {
        torch::stable::parallel_for(0, samples.rows * blocks, grain, [&](int64_t begin, int64_t end) {
          std::vector<T> scale(width), center(width);
          double constant = 0;
          for (int64_t task = begin, known = -1; task < end; ++task) {
            const int64_t n = task / blocks, first = task % blocks * step;
            if (n != known) {
              load(from_mean + n * width, center.data(), width);
              constant = scales_of(from_scale + n * width, width, scale.data());
              if (!prior) constant += importance::kHalfLog2Pi * static_cast<double>(width);
              known = n;
            }
            for (int64_t k = first; k < std::min(samples.count, first + step); ++k) {
              const int64_t row = n * samples.count + k;
              double sum = constant;
              for_each_tile(0, width, [&](int64_t at, int64_t count) {
                Room<T> noise_room, room;
                const T* e = widened(from + row * width + at, noise_room, count);
                const T *m = center.data() + at, *s = scale.data() + at;
                narrowed(to + row * width + at, room, count, [&](T* out) {
                  sum += sum_lanes<T>(count, [&](int64_t i) __attribute__((always_inline)) {
                    const T value = m[i] + s[i] * e[i];
                    out[i] = value;
                    return importance::term<with_prior.value>(e[i], value);
                  });
                });
              });
              to_ratio[row] = T(sum);
            }
          }
        });
      },
      prior);
}

// Sums of one tile of columns: of kStep samples in T, of all in fp64.
template <typename T>
struct TileSums {
  Room<T> part[4];
  double total[4][kTile];

  explicit TileSums(int64_t n) {
    for (int64_t q = 0; q < 4; ++q) {
      std::fill_n(part[q].values, n, T(0));
      std::fill_n(total[q], n, 0.0);
    }
  }
  void flush(int64_t n) {
    for (int64_t q = 0; q < 4; ++q) {
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        total[q][i] += part[q].values[i];
        part[q].values[i] = 0;
      }
    }
  }
};

// Adds one sample. Without a gradient of z, or of the ratio, what it would have been multiplied by plays no part.
template <typename T, bool kByZ, bool kByRatio, bool kPrior, bool kStopped>
void add_sample(TileSums<T>& sums, int64_t n, const T* by_z, T r, const T* e, const T* m, const T* s) {
  T *g_sum = sums.part[0], *g_noise = sums.part[1], *r_noise = sums.part[2], *r_noise2 = sums.part[3];
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (kByZ || (kByRatio && kPrior)) {
      T g = kByZ ? by_z[i] : T(0);
      if constexpr (kByRatio && kPrior) g -= r * (m[i] + s[i] * e[i]);
      g_sum[i] += g;
      g_noise[i] += g * e[i];
    }
    if constexpr (kByRatio && kStopped) {
      r_noise[i] += r * e[i];
      r_noise2[i] += r * e[i] * e[i];
    }
  }
}

template <typename S>
void Cpu::reparameterize_backward(const Samples& samples, const Options& options, const std::optional<Tensor>& grad_z,
                                  const std::optional<Tensor>& grad_ratio, const Tensor& noise, const Tensor& mean,
                                  const Tensor& log_scale, const Tensor& by_mean, const Tensor& by_log_scale) {
  using T = arithmetic_t<S>;
  const S *by_z = data<S>(grad_z), *from = data<S>(noise), *from_mean = data<S>(mean), *from_scale = data<S>(log_scale);
  const T* by_ratio = data<T>(grad_ratio);
  S *to_mean = mutable_data<S>(by_mean), *to_scale = mutable_data<S>(by_log_scale);
  const int64_t width = samples.width, tiles = (width + kTile - 1) / kTile;
  const int64_t grain = grain_of(samples.count * std::min(width, kTile));
  // one function for a tile's sample, not one loop over all tiles: the latter is ten times the code
  decltype(&add_sample<T, true, true, true, true>) add = nullptr;
  with_flags(
      [&](auto z_comes, auto ratio_comes, auto prior, auto stopped) {
        constexpr bool kByRatio = decltype(ratio_comes)::value;
        add = add_sample<T, decltype(z_comes)::value, kByRatio, kByRatio&& decltype(prior)::value,
                         kByRatio&& decltype(stopped)::value>;
      },
      by_z != nullptr, by_ratio != nullptr, options.prior, options.stopped);
  torch::stable::parallel_for(0, samples.rows * tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / tiles, at = task % tiles * kTile, n = std::min(kTile, width - at);
      Room<T> mean_room, scale, noise_room, grad_room, out_mean, out_scale;
      const T* m = widened(from_mean + row * width + at, mean_room, n);
      scales_of(from_scale + row * width + at, n, scale.values);
      TileSums<T> sums(n);
      double r_sum = 0;
      for (int64_t k = 0; k < samples.count; ++k) {
        const int64_t offset = (row * samples.count + k) * width + at;
        const T* e = widened(from + offset, noise_room, n);
        const T* g = by_z ? widened(by_z + offset, grad_room, n) : nullptr;
        const T r = by_ratio ? by_ratio[row * samples.count + k] : T(0);
        r_sum += r;
        add(sums, n, g, r, e, m, scale.values);
        if (k % kStep == kStep - 1) sums.flush(n);
      }
      sums.flush(n);
      for (int64_t i = 0; i < n; ++i) {
        const importance::Sums<double> all{sums.total[0][i], sums.total[1][i], sums.total[2][i], sums.total[3][i]};
        const double s = scale.values[i];
        out_mean.values[i] = T(all.by_mean(options, s));
        out_scale.values[i] = T(all.by_log_scale(options, s, r_sum));
      }
      store(out_mean.values, to_mean + row * width + at, n);
      store(out_scale.values, to_scale + row * width + at, n);
    }
  });
}

}  // namespace
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels, CPU, m) {
  using namespace genkernels;
  m.impl("importance_bound", TORCH_BOX(&importance::importance_bound<Cpu>));
  m.impl("importance_bound_backward", TORCH_BOX(&importance::importance_bound_backward<Cpu>));
  m.impl("gaussian_reparameterize", TORCH_BOX(&importance::gaussian_reparameterize<Cpu>));
  m.impl("gaussian_reparameterize_backward", TORCH_BOX(&importance::gaussian_reparameterize_backward<Cpu>));
}
