// The shapes of tile that the implicit-GEMM kernels are built for: one table, read by the kernels'
// launchers, by fused_resnet._C.implicit_gemm_tiles() and through it by the chooser. No torch, no
// CUDA.
#pragma once

namespace fused_resnet {

// A tile of block_m pixels by block_n outputs. A step takes 128 bytes of channels of one tap or of
// neighbouring ones: 64 channels of 16 bits, 32 of float32.
struct GemmTile {
  int architecture;  // 80: mma.sync, any GPU from sm_80 on; 90: TMA and wgmma, Hopper alone
  int block_m, block_n;
  int warps;   // that multiply a tile; sm_90's blocks have 8, 4 to a tile: two take turns
  int stages;  // steps in flight

  // Of a part, in training's epilogues (cuda/convolution/statistics.cuh,
  // cuda/convolution/gradient.cuh): those whose sums meet. The halves of sm_90's tile by 8 warps do
  // not.
  constexpr int part_pixels() const {
    return architecture == 90 && warps == 8 ? block_m / 2 : block_m;
  }
  // Whether there are kernels that normalise x in their prologue (cuda/convolution/prologue.cuh):
  // not of the tiles for narrow groups and for single images, which training has no use for.
  constexpr bool normalises() const { return block_m >= 64 && block_n >= 64; }
};

constexpr int kStepBytes = 128;

// One object in the whole program: a row is known by its address.
inline constexpr GemmTile kGemmTiles[] = {
    {80, 128, 128, 8, 3},  // 96 KiB of shared memory: the usual one
    {80, 128, 128, 4, 3},  // 96: a quarter less shared memory traffic, half the warps
    {80, 128, 64, 4, 3},   // 72: layer1 and the narrow 1x1, K = 64
    {80, 64, 128, 4, 3},   // 72: few pixels, many outputs: layer4 at small batch
    {80, 64, 64, 4, 4},    // 64: small grids
    {80, 128, 32, 4, 3},   // 60: narrow groups
    {80, 32, 64, 2, 4},    // 48: 7x7 pixels of one image
    {90, 128, 256, 8, 3},  // 209 KiB; fewest loads per product: long sums, K >= 256
    {90, 128, 128, 4, 5},  // 225: the usual one
    {90, 64, 256, 4, 4},   // 225: short sums, many outputs: the 1x1 that widens
    {90, 128, 64, 4, 6},   // 177: layer1 and the narrow 1x1, K = 64
    {90, 64, 64, 4, 8},    // 145: small grids
};
constexpr int kGemmTileCount = sizeof(kGemmTiles) / sizeof(kGemmTiles[0]);

}  // namespace fused_resnet
