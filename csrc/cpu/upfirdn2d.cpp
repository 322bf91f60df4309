// Up-sampling by zeros, a separable filter and down-sampling on the CPU; genkernels/reference/upfirdn2d.py has the
// maths, upfirdn2d/axis.h the taps.
//
// Results are worked out a row at a time: the rows of numbers that it takes, filtered along x, lie in a ring, each made
// once for all the rows of results that take it, and are added up with the weights along y. Both passes multiply
// contiguous vectors by one weight; what is strided is done once a row, the cut into streams before the pass along x
// and the interleaving of phases after it. Zeros are neither stored nor multiplied.
//
// Rows of results go among threads, neighbours together; where a thread begins it fills a ring anew, a filter's height
// of rows. All that a thread touches between reading x and writing y is k rows: the first cache holds it. The order of
// sums is that of the taps: the same bits for any number of threads.
//
// Bytes: reads x and writes y, once. Work: k/u products a number along x for every row of x, the same along y for every
// row of y.
#include <algorithm>
#include <bit>

#include "rows.h"
#include "upfirdn2d/axis.h"
#include "vector.h"

namespace genkernels {
namespace {

constexpr int64_t kGrain = 16 * 1024;  // numbers of y below which a second thread does not pay

template <typename T>
int64_t whole_vectors(int64_t count) {
  return (count + Vector<T>::kLanes - 1) / Vector<T>::kLanes * Vector<T>::kLanes;
}

// Rows of numbers and the weights that they are added up with.
template <typename T>
struct Sum {
  std::vector<const T*> rows;
  std::vector<T> weights;

  void add(const T* row, T weight) {
    rows.push_back(row);
    weights.push_back(weight);
  }
  void clear() {
    rows.clear();
    weights.clear();
  }
  // to[0 … count), of whole vectors.
  void run(T* to, int64_t count) const {
    const int64_t many = rows.size();
    const T* const* from = rows.data();
    const T* by = weights.data();
    for (int64_t i = 0; i < count; i += Vector<T>::kLanes) {
      typename Vector<T>::type sum = {};
      for (int64_t k = 0; k < many; ++k) sum += by[k] * load_vector(from[k] + i);
      store_vector<T>(sum, to + i);
    }
  }
};

// The pass along x.
template <typename T>
class AlongX {
 public:
  explicit AlongX(const Axis<T>& axis)
      : axis_(axis), padded_(whole_vectors<T>((axis.results + axis.phases - 1) / axis.phases)), sums_(axis.phases) {
    int64_t last = first_ = axis.taps[0].empty() ? 0 : axis.place_of(axis.taps[0][0]);
    for (const auto& taps : axis.taps)
      for (const Tap<T>& tap : taps) {
        first_ = std::min(first_, axis.place_of(tap));
        last = std::max(last, axis.place_of(tap));
      }
    stream_ = last - first_ + padded_;
    streams_.assign(axis.streams * stream_, T(0));
    phases_.resize(axis.phases * padded_);
    for (int64_t phase = 0; phase < axis.phases; ++phase)
      for (const Tap<T>& tap : axis.taps[phase]) {
        const int64_t place = axis.place_of(tap), s = tap.from - place * axis.streams;
        sums_[phase].add(streams_.data() + s * stream_ + place - first_, tap.weight);
      }
  }
  AlongX(const AlongX&) = delete;  // its sums point into its streams

  int64_t room() const { return axis_.phases * padded_; }  // numbers of a row of results, whole vectors for y's pass

  void run(const T* row, T* to) {
    for (int64_t s = 0; s < axis_.streams; ++s) cut(row, s);
    if (axis_.phases == 1) return sums_[0].run(to, padded_);
    for (int64_t phase = 0; phase < axis_.phases; ++phase) sums_[phase].run(phases_.data() + phase * padded_, padded_);
    interleave(to);
  }

 private:
  // Numbers s, s + M, … of the row; what lies beyond its ends stays 0.
  void cut(const T* row, int64_t s) {
    const int64_t step = axis_.streams;
    const int64_t begin = std::max<int64_t>(0, -first_);
    const int64_t end = std::min(stream_, floor_div(axis_.length - 1 - s, step) + 1 - first_);
    T* to = streams_.data() + s * stream_;
    const T* from = row + s + first_ * step;
    if (step == 1) {
      if (begin < end) std::copy(from + begin, from + end, to + begin);
    } else if (step == 2) {  // by itself, for the compiler to make shuffles of
      for (int64_t t = begin; t < end; ++t) to[t] = from[2 * t];
    } else {
      for (int64_t t = begin; t < end; ++t) to[t] = from[step * t];
    }
  }

