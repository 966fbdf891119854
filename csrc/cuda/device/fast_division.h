// Division of 31-bit integers by one multiplication, for divisors that are known before the launch.
//
// Granlund and Montgomery 1994, "Division by Invariant Integers using Multiplication": with 2^(l -
// 1) < d <= 2^l and multiplier = ceil(2^(31 + l) / d), multiplier * d exceeds 2^(31 + l) by less
// than d <= 2^l. So n * multiplier / 2^(31 + l) exceeds n / d by less than 1 / d for every n <
// 2^31, and its floor is n / d.
#pragma once

#include "cuda/device/device.cuh"

namespace fused_resnet {

struct FastDivision {
  uint32_t divisor, multiplier, shift;

  // divisor: 1 to 2^31 - 1.
  __host__ static FastDivision by(int divisor) {
    const auto d = static_cast<uint64_t>(divisor);
    uint32_t l = 0;
    while ((uint64_t{1} << l) < d) ++l;
    const uint64_t power = uint64_t{1} << (31 + l);
    return {static_cast<uint32_t>(d), static_cast<uint32_t>((power + d - 1) / d), 31 + l};
  }
  // n: 0 to 2^31 - 1.
  __host__ __device__ int quotient(int n) const {
    return static_cast<int>(uint64_t{static_cast<uint32_t>(n)} * multiplier >> shift);
  }
  __host__ __device__ int remainder(int n, int quotient) const {
    return n - quotient * static_cast<int>(divisor);
  }
};

}  // namespace fused_resnet
