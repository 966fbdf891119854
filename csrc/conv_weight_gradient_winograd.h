// The gradient of a 3x3, stride 1 convolution's weights in float32 by Winograd's minimal filtering:
// the transpose of what conv_bn_relu_winograd.h computes, 16 multiplications for the 36 that a 2x2
// tile of dy takes directly.
//
//   dg = G^T [ sum over tiles of (B^T d B) * (A dY A^T) ] G     B, G, A: as in
//   conv_bn_relu_winograd.h
//
// The 16 sums over tiles are matrix products by the assembly of conv_weight_gradient_kernels.h: for
// some tiles at a time, transformed x in blocks of 64 channels (4, block, tile, 64) and transformed
// dy with every output's tiles next to each other (4, K, tiles). A row of the 4x4 transforms at a
// time: four of the 16 fit the second-level cache with their sums, where all of them, of 128
// channels 4.8 MB, went out to memory and back (0.90 of the time at 28 x 28, 0.95 of 256 channels
// at 14 x 14). The sums, (K, 16, C), are added to in memory.
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
  return 4 * kGradientTiles * g.C * 4 + 4 * outputs * kTilesApart * 4 + 128;
}

// Row `row` of B^T d B of one tile; its 4 results of channels [begin, end) go to v, `pitch` floats
// apart. As winograd_input computes them, to the bit.
template <int row>
FR_INLINE void winograd_input_row(const WeightGradient& g, int64_t tile, int64_t begin, int64_t end,
                                  float* v, int64_t pitch) {
  constexpr int64_t rows[4][2] = {{0, 2}, {1, 2}, {2, 1}, {1, 3}};  // added in 1, else subtracted
  const int64_t tiles_w = (g.Q + 1) / 2, tiles_h = (g.P + 1) / 2;
  const int64_t n = tile / (tiles_h * tiles_w);
  const int64_t top = tile / tiles_w % tiles_h * 2 - g.pad_h, left = tile % tiles_w * 2 - g.pad_w;
  const auto* x = static_cast<const float*>(g.x) + n * g.H * g.W * g.C;
  const float* d[2][4];
  for (int64_t i = 0; i < 2; ++i)
    for (int64_t j = 0; j < 4; ++j) {
      const int64_t h = top + rows[row][i], w = left + j;
      const bool inside = static_cast<uint64_t>(h) < static_cast<uint64_t>(g.H) &&
                          static_cast<uint64_t>(w) < static_cast<uint64_t>(g.W);
      d[i][j] = inside ? x + (h * g.W + w) * g.C : static_cast<const float*>(g.zeros);
    }
  for (int64_t channel = begin; channel < end; channel += kLanes) {
    vf t[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const vf a = load_any<vf>(d[0][j] + channel), b = load_any<vf>(d[1][j] + channel);
      t[j] = row == 1 ? a + b : a - b;
    }
    float* out = v + channel - begin;
    store_any(out, t[0] - t[2]);
    store_any(out + pitch, t[1] + t[2]);
    store_any(out + 2 * pitch, t[2] - t[1]);
    store_any(out + 3 * pitch, t[1] - t[3]);
  }
}

