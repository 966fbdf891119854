// Launches the sm_80 convolution of one dtype: its limits, what its kernels are told, the kernel of
// a tile, and the one that adds splits up.
#pragma once

#include <limits>

#include "implicit_gemm_prologue.h"
#include "implicit_gemm_sm80.cuh"

namespace fused_resnet {

template <typename T, int kTile>
void launch_tile(const DeviceScope& scope, bool pointwise, const GemmArguments& arguments) {
  using Shape = TileShape<kTile>;
  const int64_t blocks = int64_t{arguments.tiles_m} * arguments.tiles_n * arguments.splits;
  check(blocks <= std::numeric_limits<int>::max(), "implicit_gemm: ", blocks, " blocks");
  const Grid grid{blocks, Shape::kThreads, Shape::kSharedBytes};
  const auto kernel = [&](auto statistics) {
    constexpr bool with = decltype(statistics)::value;
    return pointwise ? implicit_gemm_sm80_kernel<T, kTile, true, with>
                     : implicit_gemm_sm80_kernel<T, kTile, false, with>;
  };
  const bool statistics = arguments.statistics != nullptr && arguments.partial == nullptr;
  scope.launch(grid, statistics ? kernel(std::true_type{}) : kernel(std::false_type{}), arguments);
}

// The tile's row of the table is a constant in its kernels: the first one that is alike.
template <typename T, int kTile = 0>
void launch_tile_alike(const DeviceScope& scope, const GemmTile& tile, bool pointwise,
                       const GemmArguments& arguments) {
  if constexpr (kTile == kGemmTileCount) {
    check(false, "implicit_gemm: no such tile");
  } else {
    constexpr GemmTile mine = kGemmTiles[kTile];
    if constexpr (mine.architecture == 80)
      if (mine.block_m == tile.block_m && mine.block_n == tile.block_n &&
          mine.warps == tile.warps && mine.stages == tile.stages)
        return launch_tile<T, kTile>(scope, pointwise, arguments);
    launch_tile_alike<T, kTile + 1>(scope, tile, pointwise, arguments);
  }
}

template <typename T>
void launch_implicit_gemm_sm80_of(const DeviceScope& scope, const ConvProblem& problem,
                                  const ConvOperands& operands, const GemmTile& tile, int splits,
                                  float* partial) {
  // Coordinates are ints, a window's end and a step beyond it included.
  const auto reach = [](int64_t size, int64_t pad, int64_t kernel, int64_t dilation) {
    return size + 2 * pad + (kernel + kStepChunks) * (kernel > 1 ? dilation : 1);
  };
  check(reach(problem.H, problem.pad_h, problem.R, problem.dilation_h) < -kOutside &&
            reach(problem.W, problem.pad_w, problem.S, problem.dilation_w) < -kOutside,
        "implicit_gemm: the padded image must be smaller than 2^30 pixels each way");
  const int64_t pixel_chunks = int64_t{problem.groups} * problem.C * sizeof(T) / kChunkBytes;
  const int64_t chunks = pixel_chunks / problem.groups * problem.R * problem.S;
  check(problem.N * problem.H * problem.W * pixel_chunks <= uint32_t(-1) &&
            problem.groups * problem.K * chunks <= uint32_t(-1) && chunks < -kOutside,
        "implicit_gemm: x and weight must be smaller than 64 GiB, one filter than 16 GiB");
  GemmArguments arguments{};
  arguments.x = static_cast<const uint8_t*>(operands.x);
  arguments.weight = static_cast<const uint8_t*>(operands.weight);
  arguments.scale = operands.scale;
  arguments.shift = operands.shift;
  arguments.residual = static_cast<const uint8_t*>(operands.residual);
  arguments.y = static_cast<uint8_t*>(operands.y);
  arguments.partial = splits > 1 ? partial : nullptr;
  arguments.statistics = operands.statistics;
  arguments.norm = operands.norm;
  arguments.window = Window::of(problem, sizeof(T));
  arguments.M = static_cast<int>(problem.M());
  arguments.K = problem.K;
  arguments.groups = problem.groups;
  arguments.chunks = static_cast<uint32_t>(chunks);
  arguments.pixel_chunks = static_cast<uint32_t>(pixel_chunks);
  arguments.steps = static_cast<int>(ceil_div(chunks, kStepChunks));
  arguments.splits = splits;
  arguments.tiles_m = static_cast<int>(ceil_div(problem.M(), tile.block_m));
  arguments.tiles_per_group = static_cast<int>(ceil_div(problem.K, tile.block_n));
  arguments.tiles_n = problem.groups * arguments.tiles_per_group;
  arguments.relu = operands.relu;
  if constexpr (sizeof(T) == 2)
    if (operands.norm != nullptr) return Sm80Prologues<T>::launch(scope, tile, arguments);
  if (splits == 1) return launch_tile_alike<T>(scope, tile, problem.pointwise(), arguments);
  GemmArguments parts = arguments;
  parts.residual = nullptr;  // which the merging kernel adds: not read here too
  // Read and not used; with statistics there are none, and any numbers will do.
  if (operands.statistics != nullptr)
    parts.scale = parts.shift = static_cast<const float*>(operands.weight);
  launch_tile_alike<T>(scope, tile, problem.pointwise(), parts);
  const int64_t row_packs = int64_t{problem.groups} * problem.K / Pack<T>::size;
  const int64_t packs = problem.M() * row_packs;
  check(packs <= std::numeric_limits<int>::max(), "implicit_gemm: too many outputs to split");
  if (operands.statistics != nullptr) {
    constexpr int shared_bytes =
        PartStatistics<T, kMergeColumns, kMergeThreads, kMergePacks>::kScratchBytes;
    const int64_t slabs = ceil_div(row_packs, kMergeColumns);
    scope.launch({ceil_div(problem.M(), kMergedPixels) * slabs, kMergeThreads, shared_bytes},
                 implicit_gemm_merge_statistics_kernel<T>, arguments, static_cast<int>(row_packs),
                 static_cast<int>(slabs));
    return;
  }
  scope.launch({ceil_div(packs, kMergeThreads), kMergeThreads}, implicit_gemm_merge_kernel<T>,
               arguments, FastDivision::by(static_cast<int>(row_packs)), static_cast<int>(packs));
}

// type: the dtype's name.
template <typename T, int kTile = 0>
void list_implicit_gemm_sm80_of(std::vector<CudaKernel>& list, const char* type, bool gpu) {
  if constexpr (kTile == kGemmTileCount) {
    describe_kernel(list, std::string("implicit_gemm_merge_") + type, implicit_gemm_merge_kernel<T>,
                    gpu);
    describe_kernel(list, std::string("implicit_gemm_merge_statistics_") + type,
                    implicit_gemm_merge_statistics_kernel<T>, gpu);
  } else {
    constexpr GemmTile tile = kGemmTiles[kTile];
    if constexpr (tile.architecture == 80) {
      const std::string name = "implicit_gemm_sm80_" + std::to_string(tile.block_m) + "x" +
                               std::to_string(tile.block_n) + "_" + std::to_string(tile.warps) +
                               "_warps_" + type;
      describe_kernel(list, name, implicit_gemm_sm80_kernel<T, kTile, false, false>, gpu);
      describe_kernel(list, name + "_pointwise", implicit_gemm_sm80_kernel<T, kTile, true, false>,
                      gpu);
      describe_kernel(list, name + "_statistics", implicit_gemm_sm80_kernel<T, kTile, false, true>,
                      gpu);
      describe_kernel(list, name + "_pointwise_statistics",
                      implicit_gemm_sm80_kernel<T, kTile, true, true>, gpu);
    }
    list_implicit_gemm_sm80_of<T, kTile + 1>(list, type, gpu);
  }
}

// Each in a file of its own, for the time it takes to compile.
#define FUSED_RESNET_IMPLICIT_GEMM_SM80(keyword, T)                                               \
  keyword template void launch_implicit_gemm_sm80_of<T>(                                          \
      const DeviceScope&, const ConvProblem&, const ConvOperands&, const GemmTile&, int, float*); \
  keyword template void list_implicit_gemm_sm80_of<T>(std::vector<CudaKernel>&, const char*, bool);

}  // namespace fused_resnet
