// Affine coupling on the CPU: z₂ = x₂·σ(s) + t, ldj = Σ log σ(s), z₁ = x₁ copied, in one pass; backward, inverse and
// reverse alike.
//
// Layout. A sample's transformed part is L elements: M·S of M channels of S pixels (channel split), or all C·H·W with a
// mask (checkerboard). It is worked through in tiles of up to kTile elements, which stay in the first-level cache:
//     stage (to fp32/fp64, gathered)  →  arithmetic over plain arrays, vectorised by the compiler  →  unstage (cast,
//     scattered)
// Where storage is already plain (same type, halves layout) the stages are skipped and the arithmetic reads and writes
// the tensors themselves. Samples of fewer than kTile elements share a tile, so that 2-D points vectorise as well as
// images.
//
// Stores are ordinary ones. Streaming stores, which skip the read of a line before it is overwritten, were tried: on
// tensors beyond the cache the operator alone gains for exp and loses for tanh, and together with whatever reads its
// result next it loses for every map, because the result is then in no cache.
//
// Bytes, in units of one half-tensor: forward reads x₁ x₂ s t, writes z₁ z₂ (6); backward reads g₁ g₂ x₂ s, writes g₁
// g₂ g_s g_t (8); reverse reads 6 (z₁ z₂ g₁ g₂ s t), writes 6.
//
// Log-determinant: each tile sums in 16 fp32 lanes, tiles add up in fp64, chunks of kChunk elements in a fixed order.
// Bitwise the same from run to run and for any number of threads.
#include "common.h"

#include "../common/scale_map.h"

namespace genkernels {
namespace {

constexpr int64_t kTile = 1024;
constexpr int64_t kChunk = 16 * 1024;
constexpr int64_t kGrain = 32 * 1024;  // elements below which a second thread does not pay

// ---- arithmetic over plain arrays -------------------------------------------------------------------------------

template <ScaleMap M, typename T, bool Inverse>
__attribute__((always_inline)) inline T forward_element(T x, T s, T t, T& z) {  // gives log σ
  if constexpr (M == ScaleMap::kAdditive) {
    z = Inverse ? x - t : x + t;
    return T(0);
  } else {
    T log_scale, scale, slope;
    scale_map<M>(s, log_scale, scale, slope);
    z = Inverse ? (x - t) * math::exp(-log_scale) : x * scale + t;
    return log_scale;
  }
}

template <ScaleMap M, typename T, bool Inverse>
__attribute__((always_inline)) inline void backward_element(T g, T gl, T x, T s, T t, T& gx, T& gs, T& gt) {
  if constexpr (M == ScaleMap::kAdditive) {
    gx = g;
    gt = Inverse ? -g : g;
  } else {
    T log_scale, scale, slope;
    scale_map<M>(s, log_scale, scale, slope);
    if constexpr (Inverse) {
      const T shrink = math::exp(-log_scale);
      const T moved = g * shrink;
      gx = moved;
      gt = -moved;
      gs = -(g * ((x - t) * shrink) + gl) * slope;
    } else {
      const T moved = g * scale;
      gx = moved;
      gt = g;
      gs = (moved * x + gl) * slope;
    }
  }
}

// Sum in 16 lanes of T (the compiler may not reorder a plain sum), lanes added in fp64.
constexpr int64_t kLanes = 16;
template <typename T, typename F>
double sum_lanes(int64_t n, F&& value) {
  T lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma GCC ivdep
    for (int64_t l = 0; l < kLanes; ++l) lane[l] += value(i + l);
  }
  double total = 0;
  for (int64_t l = 0; l < kLanes; ++l) total += lane[l];
  for (; i < n; ++i) total += value(i);
  return total;
}

template <typename T>
double sum_tile(const T* v, int64_t n) {
  return sum_lanes<T>(n, [&](int64_t i) __attribute__((always_inline)) { return v[i]; });
}

// Each operator for one map in two forms. `tile`: anything; log σ and the gradient of the log-determinant go through
// arrays. `row`: a tile of one sample, nothing masked, which is what images are made of; the two stay in registers,
// worth a tenth to a fifth of the time.
template <typename T>
struct Forward {
  void (*tile)(int64_t n, const T* x, const T* s, const T* t, T* z, T* ell);
  double (*row)(int64_t n, const T* x, const T* s, const T* t, T* z);  // gives Σ log σ
};
template <typename T>
struct Backward {
  void (*tile)(int64_t n, const T* g, const T* gl, const T* x, const T* s, const T* t, T* gx, T* gs, T* gt);
  void (*row)(int64_t n, const T* g, T gl, const T* x, const T* s, const T* t, T* gx, T* gs, T* gt);
};

template <ScaleMap M, typename T, bool Inverse>
void forward_tile(int64_t n, const T* __restrict x, const T* __restrict s, const T* __restrict t, T* __restrict z,
                  T* __restrict ell) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) ell[i] = forward_element<M, T, Inverse>(x[i], s[i], t[i], z[i]);
}

