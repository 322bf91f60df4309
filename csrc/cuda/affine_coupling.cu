// genkernels_cuda::affine_coupling, _backward and _reverse: launch shapes, outputs, dtypes, registration. Kernels: the
// .cuh.
//
// Shapes, dtypes, devices and contiguity were checked above, in genkernels/ops/affine_coupling.py, which also has the
// schemas.
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "affine_coupling.cuh"

namespace genkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

// Calls f(std::integral_constant<ScaleMap, map>{}).
template <typename F>
void with_scale_map(ScaleMap map, F f) {
  switch (map) {
    case ScaleMap::kExp: return f(std::integral_constant<ScaleMap, ScaleMap::kExp>{});
    case ScaleMap::kSigmoid: return f(std::integral_constant<ScaleMap, ScaleMap::kSigmoid>{});
    case ScaleMap::kTanh: return f(std::integral_constant<ScaleMap, ScaleMap::kTanh>{});
    case ScaleMap::kAdditive: return f(std::integral_constant<ScaleMap, ScaleMap::kAdditive>{});
  }
  throw std::runtime_error("affine_coupling: scale_map must be 0 to 3, got " + std::to_string(static_cast<int>(map)));
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
  return c.moved % V == 0 && c.row.value() % V == 0;
}

template <typename T, typename P>
void run_forward(const Launcher& launch, Coupling c, ScaleMap map, bool inverse, const Tensor& input,
                 const Tensor& params, const Tensor& output, const Tensor& ldj) {
  using A = accumulator_t<T>;
  const T* x = static_cast<const T*>(input.const_data_ptr());
  const P* p = static_cast<const P*>(params.const_data_ptr());
  T* out = static_cast<T*>(output.mutable_data_ptr());
  A* sums = static_cast<A*>(ldj.mutable_data_ptr());
  constexpr int V = kLanes<T, true>;
  const bool wide = kHasWide<T> && whole_runs<V>(c) && are_aligned<V>(x, p, out);
  const Grid grid = divide(c, wide ? V : kLanes<T, false>);
  const bool staged = c.chunks > 1 && map != ScaleMap::kAdditive;
  Tensor partial = ldj;
  if (staged) partial = torch::stable::new_empty(ldj, {c.samples * static_cast<int64_t>(c.chunks)});
  A* log_det = static_cast<A*>(partial.mutable_data_ptr());
  with_scale_map(map, [&](auto m) {
    auto kernel = coupling_forward<m.value, T, P, false>;
    if constexpr (kHasWide<T>) {
      if (wide) kernel = coupling_forward<m.value, T, P, true>;
    }
    launch(kernel, grid.blocks, grid.block, c, inverse, x, p, out, log_det);
  });
  if (staged) launch_sum_rows<A>(launch, log_det, c.samples, c.chunks, sums);
}

