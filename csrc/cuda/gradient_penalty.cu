// genkernels_cuda::interpolate_pairs, gradient_penalty and their backwards: launch shapes and registration. Kernels:
// the .cuh; outputs and dtypes: csrc/common/gradient_penalty.h.
#include "gradient_penalty.cuh"

namespace genkernels {
namespace {

using penalty::Grid;
using penalty::Target;

// Blocks and their shape for threads of `lanes` numbers each; sets the chunks of a row.
struct Shape {
  int64_t blocks;
  dim3 block;
};

Shape divide(Grid& grid, int lanes) {
  const int group = group_for(grid.rows.length, lanes), rows_a_block = kThreads / group;
  grid.chunks =
      static_cast<unsigned int>(std::max<int64_t>(1, ceil_div(grid.rows.length, static_cast<int64_t>(group) * lanes)));
  return {ceil_div(grid.rows.count, rows_a_block) * grid.chunks, dim3(group, rows_a_block)};
}

// Calls f(std::bool_constant<wide>{}): whether every run is one 16-byte access.
template <typename S, typename F, typename... Pointers>
void with_width(const Rows& rows, F&& f, const Pointers*... pointers) {
  constexpr int V = kLanes<S, true>;
  if constexpr (kHasWide<S>) {
    if (rows.length % V == 0 && are_aligned<V>(pointers...)) return f(std::true_type{});
  }
  f(std::false_type{});
}

// The backend of common/gradient_penalty.h.
struct Cuda {
  template <typename S>
  static void interpolate(const Rows& rows, const Tensor& real, const Tensor& fake, const Tensor& u, const Tensor& x) {
    const Launcher launch("interpolate_pairs", real);
    const S *from_real = data<S>(real), *from_fake = data<S>(fake);
    S* to = mutable_data<S>(x);
    const auto run = [&](auto wide) {
      Grid grid{rows};
      const Shape shape = divide(grid, kLanes<S, wide.value>);
      launch(penalty::interpolate_kernel<S, wide.value>, shape.blocks, shape.block, grid, from_real, from_fake,
             data<arithmetic_t<S>>(u), to);
    };
    with_width<S>(rows, run, from_real, from_fake, to);
  }

  template <typename S>
  static void interpolate_backward(const Rows& rows, const Tensor& grad, const Tensor& u, const Tensor& by_real,
                                   const Tensor& by_fake) {
    const Launcher launch("interpolate_pairs_backward", grad);
    const S* from = data<S>(grad);
    S *to_real = mutable_data<S>(by_real), *to_fake = mutable_data<S>(by_fake);
    const auto run = [&](auto wide) {
      Grid grid{rows};
      const Shape shape = divide(grid, kLanes<S, wide.value>);
      launch(penalty::interpolate_backward_kernel<S, wide.value>, shape.blocks, shape.block, grid, from,
             data<arithmetic_t<S>>(u), to_real, to_fake);
    };
    with_width<S>(rows, run, from, to_real, to_fake);
  }

  template <typename S>
  static void penalty(const Rows& rows, const Target& target, const Tensor& gradient, const Tensor& value,
                      const Tensor& norm) {
    const Launcher launch("gradient_penalty", gradient);
    const S* from = data<S>(gradient);
    const Tensor squares = empty(norm);
    double* sums = mutable_data<double>(squares);
    const auto run = [&](auto wide) {
      Grid grid{rows};
      const Shape shape = divide(grid, penalty::kRuns * kLanes<S, wide.value>);
      const bool staged = grid.chunks > 1;
      const Tensor partial = staged ? empty(norm, {rows.count * static_cast<int64_t>(grid.chunks)}) : squares;
      double* of_chunks = mutable_data<double>(partial);
      launch(penalty::squares_kernel<S, wide.value>, shape.blocks, shape.block, grid, from, of_chunks);
      if (staged) launch_sum_rows<double>(launch, of_chunks, rows.count, grid.chunks, sums);
    };
    with_width<S>(rows, run, from);
    launch(penalty::penalty_kernel<arithmetic_t<S>>, ceil_div(rows.count, kThreads), dim3(kThreads), target, rows.count,
           sums, mutable_data<arithmetic_t<S>>(value), mutable_data<double>(norm));
  }

  template <typename S>
  static void penalty_backward(const Rows& rows, const Target& target, const std::optional<Tensor>& grad,
                               const std::optional<Tensor>& grad_norm, const Tensor& gradient, const Tensor& norm,
                               const Tensor& by_gradient) {
    const Launcher launch("gradient_penalty_backward", gradient);
    const S* from = data<S>(gradient);
    S* to = mutable_data<S>(by_gradient);
    const auto run = [&](auto wide) {
      Grid grid{rows};
      const Shape shape = divide(grid, kLanes<S, wide.value>);
      launch(penalty::penalty_backward_kernel<S, wide.value>, shape.blocks, shape.block, grid, target,
             data<arithmetic_t<S>>(grad), data<double>(grad_norm), from, data<double>(norm), to);
    };
    with_width<S>(rows, run, from, to);
  }
};

}  // namespace
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels_cuda, CUDA, m) {
  using namespace genkernels;
  m.impl("interpolate_pairs", TORCH_BOX(&penalty::interpolate_pairs<Cuda>));
  m.impl("interpolate_pairs_backward", TORCH_BOX(&penalty::interpolate_pairs_backward<Cuda>));
  m.impl("gradient_penalty", TORCH_BOX(&penalty::gradient_penalty<Cuda>));
  m.impl("gradient_penalty_backward", TORCH_BOX(&penalty::gradient_penalty_backward<Cuda>));
}
