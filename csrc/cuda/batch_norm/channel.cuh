// Arithmetic of one channel of batch norm and the ReLU after it, shared by all CUDA kernels, so
// that a kernel that recomputes an activation gets the same bits.
//   y = relu((x - mean) * scale + shift),   scale = weight / sqrt(var + eps),
//   shift = bias - rest * scale,   rest: the rounding error of mean
// There is one rounding after the subtraction and one after the explicit fused multiply-add, so
// that the result does not depend on the compiler's contraction.
#pragma once

#include <cmath>

#include "cuda/device/activation.cuh"

namespace fused_resnet {

// A: float, or double for float64 data.
template <typename A>
struct NormChannel {
  A mean, scale, shift;

  __device__ __forceinline__ static NormChannel of(A mean, A var, A rest, A weight, A bias, A eps) {
    const A scale = weight / std::sqrt(var + eps);
    return {mean, scale, multiply_add(-rest, scale, bias)};
  }
};

// Parameters and statistics of one channel, as stored in memory.
struct NormParameters {
  float mean, var, rest, weight, bias;

  template <typename Norm>
  __device__ __forceinline__ static NormParameters load(const Norm& norm, int64_t c) {
    return {norm.mean[c], norm.var[c], norm.rest[c], norm.weight != nullptr ? norm.weight[c] : 1.0f,
            norm.bias != nullptr ? norm.bias[c] : 0.0f};
  }
  // Folded as in the forward pass.
  __device__ __forceinline__ NormChannel<float> folded(float eps) const {
    return NormChannel<float>::of(mean, var, rest, weight, bias, eps);
  }
};

template <typename A>
__device__ __forceinline__ A normalised(A x, A mean, A scale, A shift) {
  return multiply_add(x - mean, scale, shift);
}

}  // namespace fused_resnet
