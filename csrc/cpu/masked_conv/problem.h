// What one call of a masked convolution computes: sizes, options and the live taps.
#pragma once

#include "../../common/options.h"
#include "../common.h"

namespace genkernels {
namespace masked {

struct Tap {
  int64_t row, column;
  bool centre;  // live only between certain blocks of channels
};

struct Problem {
  int64_t batch, inputs, outputs, height, width, kh, kw;
  MaskType mask_type;
  int64_t data_channels;
  Region region;
  Activation activation;
  std::vector<Tap> taps;
  // the block of data_channels that each channel belongs to, where there are several
  std::vector<int64_t> of_output, of_input;

  int64_t left() const { return activation == Activation::kGate ? outputs / 2 : outputs; }
  int64_t pixels() const { return height * width; }

  bool live(int64_t o, int64_t i, const Tap& t) const {
    return !t.centre || (mask_type == MaskType::kA ? of_input[i] < of_output[o] : of_input[i] <= of_output[o]);
  }
};

inline Problem problem_of(const Tensor& x, const Tensor& weight, int64_t mask_type, int64_t data_channels,
                          int64_t region, int64_t activation) {
  Problem p{};
  p.batch = x.size(0);
  p.inputs = x.size(1);
  p.outputs = weight.size(0);
  p.height = x.size(2);
  p.width = x.size(3);
  p.kh = weight.size(2);
  p.kw = weight.size(3);
  p.mask_type = static_cast<MaskType>(mask_type);
  p.data_channels = data_channels;
  p.region = static_cast<Region>(region);
  p.activation = static_cast<Activation>(activation);
  for (int64_t o = 0; data_channels > 1 && o < p.outputs; ++o)
    p.of_output.push_back((o % p.left()) * data_channels / p.left());
  for (int64_t i = 0; data_channels > 1 && i < p.inputs; ++i) p.of_input.push_back(i * data_channels / p.inputs);
  const int64_t middle_row = p.kh / 2, middle = p.kw / 2;
  const bool sees_itself = p.mask_type == MaskType::kB;
  for (int64_t r = 0; r <= middle_row; ++r)
    for (int64_t c = 0; c < p.kw; ++c) {
      if (p.region == Region::kVertical) {
        if (r < middle_row || sees_itself) p.taps.push_back({r, c, false});
      } else if ((r < middle_row && p.region == Region::kRaster) || (r == middle_row && c < middle)) {
        p.taps.push_back({r, c, false});
      } else if (r == middle_row && c == middle && (sees_itself || data_channels > 1)) {
        p.taps.push_back({r, c, data_channels > 1});
      }
    }
  return p;
}

}  // namespace masked
}  // namespace genkernels
