// conv_bn_relu as a matrix product on GPUs: the arguments of the kernels' launchers.
//
//   y[m, k] = activation(scale[k] * sum over (r, s, c) of x[pixel of m at (r, s), c] * weight[k, r,
//   s, c]
//                  + shift[k] + residual[m, k]),   m = (n, p, q)
//
// pixel of m at (r, s): h = p * stride_h - pad_h + r * dilation_h, w likewise; zero outside x.
// Group g reads channels [g * C, (g + 1) * C) of x and computes outputs [g * K, (g + 1) * K) of y.
#pragma once

#include "cuda/convolution/tiles.h"
#include "cuda/device/launch.h"

namespace fused_resnet {

struct ConvProblem {
  int64_t N;
  int H, W, C;  // C: channels per group, a multiple of 16 bytes
  int K;        // outputs per group, a multiple of 16 bytes
  int R, S, P, Q;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int groups;

  int64_t M() const { return N * P * Q; }
  // Whether x in memory is the matrix (M, groups * C).
  bool pointwise() const {
    return R == 1 && S == 1 && stride_h == 1 && stride_w == 1 && pad_h == 0 && pad_w == 0;
  }
};

// Training batch norm, float32: mean, variance, rounding error of the mean, weight and bias.
struct NormOperands {
  const float *mean, *var, *rest;
  const float *weight, *bias;  // or null
  float eps;
};

// The batch norm, (groups * K,), whose output after the ReLU is the tensor that y is the gradient
// of (cuda/convolution/gradient.cuh).
struct NormInput : NormOperands {
  const void* x;  // (N, P, Q, groups * K), its input, or null: no batch norm
  float* sums;    // (parts, 2, groups * K), output
};

// scale: the op's formula above. statistics, gradient: the training epilogues.
enum class Epilogue { scale, statistics, gradient };

// All tensors are dense, channels last, of one dtype, and aligned to 16 bytes.
struct ConvOperands {
  DtypeIndex dtype;      // kFloat16, kBFloat16, or kFloat32 (multiplied as TF32)
  const void* x;         // (N, H, W, groups * C)
  const void* weight;    // (groups * K, R, S, C)
  const float* scale;    // (groups * K,)
  const float* shift;    // (groups * K,)
  const void* residual;  // (N, P, Q, groups * K) or null
  void* y;               // (N, P, Q, groups * K)
  Activation activation;
  // Not null: y is the plain convolution (scale, shift and residual are null), and its statistics
  // (cuda/convolution/statistics.cuh) are written here, (parts, 3, groups * K).
  float* statistics;
  // Not null: the table of a batch norm that is applied to x, followed by a ReLU
  // (cuda/convolution/prologue.h). Only for a pointwise convolution of 16-bit operands with groups
  // = 1, splits = 1 and statistics.
  const float* norm = nullptr;
  // mask.x not null: y is the plain convolution, masked (scale, shift and residual are null).
  NormInput mask{};

  Epilogue epilogue() const {
    if (mask.x != nullptr) return Epilogue::gradient;
    return statistics != nullptr ? Epilogue::statistics : Epilogue::scale;
  }
};

// Pixels per part in the training epilogues when splits > 1; otherwise GemmTile::part_pixels.
constexpr int kMergedPixels = 64;

// splits > 1: this many blocks share the steps of a tile. `partial` has room for splits * M *
// groups * K float32 sums, which a second kernel adds in order.
void launch_implicit_gemm_sm80(const DeviceScope& scope, const ConvProblem& problem,
                               const ConvOperands& operands, const GemmTile& tile, int splits,
                               float* partial);
// Whether TMA can address the problem. 16-bit operands only.
bool covers_sm90(const ConvProblem& problem);
void launch_implicit_gemm_sm90(const DeviceScope& scope, const ConvProblem& problem,
                               const ConvOperands& operands, const GemmTile& tile);

}  // namespace fused_resnet
