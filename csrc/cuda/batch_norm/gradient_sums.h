// The sums that a norm's gradient is made of, where a convolution took them
// (cuda/convolution/gradient.cuh): (parts, 2, C) float32, of every part of the pixels and channel
//   sum of g, sum of g * (x - mean)
#pragma once

#include "cuda/device/launch.h"

namespace fused_resnet {

constexpr int kMostSumParts = 128;  // that every block of the gradient's kernel adds up by itself

// At most kMostSumParts parts, which are the sums of so many of those given; always in one order.
Tensor few_sums(const DeviceScope& scope, Tensor sums);

}  // namespace fused_resnet
