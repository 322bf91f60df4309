// The operator autoregressive_sampling but for its arithmetic: the call, its checks and dtypes.
//
// A backend gives one function, for fp32 or fp64 tensors and at least one pixel to draw:
//   sample<T>(task, net, image, state, noise, known, tensors)
#pragma once

#include "stages.h"

namespace genkernels {
namespace sampling {

using stages::Network;

// One call: rows [begin, end) of [N, C, H, W] images.
struct Task {
  int64_t batch, channels, height, columns, noise_channels;
  Head head;
  int64_t groups;  // data channels that are drawn one after the other, each by its own group of every stage's outputs
  int64_t levels, begin, end;
  double temperature;
};

// What memory safety asks of the arguments; sentences for users are Python's.
inline Task task_of(const Tensor& image, const Tensor& state, const Tensor& noise, const std::optional<Tensor>& known,
                    const std::vector<Tensor>& tensors, const Network& net, int64_t head, int64_t levels,
                    double temperature, int64_t begin, int64_t end) {
  const auto holds = [](bool condition, const char* what) { require(condition, "autoregressive_sampling: ", what); };
  holds(image.dim() == 4 && noise.dim() == 4, "image and noise must have 4 dimensions");
  const int64_t batch = image.size(0), channels = image.size(1), height = image.size(2), columns = image.size(3);
  const Head which = static_cast<Head>(head);
  const bool mixture = which == Head::kLogisticMixture;
  holds(shape_of(noise) == std::vector<int64_t>{batch, channels + mixture, height, columns},
        "noise must be [N, C, H, W], or [N, 1 + C, H, W] for logistic_mixture");
  holds(!mixture || channels == 1 || channels == 3, "a logistic mixture must have 1 or 3 channels");
  holds(begin >= 0 && end <= height && levels >= 2, "rows or levels are out of range");
  const ScalarType dtype = noise.scalar_type();
  for (const Tensor& t : tensors)
    holds(t.scalar_type() == dtype && t.is_contiguous(),
          "tensors of the stages must have noise's dtype and be contiguous");
  holds(image.scalar_type() == ScalarType::Long && image.is_contiguous(), "image must be int64 and contiguous");
  holds(noise.is_contiguous(), "noise must be contiguous");
  holds(!known.has_value() ||
            (known->scalar_type() == ScalarType::Bool && known->is_contiguous() && known->numel() == image.numel()),
        "known must be bool, contiguous and of the image's shape");
  stages::check(net, tensors, noise);
  const int64_t width = net.planes.back().channels;
  holds(net.planes[0].channels == channels, "plane 0 must have the image's channels");
  holds(mixture ? width % (channels == 1 ? 3 : 10) == 0 : width == channels * levels,
        "the last plane does not fit the head");
  holds(shape_of(state) == std::vector<int64_t>{batch, net.state_size} && state.is_contiguous() &&
            state.scalar_type() == dtype,
        "state must be [N, the caches' size], of noise's dtype and contiguous");
  return {batch,  channels, height, columns,    noise.size(1), which, mixture ? 1 : channels,
          levels, begin,    end,    temperature};
}

template <typename Backend>
void autoregressive_sampling(Tensor image, Tensor state, Tensor noise, std::optional<Tensor> known,
                             std::vector<Tensor> tensors, std::vector<int64_t> plan, int64_t head, int64_t levels,
                             double temperature, int64_t begin, int64_t end) {
  const Network net(plan);
  const Task task = task_of(image, state, noise, known, tensors, net, head, levels, temperature, begin, end);
  if (image.numel() == 0 || begin >= end) return;
  with_dtype<float, double>("autoregressive_sampling: noise", noise, [&]<typename T>() {
    Backend::template sample<T>(task, net, image, state, noise, known, tensors);
  });
}

}  // namespace sampling
}  // namespace genkernels
