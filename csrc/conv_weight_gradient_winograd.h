// The gradient of a 3x3, stride 1 convolution's weights in float32 by Winograd's minimal filtering:
// the transpose of what conv_bn_relu_winograd.h computes, 16 multiplications for the 36 that a 2x2
// tile of dy takes directly.
//
//   dg = G^T [ sum over tiles of (B^T d B) * (A dY A^T) ] G     B, G, A: as in
//   conv_bn_relu_winograd.h
//
// The 16 sums over tiles are matrix products by the assembly of conv_weight_gradient_kernels.h: for
// some tiles at a time, transformed x in blocks of 64 channels (16, block, tile, 64) and
// transformed dy with every output's tiles next to each other (16, K, tiles). One of the 16 fits
// the second-level cache; the sums, (K, 16, C), are added to in memory.
//
// Error: up to 2.0 times stock's where few pixels are summed, less than stock's on large layers. An
// Inf or NaN, or a sum that overflows where the direct one would not, shows in the result, which is
// then computed directly.
#pragma once

#include "conv_bn_relu_winograd.h"
#include "conv_weight_gradient_kernels.h"

FR_INLINE int64_t winograd_gradient_tiles(const WeightGradient& g) {
  return g.N * ((g.P + 1) / 2) * ((g.Q + 1) / 2);
}

// Tiles in one chain of additions: so few, because the transforms add errors of their own. With 56
// the error was 2.4 times stock's where few pixels are summed, with 32 it is 2.0; no slower.
constexpr int64_t kTilesSummed = 32;
// Floats between two outputs' tiles: no multiple of a page, as in gradient_panel.
constexpr int64_t kTilesApart = kGradientTiles + 16;

int64_t winograd_gradient_scratch(const WeightGradient& g, int64_t outputs) {
  return 16 * kGradientTiles * g.C * 4 + 16 * outputs * kTilesApart * 4 + 128;
}

// A dY A^T for 16 outputs from k on of tiles [first, first + count): to (16, outputs, tiles), the
// 16 of them `pitch` floats apart.
FR_INLINE void winograd_dy(const WeightGradient& g, int64_t first, int64_t count, int64_t k,
                           float* to, int64_t pitch) {
  const int64_t tiles_w = (g.Q + 1) / 2, tiles_h = (g.P + 1) / 2;
  const auto* dy = static_cast<const float*>(g.dy);
  for (int64_t t = 0; t < count; t += 16) {
    alignas(64) vf m[16][16];  // (of the 16, tile): vectors of outputs
    for (int64_t i = 0; i < 16; ++i) {
      vf d[2][2] = {};
      const int64_t tile = first + t + i;
      if (t + i < count) {
        const int64_t n = tile / (tiles_h * tiles_w);
        const int64_t p = tile / tiles_w % tiles_h * 2, q = tile % tiles_w * 2;
        const float* from = dy + ((n * g.P + p) * g.Q + q) * g.K + k;
        d[0][0] = load_any<vf>(from);
        if (q + 1 < g.Q) d[0][1] = load_any<vf>(from + g.K);
        if (p + 1 < g.P) d[1][0] = load_any<vf>(from + g.Q * g.K);
        if (p + 1 < g.P && q + 1 < g.Q) d[1][1] = load_any<vf>(from + (g.Q + 1) * g.K);
      }
      vf rows[4][2];
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        rows[0][j] = d[0][j], rows[1][j] = d[0][j] + d[1][j];
        rows[2][j] = d[0][j] - d[1][j], rows[3][j] = -d[1][j];
      }
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        m[4 * r][i] = rows[r][0], m[4 * r + 1][i] = rows[r][0] + rows[r][1];
        m[4 * r + 2][i] = rows[r][0] - rows[r][1], m[4 * r + 3][i] = -rows[r][1];
      }
    }
    for (int64_t j = 0; j < 16; ++j) {
      transpose_16x16(m[j]);
      for (int64_t i = 0; i < 16; ++i) store_any(to + j * pitch + i * kTilesApart + t, m[j][i]);
    }
  }
}