template <ScaleMap M, typename T, bool Inverse>
double forward_row(int64_t n, const T* __restrict x, const T* __restrict s, const T* __restrict t, T* __restrict z) {
  return sum_lanes<T>(n, [&](int64_t i) __attribute__((always_inline)) {
    return forward_element<M, T, Inverse>(x[i], s[i], t[i], z[i]);
  });
}

template <ScaleMap M, typename T, bool Inverse>
void backward_tile(int64_t n, const T* __restrict g, const T* __restrict gl, const T* __restrict x,
                   const T* __restrict s, const T* __restrict t, T* __restrict gx, T* __restrict gs, T* __restrict gt) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) backward_element<M, T, Inverse>(g[i], gl[i], x[i], s[i], t[i], gx[i], gs[i], gt[i]);
}

template <ScaleMap M, typename T, bool Inverse>
void backward_row(int64_t n, const T* __restrict g, T gl, const T* __restrict x, const T* __restrict s,
                  const T* __restrict t, T* __restrict gx, T* __restrict gs, T* __restrict gt) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) backward_element<M, T, Inverse>(g[i], gl, x[i], s[i], t[i], gx[i], gs[i], gt[i]);
}

template <ScaleMap M, typename T>
Forward<T> forward_of(bool inverse) {
  return inverse ? Forward<T>{forward_tile<M, T, true>, forward_row<M, T, true>}
                 : Forward<T>{forward_tile<M, T, false>, forward_row<M, T, false>};
}
template <ScaleMap M, typename T>
Backward<T> backward_of(bool inverse) {
  return inverse ? Backward<T>{backward_tile<M, T, true>, backward_row<M, T, true>}
                 : Backward<T>{backward_tile<M, T, false>, backward_row<M, T, false>};
}

template <typename T>
Forward<T> forward_for(int64_t map, bool inverse) {
  switch (ScaleMap(map)) {
    case ScaleMap::kExp: return forward_of<ScaleMap::kExp, T>(inverse);
    case ScaleMap::kSigmoid: return forward_of<ScaleMap::kSigmoid, T>(inverse);
    case ScaleMap::kTanh: return forward_of<ScaleMap::kTanh, T>(inverse);
    default: return forward_of<ScaleMap::kAdditive, T>(inverse);
  }
}

template <typename T>
Backward<T> backward_for(int64_t map, bool inverse) {
  switch (ScaleMap(map)) {
    case ScaleMap::kExp: return backward_of<ScaleMap::kExp, T>(inverse);
    case ScaleMap::kSigmoid: return backward_of<ScaleMap::kSigmoid, T>(inverse);
    case ScaleMap::kTanh: return backward_of<ScaleMap::kTanh, T>(inverse);
    default: return backward_of<ScaleMap::kAdditive, T>(inverse);
  }
}

// ---- where things lie -------------------------------------------------------------------------------------------

struct Geometry {
  int64_t samples, length, pixels;  // N, L, S
  int64_t x_stride, p_stride;       // elements a sample of x and of params
  int64_t moved, kept;              // offsets of the two halves in a sample (equal for the checkerboard)
  bool additive, interleaved;
  std::vector<uint8_t> mask;  // [L], 1 where the checkerboard transforms; empty for the channel split
};

