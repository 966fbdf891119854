// A training norm and the ReLU behind it, applied to x on its way into the matrix product of a 1x1
// convolution: cuda/convolution/prologue.cuh. What the op hands to their kernels' launchers.
#pragma once

#include "cuda/convolution/problem.h"

namespace fused_resnet {

// A table of a norm's numbers: mean, scale and shift, each of the first and of the second four
// channels of every 16 bytes of x, (3, 2, C / 8, 4). So threads that have neighbouring 16 bytes of
// x read neighbouring 16 bytes of the table.
constexpr int kNormNumbers = 3;
__host__ __device__ constexpr int norm_place(int number, int half, int chunk, int chunks) {
  return ((number * 2 + half) * chunks + chunk) * 4;
}
// table: kNormNumbers * C float32.
void launch_fold_norm(const DeviceScope& scope, const NormOperands& norm, int C, float* table);

// A kernel's prologue. load(step): gets ready, while the step is on its way; apply(chunks): the
// step has come, and lies there. This one is every other kernel's: x is multiplied as it is.
struct NoPrologue {
  __device__ __forceinline__ NoPrologue(const float*, int, int) {}
  __device__ __forceinline__ void load(int) {}
  __device__ __forceinline__ void apply(uint8_t*) const {}
};

struct GemmArguments;
// The sm_80 kernels that normalise x, by dtype; defined in cuda/convolution/sm80/prologue.cuh,
// instantiated in implicit_gemm_sm80_prologue_*_cuda.cu. tile: a row of kGemmTiles.
template <typename T>
struct Sm80Prologues {
  static void launch(const DeviceScope& scope, const GemmTile& tile,
                     const GemmArguments& arguments);
  static void list(std::vector<CudaKernel>& list, bool gpu);
};

}  // namespace fused_resnet
