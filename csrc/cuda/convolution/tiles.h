// Tile shapes of the implicit-GEMM kernels. The kernels' launchers read this table, as does
// native.gemm_tiles(), from which the tile is chosen. No torch, no CUDA.
#pragma once

namespace fused_resnet {

// A tile of block_m pixels by block_n outputs. A step covers 128 bytes of channels, of one tap or
// of consecutive taps: 64 channels of 16 bits, 32 of float32.
struct GemmTile {
  int architecture;  // 80: mma.sync, sm_80 and later; 90: TMA and wgmma, Hopper only
  int block_m, block_n;
  int warps;   // per tile; sm_90 blocks have 8: with 4 per tile, two tiles alternate
  int stages;  // steps in flight

  // Pixels per part in the training epilogues (cuda/convolution/statistics.cuh,
  // cuda/convolution/gradient.cuh): the pixels whose sums are reduced together. The two halves of
  // an 8-warp sm_90 tile are separate parts.
  constexpr int part_pixels() const {
    return architecture == 90 && warps == 8 ? block_m / 2 : block_m;
  }
  // Whether kernels exist that normalise x in their prologue (cuda/convolution/prologue.cuh). The
  // tiles for narrow groups and single images have none: training does not use them.
  constexpr bool normalises() const { return block_m >= 64 && block_n >= 64; }
};

constexpr int kStepBytes = 128;

// A single object in the whole program: a row is identified by its address.
inline constexpr GemmTile kGemmTiles[] = {
    {80, 128, 128, 8, 3},  // 96 KiB of shared memory: the default
    {80, 128, 128, 4, 3},  // 96: a quarter less shared memory traffic, half the warps
    {80, 128, 64, 4, 3},   // 72: layer1 and 1x1 with K = 64
    {80, 64, 128, 4, 3},   // 72: few pixels, many outputs: layer4 at small batch
    {80, 64, 64, 4, 4},    // 64: small grids
    {80, 128, 32, 4, 3},   // 60: narrow groups
    {80, 32, 64, 2, 4},    // 48: 7x7 pixels of one image
    {90, 128, 256, 8, 3},  // 209 KiB; fewest loads per multiply-add: long sums, K >= 256
    {90, 128, 128, 4, 5},  // 225: the default
    {90, 64, 256, 4, 4},   // 225: short sums, many outputs: the expanding 1x1
    {90, 128, 64, 4, 6},   // 177: layer1 and 1x1 with K = 64
    {90, 64, 64, 4, 8},    // 145: small grids
};
constexpr int kGemmTileCount = sizeof(kGemmTiles) / sizeof(kGemmTiles[0]);

}  // namespace fused_resnet
