// What Hopper's convolution is launched with, and its index arithmetic: which tile a block works
// on, which pixel a tile starts at, which stage of the ring a step has.
#pragma once

#include "cuda/convolution/problem.h"
#include "cuda/device/hopper.cuh"

namespace fused_resnet {

// How x is read. im2col reads 64 channels from a group's c on, whoever's they are: a group must end
// with a step (covers_sm90).
enum class Sm90Input : int {
  kMatrix,  // (C, groups, M): pointwise
  kIm2col   // (groups * C, W, H, N)
};

// A kernel's parameter: the problem, and what of it is counted in tiles and steps.
struct GemmSm90 {
  Sm90Input input;
  int K, C;  // per group
  int R, S, P, Q;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int groups;
  int n_tiles;         // of a group
  int tiles;           // in all
  int channel_blocks;  // steps of one tap
  const float* scale;  // (groups * K,)
  const float* shift;  // (groups * K,)
  bool residual, relu;
  int M;              // pixels
  float* statistics;  // (parts, 3, groups * K) or null: then there is no scale and no shift
  const float* norm;  // (3, 2, C / 8, 4) or null: what a prologue normalises x by
  NormInput mask;     // its x null: none; else there is no scale and no shift either

  __host__ __device__ int steps() const { return R * S * channel_blocks; }
};

constexpr int kStepChannels = kStepBytes / 2;

struct TileStart {
  int m;      // first pixel
  int group;  // whose outputs
  int k;      // first output within the group
};
// Tiles that lie side by side in time read the same pixels: outputs go fastest, then groups. The
// weights, which all of them read, stay in L2 whatever the order: 4.7 MB at most in a ResNet.
__host__ __device__ __forceinline__ TileStart tile_start(const GemmSm90& gemm, int tile,
                                                         int block_m, int block_n) {
  const int n_tile = tile % gemm.n_tiles, rest = tile / gemm.n_tiles;
  return {rest / gemm.groups * block_m, rest % gemm.groups, n_tile * block_n};
}

// Where the first tap of output pixel m lies in x.
struct InputStart {
  int n, h, w;
};
__host__ __device__ __forceinline__ InputStart input_start(const GemmSm90& gemm, int m) {
  const int q = m % gemm.Q, rest = m / gemm.Q;
  return {rest / gemm.P, rest % gemm.P * gemm.stride_h - gemm.pad_h,
          q * gemm.stride_w - gemm.pad_w};
}

// The stage that a step uses, and the parity of its turn.
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

// The tensor maps of a launch (cuda/device/tensor_map.h); residual's is y's where there is none.
struct Sm90Maps {
  TensorMap x, weight, residual, y;
};

// By dtype; defined in cuda/convolution/sm90/kernel.cuh, instantiated in
// implicit_gemm_sm90_*_cuda.cu.
template <typename T>
struct Sm90Kernels {
  static void launch(const DeviceScope& scope, int tile, const Sm90Maps& maps, const GemmSm90& gemm,
                     Epilogue epilogue);
  static void list(std::vector<CudaKernel>& list, bool gpu);
};
// Those that normalise x: cuda/convolution/sm90/prologue.cuh,
// implicit_gemm_sm90_prologue_*_cuda.cu.
template <typename T>
struct Sm90Prologues {
  static void launch(const DeviceScope& scope, int tile, const Sm90Maps& maps,
                     const GemmSm90& gemm);
  static void list(std::vector<CudaKernel>& list, bool gpu);
};

}  // namespace fused_resnet
