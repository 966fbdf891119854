// Computes the table that the prologue of a 1x1 convolution normalises by, one thread per channel.
// Memory traffic: 20 bytes per channel read, 12 written; C is at most 2048 in a ResNet. Speed: not
// yet measured.
#include "cuda/batch_norm/channel.cuh"
#include "cuda/convolution/prologue.h"

namespace fused_resnet {
namespace {

constexpr int kFoldThreads = 128;

// table (3, 2, C / 8, 4)
__global__ void __launch_bounds__(kFoldThreads)
    fold_norm_kernel(const NormOperands norm, int C, float* table) {
  const int c = static_cast<int>(blockIdx.x) * kFoldThreads + static_cast<int>(threadIdx.x);
  if (c >= C) return;
  const auto channel = NormParameters::load(norm, c).folded(norm.eps);
  const float values[kNormTableRows] = {channel.mean, channel.scale, channel.shift};
#pragma unroll
  for (int i = 0; i < kNormTableRows; ++i)
    table[norm_table_index(i, c / 4 % 2, c / 8, C / 8) + c % 4] = values[i];
}

}  // namespace

void launch_fold_norm(const DeviceScope& scope, const NormOperands& norm, int C, float* table) {
  scope.launch({ceil_div(C, kFoldThreads), kFoldThreads}, fold_norm_kernel, norm, C, table);
}

void list_prologue_kernels(std::vector<CudaKernel>& list, bool gpu) {
  describe_kernel(list, "fold_norm", fold_norm_kernel, gpu);
}

}  // namespace fused_resnet