Geometry geometry_of(const Tensor& x, int64_t map, int64_t split, int64_t layout, bool flip) {
  Geometry g;
  g.samples = x.size(0);
  int64_t per_sample = 1;
  for (int64_t i = 1; i < x.dim(); ++i) per_sample *= x.size(i);
  const int64_t channels = x.size(1);
  g.pixels = channels ? per_sample / channels : 0;
  g.x_stride = per_sample;
  g.additive = map == int64_t(ScaleMap::kAdditive);
  g.interleaved = layout == 1 && !g.additive;
  if (split == 0) {
    g.length = per_sample / 2;
    g.moved = flip ? 0 : g.length;
    g.kept = flip ? g.length : 0;
  } else {
    g.length = per_sample;
    g.moved = g.kept = 0;
    const int64_t height = x.size(2), width = x.size(3);
    g.mask.resize(per_sample);
    for (int64_t c = 0, i = 0; c < channels; ++c)
      for (int64_t h = 0; h < height; ++h)
        for (int64_t w = 0; w < width; ++w) g.mask[i++] = uint8_t(((h + w) & 1) == (flip ? 0 : 1));
  }
  g.p_stride = g.additive ? g.length : 2 * g.length;
  return g;
}

// A tile: elements [begin, begin + width) of the transformed parts of `rows` samples from `sample` on. rows > 1 only
// for whole samples.
struct Tile {
  int64_t sample, rows, begin, width;
  int64_t count() const { return rows * width; }
};

template <typename S, typename T>
constexpr bool same = std::is_same_v<S, T>;

// Plain arrays of a tile. `pointer` is the tensor itself where it can be read as it lies, else `buffer`, filled.
template <typename S, typename T>
const T* stage(const S* base, int64_t stride, int64_t offset, const Tile& k, T* buffer) {
  const S* first = base + k.sample * stride + offset + k.begin;
  if constexpr (same<S, T>)
    if (k.rows == 1) return first;
  for (int64_t r = 0; r < k.rows; ++r) load(first + r * stride, buffer + r * k.width, k.width);
  return buffer;
}

template <typename S, typename T>
void unstage(const T* buffer, S* base, int64_t stride, int64_t offset, const Tile& k) {
  S* first = base + k.sample * stride + offset + k.begin;
  if constexpr (same<S, T>)
    if (buffer == first) return;
  for (int64_t r = 0; r < k.rows; ++r) store(buffer + r * k.width, first + r * stride, k.width);
}

// Where the arithmetic should write: into the tensor itself, or into `buffer`, which unstage then carries over.
template <typename S, typename T>
T* target(S* base, int64_t stride, int64_t offset, const Tile& k, T* buffer, bool plain) {
  if constexpr (same<S, T>)
    if (plain && k.rows == 1) return base + k.sample * stride + offset + k.begin;
  return buffer;
}

// Visits the channel segments of a tile in the interleaved layout: f(params offset, position in the tile, length).
template <typename F>
void each_segment(const Geometry& g, const Tile& k, int64_t which, F&& f) {
  for (int64_t r = 0; r < k.rows; ++r)
    for (int64_t i = 0; i < k.width;) {
      const int64_t channel = (k.begin + i) / g.pixels, pixel = (k.begin + i) % g.pixels;
      const int64_t n = std::min(g.pixels - pixel, k.width - i);
      f((k.sample + r) * g.p_stride + (2 * channel + which) * g.pixels + pixel, r * k.width + i, n);
      i += n;
    }
}

// which: 0 the log-scale, 1 the shift.
template <typename P, typename T>
const T* stage_params(const P* params, const Geometry& g, const Tile& k, int64_t which, T* buffer) {
  if (!g.interleaved) return stage(params, g.p_stride, g.additive || which == 0 ? 0 : g.length, k, buffer);
  each_segment(g, k, which, [&](int64_t at, int64_t i, int64_t n) { load(params + at, buffer + i, n); });
  return buffer;
}

