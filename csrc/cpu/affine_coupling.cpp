// Affine coupling on the CPU: z₂ = x₂·σ(s) + t, ldj = Σ log σ(s), z₁ = x₁ copied, in one pass; backward, inverse and
// reverse alike.
//
// Layout. A sample's transformed part is L elements: M·S of M channels of S pixels (channel split), or all C·H·W with a
// mask (checkerboard). It is worked through in tiles of up to kTile elements, which stay in the first-level cache:
//     stage (to fp32/fp64, gathered)  →  arithmetic over plain arrays, vectorised  →  unstage (cast, scattered)
// Where storage is already plain (same type, halves layout) the stages are skipped and the arithmetic reads and writes
// the tensors themselves. Samples of fewer than kTile elements share a tile, so that 2-D points vectorise as well as
// images.
//
// Stores are ordinary ones. Streaming stores, which skip the read of a line before it is overwritten, were tried: on
// tensors beyond the cache the operator alone gains for exp and loses for tanh, and together with whatever reads its
// result next it loses for every map, because the result is then in no cache.
//
// Bytes, in units of one half-tensor:
//     forward   reads x₁ x₂ s t          writes z₁ z₂                  6
//     backward  reads g₁ g₂ x₂ s         writes g₁ g₂ g_s g_t          8
//     reverse   reads z₁ z₂ g₁ g₂ s t    writes x₁ x₂ g₁ g₂ g_s g_t   12
//
// Log-determinant: each tile sums in 16 fp32 lanes, tiles add up in fp64, chunks of kChunk elements in a fixed order.
// Bitwise the same from run to run and for any number of threads.
#include "affine_coupling/arithmetic.h"
#include "affine_coupling/tiles.h"

