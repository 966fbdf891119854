// The sm_80 kernels that normalise x in their prologue (cuda/convolution/prologue.cuh), for one
// dtype: pointwise, with statistics. A thread normalises the chunks that it copied itself.
#pragma once

#include <limits>

#include "cuda/convolution/prologue.cuh"
#include "cuda/convolution/sm80/kernel.cuh"

namespace fused_resnet {

template <typename T, int kTile>
using Sm80Prologue = NormPrologue<T, TileShape<kTile>::kBlockM / TileShape<kTile>::kCopyRows,
                                  TileShape<kTile>::kCopyRows>;

// Calls f(std::integral_constant<int, i>) for every tile i that has these kernels.
template <int kTile = 0, typename F>
void for_each_normalising_sm80_tile(const F& f) {
  if constexpr (kTile < kGemmTileCount) {
    constexpr GemmTile tile = kGemmTiles[kTile];
    if constexpr (tile.architecture == 80 && tile.normalises())
      f(std::integral_constant<int, kTile>{});
    for_each_normalising_sm80_tile<kTile + 1>(f);
  }
}

template <typename T>
void Sm80Prologues<T>::launch(const DeviceScope& scope, const GemmTile& tile,
                              const GemmArguments& arguments) {
  bool found = false;
  for_each_normalising_sm80_tile([&](auto number) {
    constexpr int kTile = decltype(number)::value;
    using Shape = TileShape<kTile>;
    if (&tile != &kGemmTiles[kTile]) return;
    found = true;
    const int64_t blocks = int64_t{arguments.tiles_m} * arguments.tiles_n;
    check(blocks <= std::numeric_limits<int>::max(), "implicit_gemm: ", blocks, " blocks");
    scope.launch(
        {blocks, Shape::kThreads, Shape::kSharedBytes},
        implicit_gemm_sm80_kernel<T, kTile, true, Epilogue::statistics, Sm80Prologue<T, kTile>>,
        arguments);
  });
  check(found, "implicit_gemm: no kernel of this tile normalises x");
}

template <typename T>
void Sm80Prologues<T>::list(std::vector<CudaKernel>& list, bool gpu) {
  for_each_normalising_sm80_tile([&](auto number) {
    constexpr int kTile = decltype(number)::value;
    const GemmTile& tile = kGemmTiles[kTile];
    const std::string name = "implicit_gemm_sm80_" + std::to_string(tile.block_m) + "x" +
                             std::to_string(tile.block_n) + "_" + std::to_string(tile.warps) +
                             "_warps_" + (std::is_same_v<T, float16_t> ? "float16" : "bfloat16");
    describe_kernel(
        list, name + "_prologue",
        implicit_gemm_sm80_kernel<T, kTile, true, Epilogue::statistics, Sm80Prologue<T, kTile>>,
        gpu);
  });
}

}  // namespace fused_resnet
