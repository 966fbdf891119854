// The activation at the end of an epilogue, by the numbers of fused_resnet/kernels/activation.py.
#pragma once

#include <stdint.h>

namespace fused_resnet {

enum Activation : int32_t { kNoActivation = 0, kRelu = 1 };

constexpr int64_t kActivations = 2;

}  // namespace fused_resnet