// Row `row` of A dY A^T for 16 outputs from k on of tiles [first, first + count): to (4, outputs,
// tiles), the 4 of them `pitch` floats apart.
template <int row>
FR_INLINE void winograd_dy_row(const WeightGradient& g, int64_t first, int64_t count, int64_t k,
                               float* to, int64_t pitch) {
  const int64_t tiles_w = (g.Q + 1) / 2, tiles_h = (g.P + 1) / 2;
  const auto* dy = static_cast<const float*>(g.dy);
  for (int64_t t = 0; t < count; t += kLanes)
    for (int64_t lane = 0; lane < 16; lane += kLanes) {
      alignas(64) vf m[4][kLanes];  // (of the 4, tile): vectors of outputs
      for (int64_t i = 0; i < kLanes; ++i) {
        vf d[2][2] = {};
        const int64_t tile = first + t + i;
        if (t + i < count) {
          const int64_t n = tile / (tiles_h * tiles_w);
          const int64_t p = tile / tiles_w % tiles_h * 2, q = tile % tiles_w * 2;
          const float* from = dy + ((n * g.P + p) * g.Q + q) * g.K + k + lane;
          const bool right = q + 1 < g.Q, below = row > 0 && p + 1 < g.P;
          if (row < 3) d[0][0] = load_any<vf>(from);
          if (row < 3 && right) d[0][1] = load_any<vf>(from + g.K);
          if (below) d[1][0] = load_any<vf>(from + g.Q * g.K);
          if (below && right) d[1][1] = load_any<vf>(from + (g.Q + 1) * g.K);
        }
        vf r[2];
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          if (row == 0) r[j] = d[0][j];
          if (row == 1) r[j] = d[0][j] + d[1][j];
          if (row == 2) r[j] = d[0][j] - d[1][j];
          if (row == 3) r[j] = -d[1][j];
        }
        m[0][i] = r[0], m[1][i] = r[0] + r[1], m[2][i] = r[0] - r[1], m[3][i] = -r[1];
      }
      for (int64_t j = 0; j < 4; ++j) {
        transpose_square(m[j]);
        for (int64_t i = 0; i < kLanes; ++i)
          store_any(to + j * pitch + (lane + i) * kTilesApart + t, m[j][i]);
      }
    }
}

// sums (outputs, 16, C) += or, at first, = over `count` tiles, for a block of channels from c on; x
// and dy: one of the 16 transforms of each.
template <int vectors>
FR_INLINE void winograd_gradient_block(const WeightGradient& g, const char* x, const float* dy,
                                       int64_t count, int64_t c, int64_t outputs, int64_t which,
                                       bool again, Fetch& fetch, GradientReads& reads,
                                       float* sums) {
  const char* table[8];
  for (int64_t j = 0; j < kTilePixels; ++j)
    table[j] = reinterpret_cast<const char*>(dy + j * kTilesApart);
  table[7] = x;
  const int64_t wide = wide_outputs(outputs);
  for (int64_t k = 0; k < outputs;) {
    const int64_t width = k < wide ? kTilePixels : kTilePixels - 1, end = k < wide ? wide : outputs;
    const int64_t start = k + width <= end ? k : end - width;
    const int64_t channel = start * kTilesApart * 4;
    float* to = sums + (start * 16 + which) * g.C + c;
    fetch.written = {reinterpret_cast<const char*>(to), 16 * g.C * 4, width};
    if (k == wide) table[kTilePixels - 1] = nullptr;
    alignas(64) float sum[kSums];
    for (int64_t t = 0; t < count; t += kTilesSummed) {
      const int64_t steps = count - t < kTilesSummed ? count - t : kTilesSummed;
      if (fetch.read.left <= 0) fetch.read = reads.next();
      sum_rows<DotFloat32, vectors>(table, 1, steps, channel + t * 4, t * vectors * 64, t > 0,
                                    fetch, sum);
    }
    for (int64_t i = k - start; i < width; ++i) {
#pragma GCC unroll 8
      for (int64_t j = 0; j < vectors * 16; j += kLanes) {
        vf value = load_any<vf>(sum + 64 * i + j);
        if (again) value += load_any<vf>(to + i * 16 * g.C + j);
        store_any(to + i * 16 * g.C + j, value);
      }
    }
    k = start + width;
  }
}

