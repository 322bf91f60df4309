// genkernels_cuda::autoregressive_sampling: records of the stages, packed weights, the launch. Kernels: the .cuh;
// checks: csrc/common/autoregressive_sampling.h.
#include <algorithm>

#include "../common/autoregressive_sampling.h"
#include "autoregressive_sampling.cuh"

namespace genkernels {
namespace sampling {
namespace {

using stages::Input;
using stages::Plane;
using stages::Stage;

// The backend of common/autoregressive_sampling.h.
struct Cuda {
  template <typename T>
  static void sample(const Task& t, const Network& net, const Tensor& image, const Tensor& state, const Tensor& noise,
                     const std::optional<Tensor>& known, const std::vector<Tensor>& tensors);
};

template <typename T>
void Cuda::sample(const Task& t, const Network& net, const Tensor& image, const Tensor& state, const Tensor& noise,
                  const std::optional<Tensor>& known, const std::vector<Tensor>& tensors) {
  const Launcher launch("autoregressive_sampling", image);
  std::vector<PlaneAt> planes;
  for (const Plane& p : net.planes)
    planes.push_back({static_cast<int>(p.channels), static_cast<int>(p.rows), static_cast<int>(p.border),
                      static_cast<int>(p.row_length), p.offset});

  std::vector<Part> parts;
  std::vector<StageAt<T>> found;
  struct Packing {
    const T* weight;
    int width, channels, taps, first_tap, count;
    int64_t to;
  };
  std::vector<Packing> packings;
  int64_t weights_size = 0, sums_size = 0;
  const auto pointer = [&](int64_t index) { return index < 0 ? nullptr : data<T>(tensors[index]); };
  for (const Stage& s : net.stages) {
    StageAt<T> stage{static_cast<int>(s.width),
                     static_cast<int>(s.made),
                     static_cast<int>(s.activation),
                     static_cast<int>(s.residual),
                     static_cast<int>(s.vertical),
                     static_cast<int>(s.condition_map),
                     static_cast<int>(parts.size()),
                     0,
                     sums_size,
                     pointer(s.bias),
                     pointer(s.condition)};
    sums_size += s.width * t.columns;
    for (const Input& in : net.inputs(s)) {
      const Plane& from = net.planes[in.plane];
      for (int64_t y = 0; y <= in.kh / 2; ++y) {
        const int64_t up = in.kh / 2 - y;
        const bool whole = up > 0 || from.vertical;
        if (s.vertical && !whole) continue;  // such weights are 0
        Part part{static_cast<int>(in.plane),
                  static_cast<int>(up),
                  static_cast<int>((from.border - in.kw / 2) * from.channels),
                  static_cast<int>(in.kw * from.channels),
                  0,
                  0,
                  !whole,
                  weights_size};
        if (up == 0 && !s.vertical) part.count = static_cast<int>((in.kw / 2 + 1) * from.channels);
        const int64_t stored = part.count;
        if (!whole) {
          part.count -= static_cast<int>(from.channels);
          part.centre = static_cast<int>(from.channels / t.groups);
          part.own = in.plane != 0;
        }
        packings.push_back({pointer(in.tensor), static_cast<int>(s.width), static_cast<int>(from.channels),
                            static_cast<int>(in.kh * in.kw), static_cast<int>(y * in.kw), static_cast<int>(stored),
                            weights_size});
        weights_size += stored * s.width;
        parts.push_back(part);
      }
    }
    for (int64_t plane : net.added(s))
      parts.push_back({static_cast<int>(plane), 0, 0, 0, 0, 0, !(s.vertical || net.planes[plane].vertical), 0});
    stage.last_part = static_cast<int>(parts.size());
    found.push_back(stage);
  }
  sums_size += t.levels;  // the draw's weights

  const auto bytes = [&](int64_t count) { return empty(image, {std::max<int64_t>(count, 1)}, ScalarType::Byte); };
  const Tensor packed = empty(noise, {std::max<int64_t>(weights_size, 1)}), sums = empty(noise, {t.batch, sums_size});
  const Tensor plane_bytes = bytes(planes.size() * sizeof(PlaneAt)), part_bytes = bytes(parts.size() * sizeof(Part)),
               stage_bytes = bytes(found.size() * sizeof(StageAt<T>));
  const auto send = [&]<typename Record>(const std::vector<Record>& records, const Tensor& to) {
    Record* at = mutable_data<Record>(to);
    for (size_t k = 0; k < records.size(); ++k) launch(write_record<Record>, 1, dim3(1), at + k, records[k]);
    return static_cast<const Record*>(at);
  };
  for (const Packing& p : packings)
    launch(pack_row<T>, ceil_div(static_cast<int64_t>(p.count) * p.width, kThreads), dim3(kThreads), p.weight, p.width,
           p.channels, p.taps, p.first_tap, p.count, mutable_data<T>(packed) + p.to);
  const Problem<T> problem{send(planes, plane_bytes),
                           send(parts, part_bytes),
                           send(found, stage_bytes),
                           static_cast<int>(found.size()),
                           static_cast<int>(t.groups),
                           static_cast<int>(t.channels),
                           static_cast<int>(t.height),
                           static_cast<int>(t.columns),
                           static_cast<int>(t.noise_channels),
                           t.head == Head::kLogisticMixture,
                           static_cast<int>(t.levels),
                           static_cast<int>(t.begin),
                           static_cast<int>(t.end),
                           static_cast<T>(t.temperature),
                           net.state_size,
                           sums_size,
                           data<T>(packed),
                           data<T>(noise),
                           data<bool>(known),
                           mutable_data<int64_t>(image),
                           mutable_data<T>(state),
                           mutable_data<T>(sums)};
  launch(sample_rows<T>, t.batch, dim3(kBlock), problem);
}

}  // namespace
}  // namespace sampling
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels_cuda, CUDA, m) {
  using namespace genkernels::sampling;
  m.impl("autoregressive_sampling", TORCH_BOX(&autoregressive_sampling<Cuda>));
}
