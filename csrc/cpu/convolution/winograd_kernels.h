// The 3x3, stride 1 convolutions of cpu/convolution/direct_kernels.h, multiplied in float32, by
// Winograd's minimal filtering, F(m x m, 3x3): (m + 2)^2 multiplications for the 9 m^2 of a tile of
// m x m outputs, with m = 2 four ninths, with m = 4 a quarter.
//
//   Y = A^T [(G g G^T) * (B^T d B)] A     d: (m + 2)^2 of x, g: 3x3 of the weights, Y: m x m
//
//   m = 2:  B^T = 1  0 -1  0    G =  1    0    0     A^T = 1  1  1  0
//                 0  1  1  0        1/2  1/2  1/2          0  1 -1 -1
//                 0 -1  1  0        1/2 -1/2  1/2
//                 0  1  0 -1         0    0    1
//
//   m = 4:  B^T = 4  0 -5  0  1  0    G =  1/4   0    0     A^T = 1  1  1  1  1  0
//                 0 -4 -4  1  1  0        -1/6 -1/6 -1/6          0  1 -1  2 -2  0
//                 0  4 -4 -1  1  0        -1/6  1/6 -1/6          0  1  1  4  4  0
//                 0 -2 -1  2  1  0        1/24 1/12  1/6          0  1 -1  8 -8  1
//                 0  2 -1 -2  1  0        1/24 -1/12 1/6
//                 0  4  0 -5  0  1          0    0    1
//
// Dilated, every d-th pixel in either dimension is convolved with dilation 1, for each of the d * d
// phases: tiles are the same, of pixels d apart (256 channels at 20 x 20 with d = 2, in float32 on
// Zen 5: 0.51 of the time of the direct kernel).
//
// Layout: x (N, H, W, C) in memory, the transformed weights (blocks of K, products, C, vectors, 16)
// as cpu/convolution/pack.cpp packs them. For some groups of kTilePixels tiles at a
// time: the transformed x, (products, tiles, C), then per block of 64 outputs as many matrix
// products by the assembly of the direct convolution, their sums (groups, products, 7, 4 vectors),
// and the inverse transform with the epilogue. Both buffers and one product's
// weights stay in the second-level cache.
//
// Error: sums of C instead of 9 C products, and sums of a few terms before and after. With m = 2,
// on layers of ResNets closer to float64 than stock (the parity table of README.md). With m = 4
// about 20 times the rms error of a direct float32 convolution, 2e-6 for results of 1, and a
// thousandth of the error of rounding to bfloat16: used for that dtype only, where 2 in 1000
// results are rounded the other way and none is further from float64 than stock's worst. The error
// is relative to the largest product in a tile, even one with a weight of zero. An Inf or NaN in d
// would spread over its tile, and intermediate sums may overflow where stock's do not: a tile with
// a non-finite sum is recomputed directly.
//
// Measured on Zen 4, against the bfloat16 dot product, which does two products at once: m = 4, 64
// channels at 56 x 56 0.69 to 0.77 of the time, 128 at 28 x 28 0.63 to 0.70; 256 at 14 x 14, where
// tiles cover 16 x 16, 0.97 to 1.03 including the packing of the weights.
//
// Bytes: x once or twice from cache, y written once; weights 16/9 or 4 times the direct float32
// ones. Measured: see benchmarks/results/conv_bn_relu-cpu-*.json. Source: Lavin and Gray 2015,
// "Fast Algorithms for Convolutional Neural Networks" (1509.09308).
#pragma once

#include "cpu/convolution/direct_kernels.h"

// One-dimensional transforms of F(m x m, 3x3). d(i): element i of the input.
template <int m>
struct WinogradTransform;

template <>
struct WinogradTransform<2> {
  static constexpr int size = 4;

