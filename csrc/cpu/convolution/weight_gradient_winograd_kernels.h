// The weight gradient of a 3x3, stride 1 convolution by Winograd's minimal filtering: the transpose
// of cpu/convolution/winograd_kernels.h, (m + 2)^2 multiplications in float32 for the 9 m^2 that an
// m x m tile of dy takes directly.
//
//   dg = G^T [ sum over tiles of (B^T d B) * (A dY A^T) ] G     B, G, A: as in
//   cpu/convolution/winograd_kernels.h
//
// The sums over tiles are matrix products by the assembly of
// cpu/convolution/weight_gradient_kernels.h: for a range of tiles at a time, transformed x in
// blocks of 64 channels (m + 2, block, tile, 64) and transformed dy with the tiles of every output
// contiguous (m + 2, K, tiles). One row of the transforms is processed at a time: with its sums it
// fits the second-level cache, where all rows, 4.8 MB for 128 channels, were written to memory and
// read back (m = 2: 0.90 of the time at 28 x 28, 0.95 for 256 channels at 14 x 14). The sums, (K,
// products, C), are accumulated in memory.
//
// Error, m = 2: up to 2.0 times stock's where few pixels are summed, less than stock's on large
// layers. m = 4, only for bfloat16: rms 2e-6 of the result, where stock loses 2e-3 by rounding it.
// An Inf or NaN, or a sum that overflows where the direct one would not, makes the result
// non-finite, which is then computed directly.
//
// Measured on Zen 4, against the bfloat16 dot product: m = 4, 0.78 of the time for 64 channels at
// 56 x 56 and for 128 at 28 x 28, 0.90 for 256 at 14 x 14.
#pragma once

#include "cpu/convolution/weight_gradient_kernels.h"
#include "cpu/convolution/winograd_kernels.h"

// Tiles in one chain of additions. Few for float32, because the transforms add errors: with 56 the
// error was 2.4 times stock's where few pixels are summed, with 32 it is 2.0, at the same speed.
// For bfloat16, all that are laid out (0.93 of the time).
constexpr int64_t tiles_summed(int64_t m) { return m == 2 ? 32 : gradient_tiles(m); }
// Floats between the tiles of two outputs: not a multiple of a page, as in gradient_panel.
constexpr int64_t tile_stride(int64_t m) { return gradient_tiles(m) + 16; }

int64_t winograd_gradient_scratch(const WeightGradient& g, int64_t outputs) {
  const int64_t m = g.winograd_tile;
  return (m + 2) * 4 * (gradient_tiles(m) * g.C + outputs * tile_stride(m)) + 128;
}

// Row `row` of B^T d B of one tile; the results for channels [begin, end) go to v, `pitch` floats
// apart.
template <typename D, int m, int row>
FR_INLINE void winograd_input_row(const WeightGradient& g, int64_t tile, int64_t begin, int64_t end,
                                  float* v, int64_t pitch) {
  typedef typename D::T T;
  constexpr int size = WinogradTransform<m>::size;
  const T* d[size][size];
  locate_tile(g, g.x, g.zeros, tile, d);
  for (int64_t channel = begin; channel < end; channel += kLanes) {
    vf t[size], out[size];
#pragma GCC unroll 6
    for (int j = 0; j < size; ++j)
      t[j] = WinogradTransform<m>::template input<row>(
          [&](int i) FR_LAMBDA { return D::load(d[i][j] + channel); });
    transform_input<m>([&](int j) FR_LAMBDA { return t[j]; }, out, 1);
#pragma GCC unroll 6
    for (int j = 0; j < size; ++j) store_any(v + channel - begin + j * pitch, out[j]);
  }
}

// Row `row` of A dY A^T for 16 outputs from k on of tiles [first, first + count): to (m + 2,
// outputs, tiles), of which the first dimension has a stride of `pitch` floats.
template <typename D, int m, int row>
FR_INLINE void winograd_dy_row(const WeightGradient& g, int64_t first, int64_t count, int64_t k,
                               float* to, int64_t pitch) {
  constexpr int size = WinogradTransform<m>::size;
  const auto* dy = static_cast<const typename D::T*>(g.dy);
  for (int64_t t = 0; t < count; t += kLanes)
    for (int64_t lane = 0; lane < 16; lane += kLanes) {
      alignas(64) vf transformed[size][kLanes];  // (m + 2, tile): vectors of outputs
      for (int64_t i = 0; i < kLanes; ++i) {
        vf r[m] = {};
        if (t + i < count) {
          const TilePlace at = TilePlace::of(g, m, first + t + i);
          const auto* from = dy + ((at.n * g.P + at.p) * g.Q + at.q) * g.K + k + lane;
          const int64_t rows = g.P - at.p, columns = g.Q - at.q;
#pragma GCC unroll 4
          for (int j = 0; j < m; ++j)
            r[j] = WinogradTransform<m>::template dy<row>([&](int i) FR_LAMBDA {
              const int64_t down = i * g.dilation_h, right = j * g.dilation_w;
              return down < rows && right < columns ? D::load(from + (down * g.Q + right) * g.K)
                                                    : vf{};
            });
        }
        transform_dy<m>([&](int j) FR_LAMBDA { return r[j]; }, &transformed[0][i], kLanes);
      }
      for (int64_t j = 0; j < size; ++j) {
        transpose_square(transformed[j]);
        for (int64_t i = 0; i < kLanes; ++i)
          store_any(to + j * pitch + (lane + i) * tile_stride(m) + t, transformed[j][i]);
      }
    }
}

