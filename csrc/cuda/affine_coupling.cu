// genkernels_cuda::affine_coupling, _backward and _reverse: launch shapes and registration. Kernels: the .cuh; outputs
// and dtypes: csrc/common/affine_coupling.h.
#include "../common/affine_coupling.h"
#include "affine_coupling.cuh"

namespace genkernels {
namespace {

using coupling::Call;
using coupling::Gradient;

// Calls f(std::integral_constant<Kernel, kernel>{}).
template <typename F>
void with_kernel_for(ScaleMap map, F f) {
  switch (map) {
    case ScaleMap::kExp: return f(std::integral_constant<Kernel, Kernel::kExp>{});
    case ScaleMap::kSigmoid: return f(std::integral_constant<Kernel, Kernel::kSigmoid>{});
    case ScaleMap::kTanh: return f(std::integral_constant<Kernel, Kernel::kTanh>{});
    case ScaleMap::kAdditive: return f(std::integral_constant<Kernel, Kernel::kAdditive>{});
    default: return f(std::integral_constant<Kernel, Kernel::kOther>{});
  }
}

// The call as the kernels take it.
Coupling describe(const Call& call) {
  Coupling c{};
  c.samples = call.samples;
  c.moved = call.moved;
  c.row = Divisor(call.row);
  c.x_row = Divisor(call.turns ? call.pixels : call.moved);
  if (call.checkerboard) {
    c.height = Divisor(call.height);
    c.width = Divisor(call.width);
  }
  c.x_size = call.sample;
  c.param_size = call.param_sample;
  c.passed_at = call.passed_at;
  c.moved_at = call.moved_at;
  (call.shift_first ? c.scale_at : c.shift_at) = call.map == ScaleMap::kAdditive ? 0 : call.row;
  c.map = call.map;
  c.constant = call.constant;
  c.checkerboard = call.checkerboard;
  c.copies = call.copies;
  c.flip = call.flip;
  return c;
}

// Blocks and their shape for a call; sets the chunks of a sample.
struct Grid {
  int64_t blocks;
  dim3 block;
};

inline Grid divide(Coupling& c, int lanes) {
  const int group = group_for(c.moved, lanes), samples_a_block = kThreads / group;
  const int64_t chunks = ceil_div(c.moved, static_cast<int64_t>(group) * lanes);
  c.chunks = static_cast<unsigned int>(chunks);
  return {ceil_div(c.samples, samples_a_block) * chunks, dim3(group, samples_a_block)};
}

// Whether every run of the call is one 16-byte access (fewer bytes for half params beside fp32): rows and halves are
// whole numbers of runs, and so every address is aligned if the first one of its tensor is.
template <int V>
bool whole_runs(const Coupling& c) {
  return c.moved % V == 0 && c.row.value() % V == 0 && c.x_row.value() % V == 0;
}

// The backend of common/affine_coupling.h.
struct Cuda {
  template <typename T, typename P>
  static void forward(const Call& call, bool inverse, const Tensor& input, const Tensor& params, const Tensor& output,
                      const Tensor& ldj);
  template <typename T, typename P>
  static void backward(const Call& call, Gradient which, const std::optional<Tensor>& grad_output,
                       const std::optional<Tensor>& grad_ldj, const Tensor& given, const Tensor& params,
                       const Tensor& grad_input, const Tensor& grad_params, const Tensor* rebuilt);
};

template <typename T, typename P>
void Cuda::forward(const Call& call, bool inverse, const Tensor& input, const Tensor& params, const Tensor& output,
                   const Tensor& ldj) {
  using A = arithmetic_t<T>;
  const Launcher launch("affine_coupling", input);
  Coupling c = describe(call);
  const T* x = data<T>(input);
  const P* p = data<P>(params);
  T* out = mutable_data<T>(output);
  constexpr int V = kLanes<T, true>;
  const bool wide = kHasWide<T> && whole_runs<V>(c) && are_aligned<V>(x, p, out);
  const Grid grid = divide(c, wide ? V : kLanes<T, false>);
  const bool staged = c.chunks > 1 && call.map != ScaleMap::kAdditive;
  const Tensor partial = staged ? empty(ldj, {c.samples * static_cast<int64_t>(c.chunks)}) : ldj;
  A* log_det = mutable_data<A>(partial);
  with_kernel_for(call.map, [&](auto m) {
    auto kernel = coupling_forward<m.value, T, P, false>;
    if constexpr (kHasWide<T>) {
      if (wide) kernel = coupling_forward<m.value, T, P, true>;
    }
    launch(kernel, grid.blocks, grid.block, c, inverse, x, p, out, log_det);
  });
  if (staged) launch_sum_rows<A>(launch, log_det, c.samples, c.chunks, mutable_data<A>(ldj));
}

template <typename T, typename P>
void Cuda::backward(const Call& call, Gradient which, const std::optional<Tensor>& grad_output,
                    const std::optional<Tensor>& grad_ldj, const Tensor& given, const Tensor& params,
                    const Tensor& grad_input, const Tensor& grad_params, const Tensor* rebuilt) {
  const Launcher launch(which == Gradient::kReverse ? "affine_coupling_reverse" : "affine_coupling_backward", given);
  Coupling c = describe(call);
  const T* x = data<T>(given);
  const P* p = data<P>(params);
  const T* g = grad_output ? data<T>(grad_output) : x;  // any such tensor: it is not looked at
  T* gx = mutable_data<T>(grad_input);
  P* gp = mutable_data<P>(grad_params);
  T* x_out = rebuilt ? mutable_data<T>(*rebuilt) : nullptr;
  constexpr int V = kLanes<T, true>;
  const bool wide = kHasWide<T> && whole_runs<V>(c) && are_aligned<V>(g, x, p, gx, gp, x_out);
  const Grid grid = divide(c, wide ? V : kLanes<T, false>);
  with_kernel_for(call.map, [&](auto m) {
    auto kernel = coupling_backward<m.value, T, P, false>;
    if constexpr (kHasWide<T>) {
      if (wide) kernel = coupling_backward<m.value, T, P, true>;
    }
    launch(kernel, grid.blocks, grid.block, c, which, grad_output.has_value(), g, data<arithmetic_t<T>>(grad_ldj), x, p,
           gx, gp, x_out);
  });
}

}  // namespace
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels_cuda, CUDA, m) {
  using namespace genkernels;
  m.impl("affine_coupling", TORCH_BOX(&coupling::affine_coupling<Cuda>));
  m.impl("affine_coupling_backward", TORCH_BOX(&coupling::affine_coupling_backward<Cuda>));
  m.impl("affine_coupling_reverse", TORCH_BOX(&coupling::affine_coupling_reverse<Cuda>));
}
