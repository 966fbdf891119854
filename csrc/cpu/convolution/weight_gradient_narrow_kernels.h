// The weight gradient of a convolution with few input channels, a network's stem:
//
//   out[r][s C + c][k] = sum over n, p, q of x[n, p stride - pad + r, q stride - pad + s, c]
//                        * dy[n, p, q, k]
//
// over channels_last tensors. As in cpu/convolution/weight_gradient_kernels.h, with the roles of
// the operands swapped: the broadcast operand is the S C values of x that a row of taps reads for
// one pixel, laid out with the pixels of each value contiguous, which serve every r; the vector
// operand is dy.
#pragma once

#include "cpu/convolution/weight_gradient_kernels.h"

// Pixels laid out at a time. With fewer, x's rows around the taps are read too often: 512 take 1.03
// of the time.
constexpr int64_t kNarrowPixels = 2048;

struct NarrowPanel {
  int64_t rows, slots;  // of dy and x laid out at a time
  int64_t values;       // S C
  int64_t pitch;        // pixels of one value's row, an even number
  int64_t columns;      // of x with its padding, per phase of the stride
};

FR_INLINE NarrowPanel narrow_panel(const WeightGradient& g) {
  NarrowPanel panel{};
  panel.rows = kNarrowPixels / g.Q > 0 ? kNarrowPixels / g.Q : 1;
  panel.slots = panel.rows * g.stride_h + (panel.rows / g.P + 2) * g.R;
  panel.values = g.S * g.C;
  panel.pitch = (g.Q + 1) / 2 * 2;
  panel.columns = (g.W + g.pad_w) / g.stride_w + g.S + g.Q + 1;
  return panel;
}

int64_t narrow_gradient_scratch(const WeightGradient& g) {
  const NarrowPanel panel = narrow_panel(g);
  return lines_of(panel.slots * panel.values * panel.pitch * 4) +
         lines_of(panel.rows * panel.pitch * 256) + lines_of(g.R * panel.rows * 64) +
         lines_of(g.C * g.stride_w * panel.columns * 4) + 64;
}

// One row of x: (value, pitch), zeros where a tap reads outside. planes: scratch for the row split
// by channel and phase, of which the values are shifted copies; zeros in the padding.
template <typename T>
FR_INLINE void spread_values(const WeightGradient& g, const NarrowPanel& panel, int64_t row,
                             T* planes, T* to) {
  const T* x = static_cast<const T*>(g.x) + row * g.W * g.C;
  for (int64_t c = 0; c < g.C; ++c)
    for (int64_t phase = 0; phase < g.stride_w; ++phase) {
      T* plane = planes + (c * g.stride_w + phase) * panel.columns;
      int64_t column = (g.pad_w - phase + g.stride_w - 1) / g.stride_w;
      column = column > 0 ? column : 0;
      for (int64_t w = column * g.stride_w + phase - g.pad_w; w < g.W; w += g.stride_w)
        plane[column++] = x[w * g.C + c];
    }
  for (int64_t s = 0; s < g.S; ++s)
    for (int64_t c = 0; c < g.C; ++c, to += panel.pitch) {
      const T* plane = planes + (c * g.stride_w + s % g.stride_w) * panel.columns + s / g.stride_w;
      __builtin_memcpy(to, plane, static_cast<uint64_t>(g.Q) * sizeof(T));
      if (panel.pitch > g.Q) to[g.Q] = 0;
    }
}

template <typename Dot, int vectors>
FR_INLINE void narrow_block(const WeightGradient& g, const NarrowPanel& panel, int64_t k,
                            const char* const* table, const int64_t* entries, bool accumulate,
                            float* out) {
  constexpr int64_t size = sizeof(typename Dot::D::T), pair = Dot::pair;
  const int64_t steps = (g.Q + pair - 1) / pair;
  const int64_t at_once = steps < gradient_chain(pair) ? gradient_chain(pair) / steps : 1;
  Fetch none{};
  for (int64_t r = 0; r < g.R; ++r)
    for (int64_t j = 0; j < panel.values; j += kTilePixels) {
      const int64_t start = j + kTilePixels <= panel.values ? j : panel.values - kTilePixels;
      alignas(64) float sum[kSums];
      for (int64_t row = 0; row < entries[r]; row += at_once) {
        const int64_t chunk = entries[r] - row < at_once ? entries[r] - row : at_once;
        sum_rows<Dot, vectors>(table + (r * panel.rows + row) * 8, chunk, steps,
                               start * panel.pitch * size, 0, row > 0, none, sum);
      }
      store_sums<vectors>(sum, entries[r] > 0, j - start, kTilePixels, accumulate,
                          out + (r * panel.values + start) * g.K + k, g.K);
    }
}

