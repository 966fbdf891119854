// The 3x3, stride 1 convolutions of conv_bn_relu_kernels.h, multiplied in float32, by Winograd's
// minimal filtering, F(2x2, 3x3): 16 multiplications for the 36 of a 2x2 tile of outputs.
//
//   Y = A^T [(G g G^T) * (B^T d B)] A     d: 4x4 of x, g: 3x3 of the weights, Y: 2x2
//
//   B^T = 1  0 -1  0    G =  1    0    0     A^T = 1  1  1  0
//         0  1  1  0        1/2  1/2  1/2          0  1 -1 -1
//         0 -1  1  0        1/2 -1/2  1/2
//         0  1  0 -1         0    0    1
//
// Layout: x (N, H, W, C) in memory, the transformed weights (blocks of K, 16, C, vectors, 16) as
// native_conv.py packs them. For some groups of kTilePixels tiles at a time: the transformed x,
// (16, tiles, C), then per block of 64 outputs 16 matrix products by the same assembly as the
// direct convolution, their sums (groups, 16, 7, 4 vectors), and the transform back with scale,
// shift, residual, ReLU. Both buffers and one product's weights stay in the second-level cache.
//
// Error: sums of C instead of 9 C products and four-term sums around them: on layers of ResNets
// nearer to float64 than stock's (the parity table of README.md). It is relative to the largest
// product in a tile, be it one with a weight of zero. An Inf or NaN in d would spread over its
// tile, and intermediate sums may overflow where stock's do not: a tile with a sum that is no
// finite number is computed again, directly.
//
// Bytes: x once or twice from cache, y written once; 16/9 of the direct weights.
// Measured: see benchmarks/results/conv_bn_relu-cpu-*.json.
// Source: Lavin and Gray 2015, "Fast Algorithms for Convolutional Neural Networks" (1509.09308).
#pragma once

#include "conv_bn_relu_kernels.h"

FR_INLINE int64_t winograd_tiles_w(const ConvBnRelu& c) { return (c.Q + 1) / 2; }
FR_INLINE int64_t winograd_tiles_h(const ConvBnRelu& c) { return (c.P + 1) / 2; }

// B^T d B of one tile; the 16 results of channels [begin, end) go to v, `pitch` floats apart.
FR_INLINE void winograd_input(const ConvBnRelu& c, int64_t tile, int64_t begin, int64_t end,
                              float* v, int64_t pitch) {
  const int64_t tiles_w = winograd_tiles_w(c), tiles_h = winograd_tiles_h(c);
  const int64_t n = tile / (tiles_h * tiles_w);
  const int64_t top = tile / tiles_w % tiles_h * 2 - c.pad_h, left = tile % tiles_w * 2 - c.pad_w;
  const auto* x = static_cast<const float*>(c.x) + n * c.H * c.W * c.C;
  const float* d_ptr[4][4];
  for (int64_t i = 0; i < 4; ++i)
    for (int64_t j = 0; j < 4; ++j) {
      const int64_t h = top + i, w = left + j;
      const bool inside = static_cast<uint64_t>(h) < static_cast<uint64_t>(c.H) &&
                          static_cast<uint64_t>(w) < static_cast<uint64_t>(c.W);
      d_ptr[i][j] = inside ? x + (h * c.W + w) * c.C : static_cast<const float*>(c.zeros);
    }
  for (int64_t channel = begin; channel < end; channel += kLanes) {
    vf t[4][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const vf d0 = load_any<vf>(d_ptr[0][j] + channel), d1 = load_any<vf>(d_ptr[1][j] + channel);
      const vf d2 = load_any<vf>(d_ptr[2][j] + channel), d3 = load_any<vf>(d_ptr[3][j] + channel);
      t[0][j] = d0 - d2, t[1][j] = d1 + d2, t[2][j] = d2 - d1, t[3][j] = d1 - d3;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      float* out = v + 4 * i * pitch + channel - begin;
      store_any(out, t[i][0] - t[i][2]);
      store_any(out + pitch, t[i][1] + t[i][2]);
      store_any(out + 2 * pitch, t[i][2] - t[i][1]);
      store_any(out + 3 * pitch, t[i][1] - t[i][3]);
    }
  }
}

// Y = A^T M A of one tile and up to 64 outputs; m: its sums, the 16 of them kSums apart. False
// where one is no finite number: then nothing was written.
template <typename Dot, int vectors>
FR_INLINE bool winograd_output(const ConvBnRelu& c, int64_t tile, int64_t k, const float* m) {
  constexpr int parts = vectors * 16 / kLanes;
  vf y[4][parts], finite = {};
#pragma GCC unroll 4
  for (int v = 0; v < parts; ++v) {
    const auto at = [&](int i) FR_LAMBDA { return load_any<vf>(m + i * kSums + v * kLanes); };
    vf s[2][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const vf m1 = at(4 + j), m2 = at(8 + j);
      s[0][j] = at(j) + m1 + m2, s[1][j] = m1 - m2 - at(12 + j);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      y[2 * i][v] = s[i][0] + s[i][1] + s[i][2];
      y[2 * i + 1][v] = s[i][1] - s[i][2] - s[i][3];
      finite += y[2 * i][v] * 0 + y[2 * i + 1][v] * 0;  // 0, or NaN
    }
  }
  if (has_nan(finite)) return false;
  const int64_t tiles_w = winograd_tiles_w(c), tiles_h = winograd_tiles_h(c);
  const int64_t n = tile / (tiles_h * tiles_w);
  const int64_t p = tile / tiles_w % tiles_h * 2, q = tile % tiles_w * 2;
  for (int i = 0; i < 4; ++i) {
    if (p + i / 2 >= c.P || q + i % 2 >= c.Q) continue;
    const int64_t pixel = (n * c.P + p + i / 2) * c.Q + q + i % 2;
    auto* out = static_cast<typename Dot::D::T*>(c.y) + pixel * c.K + k;
    const auto* residual = static_cast<const typename Dot::D::T*>(c.residual) + pixel * c.K + k;
#pragma GCC unroll 8
    for (int v = 0; v < parts; ++v) {
      const int64_t j = v * kLanes;
      vf value = scaled(c, y[i][v], k + j);
      if (c.residual) value += Dot::D::load(residual + j);
      Dot::D::store(out + j, c.relu ? relu_of(value) : value);
    }
  }
  return true;
}