template <typename P, typename T>
void unstage_params(const T* buffer, P* params, const Geometry& g, const Tile& k, int64_t which) {
  if (!g.interleaved) return unstage(buffer, params, g.p_stride, g.additive || which == 0 ? 0 : g.length, k);
  each_segment(g, k, which, [&](int64_t at, int64_t i, int64_t n) { store(buffer + i, params + at, n); });
}

// Runs f(tile, chunk index) over everything, in parallel. Chunks never depend on the number of threads.
template <typename F>
void for_each_tile(const Geometry& g, int64_t chunks, F&& f) {
  if (g.samples == 0 || g.length == 0) return;
  if (g.length >= kTile) {
    torch::stable::parallel_for(0, g.samples * chunks, std::max<int64_t>(1, kGrain / std::min(g.length, kChunk)),
                                [&](int64_t from, int64_t to) {
                                  for (int64_t task = from; task < to; ++task) {
                                    const int64_t sample = task / chunks, chunk = task % chunks;
                                    const int64_t end = std::min((chunk + 1) * kChunk, g.length);
                                    for (int64_t i = chunk * kChunk; i < end; i += kTile)
                                      f(Tile{sample, 1, i, std::min(kTile, end - i)}, chunk);
                                  }
                                });
  } else {
    const int64_t rows = kTile / g.length;
    torch::stable::parallel_for(0, (g.samples + rows - 1) / rows, kGrain / kTile, [&](int64_t from, int64_t to) {
      for (int64_t group = from; group < to; ++group)
        f(Tile{group * rows, std::min(rows, g.samples - group * rows), 0, g.length}, 0);
    });
  }
}

int64_t chunks_of(const Geometry& g) {
  return g.length >= kTile ? (g.length + kChunk - 1) / kChunk : 1;
}

// The half that passes through, byte for byte; for the checkerboard it is part of the tile and handled by `blend`. A
// sample of several tiles copies a whole chunk at its first one: long runs keep fewer streams open at once than a piece
// a tile.
template <typename X>
void copy_kept(const X* from, X* to, const Geometry& g, const Tile& k) {
  if (!g.mask.empty() || k.begin % kChunk != 0) return;
  const int64_t width = std::min(kChunk, g.length - k.begin);
  for (int64_t r = 0; r < k.rows; ++r) {
    const int64_t at = (k.sample + r) * g.x_stride + g.kept + k.begin;
    if (from)
      std::memcpy(to + at, from + at, width * sizeof(X));
    else
      std::memset(to + at, 0, width * sizeof(X));
  }
}

// where(mask, moved, kept); kept == nullptr stands for zero. The mask decides, no product does, so NaN stays where it
// was.
template <typename T>
void blend(T* moved, const T* kept, const Geometry& g, const Tile& k) {
  if (g.mask.empty()) return;
  for (int64_t r = 0; r < k.rows; ++r) {
    const uint8_t* mask = g.mask.data() + k.begin;
    T* m = moved + r * k.width;
    if (kept) {
      const T* other = kept + r * k.width;
      for (int64_t i = 0; i < k.width; ++i) m[i] = mask[i] ? m[i] : other[i];
    } else {
      for (int64_t i = 0; i < k.width; ++i) m[i] = mask[i] ? m[i] : T(0);
    }
  }
}

// ---- the three operators, over storage types X (input) and P (params), arithmetic type T ------------------------

