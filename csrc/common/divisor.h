// Division by a number that a whole launch shares, as one 64-bit product and a shift (Granlund and Montgomery,
// "Division by invariant integers using multiplication", 1994): a 64-bit division proper costs a GPU about a hundred
// instructions.
//
// For 0 <= n < 2^63, d >= 1 and l = ceil(log2 d): n / d = floor(n·m / 2^(63 + l)) with m = ceil(2^(63 + l) / d) < 2^64.
#pragma once

#include <cstdint>

#include "math.h"

namespace genkernels {

class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(int64_t divisor) : value_(divisor) {
    while (shift_ < 63 && (uint64_t(1) << shift_) < static_cast<uint64_t>(divisor)) ++shift_;
    const auto numerator = static_cast<unsigned __int128>(1) << (63 + shift_);
    magic_ = static_cast<uint64_t>((numerator + divisor - 1) / divisor);
  }

  GK_HOST_DEVICE inline int64_t value() const { return value_; }

  GK_HOST_DEVICE inline int64_t divide(int64_t n) const {
    const uint64_t twice = static_cast<uint64_t>(n) * 2;
#if defined(__CUDA_ARCH__)
    const uint64_t high = __umul64hi(twice, magic_);
#else
    const uint64_t high = static_cast<uint64_t>(static_cast<unsigned __int128>(twice) * magic_ >> 64);
#endif
    return static_cast<int64_t>(high >> shift_);
  }

 private:
  int64_t value_ = 1;
  uint64_t magic_ = uint64_t(1) << 63;
  int shift_ = 0;
};

}  // namespace genkernels