// out (R, S C, K) <- the sum over output rows [begin, end); scratch aligned to 64 bytes. At least 7
// values, at most kMaxNarrowRows rows of taps, K a multiple of 16.
template <typename Dot>
void narrow_gradient(const WeightGradient& g, char* scratch, int64_t begin, int64_t end,
                     float* out) {
  typedef typename Dot::D::T T;
  const NarrowPanel panel = narrow_panel(g);
  auto* x = reinterpret_cast<T*>(scratch);
  char* dy = scratch + lines_of(panel.slots * panel.values * panel.pitch * 4);
  auto** table = reinterpret_cast<const char**>(dy + lines_of(panel.rows * panel.pitch * 256));
  auto* planes =
      reinterpret_cast<T*>(reinterpret_cast<char*>(table) + lines_of(g.R * panel.rows * 64));
  for (int64_t i = 0; i < g.C * g.stride_w * panel.columns; ++i) planes[i] = 0;
  const int64_t slot_values = panel.values * panel.pitch;
  // dy in the layout that gather_x_row makes of x: rows of Q pixels of K channels.
  WeightGradient vectors_of = g;
  vectors_of.x = g.dy, vectors_of.C = g.K, vectors_of.W = g.Q, vectors_of.x_pixels = g.pixels;
  vectors_of.stride_w = 1, vectors_of.pad_w = 0;
  GradientPanel rows_of{};
  rows_of.phases = 1, rows_of.columns = panel.pitch;
  for (int64_t first = begin; first < end; first += panel.rows) {
    const int64_t rows = end - first < panel.rows ? end - first : panel.rows;
    for (int64_t k = 0; k < g.K; k += 64) {
      const int64_t vectors = (g.K - k) / 16 < 4 ? (g.K - k) / 16 : 4;
      const int64_t row_bytes = panel.pitch / Dot::pair * vectors * 64;
      int64_t entries[kMaxNarrowRows] = {}, slot = 0, row = 0;
      while (row < rows) {
        const int64_t n = (first + row) / g.P, p = (first + row) % g.P;
        const int64_t chunk = rows - row < g.P - p ? rows - row : g.P - p;
        const int64_t top = p * g.stride_h - g.pad_h;
        const int64_t bottom = (p + chunk - 1) * g.stride_h - g.pad_h + g.R - 1;
        const int64_t low = top < 0 ? 0 : top, high = bottom < g.H ? bottom : g.H - 1;
        for (int64_t h = low; h <= high && k == 0; ++h)
          spread_values(g, panel, n * g.H + h, planes, x + (slot + h - low) * slot_values);
        for (int64_t i = 0; i < chunk; ++i) {
          gather_x_row<Dot>(vectors_of, rows_of, first + row + i, k, vectors,
                            dy + (row + i) * row_bytes);
          for (int64_t r = 0; r < g.R; ++r) {
            const int64_t h = (p + i) * g.stride_h - g.pad_h + r;
            if (static_cast<uint64_t>(h) >= static_cast<uint64_t>(g.H)) continue;
            const char** entry = table + (r * panel.rows + entries[r]++) * 8;
            for (int64_t j = 0; j < kTilePixels; ++j)
              entry[j] = reinterpret_cast<const char*>(x + (slot + h - low) * slot_values +
                                                       j * panel.pitch);
            entry[7] = dy + (row + i) * row_bytes;
          }
        }
        slot += high < low ? 0 : high - low + 1;
        row += chunk;
      }
      const auto run = vectors == 4   ? narrow_block<Dot, 4>
                       : vectors == 3 ? narrow_block<Dot, 3>
                       : vectors == 2 ? narrow_block<Dot, 2>
                                      : narrow_block<Dot, 1>;
      run(g, panel, k, table, entries, first > begin, out);
    }
  }
}
