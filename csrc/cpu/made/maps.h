// What a solve does with one feature of a chunk of samples, which lie side by side: an affine map, or a spline.
#pragma once

#include "../../common/made.h"

#include <memory>

#include "../rational_quadratic_spline/tile.h"
#include "product.h"

namespace genkernels {
namespace made {
namespace {

// Parameters p [P, width]; everything else [width].
template <typename T>
struct Map {
  const int64_t params, width;
  Map(int64_t count, int64_t samples) : params(count), width(samples) {}
  virtual ~Map() = default;

  // x of z, and log_det += log dx/dz.
  virtual void invert(const T* p, const T* z, T* x, double* log_det) = 0;

  // From the gradients by x, which may be null, and by log dx/dz, at x: that by z, which may lie where that by x does,
  // and over p those by p with the sign turned.
  virtual void backward(T* p, const T* x, const T* by_x, const T* by_log, T* by_z) = 0;
};

template <typename T>
class Affine final : public Map<T> {
 public:
  Affine(const AffineMaps& maps, int64_t samples)
      : Map<T>(2, samples), map_(maps.map), constant_(T(maps.constant)), room_(3 * samples) {}

  void invert(const T* p, const T* z, T* x, double* log_det) override {
    scale_row(p);
    const T *t = p + this->width, *log_scale = room_, *shrink = log_scale + this->width;
    for (int64_t n = 0; n < this->width; ++n) x[n] = (z[n] - t[n]) * shrink[n];
    for (int64_t n = 0; n < this->width; ++n) log_det[n] -= double(log_scale[n]);
  }

  void backward(T* p, const T* x, const T* by_x, const T* by_log, T* by_z) override {
    scale_row(p);
    T* t = p + this->width;
    const T *shrink = static_cast<T*>(room_) + this->width, *slope = shrink + this->width;
    if (!by_x) {  // x may be infinite
      std::fill_n(by_z, this->width, T(0));
      std::fill_n(t, this->width, T(0));
      for (int64_t n = 0; n < this->width; ++n) p[n] = by_log[n] * slope[n];
      return;
    }
#pragma GCC ivdep
    for (int64_t n = 0; n < this->width; ++n) {
      const T given = by_x[n], found = given * shrink[n];
      by_z[n] = found;
      p[n] = (given * x[n] + by_log[n]) * slope[n];
      t[n] = found;
    }
  }

 private:
  // log σ, 1 / σ and the slope.
  void scale_row(const T* s) {
    T *log_scale = room_, *shrink = log_scale + this->width, *slope = shrink + this->width;
    with_scale_map(map_, [&]<ScaleMap M>() {
#pragma GCC ivdep
      for (int64_t n = 0; n < this->width; ++n) {
        T scale;
        scale_map<M>(s[n], constant_, log_scale[n], scale, slope[n]);
        shrink[n] = shrink_of<M>(log_scale[n], scale);
      }
    });
  }

  const ScaleMap map_;
  const T constant_;
  product::Scratch<T> room_;
};

template <typename T, Spline Kind>
class Splines final : public Map<T> {
 public:
  Splines(const SplineMaps& maps, int64_t samples)
      : Map<T>(maps.params, samples),
        tile_({samples, 1, maps.bins, maps.params, maps.bound, maps.logit_scale, maps.floor, true}) {}

  void invert(const T* p, const T* z, T* x, double* log_det) override {
    for (int64_t i = 0; i < this->width; i += kColumns) {
      const int64_t count = std::min(kColumns, this->width - i);
      spline::Lanes<T> out, ell;
      tile_.take_columns(p + i, this->width, count);
      tile_.template forward<true>(lanes(z + i, count), out, ell.values);
      for (int64_t l = 0; l < count; ++l) x[i + l] = out[l];
      for (int64_t l = 0; l < count; ++l) log_det[i + l] += double(ell[l]);
    }
  }

  void backward(T* p, const T* x, const T* by_x, const T* by_log, T* by_z) override {
    for (int64_t i = 0; i < this->width; i += kColumns) {
      const int64_t count = std::min(kColumns, this->width - i);
      spline::Lanes<T> out;
      tile_.take_columns(p + i, this->width, count);
      tile_.backward(true, lanes(x + i, count), lanes(by_x ? by_x + i : nullptr, count), lanes(by_log + i, count), out);
      for (int64_t l = 0; l < count; ++l) by_z[i + l] = out[l];
      for (int64_t j = 0; j < this->params; ++j)
        for (int64_t l = 0; l < count; ++l) p[j * this->width + i + l] = -tile_.raw[j * kColumns + l];
    }
  }

 private:
  static spline::Lanes<T> lanes(const T* from, int64_t count) {
    spline::Lanes<T> to{};
    if (from) std::copy_n(from, count, to.values);
    return to;
  }

  spline::Tile<T, Kind> tile_;
};

// For one thread, chunks of at most so many samples.
template <typename T>
std::unique_ptr<Map<T>> map_of(const AffineMaps& maps, int64_t width) {
  return std::make_unique<Affine<T>>(maps, width);
}
template <typename T>
std::unique_ptr<Map<T>> map_of(const SplineMaps& maps, int64_t width) {
  switch (maps.kind) {
    case Spline::kNflows: return std::make_unique<Splines<T, Spline::kNflows>>(maps, width);
    case Spline::kZuko: return std::make_unique<Splines<T, Spline::kZuko>>(maps, width);
    default: return std::make_unique<Splines<T, Spline::kCircular>>(maps, width);
  }
}

}  // namespace
}  // namespace made
}  // namespace genkernels
