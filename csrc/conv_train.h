// A training step's convolutions on the CPU, for what puts them together (conv_train_cpu.cpp).
#pragma once

#include "common.h"

namespace fused_resnet {

// How many passes of each kind this process has run: what a step computes is a promise.
struct ConvPasses {
  int64_t convolutions, input_gradients, weight_gradients;
};
ConvPasses conv_passes();

Tensor convolution(Tensor x, Tensor weight, bool transposed, std::optional<Tensor> residual,
                   bool overwrite, std::vector<int64_t> stride, std::vector<int64_t> padding,
                   std::vector<int64_t> dilation);

void scatter_add(Tensor y, Tensor x, std::vector<int64_t> stride);

Tensor convolution_weight_gradient(Tensor dy, Tensor x, int64_t R, int64_t S,
                                   std::vector<int64_t> stride, std::vector<int64_t> padding,
                                   std::vector<int64_t> dilation);

}  // namespace fused_resnet
