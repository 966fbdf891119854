// Training batch norm and ReLU applied to x before the matrix product of a 1x1 convolution
// (cuda/convolution/prologue.cuh): the arguments of the launchers.
#pragma once

#include "cuda/convolution/problem.h"

namespace fused_resnet {

// Table of mean, scale and shift per channel, (3, 2, C / 8, 4): for each of the three, the first
// and then the second four channels of every 16 bytes of x. Threads that process consecutive 16
// bytes of x thus read consecutive 16 bytes of the table.
constexpr int kNormTableRows = 3;
__host__ __device__ constexpr int norm_table_index(int row, int half, int chunk, int chunks) {
  return ((row * 2 + half) * chunks + chunk) * 4;
}
// table: kNormTableRows * C float32, output.
void launch_fold_norm(const DeviceScope& scope, const NormOperands& norm, int C, float* table);

// The prologue of a kernel. load(step): loads what the step needs, while the step's copies are in
// flight; apply(chunks): called when the step has arrived in shared memory at `chunks`. NoPrologue
// leaves x as it is.
struct NoPrologue {
  __device__ __forceinline__ NoPrologue(const float*, int, int) {}
  __device__ __forceinline__ void load(int) {}
  __device__ __forceinline__ void apply(uint8_t*) const {}
};

struct GemmArguments;
// The sm_80 kernels that normalise x, by dtype. Defined in cuda/convolution/sm80/prologue.cuh,
// instantiated in cuda/convolution/instantiations/. tile: a row of kGemmTiles.
template <typename T>
struct Sm80Prologues {
  static void launch(const DeviceScope& scope, const GemmTile& tile,
                     const GemmArguments& arguments);
  static void list(std::vector<CudaKernel>& list, bool gpu);
};

}  // namespace fused_resnet