  // Row `row` of B^T d.
  template <int row, typename Load>
  FR_INLINE vf input(const Load& d) {
    if constexpr (row == 0) return d(0) - d(2);
    if constexpr (row == 1) return d(1) + d(2);
    if constexpr (row == 2) return d(2) - d(1);
    if constexpr (row == 3) return d(1) - d(3);
  }
  // Row `row` of A d, d of the m outputs.
  template <int row, typename Load>
  FR_INLINE vf dy(const Load& d) {
    if constexpr (row == 0) return d(0);
    if constexpr (row == 1) return d(0) + d(1);
    if constexpr (row == 2) return d(0) - d(1);
    if constexpr (row == 3) return -d(1);
  }
  // A^T s
  FR_INLINE void output(const vf* s, vf* y) {
    y[0] = s[0] + s[1] + s[2];
    y[1] = s[1] - s[2] - s[3];
  }
  // G g
  FR_INLINE void weight(const vf* g, vf* u) {
    const vf sum = (g[0] + g[2]) * 0.5f, middle = g[1] * 0.5f;
    u[0] = g[0], u[1] = sum + middle, u[2] = sum - middle, u[3] = g[2];
  }
  // G^T s
  FR_INLINE void gradient(const vf* s, vf* g) {
    const vf sum = (s[1] + s[2]) * 0.5f, difference = (s[1] - s[2]) * 0.5f;
    g[0] = s[0] + sum, g[1] = difference, g[2] = sum + s[3];
  }
};

template <>
struct WinogradTransform<4> {
  static constexpr int size = 6;

  template <int row, typename Load>
  FR_INLINE vf input(const Load& d) {
    if constexpr (row == 0) return d(4) + (d(0) * 4.0f - d(2) * 5.0f);
    if constexpr (row == 1) return (d(4) - d(2) * 4.0f) + (d(3) - d(1) * 4.0f);
    if constexpr (row == 2) return (d(4) - d(2) * 4.0f) - (d(3) - d(1) * 4.0f);
    if constexpr (row == 3) return (d(4) - d(2)) + (d(3) - d(1)) * 2.0f;
    if constexpr (row == 4) return (d(4) - d(2)) - (d(3) - d(1)) * 2.0f;
    if constexpr (row == 5) return d(5) + (d(1) * 4.0f - d(3) * 5.0f);
  }
  template <int row, typename Load>
  FR_INLINE vf dy(const Load& d) {
    if constexpr (row == 0) return d(0);
    if constexpr (row == 1) return (d(0) + d(2)) + (d(1) + d(3));
    if constexpr (row == 2) return (d(0) + d(2)) - (d(1) + d(3));
    if constexpr (row == 3) return (d(0) + d(2) * 4.0f) + (d(1) * 2.0f + d(3) * 8.0f);
    if constexpr (row == 4) return (d(0) + d(2) * 4.0f) - (d(1) * 2.0f + d(3) * 8.0f);
    if constexpr (row == 5) return d(3);
  }
  FR_INLINE void output(const vf* s, vf* y) {
    const vf near = s[1] + s[2], far = s[3] + s[4];
    const vf near_odd = s[1] - s[2], far_odd = s[3] - s[4];
    y[0] = s[0] + near + far, y[1] = near_odd + far_odd * 2.0f;
    y[2] = near + far * 4.0f, y[3] = near_odd + far_odd * 8.0f + s[5];
  }
  FR_INLINE void weight(const vf* g, vf* u) {
    const vf near = (g[0] + g[2]) * (-1.0f / 6), near_odd = g[1] * (1.0f / 6);
    const vf far = g[0] * (1.0f / 24) + g[2] * (1.0f / 6), far_odd = g[1] * (1.0f / 12);
    u[0] = g[0] * 0.25f, u[1] = near - near_odd, u[2] = near + near_odd;
    u[3] = far + far_odd, u[4] = far - far_odd, u[5] = g[2];
  }
  FR_INLINE void gradient(const vf* s, vf* g) {
    const vf near = (s[1] + s[2]) * (-1.0f / 6), far = s[3] + s[4];
    g[0] = s[0] * 0.25f + near + far * (1.0f / 24);
    g[1] = (s[2] - s[1]) * (1.0f / 6) + (s[3] - s[4]) * (1.0f / 12);
    g[2] = near + far * (1.0f / 6) + s[5];
  }
};

