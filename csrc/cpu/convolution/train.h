// Convolutions of a training step on the CPU (cpu/convolution/train.cpp).
#pragma once

#include <atomic>

#include "common.h"

namespace fused_resnet {

// Number of passes of each kind that this process has run, by which tests check what a step
// computes.
struct ConvPasses {
  std::atomic<int64_t> convolutions, input_gradients, weight_gradients;
};
ConvPasses& conv_passes();

Tensor convolution(Tensor x, Tensor weight, bool transposed, std::optional<Tensor> residual,
                   bool overwrite, std::vector<int64_t> stride, std::vector<int64_t> padding,
                   std::vector<int64_t> dilation);

// y = convolution(x, weight), and bn_statistics(y), fused.
std::tuple<Tensor, Tensor> convolution_and_statistics(Tensor x, Tensor weight,
                                                      std::vector<int64_t> stride,
                                                      std::vector<int64_t> padding,
                                                      std::vector<int64_t> dilation);

// The padding of the convolution of stride 1 that computes the input gradient of a convolution with
// weight (K, C, R, S); nullopt if there is none.
std::optional<std::vector<int64_t>> gradient_padding(const Tensor& weight,
                                                     const std::vector<int64_t>& stride,
                                                     const std::vector<int64_t>& padding,
                                                     const std::vector<int64_t>& dilation);

// The input gradient of that convolution, dx of x's shape, where the input is relu(norm(x)), x (N,
// C, H, W), with stats (2, C) float64, and norm_weight, norm_bias (C,); and the sums of bn_reduce
// of dx and x, (3, C) float64, accumulated as dx is written.
std::tuple<Tensor, Tensor> input_gradient_and_sums(Tensor dy, Tensor weight,
                                                   std::vector<int64_t> stride,
                                                   std::vector<int64_t> padding,
                                                   std::vector<int64_t> dilation, Tensor x,
                                                   Tensor stats, std::optional<Tensor> norm_weight,
                                                   std::optional<Tensor> norm_bias, double eps);

Tensor convolution_weight_gradient(Tensor dy, Tensor x, int64_t R, int64_t S,
                                   std::vector<int64_t> stride, std::vector<int64_t> padding,
                                   std::vector<int64_t> dilation);

// The same where the convolution's input is relu(norm(x)) with stats (2, C) float64, norm_weight
// and norm_bias (C,): recomputed range by range, bitwise equal.
Tensor weight_gradient_of_normed(Tensor dy, Tensor x, int64_t R, int64_t S,
                                 std::vector<int64_t> stride, std::vector<int64_t> padding,
                                 std::vector<int64_t> dilation, Tensor stats, Tensor norm_weight,
                                 Tensor norm_bias, double eps);

// dy (N, K, P, Q) channels_last, float32 or bfloat16; weight (K, C, R, S) float32, channels_last ->
// dx (N, C, H, W) channels_last of dy's dtype: the input gradient of the convolution, of any stride
// and padding and without dilation, plus `added` (N, C, H, W), which dx overwrites. K and C
// multiples of 16, R * S at most kMaxPackedTaps; stride and padding (2,).
Tensor strided_input_gradient(Tensor dy, Tensor weight, int64_t H, int64_t W,
                              std::optional<Tensor> added, std::vector<int64_t> stride,
                              std::vector<int64_t> padding);

}  // namespace fused_resnet
