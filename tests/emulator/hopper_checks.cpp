// Exports the index arithmetic of the Hopper convolution and of the emulated TMA, for
// tests/kernels/cuda/test_hopper.py.
#include <cstring>

#include "cuda/convolution/sm90/kernel.h"

#define FR_TEST extern "C" __attribute__((visibility("default")))

using namespace fused_resnet;

// Writes every tile's (m, group, k) to out (tiles, 3).
FR_TEST void hopper_schedule(int tiles, int n_tiles, int groups, int block_m, int block_n,
                             int* out) {
  GemmSm90 gemm{};
  gemm.n_tiles = n_tiles;
  gemm.groups = groups;
  for (int tile = 0; tile < tiles; ++tile) {
    const TileStart start = tile_start(gemm, tile, block_m, block_n);
    const int values[3] = {start.m, start.group, start.k};
    std::memcpy(out + 3 * tile, values, sizeof values);
  }
}

// Writes stage and parity before each of `count` advances by `step` in a ring of 3 to out (count,
// 2).
FR_TEST void hopper_ring(int count, int step, int* out) {
  StageRing<3> ring;
  for (int i = 0; i < count; ++i) {
    out[2 * i] = ring.stage;
    out[2 * i + 1] = static_cast<int>(ring.parity);
    ring.advance(step);
  }
}

// Writes the pixels (w, h, n) of x that an im2col load reads for outputs from m on at tap (r, s) to
// out (pixels, 3). geometry: N, H, W, R, S, P, Q, stride, padding and dilation (h, w each). Returns
// 1 if the map is not valid.
FR_TEST int hopper_column(const int* geometry, int m, int pixels, int r, int s, int* out) try {
  ConvProblem p{};
  p.N = geometry[0];
  p.C = p.K = kStepChannels;
  p.groups = 1;
  int* const fields[] = {&p.H,     &p.W,     &p.R,          &p.S,
                         &p.P,     &p.Q,     &p.stride_h,   &p.stride_w,
                         &p.pad_h, &p.pad_w, &p.dilation_h, &p.dilation_w};
  for (size_t i = 0; i < std::size(fields); ++i) *fields[i] = geometry[i + 1];
  GemmSm90 gemm{};
  gemm.P = p.P;
  gemm.Q = p.Q;
  gemm.stride_h = p.stride_h;
  gemm.stride_w = p.stride_w;
  gemm.pad_h = p.pad_h;
  gemm.pad_w = p.pad_w;
  const TensorMap map = sm90_input_map(p, ConvOperands{}, pixels);
  const InputStart from = input_start(gemm, m);
  emulated_visit_column(map, {0, from.w, from.h, from.n}, {s * p.dilation_w, r * p.dilation_h, 0},
                        [&](int64_t element, const EmulatedPoint& at) {
                          for (size_t d = 0; d < 3; ++d)
                            out[element / kStepChannels * 3 + static_cast<int64_t>(d)] =
                                static_cast<int>(at[d + 1]);
                        });
  return 0;
} catch (const std::exception&) {
  return 1;
}

FR_TEST int hopper_swizzled_offset(int row, int chunk) { return swizzled_offset(row, chunk); }
// Where the emulated TMA stores byte `offset` of a tile.
FR_TEST int hopper_emulated_offset(int offset) {
  alignas(1024) static uint8_t tile[2048];
  return static_cast<int>(emulated_swizzled(tile + offset) - tile);
}
FR_TEST uint64_t hopper_descriptor(uint32_t address, int further) {
  return tile_descriptor(address, further);
}
// R, S, stride, padding, dilation (h, w each), groups, C
FR_TEST int hopper_covers(const int* v) {
  ConvProblem p{};
  p.N = 1;
  p.H = p.W = p.K = 64;
  p.R = v[0];
  p.S = v[1];
  p.stride_h = v[2];
  p.stride_w = v[3];
  p.pad_h = v[4];
  p.pad_w = v[5];
  p.dilation_h = v[6];
  p.dilation_w = v[7];
  p.groups = v[8];
  p.C = v[9];
  return covers_sm90(p);
}
