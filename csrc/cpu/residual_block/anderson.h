// The accelerated fixed-point iteration of one sample, x ← x + r(x); genkernels/reference/_fixed_point.py says how.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace genkernels {
namespace block {

constexpr int64_t kMostDepth = 5;

struct Limits {
  double rtol, atol;
  int64_t most, depth;
};

template <typename T>
inline double inner(const T* a, const T* b, int64_t n) {
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; ++j) lanes[j] += double(a[i + j]) * double(b[i + j]);
  for (; i < n; ++i) lanes[0] += double(a[i]) * double(b[i]);
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

// Solves a γ = b, n ≤ kMostDepth, by elimination with row exchanges; false where it cannot.
inline bool solve_small(double (&a)[kMostDepth][kMostDepth], double (&b)[kMostDepth], int64_t n) {
  for (int64_t k = 0; k < n; ++k) {
    int64_t pivot = k;
    for (int64_t i = k + 1; i < n; ++i)
      if (std::fabs(a[i][k]) > std::fabs(a[pivot][k])) pivot = i;
    if (!(std::fabs(a[pivot][k]) > 0)) return false;
    std::swap(a[k], a[pivot]);
    std::swap(b[k], b[pivot]);
    for (int64_t i = k + 1; i < n; ++i) {
      const double f = a[i][k] / a[k][k];
      for (int64_t j = k; j < n; ++j) a[i][j] -= f * a[k][j];
      b[i] -= f * b[k];
    }
  }
  for (int64_t k = n - 1; k >= 0; --k) {
    for (int64_t j = k + 1; j < n; ++j) b[k] -= a[k][j] * b[j];
    b[k] /= a[k][k];
    if (!std::isfinite(b[k])) return false;
  }
  return true;
}

template <typename T>
class Iteration {
 public:
  std::vector<T> x, r;  // where it stands, and y − x − g(x) there, which the caller puts in

  Iteration(int64_t features, const Limits& limits)
      : x(features),
        r(features),
        n_(features),
        limits_(limits),
        depth_(std::min(limits.depth, features)),
        best_(features),
        at_(features),
        from_(features),
        dx_(depth_ * features),
        dr_(depth_ * features) {}

  void begin(const T* y, const T* start) {
    std::copy_n(start, n_, x.begin());
    T largest = 0;
    bool nan = false;
    for (int64_t i = 0; i < n_; ++i) {
      nan = nan || y[i] != y[i];
      largest = std::max(largest, std::fabs(y[i]));
    }
    limit_ = T(limits_.atol) + T(limits_.rtol) * (nan ? std::numeric_limits<T>::quiet_NaN() : largest);
    residual_ = std::numeric_limits<T>::infinity();
    std::copy_n(x.begin(), n_, best_.begin());
    taken_ = 0, kept_ = 0, newest_ = 0;
    plain_ = true, first_ = true;
  }

  // Looks at r; true where the sample has ended.
  bool ended() {
    T size = 0;
    bool nan = false;
    for (int64_t i = 0; i < n_; ++i) {
      nan = nan || r[i] != r[i];
      size = std::max(size, std::fabs(r[i]));
    }
    if (nan) size = std::numeric_limits<T>::quiet_NaN();
    ++taken_;
    if (size < residual_) {
      residual_ = size;
      std::copy_n(x.begin(), n_, best_.begin());
    }
    return size <= limit_ || (!std::isfinite(size) && plain_) || taken_ >= limits_.most;
  }

  // To the next point.
  void step() {
    const double norm = std::sqrt(inner(r.data(), r.data(), n_));
    if (first_ || depth_ == 0) {
      const bool accepted = plain_ || norm <= norm_;
      accept(norm);
      for (int64_t i = 0; i < n_; ++i) x[i] += r[i];
      plain_ = first_ ? true : accepted;
      first_ = false;
      return;
    }
    if (plain_ || norm <= norm_) {
      T *dx = &dx_[newest_ * n_], *dr = &dr_[newest_ * n_];
      for (int64_t i = 0; i < n_; ++i) dx[i] = x[i] - at_[i], dr[i] = r[i] - from_[i];
      newest_ = (newest_ + 1) % depth_;
      kept_ = std::min(kept_ + 1, depth_);
      accept(norm);
      plain_ = false;
    } else {
      kept_ = 0;
      plain_ = true;
    }
    for (int64_t i = 0; i < n_; ++i) x[i] = at_[i] + from_[i];
    if (kept_ == 0) return;
    double gram[kMostDepth][kMostDepth], right[kMostDepth], scale[kMostDepth];
    const T* rows[kMostDepth];
    for (int64_t j = 0; j < kept_; ++j) {
      rows[j] = &dr_[j * n_];
      scale[j] = std::sqrt(inner(rows[j], rows[j], n_));
      if (!(scale[j] > 0) || !std::isfinite(scale[j])) scale[j] = 1;
    }
    for (int64_t j = 0; j < kept_; ++j) {
      right[j] = inner(rows[j], from_.data(), n_) / scale[j];
      for (int64_t k = 0; k <= j; ++k)
        gram[j][k] = gram[k][j] = inner(rows[j], rows[k], n_) / (scale[j] * scale[k]) + (j == k ? 1e-10 : 0.0);
    }
    if (!solve_small(gram, right, kept_)) return;
    for (int64_t j = 0; j < kept_; ++j) {
      const T gamma = T(right[j] / scale[j]);
      const T *dx = &dx_[j * n_], *dr = rows[j];
      for (int64_t i = 0; i < n_; ++i) x[i] -= gamma * (dx[i] + dr[i]);
    }
  }

  const T* best() const { return best_.data(); }
  int64_t taken() const { return taken_; }
  bool converged() const { return residual_ <= limit_; }
  T residual() const {
    return residual_ < std::numeric_limits<T>::infinity() ? residual_ : std::numeric_limits<T>::quiet_NaN();
  }

 private:
  void accept(double norm) {
    std::copy_n(x.begin(), n_, at_.begin());
    std::copy_n(r.begin(), n_, from_.begin());
    norm_ = norm;
  }

  int64_t n_;
  Limits limits_;
  int64_t depth_;
  std::vector<T> best_, at_, from_, dx_, dr_;  // at_, from_: the last point that was not taken back, and r there
  T limit_ = 0, residual_ = 0;
  double norm_ = 0;
  int64_t taken_ = 0, kept_ = 0, newest_ = 0;
  bool plain_ = true, first_ = true;
};

}  // namespace block
}  // namespace genkernels
