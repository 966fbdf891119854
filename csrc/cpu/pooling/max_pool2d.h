// Max pooling for inference on the CPU (cpu/pooling/max_pool2d.cpp).
#pragma once

#include "common.h"

namespace fused_resnet {

Tensor max_pool2d(Tensor x, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                  std::vector<int64_t> padding);

}  // namespace fused_resnet
