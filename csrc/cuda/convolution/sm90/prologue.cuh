// The Hopper kernels that normalise x in their prologue (cuda/convolution/prologue.cuh), for one
// dtype, with statistics. The warpgroup that multiplies the rows of a stage normalises them in
// shared memory.
#pragma once

#include "cuda/convolution/prologue.cuh"
#include "cuda/convolution/sm90/kernel.cuh"

namespace fused_resnet {

#if FUSED_RESNET_HOPPER

template <typename T, int kTile>
struct Sm90Prologue {
  static constexpr int kRowsAtOnce = 128 / kStepChunks;
  using Chunks = NormPrologue<T, Sm90Shape<kTile>::rows / kRowsAtOnce, kRowsAtOnce>;

  Chunks chunks;
  WarpgroupThreads threads;

  __device__ __forceinline__ Sm90Prologue(const float* table, int chunks, int warpgroup)
      : chunks(table, chunks, WarpgroupThreads::index() % kStepChunks), threads{warpgroup} {}
  __device__ __forceinline__ void load(int step) { chunks.load(step); }
  // rows: the warpgroup's rows of a stage. Returns when all of them are normalised and visible to
  // wgmma.
  __device__ __forceinline__ void apply(uint8_t* rows) const {
    chunks.apply(rows + swizzled_offset(WarpgroupThreads::index() / kStepChunks, chunks.column));
    fence_proxy_async();
    threads.sync();
  }
};

#else

template <typename T, int kTile>
struct Sm90Prologue;

#endif

template <typename T>
void Sm90Prologues<T>::launch(const DeviceScope& scope, int tile, const Sm90Maps& maps,
                              const GemmSm90& gemm) {
  bool found = false;
  for_each_sm90_tile([&](auto number) {
    constexpr int kTile = decltype(number)::value;
    if (kTile != tile) return;
    found = true;
    const int64_t blocks = std::min(gemm.tiles, scope.multiprocessors());
    scope.launch({blocks, kSm90Threads, Sm90Shape<kTile>::shared_bytes},
                 implicit_gemm_sm90_kernel<T, kTile, Epilogue::statistics, Sm90Prologue<T, kTile>>,
                 maps.x, maps.weight, maps.residual, maps.y, gemm);
  });
  check(found, "implicit_gemm: no Hopper kernel for tile ", tile);
}

template <typename T>
void Sm90Prologues<T>::list(std::vector<CudaKernel>& list, bool gpu) {
  for_each_sm90_tile([&](auto number) {
    constexpr int kTile = decltype(number)::value;
    const GemmTile& tile = kGemmTiles[kTile];
    const std::string name = std::string("implicit_gemm_sm90_") +
                             (std::is_same_v<T, float16_t> ? "float16_" : "bfloat16_") +
                             std::to_string(tile.block_m) + "x" + std::to_string(tile.block_n);
    describe_kernel(
        list, name + "_prologue",
        implicit_gemm_sm90_kernel<T, kTile, Epilogue::statistics, Sm90Prologue<T, kTile>>, gpu);
  });
}

}  // namespace fused_resnet
