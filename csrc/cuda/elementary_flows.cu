// genkernels_cuda::planar_flow, radial_flow and their backwards: launch shapes, temporaries and registration. Kernels:
// the .cuh; outputs and dtypes: csrc/common/elementary_flows.h.
#include "elementary_flows.cuh"

namespace genkernels {
namespace flows {
namespace {

constexpr int64_t kEnough = 4096;  // warps that keep a large GPU busy: beyond, a warp takes more rows
constexpr int64_t kMostTurns = 64;

// Calls f(warps, std::integral_constant<int, V>{}).
template <typename Kind, typename F>
void with_warps(const Sizes& sizes, F&& f) {
  require(sizes.features <= kWarp * kMostNumbers, Kind::kName, ": the CUDA kernels take at most ", kWarp * kMostNumbers,
          " features, got ", sizes.features, "; those of backend 'triton' take any number");
  // up to four numbers a thread before a row takes more threads, so that sums across them are few
  int lanes = 1;
  while (lanes < kWarp && int64_t(lanes) * 4 < sizes.features) lanes *= 2;
  const int64_t rows = kWarp / lanes, tiles = ceil_div(sizes.rows, rows);
  const int64_t turns = std::clamp<int64_t>(sizes.groups * tiles / kEnough, 1, std::min(tiles, kMostTurns));
  const Warps warps{sizes, lanes, turns, ceil_div(tiles, turns)};
  const int64_t numbers = ceil_div(sizes.features, int64_t(lanes));
  if (numbers <= 2)
    f(warps, std::integral_constant<int, 2>{});
  else if (numbers <= 4)
    f(warps, std::integral_constant<int, 4>{});
  else
    f(warps, std::integral_constant<int, kMostNumbers>{});
}

int64_t blocks_for(int64_t warps) {
  return ceil_div(warps, kWarps);
}

// The backend of common/elementary_flows.h.
struct Cuda {
  template <typename Kind, typename S>
  static Tensor prepare(const Launcher& launch, const Sizes& sizes, const Parameters& p) {
    using T = arithmetic_t<S>;
    const int64_t layers = sizes.groups * sizes.layers;
    const bool planar = std::is_same_v<Kind, Planar>;
    Tensor ready = empty(p[0], {layers, planar ? sizes.features + 2 : 2}, Dtype<T>::kType);
    if constexpr (planar)
      launch(planar_prepare<S, T>, blocks_for(layers), dim3(kWarp, kWarps), layers, sizes.features, data<S>(p[0]),
             data<S>(p[1]), mutable_data<T>(ready));
    else
      launch(radial_prepare<S, T>, ceil_div(layers, kThreads), dim3(kWarp, kWarps), layers, data<S>(p[1]),
             data<S>(p[2]), mutable_data<T>(ready));
    return ready;
  }

  template <typename Kind, typename S>
  static void forward(const Sizes& sizes, const Tensor& z, const Parameters& p, const Tensor& z_out,
                      const Tensor& ldj) {
    using T = arithmetic_t<S>;
    const Launcher launch(Kind::kName, z);
    with_warps<Kind>(sizes, [&](const Warps& warps, auto numbers) {
      constexpr int V = numbers.value;
      const Tensor ready = prepare<Kind, S>(launch, sizes, p);
      const int64_t blocks = blocks_for(warps.count());
      if constexpr (std::is_same_v<Kind, Planar>)
        launch(planar_forward<S, T, V>, blocks, dim3(kWarp, kWarps), warps, data<S>(z), data<S>(p[0]), data<S>(p[2]),
               data<T>(ready), mutable_data<S>(z_out), mutable_data<T>(ldj));
      else
        launch(radial_forward<S, T, V>, blocks, dim3(kWarp, kWarps), warps, data<S>(z), data<S>(p[0]), data<T>(ready),
               mutable_data<S>(z_out), mutable_data<T>(ldj));
    });
  }

  template <typename Kind, typename S>
  static void backward(const Sizes& sizes, const std::optional<Tensor>& grad_z, const std::optional<Tensor>& grad_ldj,
                       const Tensor& z, const Parameters& p, const Tensor& by_z, const Parameters& by) {
    using T = arithmetic_t<S>;
    const Launcher launch(Kind::kName, z);
    with_warps<Kind>(sizes, [&](const Warps& warps, auto numbers) {
      constexpr int V = numbers.value;
      const Tensor ready = prepare<Kind, S>(launch, sizes, p);
      const Tensor scratch = empty(z, {sizes.layers, z.numel()}, Dtype<T>::kType);
      const Tensor sums = empty(z, {warps.count(), sizes.layers, Kind::sums(sizes.features)}, Dtype<T>::kType);
      const int64_t blocks = blocks_for(warps.count()), layers = blocks_for(sizes.groups * sizes.layers);
      const dim3 block(kWarp, kWarps);
      if constexpr (std::is_same_v<Kind, Planar>) {
        launch(planar_backward<S, T, V>, blocks, block, warps, data<S>(grad_z), data<T>(grad_ldj), data<S>(z),
               data<S>(p[0]), data<S>(p[2]), data<T>(ready), mutable_data<T>(scratch), mutable_data<S>(by_z),
               mutable_data<T>(sums));
        launch(planar_finish<S, T>, layers, block, warps, mutable_data<T>(sums), data<S>(p[0]), data<S>(p[1]),
               mutable_data<S>(by[0]), mutable_data<S>(by[1]), mutable_data<S>(by[2]));
      } else {
        launch(radial_backward<S, T, V>, blocks, block, warps, data<S>(grad_z), data<T>(grad_ldj), data<S>(z),
               data<S>(p[0]), data<T>(ready), mutable_data<T>(scratch), mutable_data<S>(by_z), mutable_data<T>(sums));
        launch(radial_finish<S, T>, layers, block, warps, data<T>(sums), data<S>(p[1]), data<S>(p[2]),
               mutable_data<S>(by[0]), mutable_data<S>(by[1]), mutable_data<S>(by[2]));
      }
    });
  }
};

}  // namespace
}  // namespace flows
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels_cuda, CUDA, m) {
  using namespace genkernels;
  m.impl("planar_flow", TORCH_BOX((&flows::forward<flows::Cuda, flows::Planar>)));
  m.impl("planar_flow_backward", TORCH_BOX((&flows::backward<flows::Cuda, flows::Planar>)));
  m.impl("radial_flow", TORCH_BOX((&flows::forward<flows::Cuda, flows::Radial>)));
  m.impl("radial_flow_backward", TORCH_BOX((&flows::backward<flows::Cuda, flows::Radial>)));
}
