// The sums of a batch norm gradient as computed by a convolution (cuda/convolution/gradient.cuh):
// (parts, 2, C) float32, for every part of the pixels and every channel
//   sum of g, sum of g * (x - mean)
#pragma once

#include "cuda/device/launch.h"

namespace fused_resnet {

constexpr int kMaxSumParts = 128;  // that every block of the gradient kernel can add up

// Reduces sums to at most kMaxSumParts parts, in a fixed order.
Tensor reduce_sums(const DeviceScope& scope, Tensor sums);

}  // namespace fused_resnet
