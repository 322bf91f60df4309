// Masked convolution on the CPU: y = act(x * (w ⊙ m) + b + c) + r over the live taps alone (van den Oord et al. 2016a,
// 2016b).
//
// Shapes, channels first in and out: nothing is rearranged but a band of rows in scratch (masked_conv/products.h).
//     x [N, Cin, H, W]                  weight [Cout, Cin, kh, kw]
//     residual, y [N, Cout', H, W]      condition [N, Cout] or [N, Cout, H, W]
//
// Forward. A task is a band of rows of one image, chosen so that its staged input and its result stay in the
// second-level cache. The weights are packed once a call as [block of output channels][entry][channel], an entry being
// a live tap of an input channel for any of the block: taps that data_channels kills for a whole block are left out
// too. Bias and [N, Cout] condition start the sums; the 4-D condition, the activation and the residual are applied to
// the band before it is stored.
//
// Backward. g, the gradient of the pre-activation, is written out where there is an activation. grad_x: the same
// product, taps mirrored. grad_weight: an outer product over pixels, per live tap, in at most kParts partial sums over
// the images; these depend on the shape alone and are added in order, so that bits do not depend on the number of
// threads. A dead tap's is 0.
//
// Saved for backward: x, weight; relu: the output, beside a residual the pre-activation; gate: the pre-activation
// (recomputing it would cost the convolution again).
//
// Flops: 2·N·H·W·(live weights), twice that backward: at a processor's peak this is the floor, the bytes (x and y once)
// hide behind it.
//
// fp16 is widened as it is staged. bf16 is multiplied in pairs where the processor does that (masked_conv/bf16.h), else
// widened; on a processor with AMX torch multiplies it (masked_conv/by_torch.h).
#include "masked_conv/bf16.h"
#include "masked_conv/by_torch.h"
#include "masked_conv/convolve.h"
#include "masked_conv/epilogue.h"

namespace genkernels {
namespace masked {
namespace {

// f<A>(), A being the arithmetic for storage S.
template <typename S, typename F>
void with_arithmetic(F&& f) {
  if constexpr (kHasPairs && std::is_same_v<S, BFloat16>)
    if (multiplies_pairs()) return f.template operator()<Pairs>();
  f.template operator()<Single<arithmetic_t<S>>>();
}

// The weight as A packs it: itself, or widened into `buffer`.
template <typename S, typename A>
const typename A::Weight* packable(const Tensor& weight, std::vector<typename A::Weight>& buffer) {
  using Weight = typename A::Weight;
  if constexpr (sizeof(S) == sizeof(Weight)) {
    return reinterpret_cast<const Weight*>(data<S>(weight));
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
  const bool kept =
      keep && (p.activation == Activation::kGate || (p.activation == Activation::kRelu && residual.has_value()));
  Tensor pre = empty(x, kept ? std::vector<int64_t>{p.batch, p.outputs, p.height, p.width} : std::vector<int64_t>{0});
  std::optional<Tensor> output;
  with_dtype<float, double, BFloat16, Half>("masked_conv: x", x, [&]<typename S>() {
    using T = arithmetic_t<S>;
    if (p.batch && torch_is_faster(x)) {
      output = std::get<0>(forward_by_torch<S>(p, x, weight, bias, condition, residual, pre, kept));
      return;
    }
    output = empty(x, {p.batch, p.left(), p.height, p.width});
    if (p.batch == 0) return;
    const bool flat = condition.has_value() && condition->dim() == 2;
    std::vector<T> shift(p.outputs * (flat ? p.batch : 1), T(0));
    const int64_t per_image = flat ? p.outputs : 0;
    if (flat) load(data<S>(condition), shift.data(), int64_t(shift.size()));
    if (bias.has_value()) {
      std::vector<T> b(p.outputs);
      load(data<S>(bias), b.data(), p.outputs);
      for (size_t i = 0; i < shift.size(); ++i) shift[i] += b[i % p.outputs];
    }
    const Epilogue<S> epilogue{p, flat ? nullptr : data<S>(condition), data<S>(residual), mutable_data<S>(*output),
                               kept ? mutable_data<S>(pre) : nullptr};
    with_arithmetic<S>([&]<typename A>() {
      std::vector<typename A::Weight> buffer;
      const Packed<A> packed = pack<A>(p, packable<S, A>(weight, buffer), false);
      const bool alone = p.activation == Activation::kNone && !epilogue.condition && !epilogue.residual && !kept;
      S* straight = alone && goes_straight<S>(packed) ? mutable_data<S>(*output) : nullptr;
      convolve(
          packed, data<S>(x), p.batch, straight, [&](int64_t n, int64_t o) { return shift[n * per_image + o]; },
          [&](int64_t n, int64_t first, int64_t rows, T* result, int64_t stride) {
            epilogue.template apply<A>(n, first, rows, result, stride, packed.band.pitch());
          });
    });
  });
  return {*output, pre};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> masked_conv_backward(
    std::optional<Tensor> grad_output, std::optional<Tensor> grad_pre, std::optional<Tensor> state, Tensor x,
    Tensor weight, int64_t mask_type, int64_t data_channels, int64_t region, int64_t activation, int64_t condition_rank,
    bool want_x, bool want_weight, bool want_bias, bool want_condition) {
  const Problem p = problem_of(x, weight, mask_type, data_channels, region, activation);
  const std::vector<int64_t> whole{p.batch, p.outputs, p.height, p.width}, flat{p.batch, p.outputs}, nothing{0};
  const bool by_torch = p.batch && torch_is_faster(x);  // which makes the tensors of its results itself
  Tensor grad_x = empty(x, want_x && !by_torch ? shape_of(x) : nothing);
  Tensor grad_w = empty(x, want_weight && !by_torch ? shape_of(weight) : nothing);
  Tensor grad_bias = empty(x, want_bias ? std::vector<int64_t>{p.outputs} : nothing);
  Tensor grad_condition = empty(x, !want_condition ? nothing : condition_rank == 4 ? whole : flat);
  // with no activation g is the output's gradient, unless it must be handed out
  const bool full = want_condition && condition_rank == 4, flat_condition = want_condition && condition_rank == 2;
  const bool made = full || p.activation != Activation::kNone || !grad_output.has_value() || grad_pre.has_value();
  const Tensor g = full ? grad_condition : made ? empty(x, whole) : *grad_output;
  const bool bias_by_torch = by_torch && want_bias && !flat_condition;  // on the way, where nothing else is summed
  with_dtype<float, double, BFloat16, Half>("masked_conv: x", x, [&]<typename S>() {
    using T = arithmetic_t<S>;
    pre_gradients<S>(p, grad_output, grad_pre, state, made ? mutable_data<S>(g) : nullptr,
                     want_bias && !bias_by_torch ? mutable_data<S>(grad_bias) : nullptr,
                     flat_condition ? mutable_data<S>(grad_condition) : nullptr);
    if (p.batch == 0) {
      if (want_weight) std::fill_n(mutable_data<S>(grad_w), weight.numel(), S(0.0f));
      return;
    }
    if (by_torch)
      return gradients_by_torch<S>(p, g, x, weight, want_x, want_weight, bias_by_torch, grad_x, grad_w, grad_bias);
    with_arithmetic<S>([&]<typename A>() {
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
}  // namespace masked
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels, CPU, m) {
  using namespace genkernels::masked;
  m.impl("masked_conv", TORCH_BOX(&masked_conv));
  m.impl("masked_conv_backward", TORCH_BOX(&masked_conv_backward));
}