template <typename T, typename P>
void run_backward(const Launcher& launch, Coupling c, ScaleMap map, Gradient which, const Tensor* grad_output,
                  const Tensor* grad_ldj, const Tensor& input, const Tensor& params, const Tensor& grad_input,
                  const Tensor& grad_params, const Tensor* rebuilt) {
  using A = accumulator_t<T>;
  const T* g = static_cast<const T*>((grad_output ? *grad_output : input).const_data_ptr());
  const A* g_ldj = grad_ldj ? static_cast<const A*>(grad_ldj->const_data_ptr()) : nullptr;
  const T* x = static_cast<const T*>(input.const_data_ptr());
  const P* p = static_cast<const P*>(params.const_data_ptr());
  T* gx = static_cast<T*>(grad_input.mutable_data_ptr());
  P* gp = static_cast<P*>(grad_params.mutable_data_ptr());
  T* x_out = rebuilt ? static_cast<T*>(rebuilt->mutable_data_ptr()) : nullptr;
  constexpr int V = kLanes<T, true>;
  const bool wide = kHasWide<T> && whole_runs<V>(c) && are_aligned<V>(g, x, p, gx, gp, x_out);
  const Grid grid = divide(c, wide ? V : kLanes<T, false>);
  with_scale_map(map, [&](auto m) {
    auto kernel = coupling_backward<m.value, T, P, false>;
    if constexpr (kHasWide<T>) {
      if (wide) kernel = coupling_backward<m.value, T, P, true>;
    }
    launch(kernel, grid.blocks, grid.block, c, which, grad_output != nullptr, g, g_ldj, x, p, gx, gp, x_out);
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Operators

constexpr int64_t kCheckerboard = 1;  // split
constexpr int64_t kInterleaved = 1;   // layout

Coupling describe(const Tensor& x, ScaleMap map, int64_t split, int64_t layout, bool flip) {
  const auto sizes = x.sizes();
  int64_t plane = 1;
  for (size_t d = 2; d < sizes.size(); ++d) plane *= sizes[d];
  const bool checkerboard = split == kCheckerboard;
  const int64_t sample = sizes[1] * plane, moved = checkerboard ? sample : sample / 2;
  const bool additive = map == ScaleMap::kAdditive;
  Coupling c{};
  if (moved == 0) return c;  // nothing to index
  c.samples = sizes[0];
  c.moved = moved;
  c.row = Divisor(layout == kInterleaved && !additive ? plane : moved);
  if (checkerboard) {
    c.height = Divisor(sizes[2]);
    c.width = Divisor(sizes[3]);
  }
  c.x_size = sample;
  c.param_size = additive ? moved : 2 * moved;
  c.passed_at = !checkerboard && flip ? moved : 0;
  c.moved_at = !checkerboard && !flip ? moved : 0;
  c.checkerboard = checkerboard;
  c.flip = flip;
  return c;
}

// Calls f(T{}, P{}) for the dtypes of x and of params.
template <typename F>
void with_dtypes(const Tensor& x, const Tensor& params, F f) {
  const ScalarType t = x.scalar_type(), p = params.scalar_type();
  if (t == ScalarType::Float && p == ScalarType::Float) return f(float{}, float{});
  if (t == ScalarType::BFloat16 && p == ScalarType::BFloat16) return f(BFloat16{}, BFloat16{});
  if (t == ScalarType::Half && p == ScalarType::Half) return f(Half{}, Half{});
  if (t == ScalarType::Float && p == ScalarType::BFloat16) return f(float{}, BFloat16{});
  if (t == ScalarType::Float && p == ScalarType::Half) return f(float{}, Half{});
  if (t == ScalarType::Double && p == ScalarType::Double) return f(double{}, double{});
  throw std::runtime_error(
      "affine_coupling: params must have x's dtype (float64, float32, bfloat16, float16), or be bfloat16 or float16 "
      "beside a "
      "float32 x");
}

std::tuple<Tensor, Tensor> affine_coupling(const Tensor& input, const Tensor& params, int64_t scale_map, int64_t split,
                                           int64_t layout, bool flip, bool inverse) {
  const ScaleMap map = static_cast<ScaleMap>(scale_map);
  const Coupling c = describe(input, map, split, layout, flip);
  const Launcher launch("affine_coupling", input);
  Tensor output = torch::stable::new_empty(input, input.sizes());
  const auto wide_type = input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  if (input.numel() == 0) return {output, torch::stable::new_zeros(input, {input.size(0)}, wide_type)};
  Tensor ldj = torch::stable::new_empty(input, {input.size(0)}, wide_type);
  with_dtypes(input, params, [&](auto t, auto p) {
    run_forward<decltype(t), decltype(p)>(launch, c, map, inverse, input, params, output, ldj);
  });
  return {output, ldj};
}

const Tensor* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? &*tensor : nullptr;
}

std::tuple<Tensor, Tensor> affine_coupling_backward(std::optional<Tensor> grad_output, std::optional<Tensor> grad_ldj,
                                                    const Tensor& input, const Tensor& params, int64_t scale_map,
                                                    int64_t split, int64_t layout, bool flip, bool inverse) {
  const ScaleMap map = static_cast<ScaleMap>(scale_map);
  const Gradient which = inverse ? Gradient::kInverse : Gradient::kForward;
  const Launcher launch("affine_coupling_backward", input);
  Tensor grad_input = torch::stable::new_empty(input, input.sizes());
  Tensor grad_params = torch::stable::new_empty(params, params.sizes());
  if (input.numel() == 0) return {grad_input, grad_params};
  with_dtypes(input, params, [&](auto t, auto p) {
    run_backward<decltype(t), decltype(p)>(launch, describe(input, map, split, layout, flip), map, which,
                                           pointer(grad_output), pointer(grad_ldj), input, params, grad_input,
                                           grad_params, nullptr);
  });
  return {grad_input, grad_params};
}

std::tuple<Tensor, Tensor, Tensor> affine_coupling_reverse(std::optional<Tensor> grad_output,
                                                           std::optional<Tensor> grad_ldj, const Tensor& output,
                                                           const Tensor& params, int64_t scale_map, int64_t split,
                                                           int64_t layout, bool flip) {
  const ScaleMap map = static_cast<ScaleMap>(scale_map);
  const Launcher launch("affine_coupling_reverse", output);
  Tensor input = torch::stable::new_empty(output, output.sizes());
  Tensor grad_input = torch::stable::new_empty(output, output.sizes());
  Tensor grad_params = torch::stable::new_empty(params, params.sizes());
  if (output.numel() == 0) return {input, grad_input, grad_params};
  with_dtypes(output, params, [&](auto t, auto p) {
    run_backward<decltype(t), decltype(p)>(launch, describe(output, map, split, layout, flip), map, Gradient::kReverse,
                                           pointer(grad_output), pointer(grad_ldj), output, params, grad_input,
                                           grad_params, &input);
  });
  return {input, grad_input, grad_params};
}

}  // namespace
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels_cuda, CUDA, m) {
  m.impl("affine_coupling", TORCH_BOX(&genkernels::affine_coupling));
  m.impl("affine_coupling_backward", TORCH_BOX(&genkernels::affine_coupling_backward));
  m.impl("affine_coupling_reverse", TORCH_BOX(&genkernels::affine_coupling_reverse));
}
