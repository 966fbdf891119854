// Shared by a block's training step and its inference on the CPU.
#pragma once

#include "common.h"

namespace fused_resnet {

enum Shortcut : int64_t { kNone = 0, kIdentity = 1, kProjection = 2, kPad = 3 };

// x (N, C, H, W) channels_last -> (N, channels, P, Q): every stride-th pixel of x, with zeros in
// the channels from C on
Tensor padded(const Tensor& x, int64_t channels, int64_t stride);

}  // namespace fused_resnet
