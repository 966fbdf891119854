// The convolutions of cpu/convolution/winograd_kernels.h and the weight gradient of
// cpu/convolution/weight_gradient_winograd_kernels.h for 16 channels in and out, as in the first
// stage of a ResNet for small images. With one vector of outputs their assembly has 7 chains of 16
// steps, too few and too short to hide the latency of a multiply-add.
//
//   M[i] (tiles, K) = V[i] (tiles, C) U[i] (C, K)          i: the 16 of a tile
//   dU[i] (K, C) = D[i]^T (K, tiles) V[i] (tiles, C)       V = B^T d B, D = A dY A^T
//
// Layout: as there; V, D and M (16, tiles, 16), M overwrites V. U[i] is 16 registers and 8 tiles
// are 8 chains in 8 more; dU[i] is 16 registers, as many chains, over up to 16 tiles. Every
// multiply-add broadcasts its other operand from memory, V[i][tile][c] or D[i][tile][k]: 256 loads
// for 256 multiply-adds a tile, two a cycle of either, so that nothing is transposed. Tiles are
// processed in rows: a column of B^T d is used by two of them.
//
// Error: forward sums in the order of cpu/convolution/winograd_kernels.h, bitwise equal; the chains
// of the gradient are shorter, kTilesOf16 tiles. Non-finite results are handled as there.
//
// Bytes: x and dy once or twice from cache, y written once, all prefetched a row of tiles ahead; V,
// D, M and one U[i] or all of dU, 32 to 48 KiB, stay in the first-level cache.
// Measured on Zen 5, cycles a tile, data in cache: 192 forward, 210 for the gradient, where 256
// loads take 128; by the assembly for more channels 440 and 400.
#pragma once

#include "cpu/convolution/weight_gradient_winograd_kernels.h"
#include "cpu/convolution/winograd_kernels.h"

constexpr int64_t kChains = 8;  // tiles whose sums are in registers
constexpr int64_t kPitch16 = kTilesOf16 * 16;
// Blocks of kTilesOf16 tiles in one sum before it is added to the total, as in winograd_gradient.
constexpr int64_t kBlocks16 = gradient_tiles(2) / kTilesOf16;

// sum += x's value in all lanes * y
FR_INLINE void add_product(vf& sum, const float* x, vf y) {
  asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(y), "m"(*x));
}

// Prefetches the 2x2 pixels below those at p, for the next row of tiles: a quarter of the time if x
// and y are in memory.
template <int write, typename T>
FR_INLINE void prefetch_below(const T* p, int64_t width) {
  const T* const below = p + 2 * width * 16;
  __builtin_prefetch(below, write), __builtin_prefetch(below + 16, write);
  __builtin_prefetch(below + width * 16, write), __builtin_prefetch(below + width * 16 + 16, write);
}

// body(n, row and column of tiles, tiles, tiles before) for the part of each row in [first, first +
// count).
template <typename Body>
FR_INLINE void for_rows_of_tiles(int64_t tiles_h, int64_t tiles_w, int64_t first, int64_t count,
                                 const Body& body) {
  int64_t row = first / tiles_w, column = first % tiles_w;
  for (int64_t t = 0; t < count; ++row, column = 0) {
    const int64_t row_tiles = tiles_w - column < count - t ? tiles_w - column : count - t;
    body(row / tiles_h, row % tiles_h, column, row_tiles, t);
    t += row_tiles;
  }
}

// V of `tiles` tiles of one row, the first of which reads from (top, left) on: to (16, kTilesOf16,
// 16)
FR_INLINE void input_of_16(const ConvBnRelu& c, int64_t n, int64_t top, int64_t left, int64_t tiles,
                           float* v) {
  const float* rows[4];
  int64_t step[4];  // from one column to the next
  for (int64_t i = 0; i < 4; ++i) {
    const int64_t h = top + i;
    const bool inside = static_cast<uint64_t>(h) < static_cast<uint64_t>(c.H);
    rows[i] = static_cast<const float*>(inside ? c.x : c.zeros);
    if (inside) rows[i] += (n * c.H + h) * c.W * 16;
    step[i] = inside ? 16 : 0;
  }
  vf t[4][4];  // B^T d, of four columns
  const auto column = [&](int64_t w, int j) FR_LAMBDA {
    vf d[4] = {};
    if (static_cast<uint64_t>(w) < static_cast<uint64_t>(c.W)) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) d[i] = load_any<vf>(rows[i] + w * step[i]);
    }
    t[0][j] = d[0] - d[2], t[1][j] = d[1] + d[2], t[2][j] = d[2] - d[1], t[3][j] = d[1] - d[3];
  };
  column(left, 0), column(left + 1, 1);
  for (int64_t tile = 0; tile < tiles; ++tile, v += 16) {
    column(left + 2 * tile + 2, 2), column(left + 2 * tile + 3, 3);
    if (step[2]) prefetch_below<0>(rows[2] + (left + 2 * tile + 2) * 16, c.W);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      float* out = v + 4 * i * kPitch16;
      store_any(out, t[i][0] - t[i][2]);
      store_any(out + kPitch16, t[i][1] + t[i][2]);
      store_any(out + 2 * kPitch16, t[i][2] - t[i][1]);
      store_any(out + 3 * kPitch16, t[i][1] - t[i][3]);
      t[i][0] = t[i][2], t[i][1] = t[i][3];
    }
  }
}

