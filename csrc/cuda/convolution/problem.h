// conv_bn_relu as a matrix product on GPUs: what the op hands to a kernel's launcher.
//
//   y[m, k] = relu(scale[k] * sum over (r, s, c) of x[pixel of m at (r, s), c] * weight[k, r, s, c]
//                  + shift[k] + residual[m, k]),   m = (n, p, q)
//
// pixel of m at (r, s): h = p * stride_h - pad_h + r * dilation_h, w likewise; zero outside x.
// Group g reads channels [g * C, (g + 1) * C) of x and makes outputs [g * K, (g + 1) * K) of y.
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
  // x, read as it lies, is the matrix (M, groups * C).
  bool pointwise() const {
    return R == 1 && S == 1 && stride_h == 1 && stride_w == 1 && pad_h == 0 && pad_w == 0;
  }
};

// A training norm, float32: mean, variance, what the mean's rounding took off, weight and bias.
struct NormOperands {
  const float *mean, *var, *rest;
  const float *weight, *bias;  // or null
  float eps;
};

// The norm, (groups * K,), whose output, through a ReLU, has y for its gradient
// (cuda/convolution/gradient.cuh).
struct NormInput : NormOperands {
  const void* x;  // (N, P, Q, groups * K), what it normalised, or null: there is none
  float* sums;    // (parts, 2, groups * K), written
};

// What becomes of the sums of products: the op's formula, or training's two.
enum class Epilogue { scale, statistics, gradient };

// All dense, channels last, of one dtype, aligned to 16 bytes.
struct ConvOperands {
  DtypeIndex dtype;      // kFloat16, kBFloat16, or kFloat32 (multiplied as TF32)
  const void* x;         // (N, H, W, groups * C)
  const void* weight;    // (groups * K, R, S, C)
  const float* scale;    // (groups * K,)
  const float* shift;    // (groups * K,)
  const void* residual;  // (N, P, Q, groups * K) or null
  void* y;               // (N, P, Q, groups * K)
  bool relu;
  // Not null: y is the convolution itself (scale and shift are null, as is the residual), and what
  // cuda/convolution/statistics.cuh says of it goes here, (parts, 3, groups * K).
  float* statistics;
  // Not null: a norm's table (cuda/convolution/prologue.h), which is applied to x, and a ReLU. Of
  // one group's pointwise convolution of 16-bit operands, with statistics, in one split.
  const float* norm = nullptr;
  // Its x not null: y is the convolution itself, masked (scale, shift and residual are null).
  NormInput mask{};

  Epilogue epilogue() const {
    if (mask.x != nullptr) return Epilogue::gradient;
    return statistics != nullptr ? Epilogue::statistics : Epilogue::scale;
  }
};

// Pixels of a part, in training's epilogues, where splits are added up; else part_pixels.
constexpr int kMergedPixels = 64;

// splits > 1: so many blocks share a tile's steps; `partial` has room for splits * M * groups * K
// float32 sums, which a second kernel adds in order.
void launch_implicit_gemm_sm80(const DeviceScope& scope, const ConvProblem& problem,
                               const ConvOperands& operands, const GemmTile& tile, int splits,
                               float* partial);
// What the bulk copy engine can address. 16-bit operands only.
bool covers_sm90(const ConvProblem& problem);
void launch_implicit_gemm_sm90(const DeviceScope& scope, const ConvProblem& problem,
                               const ConvOperands& operands, const GemmTile& tile);

}  // namespace fused_resnet