// t[i * step] = element i of B^T d, of A d, from `row` on
template <int m, int row = 0, typename Load>
FR_INLINE void transform_input(const Load& d, vf* t, int step) {
  t[row * step] = WinogradTransform<m>::template input<row>(d);
  if constexpr (row < m + 1) transform_input<m, row + 1>(d, t, step);
}
template <int m, int row = 0, typename Load>
FR_INLINE void transform_dy(const Load& d, vf* t, int step) {
  t[row * step] = WinogradTransform<m>::template dy<row>(d);
  if constexpr (row < m + 1) transform_dy<m, row + 1>(d, t, step);
}

// The first pixel of a tile of m x m pixels. It may lie outside y if the convolution is dilated.
struct TilePlace {
  int64_t n, p, q;
  FR_INLINE TilePlace of(const ConvShape& c, int64_t m, int64_t tile) {
    const int64_t tiles_h = winograd_tiles_along(c.P, m, c.dilation_h);
    const int64_t tiles_w = winograd_tiles_along(c.Q, m, c.dilation_w);
    const int64_t row = tile / tiles_w, column = tile % tiles_w;
    return {row / tiles_h, first_pixel(row % tiles_h, m, c.dilation_h),
            first_pixel(column, m, c.dilation_w)};
  }

 private:
  FR_INLINE int64_t first_pixel(int64_t tile, int64_t m, int64_t dilation) {
    return tile * m - (dilation == 1 ? 0 : tile % dilation * (m - 1));
  }
};

// Pointers to the (m + 2)^2 pixels of x (N, H, W, C) that a tile reads, or to zeros.
template <int size, typename T>
FR_INLINE void locate_tile(const ConvShape& c, const void* x, const void* zeros, int64_t tile,
                           const T* (&d)[size][size]) {
  const TilePlace at = TilePlace::of(c, size - 2, tile);
  const int64_t top = at.p - c.pad_h, left = at.q - c.pad_w;
  const T* image = static_cast<const T*>(x) + at.n * c.H * c.W * c.C;
  for (int64_t i = 0; i < size; ++i)
    for (int64_t j = 0; j < size; ++j) {
      const int64_t h = top + i * c.dilation_h, w = left + j * c.dilation_w;
      const bool inside = static_cast<uint64_t>(h) < static_cast<uint64_t>(c.H) &&
                          static_cast<uint64_t>(w) < static_cast<uint64_t>(c.W);
      d[i][j] = inside ? image + (h * c.W + w) * c.C : static_cast<const T*>(zeros);
    }
}

// B^T d B of one tile; the results for channels [begin, end) go to v, `pitch` floats apart.
template <typename Dot, int m>
FR_INLINE void winograd_input(const ConvBnRelu& c, int64_t tile, int64_t begin, int64_t end,
                              float* v, int64_t pitch) {
  typedef typename Dot::X X;
  constexpr int size = WinogradTransform<m>::size;
  const typename X::T* d_ptr[size][size];
  locate_tile(c, c.x, c.zeros, tile, d_ptr);
  for (int64_t channel = begin; channel < end; channel += kLanes) {
    vf t[size * size];
#pragma GCC unroll 6
    for (int j = 0; j < size; ++j) {
      vf d[size];
#pragma GCC unroll 6
      for (int i = 0; i < size; ++i) d[i] = X::load(d_ptr[i][j] + channel);
      transform_input<m>([&](int i) FR_LAMBDA { return d[i]; }, t + j, size);
    }
    float* out = v + channel - begin;
#pragma GCC unroll 6
    for (int i = 0; i < size; ++i) {
      vf row[size];
      transform_input<m>([&](int j) FR_LAMBDA { return t[i * size + j]; }, row, 1);
#pragma GCC unroll 6
      for (int j = 0; j < size; ++j) store_any(out + (i * size + j) * pitch, row[j]);
    }
  }
}

