// Convolutions of a training step on the CPU (cpu/convolution/train.cpp).
#pragma once

#include <atomic>

#include "common.h"
#include "cpu/isa/kernels.h"

namespace fused_resnet {

// Number of passes of each kind that this process has run, by which tests check what a step
// computes.
struct ConvPasses {
  std::atomic<int64_t> convolutions, input_gradients, weight_gradients;
};
ConvPasses& conv_passes();

// Of a convolution: stride, padding and dilation in pixels, each (height, width), and groups.
using Sizes = std::vector<int64_t>;
constexpr size_t kSizes = 7;

enum class Pass { kConvolution, kInputGradient, kWeightGradient };

// Why no kernel computes this pass of a convolution with weight (K, C / groups, R, S) for tensors
// of this dtype; nullptr if one does.
const char* training_reason(Pass pass, DtypeIndex dtype, const std::vector<int64_t>& weight_shape,
                            const Sizes& geometry);

// x, y, dx and dy are channels_last, float32, bfloat16 or float16; weight (K, C / groups, R, S) is
// float32, contiguous or channels_last.

// y = convolution(x, weight) + residual
Tensor convolution(Tensor x, Tensor weight, std::optional<Tensor> residual, Sizes geometry);

// y = activation(convolution(x, weight) * scale[k] + shift[k] + residual); scale (none: 1) and
// shift (none: 0) (K,) float32
Tensor convolution_and_epilogue(Tensor x, Tensor weight, std::optional<Tensor> scale,
                                std::optional<Tensor> shift, std::optional<Tensor> residual,
                                int64_t activation, Sizes geometry);

// dy (N, K, P, Q) of that y -> dz = g * scale[k], the gradient of the convolution, and, if `keep`,
// g, that of the residual; with g = dy masked by y, the ReLU's output; none: dy
std::vector<Tensor> epilogue_gradient(Tensor dy, std::optional<Tensor> y, Tensor scale, bool keep);

// y = convolution(x, weight), and bn_statistics(y), fused.
std::tuple<Tensor, Tensor> convolution_and_statistics(Tensor x, Tensor weight, Sizes geometry);

// dy (N, K, P, Q) -> dx (N, C, H, W), the input gradient, plus `added` (N, C, H, W), which dx
// overwrites
Tensor input_gradient(Tensor dy, Tensor weight, int64_t H, int64_t W, std::optional<Tensor> added,
                      Sizes geometry);

// dx of x's shape where the convolution's input is relu(norm(x)), x (N, C, H, W), with stats (2, C)
// float64, and norm_weight, norm_bias (C,); and the sums of bn_reduce of dx and x, (3, C) float64,
// accumulated as dx is written.
std::tuple<Tensor, Tensor> input_gradient_and_sums(Tensor dy, Tensor weight, Sizes geometry,
                                                   Tensor x, Tensor stats,
                                                   std::optional<Tensor> norm_weight,
                                                   std::optional<Tensor> norm_bias, double eps);

// dy (N, K, P, Q), x (N, C, H, W) -> dweight (K, C / groups, R, S) float32, channels_last or
// `contiguous`
Tensor weight_gradient(Tensor dy, Tensor x, int64_t R, int64_t S, Sizes geometry, bool contiguous);

// The same where the convolution's input is relu(norm(x)) with stats (2, C) float64, norm_weight
// and norm_bias (C,): recomputed range by range, bitwise equal.
Tensor weight_gradient_of_normed(Tensor dy, Tensor x, int64_t R, int64_t S, Sizes geometry,
                                 Tensor stats, Tensor norm_weight, Tensor norm_bias, double eps,
                                 bool contiguous);

// Whether the passes read weight (K, C / groups, R, S) as it lies in memory.
bool has_kernel_layout(const Tensor& weight);

// Describes weight (K, C / groups, R, S), of merged groups, and its strides to `pack`, with inputs
// and outputs swapped in each group if `transposed`. c: the convolution that reads it. Returns the
// stride from tap to tap.
int64_t read_weight(ConvPack& pack, const ConvShape& c, const Tensor& weight, bool transposed);

// The sizes of a convolution of x (N, C, H, W) with weight (K, C / groups, R, S), with its groups
// merged where the kernels need it.
ConvShape conv_shape(const char* op, int64_t N, int64_t H, int64_t W,
                     const std::vector<int64_t>& weight_shape, const Sizes& geometry);

// `input_gradient` of a convolution without dilation, of any stride and padding, with the weight of
// merged groups; operands are not checked.
Tensor strided_input_gradient(const ConvShape& c, const Tensor& dy, const Tensor& weight,
                              const std::optional<Tensor>& added);

}  // namespace fused_resnet
