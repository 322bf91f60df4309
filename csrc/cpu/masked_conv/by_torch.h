// torch's own convolution of all taps with the masked weight, and its backward: for bf16 where the processor has AMX,
// whose matrix units do many times as much in bf16 as the vector units do. Everywhere else the kernels over live taps
// are the faster ones. What a dead tap meets is multiplied by 0 here, so that NaN and infinity show there, and bits of
// the weight's gradient depend on the number of threads.
#pragma once

#include "epilogue.h"

#include <array>

namespace genkernels {
namespace masked {
namespace {

inline bool torch_is_faster(const Tensor& x) {
#if defined(__x86_64__)
  static const bool has_amx = __builtin_cpu_supports("amx-bf16");
  return has_amx && x.scalar_type() == ScalarType::BFloat16;
#else
  return false;
#endif
}

template <typename S>
Tensor masked_weight(const Problem& p, const Tensor& weight) {
  Tensor to = empty(weight, shape_of(weight), weight.scalar_type());
  const S* from = data<S>(weight);
  S* at = mutable_data<S>(to);
  const int64_t area = p.kh * p.kw;
  std::memset(static_cast<void*>(at), 0, p.outputs * p.inputs * area * sizeof(S));
  std::vector<int64_t> always, sometimes;  // live for every pair of channels; between certain groups alone
  for (size_t t = 0; t < p.taps.size(); ++t) (p.taps[t].centre ? sometimes : always).push_back(int64_t(t));
  for (int64_t o = 0; o < p.outputs; ++o)
    for (int64_t i = 0; i < p.inputs; ++i, at += area, from += area) {
      for (int64_t t : always) {
        const int64_t k = p.taps[t].row * p.kw + p.taps[t].column;
        at[k] = from[k];
      }
      for (int64_t t : sometimes) {
        const int64_t k = p.taps[t].row * p.kw + p.taps[t].column;
        if (p.live(o, i, p.taps[t])) at[k] = from[k];
      }
    }
  return to;
}

inline Tensor torch_convolution(const Problem& p, const Tensor& x, const Tensor& weight,
                                const std::optional<Tensor>& bias) {
  using torch::stable::detail::from;
  const std::vector<int64_t> one{1, 1}, none{0, 0}, padding{p.kh / 2, p.kw / 2};
  std::array<StableIValue, 9> stack{from(x),   from(weight), from(bias), from(one),       from(padding),
                                    from(one), from(false),  from(none), from(int64_t(1))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[0]));
}

inline std::tuple<Tensor, Tensor, Tensor> torch_backward(const Problem& p, const Tensor& g, const Tensor& x,
                                                         const Tensor& weight, bool want_x, bool want_weight,
                                                         bool want_bias) {
  using torch::stable::detail::from;
  const std::vector<int64_t> one{1, 1}, none{0, 0}, padding{p.kh / 2, p.kw / 2};
  const std::array<bool, 3> wanted{want_x, want_weight, want_bias};
  std::array<StableIValue, 11> stack{from(g),
                                     from(x),
                                     from(weight),
                                     from(std::optional<std::vector<int64_t>>(std::vector<int64_t>{p.outputs})),
                                     from(one),
                                     from(padding),
                                     from(one),
                                     from(false),
                                     from(none),
                                     from(int64_t(1)),
                                     from(torch::headeronly::HeaderOnlyArrayRef<bool>(wanted.data(), wanted.size()))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  using torch::stable::detail::to;
  Tensor grad_x = to<Tensor>(stack[0]), grad_weight = to<Tensor>(stack[1]), grad_bias = to<Tensor>(stack[2]);
  const auto dense = [](bool wanted, const Tensor& t) { return wanted ? torch::stable::contiguous(t) : t; };
  return {dense(want_x, grad_x), dense(want_weight, grad_weight), grad_bias};
}

// masked_conv in whole.
template <typename S>
std::tuple<Tensor, Tensor> forward_by_torch(const Problem& p, const Tensor& x, const Tensor& weight,
                                            const std::optional<Tensor>& bias, const std::optional<Tensor>& condition,
                                            const std::optional<Tensor>& residual, Tensor pre, bool kept) {
  using T = arithmetic_t<S>;
  const Tensor product = torch_convolution(p, x, masked_weight<S>(p, weight), bias);  // adds the bias before it rounds
  if (p.activation == Activation::kNone && !condition.has_value() && !residual.has_value()) return {product, pre};
  Tensor output = empty(x, {p.batch, p.left(), p.height, p.width});
  const bool flat = condition.has_value() && condition->dim() == 2;
  std::vector<T> shift(flat ? p.batch * p.outputs : 0);
  if (flat) load(data<S>(condition), shift.data(), int64_t(shift.size()));
  const Epilogue<S> epilogue{p, flat ? nullptr : data<S>(condition), data<S>(residual), mutable_data<S>(output),
                             kept ? mutable_data<S>(pre) : nullptr};
  const S* from = data<S>(product);
  torch::stable::parallel_for(0, p.batch, 1, [&](int64_t begin, int64_t end) {
    T* image = scratch<T>(1, p.outputs * p.pixels());
    for (int64_t n = begin; n < end; ++n) {
      load(from + n * p.outputs * p.pixels(), image, p.outputs * p.pixels());
      for (int64_t o = 0; flat && o < p.outputs; ++o)
        for (int64_t i = 0; i < p.pixels(); ++i) image[o * p.pixels() + i] += shift[n * p.outputs + o];
      epilogue.template apply<Single<T>>(n, 0, p.height, image, p.pixels(), p.width);
    }
  });
  return {output, pre};
}

// The gradients of x and weight, and of the bias where nothing else sums g, replaced where they are wanted.
template <typename S>
void gradients_by_torch(const Problem& p, const Tensor& g, const Tensor& x, const Tensor& weight, bool want_x,
                        bool want_weight, bool want_bias, Tensor& grad_x, Tensor& grad_w, Tensor& grad_bias) {
  if (!want_x && !want_weight && !want_bias) return;
  const auto found = torch_backward(p, g, x, masked_weight<S>(p, weight), want_x, want_weight, want_bias);
  if (want_x) grad_x = std::get<0>(found);
  if (want_weight) grad_w = masked_weight<S>(p, std::get<1>(found));
  if (want_bias) grad_bias = std::get<2>(found);
}

}  // namespace
}  // namespace masked
}  // namespace genkernels
