// Discretised logistic mixture on the CPU (Salimans et al., "PixelCNN++", 2017): nll = −Σ_pixels log Σ_k π_k Π_c P_ck,
// its gradient, its draws. common/logistic_mixture.h has the probability of a level.
//
// Layout. params [N, P, S], P = 3·K (C = 1) or 10·K (C = 3): row after row of S pixels, K rows of logits, then for each
// channel K rows of means, K of log-scales and (C = 3) K of coefficients. A tile is kTile neighbouring pixels of one
// sample: every row of it is one contiguous piece, the SIMD lanes are pixels, the loops over components and channels go
// around them, and nothing branches on data. Half storage is widened row by row; fp32 and fp64 are read where they lie.
//
// Forward, a tile: the largest logit; for each component log π_k plus the linear part of log Π_c P_ck, and the factor
// that is left of it; their sums over components, relative to the largest linear part, so that a pixel takes two
// logarithms and a component none. Backward repeats that and keeps each component's derivatives of log P_ck, [9·K or
// 2·K, kTile], within the second-level cache; once the posterior is known they are scaled by it and stored. Saved for
// backward: the inputs alone. A saved log-sum-exp would spare backward that last scaling, but none of the exponentials
// of the levels, all of which the derivatives need.
//
// Bytes: forward reads P·S, backward reads P·S and writes P·S; PixelCNN++'s 16×100×32×32 fp32 is 6.6 MB each.
// Arithmetic: a component takes 3·C + 2 exponentials of 16 instructions, C = 3 also 3 for the tanh; a channel some 115
// vector instructions forward and 150 backward, a tanh 35 more, for one vector of lanes of 12 to 40 bytes a component:
// it is arithmetic, not memory, that sets the time; hence the exponential of its own.
//
// Draws, a chunk: logits are weighed and compared with the noise, then the chosen components' other rows are gathered,
// number by number (a cache line of 16 pixels holds a number that is wanted with a probability of 1 − (1 − 1/K)^16, so
// for K = 10 four fifths of them are read), then each channel is one loop, some 120 vector instructions for 16 lanes.
// What is left is the wait for the gathered lines: a whole chunk of them lets the prefetcher run ahead (25 % quicker
// than a tile of 64), and a sequential pass that selects among all K rows is slower.
//
// The sum over pixels: tiles of a chunk of kChunk pixels in order, in fp64, then the chunks in order: bitwise the same
// for any number of threads.
#if defined(__GNUC__) && !defined(__clang__)
// Both passes turn a select by a constant into two copies of all that follows, each with its blends and its division: a
// sixth of the loops.
#  pragma GCC optimize("no-thread-jumps", "no-tree-pre")
#endif
#include "logistic_mixture/draws.h"
#include "logistic_mixture/likelihood.h"

namespace genkernels {
namespace {

Tensor logistic_mixture_nll(Tensor params, Tensor x, int64_t levels) {
  const Geometry g = geometry_of(params, x.size(1), levels);
  Tensor nll = empty(params, {g.samples}, arithmetic_dtype(params));
  with_dtype<float, double, BFloat16, Half>("logistic_mixture: params", params, [&]<typename S>() {
    using T = arithmetic_t<S>;
    if (g.channels == 1)
      forward<1, S, T>(g, params, x, nll);
    else
      forward<3, S, T>(g, params, x, nll);
  });
  return nll;
}

Tensor logistic_mixture_nll_backward(Tensor grad, Tensor params, Tensor x, int64_t levels) {
  const Geometry g = geometry_of(params, x.size(1), levels);
  Tensor grad_params = empty(params);
  with_dtype<float, double, BFloat16, Half>("logistic_mixture: params", params, [&]<typename S>() {
    using T = arithmetic_t<S>;
    if (g.channels == 1)
      backward<1, S, T>(g, grad, params, x, grad_params);
    else
      backward<3, S, T>(g, grad, params, x, grad_params);
  });
  return grad_params;
}

Tensor logistic_mixture_sample(Tensor params, Tensor noise, int64_t levels, double temperature) {
  const Geometry g = geometry_of(params, noise.size(1) - 1, levels);
  std::vector<int64_t> shape = shape_of(noise);
  shape[1] = g.channels;
  Tensor index = empty(params, shape, ScalarType::Long);
  with_dtype<float, double, BFloat16, Half>("logistic_mixture: params", params, [&]<typename S>() {
    using T = arithmetic_t<S>;
    if (g.channels == 1)
      sample<1, S, T>(g, params, noise, T(temperature), index);
    else
      sample<3, S, T>(g, params, noise, T(temperature), index);
  });
  return index;
}

}  // namespace
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels, CPU, m) {
  m.impl("logistic_mixture_nll", TORCH_BOX(&genkernels::logistic_mixture_nll));
  m.impl("logistic_mixture_nll_backward", TORCH_BOX(&genkernels::logistic_mixture_nll_backward));
  m.impl("logistic_mixture_sample", TORCH_BOX(&genkernels::logistic_mixture_sample));
}
