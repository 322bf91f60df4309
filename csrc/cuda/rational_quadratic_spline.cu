// genkernels_cuda::rational_quadratic_spline and its backward: launch shapes and registration. Kernels: the .cuh;
// outputs and dtypes: csrc/common/rational_quadratic_spline.h.
#include <algorithm>

#include "rational_quadratic_spline.cuh"

namespace genkernels {
namespace spline {
namespace {

// Shared memory of a block: what leaves room for many blocks, and what serves the longest parameters.
constexpr int kFewBytes = 16 * 1024, kMostBytes = 46 * 1024;

// Calls f(shape, blocks, std::integral_constant<int, words>{}).
template <typename T, typename F>
void with_shape(const Call& c, F&& f) {
  constexpr int kFew = kFewBytes / sizeof(T), kMost = kMostBytes / sizeof(T);
  Shape s{};
  require(c.params <= kMost, "rational_quadratic_spline: the CUDA kernels take at most ", kMost,
          " parameters a number of this dtype, got ", c.params, "; those of backend 'triton' take any number");
  s.rows = c.rows;
  s.length = c.length;
  s.bins = static_cast<int>(c.bins);
  s.params = static_cast<int>(c.params);
  s.stride = s.params | 1;
  s.by_params = Divisor(c.params);
  const bool few = s.stride * 32 <= kFew;
  const int64_t numbers = std::clamp<int64_t>((few ? kFew : kMost) / s.stride, 1, kNumbers);
  s.width = static_cast<int>(std::min(c.length, numbers));
  s.segments = ceil_div(c.length, int64_t(s.width));
  s.rows_a_block = s.segments == 1 ? static_cast<int>(numbers / s.width) : 1;
  const int64_t blocks = s.segments == 1 ? ceil_div(c.rows, int64_t(s.rows_a_block)) : c.rows * s.segments;
  if (few)
    f(s, blocks, std::integral_constant<int, kFew>{});
  else
    f(s, blocks, std::integral_constant<int, kMost>{});
}

// The backend of common/rational_quadratic_spline.h.
struct Cuda {
  template <typename S, Spline Kind>
  static void forward(const Call& c, const Tensor& input, const Tensor& params, const Tensor& output,
                      const Tensor& ldj) {
    using T = arithmetic_t<S>;
    const Launcher launch("rational_quadratic_spline", input);
    with_shape<T>(c, [&](const Shape& shape, int64_t blocks, auto words) {
      const bool cut = shape.segments > 1;
      const Tensor parts = cut ? empty(ldj, {c.rows, shape.segments}) : ldj;
      launch(forward_kernel<S, Kind, words.value>, blocks, dim3(kNumbers), shape, Options<T>(c, Kind), c.inverse,
             data<S>(input), data<S>(params), mutable_data<S>(output), mutable_data<T>(parts));
      if (cut) launch_sum_rows(launch, data<T>(parts), c.rows, shape.segments, mutable_data<T>(ldj));
    });
  }

  template <typename S, Spline Kind>
  static void backward(const Call& c, const std::optional<Tensor>& grad_output, const std::optional<Tensor>& grad_ldj,
                       const Tensor& x, const Tensor& params, const Tensor& by_input, const Tensor& by_params) {
    using T = arithmetic_t<S>;
    const Launcher launch("rational_quadratic_spline_backward", x);
    with_shape<T>(c, [&](const Shape& shape, int64_t blocks, auto words) {
      launch(backward_kernel<S, Kind, words.value>, blocks, dim3(kNumbers), shape, Options<T>(c, Kind), c.inverse,
             data<S>(grad_output), data<T>(grad_ldj), data<S>(x), data<S>(params), mutable_data<S>(by_input),
             mutable_data<S>(by_params));
    });
  }
};

}  // namespace
}  // namespace spline
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels_cuda, CUDA, m) {
  using namespace genkernels;
  m.impl("rational_quadratic_spline", TORCH_BOX(&spline::rational_quadratic_spline<spline::Cuda>));
  m.impl("rational_quadratic_spline_backward", TORCH_BOX(&spline::rational_quadratic_spline_backward<spline::Cuda>));
}
