// What the kernels of the spectral norm are given: layers, outputs and gradients, as arguments of a launch.
#pragma once

#include "geometry.cuh"

namespace genkernels {
namespace spectral {

// A layer of `left` and `right`.
template <typename T>
struct Layer {
  const T *weight, *u, *v;  // u and v as given to the operator
  int64_t room;             // where its numbers begin in the workspace
  int first;                // its first block
  Geometry geometry;
};

// A layer of `finish`.
template <typename T>
struct Output {
  const T *weight, *u, *v;
  T *weight_out, *u_out, *v_out;
  int64_t room, numbers;
  int first, u_numbers, v_numbers, left_blocks, right_blocks;
};

// A layer of `inner` and `gradient`.
template <typename T>
struct Gradient {
  const T *grad, *weight, *u, *v;
  T* out;
  int sums;   // where its blocks' sums begin
  int first;  // its first block
  Geometry geometry;
};

template <typename L>
struct Layers {
  int count;
  L layer[kLayers];

  // That of this block.
  __device__ __forceinline__ const L& mine() const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (layer[middle].first <= static_cast<int>(blockIdx.x))
        low = middle;
      else
        high = middle - 1;
    }
    return layer[low];
  }
  __device__ __forceinline__ int index(const L& one) const { return static_cast<int>(&one - layer); }
};

}  // namespace spectral
}  // namespace genkernels
