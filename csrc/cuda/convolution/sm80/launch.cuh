// Launches the sm_80 convolution of one dtype: checks its limits, fills in the kernel arguments,
// selects the kernel of the tile, and launches the kernel that adds splits.
#pragma once

#include <limits>

#include "cuda/convolution/prologue.h"
#include "cuda/convolution/sm80/kernel.cuh"

namespace fused_resnet {

template <typename T, int kTile, Epilogue kEpilogue>
void launch_tile(const DeviceScope& scope, bool pointwise, const GemmArguments& arguments) {
  using Shape = TileShape<kTile>;
  const int64_t blocks = int64_t{arguments.tiles_m} * arguments.tiles_n * arguments.splits;
  check(blocks <= std::numeric_limits<int>::max(), "implicit_gemm: ", blocks, " blocks");
  scope.launch({blocks, Shape::kThreads, Shape::kSharedBytes},
               pointwise ? implicit_gemm_sm80_kernel<T, kTile, true, kEpilogue>
                         : implicit_gemm_sm80_kernel<T, kTile, false, kEpilogue>,
               arguments);
}

// Selects the kernel for the tile: the first row of kGemmTiles with the same values.
template <typename T, Epilogue kEpilogue, int kTile = 0>
void launch_tile_alike(const DeviceScope& scope, const GemmTile& tile, bool pointwise,
                       const GemmArguments& arguments) {
  if constexpr (kTile == kGemmTileCount) {
    check(false, "implicit_gemm: there is no kernel for this tile");
  } else {
    constexpr GemmTile mine = kGemmTiles[kTile];
    if constexpr (mine.architecture == 80)
      if (mine.block_m == tile.block_m && mine.block_n == tile.block_n &&
          mine.warps == tile.warps && mine.stages == tile.stages)
        return launch_tile<T, kTile, kEpilogue>(scope, pointwise, arguments);
    launch_tile_alike<T, kEpilogue, kTile + 1>(scope, tile, pointwise, arguments);
  }
}

// For float16 and bfloat16. Defined in cuda/convolution/sm80/gradient.cuh, instantiated in
// cuda/convolution/instantiations/.
template <typename T>
struct Sm80Gradient {
  static void launch(const DeviceScope& scope, const GemmTile& tile, bool pointwise,
                     const GemmArguments& arguments);
  // Adds the splits.
  static void launch_merge(const DeviceScope& scope, const GemmArguments& arguments, int row_packs);
  static void list(std::vector<CudaKernel>& list, const char* type, bool gpu);
};

template <typename T>
void launch_tiles(const DeviceScope& scope, Epilogue epilogue, const GemmTile& tile, bool pointwise,
                  const GemmArguments& arguments) {
  if (epilogue == Epilogue::scale)
    return launch_tile_alike<T, Epilogue::scale>(scope, tile, pointwise, arguments);
  if (epilogue == Epilogue::statistics)
    return launch_tile_alike<T, Epilogue::statistics>(scope, tile, pointwise, arguments);
  if constexpr (sizeof(T) == 2) Sm80Gradient<T>::launch(scope, tile, pointwise, arguments);
}

template <typename T>
void launch_implicit_gemm_sm80_of(const DeviceScope& scope, const ConvProblem& problem,
                                  const ConvOperands& operands, const GemmTile& tile, int splits,
                                  float* partial) {
  // Coordinates must fit in an int, including the end of a window and one step past it.
  const auto reach = [](int64_t size, int64_t pad, int64_t kernel, int64_t dilation) {
    return size + 2 * pad + (kernel + kStepChunks) * (kernel > 1 ? dilation : 1);
  };
  check(reach(problem.H, problem.pad_h, problem.R, problem.dilation_h) < -kOutside &&
            reach(problem.W, problem.pad_w, problem.S, problem.dilation_w) < -kOutside,
        "implicit_gemm: the padded image must be smaller than 2^30 pixels in each dimension");
  const int64_t pixel_chunks = int64_t{problem.groups} * problem.C * sizeof(T) / kChunkBytes;
  const int64_t chunks = pixel_chunks / problem.groups * problem.R * problem.S;
  check(
      problem.N * problem.H * problem.W * pixel_chunks <= uint32_t(-1) &&
          problem.groups * problem.K * chunks <= uint32_t(-1) && chunks < -kOutside,
      "implicit_gemm: x and weight must be smaller than 64 GiB, and a filter smaller than 16 GiB");
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
  arguments.mask = operands.mask;
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
  arguments.activation = operands.activation;
  if constexpr (sizeof(T) == 2)
    if (operands.norm != nullptr) return Sm80Prologues<T>::launch(scope, tile, arguments);
  const Epilogue epilogue = operands.epilogue();
  if (splits == 1) return launch_tiles<T>(scope, epilogue, tile, problem.pointwise(), arguments);
  GemmArguments parts = arguments;
  parts.residual = nullptr;  // added by the merge kernel
  // The kernel reads scale and shift but does not use them. In training they are null, so pass any
  // readable memory.
  if (epilogue != Epilogue::scale)
    parts.scale = parts.shift = static_cast<const float*>(operands.weight);
  launch_tiles<T>(scope, Epilogue::scale, tile, problem.pointwise(), parts);
  const int64_t row_packs = int64_t{problem.groups} * problem.K / Pack<T>::size;
  const int64_t packs = problem.M() * row_packs;
  check(packs <= std::numeric_limits<int>::max(), "implicit_gemm: too many outputs to split");
  if constexpr (sizeof(T) == 2)
    if (epilogue == Epilogue::gradient)
      return Sm80Gradient<T>::launch_merge(scope, arguments, static_cast<int>(row_packs));
  if (epilogue == Epilogue::statistics) {
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

// type: the dtype's name; epilogue: the suffix of the kernels' names.
template <typename T, Epilogue kEpilogue, int kTile = 0>
void list_tiles(std::vector<CudaKernel>& list, const char* type, const char* epilogue, bool gpu) {
  if constexpr (kTile < kGemmTileCount) {
    constexpr GemmTile tile = kGemmTiles[kTile];
    if constexpr (tile.architecture == 80) {
      const std::string name = "implicit_gemm_sm80_" + std::to_string(tile.block_m) + "x" +
                               std::to_string(tile.block_n) + "_" + std::to_string(tile.warps) +
                               "_warps_" + type;
      describe_kernel(list, name + epilogue, implicit_gemm_sm80_kernel<T, kTile, false, kEpilogue>,
                      gpu);
      describe_kernel(list, name + "_pointwise" + epilogue,
                      implicit_gemm_sm80_kernel<T, kTile, true, kEpilogue>, gpu);
    }
    list_tiles<T, kEpilogue, kTile + 1>(list, type, epilogue, gpu);
  }
}

template <typename T>
void list_implicit_gemm_sm80_of(std::vector<CudaKernel>& list, const char* type, bool gpu) {
  list_tiles<T, Epilogue::scale>(list, type, "", gpu);
  list_tiles<T, Epilogue::statistics>(list, type, "_statistics", gpu);
  describe_kernel(list, std::string("implicit_gemm_merge_") + type, implicit_gemm_merge_kernel<T>,
                  gpu);
  describe_kernel(list, std::string("implicit_gemm_merge_statistics_") + type,
                  implicit_gemm_merge_statistics_kernel<T>, gpu);
  if constexpr (sizeof(T) == 2) Sm80Gradient<T>::list(list, type, gpu);
}

// Each in a separate file, so that they compile in parallel.
#define FUSED_RESNET_IMPLICIT_GEMM_SM80(keyword, T)                                               \
  keyword template void launch_implicit_gemm_sm80_of<T>(                                          \
      const DeviceScope&, const ConvProblem&, const ConvOperands&, const GemmTile&, int, float*); \
  keyword template void list_implicit_gemm_sm80_of<T>(std::vector<CudaKernel>&, const char*, bool);

}  // namespace fused_resnet