// Overwrites V with M, for `count` tiles, rounded up to a multiple of kChains. Not inlined, like
// sums_of_16: in a larger function GCC may run out of registers.
__attribute__((noinline)) void products_of_16(const ConvBnRelu& c, int64_t count, float* v) {
  const auto* weight = static_cast<const float*>(c.winograd);
  for (int64_t i = 0; i < 16; ++i, weight += 256) {
    vf u[16];
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) u[j] = load_any<vf>(weight + 16 * j);
    for (int64_t tile = 0; tile < count; tile += kChains) {
      float* at = v + i * kPitch16 + tile * 16;
      vf sum[kChains] = {};
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j)
#pragma GCC unroll 8
        for (int t = 0; t < kChains; ++t) add_product(sum[t], at + 16 * t + j, u[j]);
#pragma GCC unroll 8
      for (int t = 0; t < kChains; ++t) store_any(at + 16 * t, sum[t]);
    }
  }
}

// y of a row's `tiles` tiles from (n, p, q) on
template <typename Dot>
FR_INLINE void output_of_16(const ConvBnRelu& c, int64_t n, int64_t p, int64_t q, int64_t tiles,
                            const float* m) {
  typedef typename Dot::D::T T;
  int64_t pixel = (n * c.P + p) * c.Q + q;
  const bool two_rows = p + 1 < c.P;
  for (int64_t tile = 0; tile < tiles; ++tile, m += 16, pixel += 2, q += 2) {
    vf s[2][4], y[4], finite = {};
    prefetch_below<1>(static_cast<const T*>(c.y) + pixel * 16, c.Q);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const auto at = [&](int i) FR_LAMBDA { return load_any<vf>(m + (4 * i + j) * kPitch16); };
      const vf m1 = at(1), m2 = at(2);
      s[0][j] = at(0) + m1 + m2, s[1][j] = m1 - m2 - at(3);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      y[2 * i] = s[i][0] + s[i][1] + s[i][2];
      y[2 * i + 1] = s[i][1] - s[i][2] - s[i][3];
      finite += y[2 * i] * 0 + y[2 * i + 1] * 0;  // 0, or NaN
    }
    const bool two_columns = q + 1 < c.Q;
    if (__builtin_expect(_mm512_cmp_ps_mask((__m512)finite, (__m512)finite, _CMP_UNORD_Q), 0)) {
      for (int64_t i = 0; i < 1 + two_rows; ++i)
        pixels_directly<Dot, 1>(c, 0, pixel + i * c.Q, 1 + two_columns);
      continue;
    }
    const auto write = [&](vf value, int64_t to) FR_LAMBDA {
      const auto load = [&]() FR_LAMBDA {
        return Dot::D::load(static_cast<const T*>(c.residual) + to * 16);
      };
      Dot::D::store(static_cast<T*>(c.y) + to * 16, finished(c, value, 0, load));
    };
    write(y[0], pixel);
    if (two_columns) write(y[1], pixel + 1);
    if (!two_rows) continue;
    write(y[2], pixel + c.Q);
    if (two_columns) write(y[3], pixel + c.Q + 1);
  }
}

// y of tiles [begin, end)
template <typename Dot>
void conv_winograd_16(const ConvBnRelu& c, int64_t begin, int64_t end) {
  const int64_t tiles_h = (c.P + 1) / 2, tiles_w = (c.Q + 1) / 2;
  alignas(64) float v[16 * kPitch16];
  for (int64_t first = begin; first < end;) {
    // Up to the next multiple: if a row has that many tiles, none starts in its middle.
    const int64_t room = kTilesOf16 - first % kTilesOf16;
    const int64_t count = end - first < room ? end - first : room;
    for_rows_of_tiles(
        tiles_h, tiles_w, first, count,
        [&](int64_t n, int64_t row, int64_t column, int64_t row_tiles, int64_t before) FR_LAMBDA {
          input_of_16(c, n, 2 * row - c.pad_h, 2 * column - c.pad_w, row_tiles, v + before * 16);
        });
    products_of_16(c, count, v);
    for_rows_of_tiles(
        tiles_h, tiles_w, first, count,
        [&](int64_t n, int64_t row, int64_t column, int64_t row_tiles, int64_t before) FR_LAMBDA {
          output_of_16<Dot>(c, n, 2 * row, 2 * column, row_tiles, v + before * 16);
        });
    first += count;
  }
}