// sums (outputs, products, C) = or, with `accumulate`, += over `count` tiles, for a block of
// channels from c on; x and dy: one element of the transforms of each.
template <int vectors, int m>
FR_INLINE void winograd_gradient_block(const WeightGradient& g, const char* x, const float* dy,
                                       int64_t count, int64_t c, int64_t outputs, int64_t which,
                                       bool accumulate, Fetch& fetch, GradientReads& reads,
                                       float* sums) {
  constexpr int64_t products = winograd_products(m);
  const char* table[8];
  for (int64_t j = 0; j < kTilePixels; ++j)
    table[j] = reinterpret_cast<const char*>(dy + j * tile_stride(m));
  table[7] = x;
  const int64_t wide = wide_outputs(outputs);
  for (int64_t k = 0; k < outputs;) {
    const int64_t width = k < wide ? kTilePixels : kTilePixels - 1, end = k < wide ? wide : outputs;
    const int64_t start = k + width <= end ? k : end - width;
    const int64_t channel = start * tile_stride(m) * 4;
    float* to = sums + (start * products + which) * g.C + c;
    fetch.write = {reinterpret_cast<const char*>(to), products * g.C * 4, width};
    if (k == wide) table[kTilePixels - 1] = nullptr;
    alignas(64) float sum[kSums];
    for (int64_t t = 0; t < count; t += tiles_summed(m)) {
      const int64_t steps = count - t < tiles_summed(m) ? count - t : tiles_summed(m);
      if (fetch.read.left <= 0) fetch.read = reads.next();
      sum_rows<DotFloat32, vectors>(table, 1, steps, channel + t * 4, t * vectors * 64, t > 0,
                                    fetch, sum);
    }
    store_sums<vectors>(sum, true, k - start, width, accumulate, to, products * g.C);
    k = start + width;
  }
}

// Adds tiles [first, first + count) to the sums of a row, for outputs [k_begin, k_end).
template <typename D, int m, int row>
FR_INLINE void winograd_gradient_row(const WeightGradient& g, char* scratch, int64_t first,
                                     int64_t count, int64_t k_begin, int64_t k_end, bool accumulate,
                                     GradientReads reads, float* sums) {
  constexpr int size = WinogradTransform<m>::size;
  constexpr int64_t room = gradient_tiles(m);
  const int64_t outputs = k_end - k_begin;
  auto* x = reinterpret_cast<float*>(scratch);
  float* dy = x + size * room * g.C;
  const int64_t x_pitch = room * g.C, dy_pitch = outputs * tile_stride(m);
  for (int64_t c = 0; c < g.C; c += 64) {
    const int64_t channels = g.C - c < 64 ? g.C - c : 64;
    for (int64_t tile = 0; tile < count; ++tile)
      winograd_input_row<D, m, row>(g, first + tile, c, c + channels,
                                    x + c * room + tile * channels, x_pitch);
  }
  for (int64_t k = 0; k < outputs; k += 16)
    winograd_dy_row<D, m, row>(g, first, count, k_begin + k, dy + k * tile_stride(m), dy_pitch);
  Fetch fetch{};
  for (int64_t i = 0; i < size; ++i)
    for (int64_t c = 0; c < g.C; c += 64) {
      const int64_t vectors = (g.C - c) / 16 < 4 ? (g.C - c) / 16 : 4;
      const auto run = vectors == 4   ? winograd_gradient_block<4, m>
                       : vectors == 3 ? winograd_gradient_block<3, m>
                       : vectors == 2 ? winograd_gradient_block<2, m>
                                      : winograd_gradient_block<1, m>;
      run(g, reinterpret_cast<const char*>(x + i * x_pitch + c * room), dy + i * dy_pitch, count, c,
          outputs, size * row + i, accumulate, fetch, reads, sums);
    }
}