// What tiles [first, first + count) add to the four sums of a row, for outputs [k_begin, k_end).
template <int row>
FR_INLINE void winograd_gradient_row(const WeightGradient& g, char* scratch, int64_t first,
                                     int64_t count, int64_t k_begin, int64_t k_end, bool again,
                                     GradientReads reads, float* sums) {
  const int64_t outputs = k_end - k_begin;
  auto* x = reinterpret_cast<float*>(scratch);
  float* dy = x + 4 * kGradientTiles * g.C;
  const int64_t x_pitch = kGradientTiles * g.C, dy_pitch = outputs * kTilesApart;
  for (int64_t c = 0; c < g.C; c += 64) {
    const int64_t channels = g.C - c < 64 ? g.C - c : 64;
    for (int64_t tile = 0; tile < count; ++tile)
      winograd_input_row<row>(g, first + tile, c, c + channels,
                              x + c * kGradientTiles + tile * channels, x_pitch);
  }
  for (int64_t k = 0; k < outputs; k += 16)
    winograd_dy_row<row>(g, first, count, k_begin + k, dy + k * kTilesApart, dy_pitch);
  Fetch fetch{};
  for (int64_t i = 0; i < 4; ++i)
    for (int64_t c = 0; c < g.C; c += 64) {
      const int64_t vectors = (g.C - c) / 16 < 4 ? (g.C - c) / 16 : 4;
      const auto run = vectors == 4   ? winograd_gradient_block<4>
                       : vectors == 3 ? winograd_gradient_block<3>
                       : vectors == 2 ? winograd_gradient_block<2>
                                      : winograd_gradient_block<1>;
      run(g, reinterpret_cast<const char*>(x + i * x_pitch + c * kGradientTiles), dy + i * dy_pitch,
          count, c, outputs, 4 * row + i, again, fetch, reads, sums);
    }
}

// sums (k_end - k_begin, 16, C) <- over tiles [begin, end), for outputs [k_begin, k_end)
void winograd_gradient(const WeightGradient& g, char* scratch, int64_t begin, int64_t end,
                       int64_t k_begin, int64_t k_end, float* sums) {
  for (int64_t first = begin; first < end; first += kGradientTiles) {
    const int64_t count = end - first < kGradientTiles ? end - first : kGradientTiles;
    const bool again = first > begin;
    // The next tiles, read four times, come while the last of these are multiplied.
    GradientReads reads{};
    if (first + count < end) {
      const int64_t next = first + count, rows_of_tiles = next / ((g.Q + 1) / 2);
      const int64_t tiles_h = (g.P + 1) / 2, n = rows_of_tiles / tiles_h;
      const int64_t p = rows_of_tiles % tiles_h * 2;
      reads.x = stream_of<float>(static_cast<const float*>(g.x) + (n * g.H + p) * g.W * g.C,
                                 4 * count, g.C);
      reads.x_rows = 1;
      if (k_end - k_begin == g.K)
        reads.dy = stream_of<float>(static_cast<const float*>(g.dy) + (n * g.P + p) * g.Q * g.K,
                                    4 * count, g.K);
    }
    const int64_t tiles_w = (g.Q + 1) / 2, tiles_h = (g.P + 1) / 2;
    const int64_t top = first / tiles_w, bottom = (first + count - 1) / tiles_w;
    const WeightGradient made = with_made(g, top / tiles_h, top % tiles_h * 2 - g.pad_h,
                                          bottom / tiles_h, bottom % tiles_h * 2 - g.pad_h + 3);
    winograd_gradient_row<0>(made, scratch, first, count, k_begin, k_end, again, {}, sums);
    winograd_gradient_row<1>(made, scratch, first, count, k_begin, k_end, again, {}, sums);
    winograd_gradient_row<2>(made, scratch, first, count, k_begin, k_end, again, {}, sums);
    winograd_gradient_row<3>(made, scratch, first, count, k_begin, k_end, again, reads, sums);
  }
}

// out (outputs, 3, 3, C) <- G^T (the sum of `parts` sums (outputs, 16, C), `part` floats apart) G.
// False where a result is no finite number.
bool winograd_gradient_output(const float* sums, int64_t parts, int64_t part, int64_t outputs,
                              int64_t C, float* out) {
  vf finite = {};
  for (int64_t k = 0; k < outputs; ++k)
    for (int64_t c = 0; c < C; c += kLanes) {
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
  return !has_nan(finite);
}