// D of `tiles` tiles of one row from (n, p, q) of dy on: to (16, kTilesOf16, 16)
FR_INLINE void dy_of_16(const WeightGradient& g, int64_t n, int64_t p, int64_t q, int64_t tiles,
                        float* to) {
  const auto* dy = static_cast<const float*>(g.dy) + ((n * g.P + p) * g.Q + q) * 16;
  const bool two_rows = p + 1 < g.P;
  for (int64_t tile = 0; tile < tiles; ++tile, dy += 32, q += 2, to += 16) {
    vf d[2][2] = {};
    prefetch_below<0>(dy, g.Q);
    const bool two_columns = q + 1 < g.Q;
    d[0][0] = load_any<vf>(dy);
    if (two_columns) d[0][1] = load_any<vf>(dy + 16);
    if (two_rows) {
      d[1][0] = load_any<vf>(dy + g.Q * 16);
      if (two_columns) d[1][1] = load_any<vf>(dy + g.Q * 16 + 16);
    }
    vf rows[4][2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      rows[0][j] = d[0][j], rows[1][j] = d[0][j] + d[1][j];
      rows[2][j] = d[0][j] - d[1][j], rows[3][j] = -d[1][j];
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      float* out = to + 4 * i * kPitch16;
      store_any(out, rows[i][0]);
      store_any(out + kPitch16, rows[i][0] + rows[i][1]);
      store_any(out + 2 * kPitch16, rows[i][0] - rows[i][1]);
      store_any(out + 3 * kPitch16, -rows[i][1]);
    }
  }
}

// dU of `count` tiles, stored to sums (16, K, C) or, with `accumulate`, added to them
__attribute__((noinline)) void sums_of_16(const float* v, const float* dy, int64_t count,
                                          bool accumulate, vf* sums) {
  for (int64_t i = 0; i < 16; ++i, sums += 16) {
    vf sum[16] = {};
    const float *x = v + i * kPitch16, *y = dy + i * kPitch16;
    for (int64_t tile = 0; tile < count; ++tile, x += 16, y += 16) {
      const vf value = load_any<vf>(x);
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k) add_product(sum[k], y + k, value);
    }
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) sums[k] = accumulate ? sums[k] + sum[k] : sum[k];
  }
}

// sums (K, 16, C) <- over tiles [begin, end)
void winograd_gradient_16(const WeightGradient& g, int64_t begin, int64_t end, float* sums) {
  ConvBnRelu conv{};  // the members that input_of_16 reads
  conv.x = g.x, conv.zeros = g.zeros, conv.H = g.H, conv.W = g.W;
  const int64_t tiles_h = (g.P + 1) / 2, tiles_w = (g.Q + 1) / 2;
  alignas(64) float v[16 * kPitch16], dy[16 * kPitch16];
  vf block_sums[16 * 16];
  int64_t blocks = 0;
  for (int64_t first = begin; first < end;) {
    const int64_t room = kTilesOf16 - first % kTilesOf16;
    const int64_t count = end - first < room ? end - first : room;
    for_rows_of_tiles(
        tiles_h, tiles_w, first, count,
        [&](int64_t n, int64_t row, int64_t column, int64_t row_tiles, int64_t before) FR_LAMBDA {
          input_of_16(conv, n, 2 * row - g.pad_h, 2 * column - g.pad_w, row_tiles, v + before * 16);
          dy_of_16(g, n, 2 * row, 2 * column, row_tiles, dy + before * 16);
        });
    sums_of_16(v, dy, count, blocks % kBlocks16 > 0, block_sums);
    first += count;
    if (++blocks % kBlocks16 > 0 && first < end) continue;
    for (int64_t k = 0; k < 16; ++k)
      for (int64_t i = 0; i < 16; ++i) {
        float* to = sums + (k * 16 + i) * 16;
        vf value = block_sums[i * 16 + k];
        if (blocks > kBlocks16) value += load_any<vf>(to);
        store_any(to, value);
      }
  }
}
