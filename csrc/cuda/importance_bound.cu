// genkernels_cuda::importance_bound, gaussian_reparameterize and their backwards: launch shapes and registration.
// Kernels: the .cuh; outputs and dtypes: csrc/common/importance_bound.h.
#include "importance_bound.cuh"

namespace genkernels {
namespace {

using importance::kColumns;
using importance::kDown;
using importance::Options;
using importance::Samples;

// Blocks for rows of so many numbers, a group of threads a row: two numbers a thread, more where 256 threads have to.
struct Shape {
  int64_t blocks;
  dim3 block;

  Shape(int64_t rows, int64_t length) {
    const int group = group_for(length, 2), rows_a_block = kThreads / group;
    blocks = ceil_div(rows, rows_a_block);
    block = dim3(group, rows_a_block);
  }
};

// The backend of common/importance_bound.h.
struct Cuda {
  template <typename S>
  static void bound(const Rows& rows, const Tensor& log_w, const Tensor& bound, const Tensor& weights) {
    using T = arithmetic_t<S>;
    const Launcher launch("importance_bound", log_w);
    const Shape shape(rows.count, rows.length);
    launch(importance::bound_kernel<S>, shape.blocks, shape.block, rows, std::log(static_cast<double>(rows.length)),
           data<S>(log_w), mutable_data<T>(bound), mutable_data<T>(weights));
  }

  template <typename S>
  static void bound_backward(const Rows& rows, const std::optional<Tensor>& grad_bound,
                             const std::optional<Tensor>& grad_weights, const Tensor& weights, const Tensor& by_log_w) {
    using T = arithmetic_t<S>;
    const Launcher launch("importance_bound_backward", weights);
    const Shape shape(rows.count, rows.length);
    launch(importance::bound_backward_kernel<S>, shape.blocks, shape.block, rows, data<T>(grad_bound),
           data<T>(grad_weights), data<T>(weights), mutable_data<S>(by_log_w));
  }

  template <typename S>
  static void reparameterize(const Samples& samples, bool prior, const Tensor& noise, const Tensor& mean,
                             const Tensor& log_scale, const Tensor& z, const Tensor& ratio) {
    using T = arithmetic_t<S>;
    const Launcher launch("gaussian_reparameterize", noise);
    const Shape shape(samples.rows * samples.count, samples.width);
    const auto kernel =
        prior ? importance::reparameterize_kernel<S, true> : importance::reparameterize_kernel<S, false>;
    launch(kernel, shape.blocks, shape.block, samples, data<S>(noise), data<S>(mean), data<S>(log_scale),
           mutable_data<S>(z), mutable_data<T>(ratio));
  }

  template <typename S>
  static void reparameterize_backward(const Samples& samples, const Options& options,
                                      const std::optional<Tensor>& grad_z, const std::optional<Tensor>& grad_ratio,
                                      const Tensor& noise, const Tensor& mean, const Tensor& log_scale,
                                      const Tensor& by_mean, const Tensor& by_log_scale) {
    using T = arithmetic_t<S>;
    const Launcher launch("gaussian_reparameterize_backward", noise);
    const int64_t tiles = ceil_div(samples.width, kColumns);
    launch(importance::reparameterize_backward_kernel<S>, samples.rows * tiles, dim3(kColumns, kDown), samples, options,
           static_cast<unsigned int>(tiles), data<S>(grad_z), data<T>(grad_ratio), data<S>(noise), data<S>(mean),
           data<S>(log_scale), mutable_data<S>(by_mean), mutable_data<S>(by_log_scale));
  }
};

}  // namespace
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels_cuda, CUDA, m) {
  using namespace genkernels;
  m.impl("importance_bound", TORCH_BOX(&importance::importance_bound<Cuda>));
  m.impl("importance_bound_backward", TORCH_BOX(&importance::importance_bound_backward<Cuda>));
  m.impl("gaussian_reparameterize", TORCH_BOX(&importance::gaussian_reparameterize<Cuda>));
  m.impl("gaussian_reparameterize_backward", TORCH_BOX(&importance::gaussian_reparameterize_backward<Cuda>));
}