template <typename D, int m>
FR_INLINE void winograd_gradient_of(const WeightGradient& g, char* scratch, int64_t begin,
                                    int64_t end, int64_t k_begin, int64_t k_end, float* sums) {
  typedef typename D::T T;
  for (int64_t first = begin; first < end; first += gradient_tiles(m)) {
    const int64_t count = end - first < gradient_tiles(m) ? end - first : gradient_tiles(m);
    const bool accumulate = first > begin;
    // The next tiles, read once per row of the transforms, are prefetched during the last row of
    // these.
    GradientReads reads{};
    if (first + count < end) {
      const TilePlace next = TilePlace::of(g, m, first + count);
      reads.x = stream_of<T>(static_cast<const T*>(g.x) + (next.n * g.H + next.p) * g.W * g.C,
                             m * m * count, g.C);
      reads.x_rows = 1;
      if (k_end - k_begin == g.K)
        reads.dy = stream_of<T>(static_cast<const T*>(g.dy) + (next.n * g.P + next.p) * g.Q * g.K,
                                m * m * count, g.K);
    }
    const TilePlace top = TilePlace::of(g, m, first);
    const TilePlace bottom = TilePlace::of(g, m, first + count - 1);
    const WeightGradient recomputed = with_recomputed(g, top.n, top.p - g.pad_h, bottom.n,
                                                      bottom.p - g.pad_h + (m + 1) * g.dilation_h);
    const auto row = [&](auto add, const GradientReads& row_reads) FR_LAMBDA {
      add(recomputed, scratch, first, count, k_begin, k_end, accumulate, row_reads, sums);
    };
    row(winograd_gradient_row<D, m, 0>, {});
    row(winograd_gradient_row<D, m, 1>, {});
    row(winograd_gradient_row<D, m, 2>, {});
    if constexpr (m == 4) {
      row(winograd_gradient_row<D, m, 3>, {});
      row(winograd_gradient_row<D, m, 4>, {});
    }
    row(winograd_gradient_row<D, m, m + 1>, reads);
  }
}

// sums (k_end - k_begin, products, C) <- over tiles [begin, end), for outputs [k_begin, k_end)
template <typename Dot>
void winograd_gradient(const WeightGradient& g, char* scratch, int64_t begin, int64_t end,
                       int64_t k_begin, int64_t k_end, float* sums) {
  typedef typename Dot::D D;
  if constexpr (winograd_supported(Dot::variant, 2))
    if (g.winograd_tile == 2)
      return winograd_gradient_of<D, 2>(g, scratch, begin, end, k_begin, k_end, sums);
  if constexpr (winograd_supported(Dot::variant, 4))
    winograd_gradient_of<D, 4>(g, scratch, begin, end, k_begin, k_end, sums);
}

template <int m>
FR_INLINE bool winograd_gradient_output_of(const float* sums, int64_t parts, int64_t part,
                                           int64_t outputs, int64_t C, float* out) {
  constexpr int size = WinogradTransform<m>::size;
  vf finite = {};
  for (int64_t k = 0; k < outputs; ++k)
    for (int64_t c = 0; c < C; c += kLanes) {
      vf t[3][size];
#pragma GCC unroll 6
      for (int j = 0; j < size; ++j) {
        vf column[size], taps[3];
#pragma GCC unroll 6
        for (int i = 0; i < size; ++i) {
          const float* from = sums + (k * winograd_products(m) + i * size + j) * C + c;
          column[i] = load_any<vf>(from);
          for (int64_t p = 1; p < parts; ++p) column[i] += load_any<vf>(from + p * part);
        }
        WinogradTransform<m>::gradient(column, taps);
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) t[i][j] = taps[i];
      }
      float* to = out + k * 9 * C + c;
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        vf row[3];
        WinogradTransform<m>::gradient(t[i], row);
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j) {
          store_any(to + (3 * i + j) * C, row[j]);
          finite += row[j] * 0;  // 0, or NaN
        }
      }
    }
  return !has_nan(finite);
}

// out (outputs, 3, 3, C) <- G^T (the total of `parts` sums (outputs, products, C), `part` floats
// apart) G. False if a result is non-finite.
bool winograd_gradient_output(int64_t m, const float* sums, int64_t parts, int64_t part,
                              int64_t outputs, int64_t C, float* out) {
  return m == 2 ? winograd_gradient_output_of<2>(sums, parts, part, outputs, C, out)
                : winograd_gradient_output_of<4>(sums, parts, part, outputs, C, out);
}