// sums (outputs, 16, C) += or, at first, = over `count` tiles, for a block of channels from c on; x
// and dy: one of the 16 transforms of each.
template <int vectors>
FR_INLINE void winograd_gradient_block(const WeightGradient& g, const char* x, const float* dy,
                                       int64_t count, int64_t c, int64_t outputs, int64_t which,
                                       bool again, float* sums) {
  const char* table[8];
  for (int64_t j = 0; j < kTilePixels; ++j)
    table[j] = reinterpret_cast<const char*>(dy + j * kTilesApart);
  table[7] = x;
  for (int64_t k = 0; k < outputs; k += kTilePixels) {
    const int64_t start = k + kTilePixels <= outputs ? k : outputs - kTilePixels;
    const int64_t channel = start * kTilesApart * 4;
    vf sum[4 * kTilePixels], piece[4 * kTilePixels];
    for (int64_t t = 0; t < count; t += kTilesSummed) {
      const int64_t steps = count - t < kTilesSummed ? count - t : kTilesSummed;
      sum_rows<DotFloat32, vectors>(table, 1, steps, channel + t * 4, t * vectors * 64,
                                    t ? piece : sum);
      if (t)
        for (int i = 0; i < kTilePixels; ++i)
          for (int v = 0; v < vectors; ++v) sum[4 * i + v] += piece[4 * i + v];
    }
    for (int64_t i = k - start; i < kTilePixels; ++i) {
      float* to = sums + ((start + i) * 16 + which) * g.C + c;
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        vf value = sum[4 * i + v];
        if (again) value += load_any<vf>(to + v * 16);
        store_any(to + v * 16, value);
      }
    }
  }
}

// sums (k_end - k_begin, 16, C) <- over tiles [begin, end), for outputs [k_begin, k_end)
void winograd_gradient(const WeightGradient& g, char* scratch, int64_t begin, int64_t end,
                       int64_t k_begin, int64_t k_end, float* sums) {
  ConvBnRelu conv{};  // what winograd_input reads of it
  conv.x = g.x, conv.zeros = g.zeros;
  conv.N = g.N, conv.C = g.C, conv.H = g.H, conv.W = g.W, conv.P = g.P, conv.Q = g.Q;
  conv.pad_h = g.pad_h, conv.pad_w = g.pad_w;
  const int64_t outputs = k_end - k_begin;
  auto* x = reinterpret_cast<float*>(scratch);
  float* dy = x + 16 * kGradientTiles * g.C;
  const int64_t x_pitch = kGradientTiles * g.C, dy_pitch = outputs * kTilesApart;
  for (int64_t first = begin; first < end; first += kGradientTiles) {
    const int64_t count = end - first < kGradientTiles ? end - first : kGradientTiles;
    for (int64_t c = 0; c < g.C; c += 64) {
      const int64_t channels = g.C - c < 64 ? g.C - c : 64;
      for (int64_t tile = 0; tile < count; ++tile)
        winograd_input(conv, first + tile, c, c + channels,
                       x + c * kGradientTiles + tile * channels, x_pitch);
    }
    for (int64_t k = 0; k < outputs; k += 16)
      winograd_dy(g, first, count, k_begin + k, dy + k * kTilesApart, dy_pitch);
    for (int64_t i = 0; i < 16; ++i)
      for (int64_t c = 0; c < g.C; c += 64) {
        const int64_t vectors = (g.C - c) / 16 < 4 ? (g.C - c) / 16 : 4;
        const auto run = vectors == 4   ? winograd_gradient_block<4>
                         : vectors == 3 ? winograd_gradient_block<3>
                         : vectors == 2 ? winograd_gradient_block<2>
                                        : winograd_gradient_block<1>;
        run(g, reinterpret_cast<const char*>(x + i * x_pitch + c * kGradientTiles),
            dy + i * dy_pitch, count, c, outputs, i, first > begin, sums);
      }
  }
}

// out (outputs, 3, 3, C) <- G^T (the sum of `parts` sums (outputs, 16, C), `part` floats apart) G.
// False where a result is no finite number.
bool winograd_gradient_output(const float* sums, int64_t parts, int64_t part, int64_t outputs,
                              int64_t C, float* out) {
  vf finite = {};
  for (int64_t k = 0; k < outputs; ++k)
    for (int64_t c = 0; c < C; c += 16) {
      vf m[4][4];
      for (int64_t i = 0; i < 16; ++i) {
        const float* from = sums + (k * 16 + i) * C + c;
        m[i / 4][i % 4] = load_any<vf>(from);
        for (int64_t j = 1; j < parts; ++j) m[i / 4][i % 4] += load_any<vf>(from + j * part);
      }
      vf t[3][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const vf sum = (m[1][j] + m[2][j]) * 0.5f, difference = (m[1][j] - m[2][j]) * 0.5f;
        t[0][j] = m[0][j] + sum, t[1][j] = difference, t[2][j] = sum + m[3][j];
      }
      float* to = out + k * 9 * C + c;
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        const vf sum = (t[i][1] + t[i][2]) * 0.5f, difference = (t[i][1] - t[i][2]) * 0.5f;
        const vf row[3] = {t[i][0] + sum, difference, sum + t[i][3]};
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j) {
          store_any(to + (3 * i + j) * C, row[j]);
          finite += row[j] * 0;  // 0, or NaN
        }
      }
    }
  const vi unlike = finite != finite;
  int32_t any = 0;
  for (int lane = 0; lane < 16; ++lane) any |= unlike[lane];
  return any == 0;
}
