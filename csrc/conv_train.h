// A training step's convolutions on the CPU, for whoever calls them from C++.
#pragma once

#include "common.h"

namespace fused_resnet {

// dy (N, K, P, Q) channels_last, float32 or bfloat16; weight (K, C, R, S) float32, channels_last ->
// dx (N, C, H, W) channels_last of dy's dtype: the gradient of the convolution, of any stride and
// padding and without dilation, by its input, plus `added` (N, C, H, W), whose memory dx then
// takes. K and C multiples of 16, R * S at most kMostPackedTaps; stride and padding (2,).
Tensor strided_input_gradient(Tensor dy, Tensor weight, int64_t H, int64_t W,
                              std::optional<Tensor> added, std::vector<int64_t> stride,
                              std::vector<int64_t> padding);

}  // namespace fused_resnet
