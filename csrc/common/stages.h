// The stages of a causal network as autoregressive_sampling receives them, and where a sample's caches lie. Host code
// of every backend.
//
// Numbers come from genkernels/reference/_stages.py (`flatten`), the layout from
// genkernels/ops/autoregressive_sampling.py (`state_size`).
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/headeronly/core/ScalarType.h>

namespace genkernels {
namespace stages {

enum class Activation : int { kNone = 0, kRelu = 1, kGate = 2 };
enum class Head : int { kCategorical = 0, kLogisticMixture = 1 };

struct Input {
  int64_t plane;
  int64_t tensor;  // its weight [out, in, kh, kw] among the tensors
  int64_t kh, kw;
};

struct Stage {
  int64_t width;  // channels before the activation
  int64_t made;   // and after it
  Activation activation;
  int64_t residual;  // plane, or -1
  bool vertical;
  int64_t bias;       // index among the tensors, or -1
  int64_t condition;  // likewise
  bool condition_map;
  std::vector<int64_t> added;
  std::vector<Input> inputs;
};

// Plane k in a sample's state: `rows` rows in a ring (image row i in slot i % rows), each of W + 2·border pixels, a
// pixel's channels together.
struct Plane {
  int64_t channels;
  bool vertical;
  int64_t rows = 1, border = 0;
  int64_t offset = 0, row_length = 0;  // elements
};

struct Network {
  std::vector<Stage> stages;
  std::vector<Plane> planes;
  int64_t state_size = 0;  // elements a sample
};

inline void require(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(std::string("autoregressive_sampling: ") + what);
}

// `Tensor` is torch's stable tensor. Shapes are checked as far as memory safety needs; sentences for users are
// Python's.
template <typename Tensor>
Network read(const std::vector<int64_t>& plan, const std::vector<Tensor>& tensors, int64_t channels,
             const std::vector<int64_t>& noise) {
  Network net;
  size_t at = 0;
  int64_t next_tensor = 0;
  auto number = [&]() {
    require(at < plan.size(), "the plan ends early");
    return plan[at++];
  };
  auto tensor = [&]() {
    require(next_tensor < static_cast<int64_t>(tensors.size()), "the plan names more tensors than there are");
    return next_tensor++;
  };
  auto shaped = [&](int64_t t, const std::vector<int64_t>& shape) {
    bool same = tensors[t].dim() == static_cast<int64_t>(shape.size());
    for (size_t d = 0; same && d < shape.size(); ++d) same = tensors[t].size(d) == shape[d];
    require(same, "a tensor of a stage has the wrong shape");
  };
  net.planes.push_back({channels, false});
  const int64_t count = number();
  for (int64_t k = 0; k < count; ++k) {
    Stage s;
    auto plane = [&]() {
      const int64_t p = number();
      require(p >= 0 && p <= k, "a stage reads a plane that is not there yet");
      return p;
    };
    s.width = number();
    s.activation = static_cast<Activation>(number());
    s.residual = number();
    require(s.residual >= -1 && s.residual <= k, "a stage reads a plane that is not there yet");
    s.vertical = number() != 0;
    const bool has_bias = number() != 0;
    const int64_t condition = number();
    s.made = s.activation == Activation::kGate ? s.width / 2 : s.width;
    for (int64_t n = number(); n > 0; --n) {
      s.added.push_back(plane());
      require(net.planes[s.added.back()].channels == s.width, "an added plane has the wrong number of channels");
    }
    for (int64_t n = number(); n > 0; --n) {
      Input in;
      in.plane = plane();
      in.tensor = tensor();
      require(tensors[in.tensor].dim() == 4, "a weight must have 4 dimensions");
      in.kh = tensors[in.tensor].size(2);
      in.kw = tensors[in.tensor].size(3);
      require(in.kh % 2 == 1 && in.kw % 2 == 1, "kernels must have odd sizes");
      Plane& read = net.planes[in.plane];
      shaped(in.tensor, {s.width, read.channels, in.kh, in.kw});
      read.rows = std::max(read.rows, 1 + in.kh / 2);
      read.border = std::max(read.border, in.kw / 2);
      s.inputs.push_back(in);
    }
    s.bias = has_bias ? tensor() : -1;
    if (has_bias) shaped(s.bias, {s.width});
    s.condition = condition ? tensor() : -1;
    s.condition_map = condition == 4;
    if (condition)
      shaped(s.condition, condition == 4 ? std::vector<int64_t>{noise[0], s.width, noise[2], noise[3]}
                                         : std::vector<int64_t>{noise[0], s.width});
    if (s.residual >= 0)
      require(net.planes[s.residual].channels == s.made, "a residual plane has the wrong number of channels");
    net.planes.push_back({s.made, s.vertical});
    net.stages.push_back(std::move(s));
  }
  for (Plane& p : net.planes) {
    p.offset = net.state_size;
    p.row_length = (noise[3] + 2 * p.border) * p.channels;
    net.state_size += (p.rows * p.row_length + 15) / 16 * 16;
  }
  return net;
}

// The arguments of the torch operator, checked; every backend's first line.
template <typename Tensor, typename Optional>
Network read_checked(const Tensor& image, const Tensor& state, const Tensor& noise, const Optional& known,
                     const std::vector<Tensor>& tensors, const std::vector<int64_t>& plan, int64_t head, int64_t levels,
                     int64_t begin, int64_t end) {
  const bool mixture = head == static_cast<int64_t>(Head::kLogisticMixture);
  require(image.dim() == 4 && noise.dim() == 4, "image and noise must have 4 dimensions");
  const int64_t channels = image.size(1);
  require(noise.size(0) == image.size(0) && noise.size(1) == channels + mixture && noise.size(2) == image.size(2) &&
              noise.size(3) == image.size(3),
          "noise must be [N, C, H, W], or [N, 1 + C, H, W] for logistic_mixture");
  require(!mixture || channels == 1 || channels == 3, "a logistic mixture must have 1 or 3 channels");
  require(begin >= 0 && end <= image.size(2) && levels >= 2, "rows or levels are out of range");
  const auto dtype = noise.scalar_type();
  require(dtype == torch::headeronly::ScalarType::Float || dtype == torch::headeronly::ScalarType::Double,
          "noise must be float32 or float64");
  for (const Tensor& t : tensors)
    require(t.scalar_type() == dtype && t.is_contiguous(),
            "tensors of the stages must have noise's dtype and be contiguous");
  require(image.scalar_type() == torch::headeronly::ScalarType::Long && image.is_contiguous(),
          "image must be int64 and contiguous");
  require(noise.is_contiguous(), "noise must be contiguous");
  if (known.has_value())
    require(known->scalar_type() == torch::headeronly::ScalarType::Bool && known->is_contiguous() &&
                known->numel() == image.numel(),
            "known must be bool, contiguous and of the image's shape");
  Network net = read(plan, tensors, channels, {noise.size(0), noise.size(1), noise.size(2), noise.size(3)});
  const int64_t width = net.planes.back().channels;
  require(mixture ? width % (channels == 1 ? 3 : 10) == 0 : width == channels * levels,
          "the last plane does not fit the head");
  require(state.dim() == 2 && state.size(0) == image.size(0) && state.size(1) == net.state_size &&
              state.is_contiguous() && state.scalar_type() == dtype,
          "state must be [N, the caches' size], of noise's dtype and contiguous");
  return net;
}

}  // namespace stages
}  // namespace genkernels