// Y = A^T M A of one tile and up to 64 outputs; sums: its M, kSums apart. False, with nothing
// written, if one is non-finite.
template <typename Dot, int vectors, int m>
FR_INLINE bool winograd_output(const ConvBnRelu& c, int64_t tile, int64_t k, const float* sums) {
  constexpr int parts = vectors * 16 / kLanes, size = WinogradTransform<m>::size;
  vf y[m * m][parts], finite = {};
#pragma GCC unroll 2
  for (int v = 0; v < parts; ++v) {
    vf s[m][size];
#pragma GCC unroll 6
    for (int j = 0; j < size; ++j) {
      vf column[size], out[m];
#pragma GCC unroll 6
      for (int i = 0; i < size; ++i)
        column[i] = load_any<vf>(sums + (i * size + j) * kSums + v * kLanes);
      WinogradTransform<m>::output(column, out);
#pragma GCC unroll 4
      for (int i = 0; i < m; ++i) s[i][j] = out[i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < m; ++i) {
      vf out[m];
      WinogradTransform<m>::output(s[i], out);
#pragma GCC unroll 4
      for (int j = 0; j < m; ++j) {
        y[i * m + j][v] = out[j];
        finite += out[j] * 0;  // 0, or NaN
      }
    }
  }
  if (has_nan(finite)) return false;
  const TilePlace at = TilePlace::of(c, m, tile);
  for (int i = 0; i < m && at.p + i * c.dilation_h < c.P; ++i)
    for (int j = 0; j < m && at.q + j * c.dilation_w < c.Q; ++j) {
      const int64_t pixel = (at.n * c.P + at.p + i * c.dilation_h) * c.Q + at.q + j * c.dilation_w;
      auto* out = static_cast<typename Dot::D::T*>(c.y) + pixel * c.K + k;
      const auto* residual = static_cast<const typename Dot::D::T*>(c.residual) + pixel * c.K + k;
#pragma GCC unroll 8
      for (int v = 0; v < parts; ++v) {
        const int64_t lane = v * kLanes;
        const auto load = [&]() FR_LAMBDA { return Dot::D::load(residual + lane); };
        store_rounded<Dot>(out + lane, finished(c, y[i * m + j][v], k + lane, load));
      }
    }
  return true;
}

// Computes `count` pixels of y from `pixel` on directly, or skips them if the weights for that are
// not packed.
template <typename Dot, int vectors>
FR_INLINE void pixels_directly(const ConvBnRelu& c, int64_t block, int64_t pixel, int64_t count) {
  if (c.weight)
    conv_pixels<Dot, vectors>(c, block, pixel, count);
  else
    __atomic_store_n(c.skipped_pixels, true, __ATOMIC_RELAXED);
}

// Computes the pixels of a tile directly.
template <typename Dot, int vectors, int m>
FR_INLINE void winograd_directly(const ConvBnRelu& c, int64_t block, int64_t tile) {
  const TilePlace at = TilePlace::of(c, m, tile);
  for (int64_t p = at.p; p < at.p + m * c.dilation_h && p < c.P; p += c.dilation_h)
    for (int64_t q = at.q; q < at.q + m * c.dilation_w && q < c.Q; q += c.dilation_w)
      pixels_directly<Dot, vectors>(c, block, (at.n * c.P + p) * c.Q + q, 1);
}

// The first pixel of y's row of tiles that `tile` is in.
FR_INLINE int64_t winograd_pixel(const ConvBnRelu& c, int64_t m, int64_t tile) {
  const TilePlace at = TilePlace::of(c, m, tile);
  return (at.n * c.P + at.p) * c.Q;
}

// One block of outputs for tiles [first, first + count): v from winograd_input, with room for
// `room` tiles per product; sums: scratch. Prefetches the lines of y that are written and, in the
// last block, the x of the following tiles.
template <typename Dot, int vectors, int m>
FR_INLINE void winograd_block(const ConvBnRelu& c, int64_t block, int64_t first, int64_t count,
                              const float* v, int64_t room, float* sums) {
  constexpr int64_t products = winograd_products(m);
  const int64_t groups = (count + kTilePixels - 1) / kTilePixels;
  const auto* weight = static_cast<const char*>(c.winograd) + block * 4 * products * c.C * 64;
  constexpr int64_t size = sizeof(typename Dot::D::T), x_size = sizeof(typename Dot::X::T);
  Fetch fetch{};
  fetch.write = {
      static_cast<const char*>(c.y) + (winograd_pixel(c, m, first) * c.K + block * 64) * size,
      c.K * size, m * m * count};
  if ((block + 1) * 64 >= c.K)
    fetch.read = {
        static_cast<const char*>(c.x) + winograd_pixel(c, m, first + count) * c.C * x_size, 256,
        m * m * count * c.C * x_size / 256};
  for (int64_t i = 0; i < products; ++i)
    for (int64_t group = 0; group < groups; ++group) {
      const char* pixel[kTilePixels];
      for (int64_t t = 0; t < kTilePixels; ++t) {
        const int64_t tile = group * kTilePixels + t;
        pixel[t] =
            reinterpret_cast<const char*>(v + (i * room + (tile < count ? tile : count - 1)) * c.C);
      }
      const uint8_t tap = 0;
      sum_chains<DotFloat32, vectors>(weight + i * c.C * vectors * 64, pixel, &tap, 1, c.C, 0, 0,
                                      fetch, sums + (group * products + i) * kSums);
    }
  for (int64_t tile = 0; tile < count; ++tile) {
    const float* tile_sums = sums + tile / kTilePixels * products * kSums + tile % kTilePixels * 64;
    if (!winograd_output<Dot, vectors, m>(c, first + tile, block * 64, tile_sums))
      winograd_directly<Dot, vectors, m>(c, block, first + tile);
  }
}

template <typename Dot, int m>
FR_INLINE void winograd_groups_of(const ConvBnRelu& c, void* scratch, int64_t block_begin,
                                  int64_t block_end, int64_t begin, int64_t end) {
  constexpr int64_t products = winograd_products(m);
  const int64_t tiles = winograd_tiles(c, m);
  const int64_t at_once = winograd_groups(m, kTilePixels, c.C), room = at_once * kTilePixels;
  auto* v = static_cast<float*>(scratch);
  float* sums = v + products * room * c.C;
  for (int64_t group = begin; group < end; group += at_once) {
    const int64_t first = group * kTilePixels;
    const int64_t groups = end - group < at_once ? end - group : at_once;
    const int64_t left = tiles - first;
    const int64_t count = groups * kTilePixels < left ? groups * kTilePixels : left;
    for (int64_t tile = 0; tile < count; ++tile)
      winograd_input<Dot, m>(c, first + tile, 0, c.C, v + tile * c.C, room * c.C);
    for (int64_t block = block_begin; block < block_end; ++block) {
      const int64_t vectors = c.K / 16 - block * 4;
      const auto run = vectors >= 4   ? winograd_block<Dot, 4, m>
                       : vectors == 3 ? winograd_block<Dot, 3, m>
                       : vectors == 2 ? winograd_block<Dot, 2, m>
                                      : winograd_block<Dot, 1, m>;
      run(c, block, first, count, v, room, sums);
    }
  }
}

// y's channels of blocks [block_begin, block_end) in groups [begin, end); scratch:
// winograd_scratch_bytes, aligned to 64 bytes.
template <typename Dot>
void conv_bn_relu_winograd(const ConvBnRelu& c, void* scratch, int64_t block_begin,
                           int64_t block_end, int64_t begin, int64_t end) {
  if constexpr (winograd_supported(Dot::variant, 2))
    if (c.winograd_tile == 2)
      return winograd_groups_of<Dot, 2>(c, scratch, block_begin, block_end, begin, end);
  if constexpr (winograd_supported(Dot::variant, 4))
    winograd_groups_of<Dot, 4>(c, scratch, block_begin, block_end, begin, end);
}
