// A convolution with packed weights on the CPU (cpu/convolution/conv_bn_relu.cpp).
#pragma once

#include "common.h"
#include "cpu/isa/kernels.h"

namespace fused_resnet {

// R, S, stride, padding, dilation, K, the number of input channels that a tap reads, and, if x is
// copied with its padding first, the number of channels of the copy, else 0
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
  kCopiedChannels,
  kCount
};

// conv_bn_relu, while whose last pieces `next` is prefetched: the packed weights that are read
// next.
Tensor conv_bn_relu_before(Upcoming next, Tensor x, const Tensor& weight, const Tensor& winograd,
                           const Tensor& scale, const Tensor& shift, const Tensor& first_channel,
                           const std::optional<Tensor>& residual, bool overwrite,
                           int64_t activation, std::vector<int64_t> geometry);

Tensor conv_bn_relu(Tensor x, Tensor weight, Tensor winograd, Tensor scale, Tensor shift,
                    Tensor first_channel, std::optional<Tensor> residual, bool overwrite,
                    int64_t activation, std::vector<int64_t> geometry);

// Why no kernel computes a convolution with weight (K, C / groups, R, S); nullptr if one does.
const char* convolution_reason(DtypeIndex dtype, const std::vector<int64_t>& weight_shape,
                               const std::vector<int64_t>& dilation, int64_t groups);

}  // namespace fused_resnet
