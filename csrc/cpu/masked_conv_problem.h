// What one call of a masked convolution computes: sizes, options and the live taps.
#pragma once

#include "common.h"

namespace genkernels {
namespace masked {

enum Activation : int64_t { kNone, kRelu, kGate };
enum Region : int64_t { kRaster, kVertical, kHorizontal };

struct Tap {
  int64_t row, column;
  bool centre;  // live only between certain blocks of channels
};

struct Problem {
  int64_t batch, inputs, outputs, height, width, kh, kw;
  int64_t mask_type, data_channels, region, activation;
  std::vector<Tap> taps;
  std::vector<int64_t> of_output,
      of_input;  // the block of data_channels that each channel belongs to, where there are several
  int64_t left() const { return activation == kGate ? outputs / 2 : outputs; }
  int64_t pixels() const { return height * width; }

  bool live(int64_t o, int64_t i, const Tap& t) const {
    return !t.centre || (mask_type == 0 ? of_input[i] < of_output[o] : of_input[i] <= of_output[o]);
  }
};

inline Problem problem_of(const Tensor& x, const Tensor& weight, int64_t mask_type, int64_t data_channels,
                          int64_t region, int64_t activation) {
  Problem p{x.size(0),
            x.size(1),
            weight.size(0),
            x.size(2),
            x.size(3),
            weight.size(2),
            weight.size(3),
            mask_type,
            data_channels,
            region,
            activation,
            {},
            {},
            {}};
  for (int64_t o = 0; data_channels > 1 && o < p.outputs; ++o)
    p.of_output.push_back((o % p.left()) * data_channels / p.left());
  for (int64_t i = 0; data_channels > 1 && i < p.inputs; ++i) p.of_input.push_back(i * data_channels / p.inputs);
  const int64_t middle_row = p.kh / 2, middle = p.kw / 2;
  for (int64_t r = 0; r <= middle_row; ++r)
    for (int64_t c = 0; c < p.kw; ++c) {
      if (region == kVertical) {
        if (r < middle_row || mask_type == 1) p.taps.push_back({r, c, false});
      } else if ((r < middle_row && region == kRaster) || (r == middle_row && c < middle)) {
        p.taps.push_back({r, c, false});
      } else if (r == middle_row && c == middle && (mask_type == 1 || data_channels > 1)) {
        p.taps.push_back({r, c, data_channels > 1});
      }
    }
  return p;
}

}  // namespace masked
}  // namespace genkernels