namespace genkernels {
namespace {

using coupling::Call;
using coupling::Gradient;

// The backend of common/affine_coupling.h.
struct Cpu {
  template <typename X, typename P>
  static void forward(const Call& c, bool inverse, const Tensor& input, const Tensor& params, const Tensor& output,
                      const Tensor& ldj);
  template <typename X, typename P>
  static void backward(const Call& c, Gradient which, const std::optional<Tensor>& grad_output,
                       const std::optional<Tensor>& grad_ldj, const Tensor& given, const Tensor& params,
                       const Tensor& grad_input, const Tensor& grad_params, const Tensor* rebuilt);
};

template <typename X, typename P>
void Cpu::forward(const Call& c, bool inverse, const Tensor& input, const Tensor& params, const Tensor& output,
                  const Tensor& ldj) {
  using T = arithmetic_t<X>;
  const Geometry g = geometry_of(c);
  const X* x = data<X>(input);
  const P* p = data<P>(params);
  X* z = mutable_data<X>(output);
  T* log_det = mutable_data<T>(ldj);
  const int64_t chunks = chunks_of(g);
  const bool masked = !g.mask.empty(), plain_x = !masked && !g.turns;
  std::vector<double> partial(chunks > 1 ? g.samples * chunks : g.samples, 0.0);
  const Forward<T> arithmetic = forward_for<T>(g.map, inverse);
  const T constant = T(g.constant);
  for_each_tile(g, chunks, [&](const Tile& k, int64_t chunk) {
    alignas(64) T bx[kTile], bs[kTile], bt[kTile], bz[kTile], ell[kTile];
    const T* tx = stage_moved(x, g, k, bx);
    const T* ts = g.additive ? bs : stage_params(p, g, k, 0, bs);
    const T* tt = stage_params(p, g, k, 1, bt);
    T* tz = target(z, g.sample, g.moved_at, k, bz, plain_x);
    if (k.rows == 1 && !masked) {
      partial[k.sample * chunks + chunk] += arithmetic.row(k.width, tx, ts, tt, constant, tz);
      unstage_moved(tz, z, g, k);
      copy_passed(x, z, g, k);
      return;
    }
    arithmetic.tile(k.count(), tx, ts, tt, constant, tz, ell);
    blend(tz, tx, g, k);
    unstage_moved(tz, z, g, k);
    copy_passed(x, z, g, k);
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

template <typename X, typename P>
void Cpu::backward(const Call& c, Gradient which, const std::optional<Tensor>& grad_output,
                   const std::optional<Tensor>& grad_ldj, const Tensor& given, const Tensor& params,
                   const Tensor& grad_input, const Tensor& grad_params, const Tensor* rebuilt) {
  using T = arithmetic_t<X>;
  const Geometry g = geometry_of(c);
  const bool inverse = which == Gradient::kInverse;
  const X* go = data<X>(grad_output);
  const T* gl = data<T>(grad_ldj);
  const X* x = data<X>(given);
  const P* p = data<P>(params);
  X* back = rebuilt ? mutable_data<X>(*rebuilt) : nullptr;
  X* gi = mutable_data<X>(grad_input);
  P* gp = mutable_data<P>(grad_params);
  const bool masked = !g.mask.empty(), plain_x = !masked && !g.turns;
  const bool needs_shift = (inverse && go) || back;
  const Backward<T> arithmetic = backward_for<T>(g.map, inverse);
  const Forward<T> rebuild = forward_for<T>(g.map, true);
  const T constant = T(g.constant);
  for_each_tile(g, chunks_of(g), [&](const Tile& k, int64_t) {
    alignas(64) T bg[kTile], bl[kTile], bx[kTile], bs[kTile], bt[kTile], bi[kTile], bgs[kTile], bgt[kTile], bb[kTile];
    const T* tg = go ? stage_moved(go, g, k, bg) : nullptr;
    const T* tx = go || back ? stage_moved(x, g, k, bx) : nullptr;
    const T* ts = g.additive ? bs : stage_params(p, g, k, 0, bs);
    const T* tt = needs_shift ? stage_params(p, g, k, 1, bt) : bt;
    if (back) {
      T* tb = target(back, g.sample, g.moved_at, k, bb, plain_x);
      rebuild.tile(k.count(), tx, ts, tt, constant, tb, bgs);  // bgs only serves as the room for log σ
      blend(tb, tx, g, k);
      unstage_moved(tb, back, g, k);
      copy_passed(x, back, g, k);
      tx = tb;
    }
    const bool plain = !masked && !g.interleaved;
    T* ti = target(gi, g.sample, g.moved_at, k, bi, plain_x);
    T* tgs = g.additive ? bgs : target(gp, g.param_sample, param_at(g, 0), k, bgs, plain);
    T* tgt = target(gp, g.param_sample, param_at(g, 1), k, bgt, plain);
    if (go && k.rows == 1) {
      arithmetic.row(k.width, tg, gl ? gl[k.sample] : T(0), tx, ts, tt, constant, ti, tgs, tgt);
    } else {
      for (int64_t r = 0; r < k.rows; ++r) std::fill_n(bl + r * k.width, k.width, gl ? gl[k.sample + r] : T(0));
      if (go) {
        arithmetic.tile(k.count(), tg, bl, tx, ts, tt, constant, ti, tgs, tgt);
      } else {
        arithmetic.log_det(k.count(), bl, ts, constant, tgs);
        std::fill_n(ti, k.count(), T(0));
        std::fill_n(tgt, k.count(), T(0));
      }
    }
    blend(ti, tg, g, k);
    unstage_moved(ti, gi, g, k);
    if (!g.additive) {
      blend(tgs, static_cast<const T*>(nullptr), g, k);
      unstage_params(tgs, gp, g, k, 0);
    }
    blend(tgt, static_cast<const T*>(nullptr), g, k);
    unstage_params(tgt, gp, g, k, 1);
    copy_passed(go, gi, g, k);
  });
}

}  // namespace
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels, CPU, m) {
  using namespace genkernels;
  m.impl("affine_coupling", TORCH_BOX(&coupling::affine_coupling<Cpu>));
  m.impl("affine_coupling_backward", TORCH_BOX(&coupling::affine_coupling_backward<Cpu>));
  m.impl("affine_coupling_reverse", TORCH_BOX(&coupling::affine_coupling_reverse<Cpu>));
}