template <typename X, typename P, typename T>
void forward(const Geometry& g, int64_t map, bool inverse, const Tensor& input, const Tensor& params, Tensor& output,
             Tensor& ldj) {
  const X* x = data<X>(input);
  const P* p = data<P>(params);
  X* z = mutable_data<X>(output);
  T* log_det = mutable_data<T>(ldj);
  const int64_t chunks = chunks_of(g);
  const bool masked = !g.mask.empty();
  std::vector<double> partial(chunks > 1 ? g.samples * chunks : g.samples, 0.0);
  const Forward<T> arithmetic = forward_for<T>(map, inverse);
  for_each_tile(g, chunks, [&](const Tile& k, int64_t chunk) {
    alignas(64) T bx[kTile], bs[kTile], bt[kTile], bz[kTile], ell[kTile];
    const T* tx = stage(x, g.x_stride, g.moved, k, bx);
    const T* ts = g.additive ? bs : stage_params(p, g, k, 0, bs);
    const T* tt = stage_params(p, g, k, 1, bt);
    T* tz = target(z, g.x_stride, g.moved, k, bz, !masked);
    if (k.rows == 1 && !masked) {
      partial[k.sample * chunks + chunk] += arithmetic.row(k.width, tx, ts, tt, tz);
      unstage(tz, z, g.x_stride, g.moved, k);
      copy_kept(x, z, g, k);
      return;
    }
    arithmetic.tile(k.count(), tx, ts, tt, tz, ell);
    blend(tz, tx, g, k);
    unstage(tz, z, g.x_stride, g.moved, k);
    copy_kept(x, z, g, k);
    if (g.additive) return;
    blend(ell, static_cast<const T*>(nullptr), g, k);
    for (int64_t r = 0; r < k.rows; ++r)
      partial[(k.sample + r) * chunks + chunk] += sum_tile(ell + r * k.width, k.width);
  });
  for (int64_t n = 0; n < g.samples; ++n) {
    double total = 0;
    for (int64_t c = 0; c < chunks; ++c) total += partial[n * chunks + c];
    log_det[n] = T(inverse && !g.additive ? -total : total);
  }
}

// input == nullptr means: `given` is the forward's output, rebuild the input first and write it to `rebuilt` (reverse).
template <typename X, typename P, typename T>
void backward(const Geometry& g, int64_t map, bool inverse, const std::optional<Tensor>& grad_output,
              const std::optional<Tensor>& grad_ldj, const Tensor& given, const Tensor& params, Tensor* rebuilt,
              Tensor& grad_input, Tensor& grad_params) {
  const X* go = data<X>(grad_output);
  const T* gl = data<T>(grad_ldj);
  const X* x = data<X>(given);
  const P* p = data<P>(params);
  X* back = rebuilt ? mutable_data<X>(*rebuilt) : nullptr;
  X* gi = mutable_data<X>(grad_input);
  P* gp = mutable_data<P>(grad_params);
  const bool masked = !g.mask.empty();
  const bool needs_shift = inverse || back;
  const Backward<T> arithmetic = backward_for<T>(map, inverse);
  const Forward<T> rebuild = forward_for<T>(map, true);
  for_each_tile(g, chunks_of(g), [&](const Tile& k, int64_t) {
    alignas(64) T bg[kTile], bl[kTile], bx[kTile], bs[kTile], bt[kTile], bi[kTile], bgs[kTile], bgt[kTile], bb[kTile];
    const T* tg = bg;
    if (go)
      tg = stage(go, g.x_stride, g.moved, k, bg);
    else
      std::fill_n(bg, k.count(), T(0));
    const T* tx = stage(x, g.x_stride, g.moved, k, bx);
    const T* ts = g.additive ? bs : stage_params(p, g, k, 0, bs);
    const T* tt = needs_shift ? stage_params(p, g, k, 1, bt) : bt;
    if (back) {
      T* tb = target(back, g.x_stride, g.moved, k, bb, !masked);
      rebuild.tile(k.count(), tx, ts, tt, tb, bgs);  // bgs only serves as the room for log σ
      blend(tb, tx, g, k);
      unstage(tb, back, g.x_stride, g.moved, k);
      copy_kept(x, back, g, k);
      tx = tb;
    }
    const bool plain = !masked && !g.interleaved;
    T* ti = target(gi, g.x_stride, g.moved, k, bi, !masked);
    T* tgs = g.additive ? bgs : target(gp, g.p_stride, 0, k, bgs, plain);
    T* tgt = target(gp, g.p_stride, g.additive ? 0 : g.length, k, bgt, plain);
    if (k.rows == 1) {
      arithmetic.row(k.width, tg, gl ? gl[k.sample] : T(0), tx, ts, tt, ti, tgs, tgt);
    } else {
      for (int64_t r = 0; r < k.rows; ++r) std::fill_n(bl + r * k.width, k.width, gl ? gl[k.sample + r] : T(0));
      arithmetic.tile(k.count(), tg, bl, tx, ts, tt, ti, tgs, tgt);
    }
    blend(ti, tg, g, k);
    unstage(ti, gi, g.x_stride, g.moved, k);
    if (!g.additive) {
      blend(tgs, static_cast<const T*>(nullptr), g, k);
      unstage_params(tgs, gp, g, k, 0);
    }
    blend(tgt, static_cast<const T*>(nullptr), g, k);
    unstage_params(tgt, gp, g, k, 1);
    copy_kept(go, gi, g, k);
  });
}