  void interleave(T* to) const {
    if (axis_.phases == 2) {
      const T *even = phases_.data(), *odd = even + padded_;
#pragma GCC ivdep
      for (int64_t q = 0; q < padded_; ++q) {
        to[2 * q] = even[q];
        to[2 * q + 1] = odd[q];
      }
      return;
    }
    for (int64_t phase = 0; phase < axis_.phases; ++phase)
      for (int64_t q = 0; q < padded_; ++q) to[q * axis_.phases + phase] = phases_[phase * padded_ + q];
  }

  const Axis<T>& axis_;
  int64_t padded_, stream_, first_;  // results of a phase, in whole vectors; numbers of a stream, the first one's place
  std::vector<T> streams_, phases_;
  std::vector<Sum<T>> sums_;  // of each phase
};

// What a thread has: the pass along x and the ring of its rows.
template <typename S, typename T>
class Worker {
 public:
  Worker(const Axis<T>& along_x, const Axis<T>& along_y)
      : x_(along_x), y_(along_y), pass_(along_x), number_(along_x.length), result_(pass_.room()) {
    for (const auto& taps : along_y.taps)
      if (!taps.empty()) depth_ = std::max(depth_, taps.back().from - taps.front().from + 1);
    depth_ = std::bit_ceil(uint64_t(depth_));
    ring_.resize(depth_ * pass_.room());
  }

  // One row of results, of a plane's numbers; `next` is the first row of numbers that the ring lacks.
  void run(const S* plane, int64_t result, int64_t& next, S* to) {
    sum_.clear();
    const int64_t shift = y_.shift_of(result);
    for (const Tap<T>& tap : y_.taps_of(result)) {
      const int64_t row = tap.from + shift;
      if (row < 0 || row >= y_.length) continue;
      T* in_ring = ring_.data() + (row & (depth_ - 1)) * pass_.room();
      if (row >= next) {
        pass_.run(widened(plane + row * x_.length, number_.data(), x_.length), in_ring);
        next = row + 1;
      }
      sum_.add(in_ring, tap.weight);
    }
    sum_.run(result_.data(), whole_vectors<T>(x_.results));
    store(result_.data(), to, x_.results);
  }

 private:
  const Axis<T>&x_, &y_;
  AlongX<T> pass_;
  int64_t depth_ = 1;
  std::vector<T> number_, result_, ring_;
  Sum<T> sum_;
};

Tensor upfirdn2d(Tensor x, Tensor filter_x, Tensor filter_y, int64_t up, int64_t down, std::vector<int64_t> padding,
                 double gain, bool flip) {
  require(x.dim() == 4 && filter_x.dim() == 1 && filter_y.dim() == 1 && padding.size() == 4 && up >= 1 && down >= 1,
          "upfirdn2d: x must be [N, C, H, W], filters [k], the padding four numbers and the factors 1 or more");
  Tensor y;
  with_dtype<float, double, BFloat16, Half>("upfirdn2d: x", x, [&]<typename S>() {
    using T = arithmetic_t<S>;
    const Axis<T> along_x(x.size(3), data<T>(filter_x), filter_x.size(0), up, down, padding[0], padding[1], flip,
                          T(gain));
    const Axis<T> along_y(x.size(2), data<T>(filter_y), filter_y.size(0), up, down, padding[2], padding[3], flip, T(1));
    require(along_x.results >= 0 && along_y.results >= 0,
            "upfirdn2d: the padded image must be as large as the filters");
    y = empty(x, {x.size(0), x.size(1), along_y.results, along_x.results});
    if (y.numel() == 0) return;
    const S* from = data<S>(x);
    S* to = mutable_data<S>(y);
    const int64_t planes = x.size(0) * x.size(1), height = along_y.results, width = along_x.results;
    const int64_t grain = std::max<int64_t>(1, kGrain / width);
    torch::stable::parallel_for(0, planes * height, grain, [&](int64_t begin, int64_t end) {
      Worker<S, T> worker(along_x, along_y);
      int64_t next = 0;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t plane = task / height, result = task % height;
        if (result == 0) next = 0;
        worker.run(from + plane * along_y.length * along_x.length, result, next, to + task * width);
      }
    });
  });
  return y;
}

}  // namespace
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels, CPU, m) {
  m.impl("upfirdn2d", TORCH_BOX(&genkernels::upfirdn2d));
}
