// The stages of a causal network as autoregressive_sampling receives them, and where a sample's caches lie: views into
// the plan of genkernels/_plan.py, whose records have the same words in the same order.
#pragma once

#include <span>

#include "host.h"
#include "options.h"

namespace genkernels {
namespace stages {

// A plane in a sample's state: `rows` rows in a ring (image row i in slot i % rows), each of W + 2·border pixels, a
// pixel's channels together.
struct Plane {
  int64_t channels, vertical, rows, border;
  int64_t offset, row_length;  // elements
};

struct Input {
  int64_t plane;
  int64_t tensor;  // its weight [width, channels of the plane, kh, kw] among the tensors
  int64_t kh, kw;
};

struct Stage {
  int64_t width;       // channels before the activation
  int64_t made;        // and after it
  int64_t activation;  // see `is`
  int64_t residual;    // plane, or -1
  int64_t vertical;
  int64_t bias;       // among the tensors, or -1
  int64_t condition;  // likewise
  int64_t condition_map;
  int64_t added, inputs, end;  // words of the plan where the added planes, the inputs and the next stage's begin

  bool is(Activation a) const { return activation == static_cast<int64_t>(a); }
};

// n records from word `at` of a plan on.
template <typename Record>
std::span<const Record> records(const std::vector<int64_t>& plan, int64_t at, int64_t n) {
  static_assert(sizeof(Record) % sizeof(int64_t) == 0);
  return {reinterpret_cast<const Record*>(plan.data() + at), static_cast<size_t>(n)};
}

// Plane 0 is the image, plane k + 1 is made by stage k.
struct Network {
  const std::vector<int64_t>& plan;
  int64_t state_size;  // elements a sample
  std::span<const Plane> planes;
  std::span<const Stage> stages;

  explicit Network(const std::vector<int64_t>& words) : plan(words) {
    constexpr int64_t kHead = 2, kPlane = sizeof(Plane) / 8, kStage = sizeof(Stage) / 8;
    const int64_t size = plan.size(), count = size < kHead ? -1 : plan[0];
    require(count >= 0 && count <= size && size >= kHead + (count + 1) * kPlane + count * kStage,
            "autoregressive_sampling: the plan ends early");
    state_size = plan[1];
    planes = records<Plane>(plan, kHead, count + 1);
    stages = records<Stage>(plan, kHead + (count + 1) * kPlane, count);
  }

  std::span<const int64_t> added(const Stage& s) const { return records<int64_t>(plan, s.added, s.inputs - s.added); }
  std::span<const Input> inputs(const Stage& s) const {
    return records<Input>(plan, s.inputs, (s.end - s.inputs) * int64_t(sizeof(int64_t)) / int64_t(sizeof(Input)));
  }
};

// That no number of the plan leads outside the tensors, the planes or the state; sentences for users are Python's.
inline void check(const Network& net, const std::vector<Tensor>& tensors, const Tensor& noise) {
  const auto holds = [](bool condition, const char* what) { require(condition, "autoregressive_sampling: ", what); };
  const auto shaped = [&](int64_t t, const std::vector<int64_t>& shape) {
    holds(t >= 0 && t < int64_t(tensors.size()), "the plan names more tensors than there are");
    holds(shape_of(tensors[t]) == shape, "a tensor of a stage has the wrong shape");
  };
  constexpr int64_t kLarge = int64_t(1) << 24;  // keeps the products below within 64 bits
  for (const Plane& p : net.planes) {
    holds(p.channels >= 0 && p.channels < kLarge && p.border >= 0 && p.border < kLarge && p.rows >= 1 &&
              p.rows < kLarge && p.offset >= 0 && p.offset <= net.state_size,
          "a plane of the plan is out of range");
    holds(p.row_length == (noise.size(3) + 2 * p.border) * p.channels &&
              (p.row_length == 0 || p.rows <= (net.state_size - p.offset) / p.row_length),
          "a plane of the plan does not fit the state");
  }
  for (int64_t k = 0; k < int64_t(net.stages.size()); ++k) {
    const Stage& s = net.stages[k];
    const auto there = [&](int64_t plane) {
      holds(plane >= 0 && plane <= k, "a stage reads a plane that is not there yet");
      return net.planes[plane];
    };
    holds(s.added >= 0 && s.added <= s.inputs && s.inputs <= s.end && s.end <= int64_t(net.plan.size()) &&
              (s.end - s.inputs) * sizeof(int64_t) % sizeof(Input) == 0,
          "the plan ends early");
    holds(s.made == (s.is(Activation::kGate) ? s.width / 2 : s.width) && s.made == net.planes[k + 1].channels &&
              s.vertical == net.planes[k + 1].vertical,
          "a stage does not fit the plane that it makes");
    for (int64_t plane : net.added(s))
      holds(there(plane).channels == s.width, "an added plane has the wrong number of channels");
    for (const Input& in : net.inputs(s)) {
      const Plane from = there(in.plane);
      holds(in.kh % 2 == 1 && in.kw % 2 == 1, "kernels must have odd sizes");
      holds(from.rows > in.kh / 2 && from.border >= in.kw / 2, "a stage reads beyond a plane's rows or border");
      shaped(in.tensor, {s.width, from.channels, in.kh, in.kw});
    }
    if (s.bias != -1) shaped(s.bias, {s.width});
    if (s.condition != -1)
      shaped(s.condition, s.condition_map ? std::vector<int64_t>{noise.size(0), s.width, noise.size(2), noise.size(3)}
                                          : std::vector<int64_t>{noise.size(0), s.width});
    if (s.residual != -1)
      holds(there(s.residual).channels == s.made, "a residual plane has the wrong number of channels");
  }
}

}  // namespace stages
}  // namespace genkernels