// ---- dispatch on dtypes -----------------------------------------------------------------------------------------

template <typename F>
void dispatch(const Tensor& x, const Tensor& p, F&& f) {
  const ScalarType a = x.scalar_type(), b = p.scalar_type();
  if (a == ScalarType::Float && b == ScalarType::Float) return f.template operator()<float, float, float>();
  if (a == ScalarType::Double && b == ScalarType::Double) return f.template operator()<double, double, double>();
  if (a == ScalarType::BFloat16 && b == ScalarType::BFloat16) return f.template operator()<BFloat16, BFloat16, float>();
  if (a == ScalarType::Half && b == ScalarType::Half) return f.template operator()<Half, Half, float>();
  if (a == ScalarType::Float && b == ScalarType::BFloat16) return f.template operator()<float, BFloat16, float>();
  if (a == ScalarType::Float && b == ScalarType::Half) return f.template operator()<float, Half, float>();
  STD_TORCH_CHECK(false, "affine_coupling: no kernel for this pair of dtypes of x and params");
}

ScalarType work_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor> affine_coupling(Tensor input, Tensor params, int64_t map, int64_t split, int64_t layout,
                                           bool flip, bool inverse) {
  const Geometry g = geometry_of(input, map, split, layout, flip);
  Tensor output = empty(input, shape_of(input), input.scalar_type());
  Tensor ldj = empty(input, {input.size(0)}, work_dtype(input));
  dispatch(input, params, [&]<typename X, typename P, typename T>() {
    forward<X, P, T>(g, map, inverse, input, params, output, ldj);
  });
  return {output, ldj};
}

std::tuple<Tensor, Tensor> affine_coupling_backward(std::optional<Tensor> grad_output, std::optional<Tensor> grad_ldj,
                                                    Tensor input, Tensor params, int64_t map, int64_t split,
                                                    int64_t layout, bool flip, bool inverse) {
  const Geometry g = geometry_of(input, map, split, layout, flip);
  Tensor grad_input = empty(input, shape_of(input), input.scalar_type());
  Tensor grad_params = empty(params, shape_of(params), params.scalar_type());
  dispatch(input, params, [&]<typename X, typename P, typename T>() {
    backward<X, P, T>(g, map, inverse, grad_output, grad_ldj, input, params, nullptr, grad_input, grad_params);
  });
  return {grad_input, grad_params};
}

std::tuple<Tensor, Tensor, Tensor> affine_coupling_reverse(std::optional<Tensor> grad_output,
                                                           std::optional<Tensor> grad_ldj, Tensor output, Tensor params,
                                                           int64_t map, int64_t split, int64_t layout, bool flip) {
  const Geometry g = geometry_of(output, map, split, layout, flip);
  Tensor input = empty(output, shape_of(output), output.scalar_type());
  Tensor grad_input = empty(output, shape_of(output), output.scalar_type());
  Tensor grad_params = empty(params, shape_of(params), params.scalar_type());
  dispatch(output, params, [&]<typename X, typename P, typename T>() {
    backward<X, P, T>(g, map, false, grad_output, grad_ldj, output, params, &input, grad_input, grad_params);
  });
  return {input, grad_input, grad_params};
}

}  // namespace
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels, CPU, m) {
  m.impl("affine_coupling", TORCH_BOX(&genkernels::affine_coupling));
  m.impl("affine_coupling_backward", TORCH_BOX(&genkernels::affine_coupling_backward));
  m.impl("affine_coupling_reverse", TORCH_BOX(&genkernels::affine_coupling_reverse));
}
