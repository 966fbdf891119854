// Arguments and index arithmetic of the Hopper convolution: the tile of a block, the first pixel of
// a tile, and the stage of a step in the ring.
#pragma once

#include "cuda/convolution/problem.h"
#include "cuda/device/hopper.cuh"

namespace fused_resnet {

// How x is loaded. im2col loads 64 channels regardless of group boundaries, so with several groups
// the channels of a group must be a multiple of a step (covers_sm90).
enum class Sm90Input : int {
  kMatrix,  // (C, groups, M): pointwise
  kIm2col   // (groups * C, W, H, N)
};

// Kernel parameter: the problem, and its sizes in tiles and steps.
struct GemmSm90 {
  Sm90Input input;
  int K, C;  // per group
  int R, S, P, Q;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int groups;
  int n_tiles;         // per group
  int tiles;           // total
  int channel_blocks;  // steps per tap
  const float* scale;  // (groups * K,)
  const float* shift;  // (groups * K,)
  bool residual;
  Activation activation;
  int M;              // pixels
  float* statistics;  // (parts, 3, groups * K) or null; if not null, scale and shift are null
  const float* norm;  // (3, 2, C / 8, 4) or null: table of the prologue
  NormInput mask;     // mask.x null: none; otherwise scale and shift are null

  __host__ __device__ int steps() const { return R * S * channel_blocks; }
};

constexpr int kStepChannels = kStepBytes / 2;

struct TileStart {
  int m;  // first pixel
  int group;
  int k;  // first output within the group
};
// Concurrent tiles read the same pixels: outputs vary fastest, then groups. The weights, which all
// tiles read, stay in L2 in any order: at most 4.7 MB in a ResNet.
__host__ __device__ __forceinline__ TileStart tile_start(const GemmSm90& gemm, int tile,
                                                         int block_m, int block_n) {
  const int n_tile = tile % gemm.n_tiles, rest = tile / gemm.n_tiles;
  return {rest / gemm.groups * block_m, rest % gemm.groups, n_tile * block_n};
}

// Position in x of the first tap of output pixel m.
struct InputStart {
  int n, h, w;
};
__host__ __device__ __forceinline__ InputStart input_start(const GemmSm90& gemm, int m) {
  const int q = m % gemm.Q, rest = m / gemm.Q;
  return {rest / gemm.P, rest % gemm.P * gemm.stride_h - gemm.pad_h,
          q * gemm.stride_w - gemm.pad_w};
}

// The stage of a step, and the parity of its mbarrier phase.
template <int kStages>
struct StageRing {
  int stage = 0;
  uint32_t parity = 0;
  __host__ __device__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
  __host__ __device__ void advance(int steps) {
    stage += steps;
    parity ^= static_cast<uint32_t>(stage / kStages) & 1;
    stage %= kStages;
  }
};

// The tensor map of x. block_m: pixels of a tile.
TensorMap sm90_input_map(const ConvProblem& problem, const ConvOperands& operands, int block_m);

// The tensor maps of a launch (cuda/device/tensor_map.h). Without a residual, `residual` is the map
// of y.
struct Sm90Maps {
  TensorMap x, weight, residual, y;
};

// By dtype. Defined in cuda/convolution/sm90/kernel.cuh, instantiated in
// cuda/convolution/instantiations/.
template <typename T>
struct Sm90Kernels {
  static void launch(const DeviceScope& scope, int tile, const Sm90Maps& maps, const GemmSm90& gemm,
                     Epilogue epilogue);
  static void list(std::vector<CudaKernel>& list, bool gpu);
};
// The kernels that normalise x. Defined in cuda/convolution/sm90/prologue.cuh, instantiated in
// cuda/convolution/instantiations/.
template <typename T>
struct Sm90Prologues {
  static void launch(const DeviceScope& scope, int tile, const Sm90Maps& maps,
                     const GemmSm90& gemm);
  static void list(std::vector<CudaKernel>& list, bool gpu);
};

}  // namespace fused_resnet
