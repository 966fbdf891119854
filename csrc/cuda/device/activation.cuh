// Activations of epilogues on GPUs.
#pragma once

#include "activation.h"
#include "cuda/device/device.cuh"

namespace fused_resnet {

// ReLU. NaN stays NaN, -0 becomes 0.
template <typename A>
__device__ __forceinline__ A rectified(A v) {
  return v <= 0 ? A{0} : v;
}

template <typename A>
__device__ __forceinline__ A activated(Activation activation, A v) {
  return activation == kRelu ? rectified(v) : v;
}

}  // namespace fused_resnet