// `count` pixels of y from `pixel` on, directly; left out where the weights for that are not
// packed.
template <typename Dot, int vectors>
FR_INLINE void pixels_directly(const ConvBnRelu& c, int64_t block, int64_t pixel, int64_t count) {
  if (c.weight)
    conv_pixels<Dot, vectors>(c, block, pixel, count);
  else
    __atomic_store_n(c.left_out, true, __ATOMIC_RELAXED);
}

// The two rows of a tile, directly.
template <typename Dot, int vectors>
FR_INLINE void winograd_directly(const ConvBnRelu& c, int64_t block, int64_t tile) {
  const int64_t tiles_w = winograd_tiles_w(c), tiles_h = winograd_tiles_h(c);
  const int64_t n = tile / (tiles_h * tiles_w);
  const int64_t p = tile / tiles_w % tiles_h * 2, q = tile % tiles_w * 2;
  for (int64_t i = 0; i < 2 && p + i < c.P; ++i)
    pixels_directly<Dot, vectors>(c, block, (n * c.P + p + i) * c.Q + q, c.Q - q < 2 ? c.Q - q : 2);
}

// The first pixel of y's row of 2x2 tiles that `tile` is in.
FR_INLINE int64_t winograd_pixel(const ConvBnRelu& c, int64_t tile) {
  const int64_t row = tile / winograd_tiles_w(c), tiles_h = winograd_tiles_h(c);
  return (row / tiles_h * c.P + row % tiles_h * 2) * c.Q;
}

// One block of outputs for tiles [first, first + count): v as winograd_input left it, `room` tiles
// apart; m: room for the sums. Fetched meanwhile: the lines of y that are written then, and, in the
// last block, the x of the tiles that follow.
template <typename Dot, int vectors>
FR_INLINE void winograd_block(const ConvBnRelu& c, int64_t block, int64_t first, int64_t count,
                              const float* v, int64_t room, float* m) {
  const int64_t groups = (count + kTilePixels - 1) / kTilePixels;
  const auto* weight = static_cast<const char*>(c.winograd) + block * 4 * 16 * c.C * 64;
  constexpr int64_t size = sizeof(typename Dot::D::T);
  Fetch fetch{};
  fetch.written = {
      static_cast<const char*>(c.y) + (winograd_pixel(c, first) * c.K + block * 64) * size,
      c.K * size, 4 * count};
  if ((block + 1) * 64 >= c.K)
    fetch.read = {static_cast<const char*>(c.x) + winograd_pixel(c, first + count) * c.C * size,
                  256, 4 * count * c.C * size / 256};
  for (int64_t i = 0; i < 16; ++i)
    for (int64_t group = 0; group < groups; ++group) {
      const char* pixel[kTilePixels];
      for (int64_t t = 0; t < kTilePixels; ++t) {
        const int64_t tile = group * kTilePixels + t;
        pixel[t] =
            reinterpret_cast<const char*>(v + (i * room + (tile < count ? tile : count - 1)) * c.C);
      }
      sum_pieces<DotFloat32, vectors>(weight + i * c.C * vectors * 64, pixel, 1, c.C, 0, 0, fetch,
                                      m + (group * 16 + i) * kSums);
    }
  for (int64_t tile = 0; tile < count; ++tile) {
    const float* sums = m + tile / kTilePixels * 16 * kSums + tile % kTilePixels * 64;
    if (!winograd_output<Dot, vectors>(c, first + tile, block * 64, sums))
      winograd_directly<Dot, vectors>(c, block, first + tile);
  }
}

// y's channels of blocks [block_begin, block_end) in groups [begin, end); scratch: as
// winograd_scratch_bytes says, aligned to 64 bytes.
template <typename Dot>
void conv_bn_relu_winograd(const ConvBnRelu& c, void* scratch, int64_t block_begin,
                           int64_t block_end, int64_t begin, int64_t end) {
  const int64_t tiles = c.N * winograd_tiles_h(c) * winograd_tiles_w(c);
  const int64_t at_once = winograd_groups(kTilePixels, c.C), room = at_once * kTilePixels;
  auto* v = static_cast<float*>(scratch);
  float* m = v + 16 * room * c.C;
  for (int64_t group = begin; group < end; group += at_once) {
    const int64_t first = group * kTilePixels;
    const int64_t groups = end - group < at_once ? end - group : at_once;
    const int64_t left = tiles - first;
    const int64_t count = groups * kTilePixels < left ? groups * kTilePixels : left;
    for (int64_t tile = 0; tile < count; ++tile)
      winograd_input(c, first + tile, 0, c.C, v + tile * c.C, room * c.C);
    for (int64_t block = block_begin; block < block_end; ++block) {
      const int64_t vectors = c.K / 16 - block * 4;
      const auto run = vectors >= 4   ? winograd_block<Dot, 4>
                       : vectors == 3 ? winograd_block<Dot, 3>
                       : vectors == 2 ? winograd_block<Dot, 2>
                                      : winograd_block<Dot, 1>;
      run(c, block, first, count, v, room, m);
    }
  }
}
