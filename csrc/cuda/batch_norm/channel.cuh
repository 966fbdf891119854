// One channel of a batch norm and the ReLU behind it, as all of our CUDA kernels apply them:
// whoever computes an activation again gets the same bits, in whatever kernel.
//   y = relu((x - mean) * scale + shift),   scale = weight / sqrt(var + eps),
//   shift = bias - rest * scale,   rest: what the mean's rounding took off
// Rounded after the subtraction and once more after the rest, which the compiler is not left to
// decide.
#pragma once

#include <cmath>

#include "cuda/device/device.cuh"

namespace fused_resnet {

// A: float, or double for data in double.
template <typename A>
struct NormChannel {
  A mean, scale, shift;

  __device__ __forceinline__ static NormChannel of(A mean, A var, A rest, A weight, A bias, A eps) {
    const A scale = weight / std::sqrt(var + eps);
    return {mean, scale, multiply_add(-rest, scale, bias)};
  }
};

// A channel of the norm as it lies in memory.
struct NormNumbers {
  float mean, var, rest, weight, bias;

  template <typename Norm>
  __device__ __forceinline__ static NormNumbers load(const Norm& norm, int64_t c) {
    return {norm.mean[c], norm.var[c], norm.rest[c], norm.weight != nullptr ? norm.weight[c] : 1.0f,
            norm.bias != nullptr ? norm.bias[c] : 0.0f};
  }
  // As the forward pass folded it.
  __device__ __forceinline__ NormChannel<float> folded(float eps) const {
    return NormChannel<float>::of(mean, var, rest, weight, bias, eps);
  }
};

template <typename A>
__device__ __forceinline__ A normalised(A x, A mean, A scale, A shift) {
  return multiply_add(x - mean, scale, shift);
}
// NaN stays NaN, -0 becomes 0.
template <typename A>
__device__ __forceinline__ A rectified(A v) {
  return v <= 0 ? A{0} : v;
}

}  // namespace fused_resnet
