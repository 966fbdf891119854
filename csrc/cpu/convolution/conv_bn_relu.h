// A convolution with packed weights on the CPU (cpu/convolution/conv_bn_relu.cpp).
#pragma once

#include "common.h"

namespace fused_resnet {

// R, S, stride, padding, dilation, K and the number of input channels that a tap reads
enum Geometry {
  kR,
  kS,
  kStrideH,
  kStrideW,
  kPadH,
  kPadW,
  kDilationH,
  kDilationW,
  kK,
  kRun,
  kCount
};

Tensor conv_bn_relu(Tensor x, Tensor weight, std::optional<Tensor> winograd, Tensor scale,
                    Tensor shift, std::optional<Tensor> first_channel,
                    std::optional<Tensor> residual, bool overwrite, bool relu, bool pooled,
                    std::vector<int64_t> geometry);

}  // namespace fused_resnet
