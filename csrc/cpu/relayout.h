// Copies into the other memory layout (cpu/relayout.cpp).
#pragma once

#include "common.h"

namespace fused_resnet {

// x (N, C, H, W), float32, contiguous or channels_last -> the same values in the other layout,
// channels_last if `last`
Tensor relayout(Tensor x, bool last);

// Each of `count` matrices (rows, columns), one of which is less than 16, <- its transpose
void transpose_each(float* matrices, int64_t count, int64_t rows, int64_t columns);

}  // namespace fused_resnet
