// dweight[k][r][s][c] = sum over n, p, q of dy[n, p, q, k] * x[n, p stride - pad + r dilation, ...,
// c], over channels_last tensors: x (N, H, W, C), dy (N, P, Q, K) in memory -> float32 (K, R, S,
// C). Grouped: group by group, (K, R, S, C / groups).
//
// The assembly of cpu/convolution/direct_kernels.h with other operands: a tile is 7 outputs k
// (AVX2: 6) by up to 64 channels c, a step one pixel (two for bfloat16), a "tap" one row of pixels.
// The broadcast operand is dy with the pixels of every k contiguous; the vector operand is x in
// blocks of 64 channels, pixel by pixel (bfloat16: two pixels interleaved). Both are copied to
// these layouts, a range of rows at a time, in scratch memory that fits the second-level cache;
// columns that a strided convolution reads together are contiguous. Rows that a tap would read
// outside x are skipped; columns outside are zeros. If a tap's rows are x's own, as with up to 64
// channels of a pointwise convolution in float32, x is read in place (0.8 to 0.9 of the time).
//
// bfloat16: for a tap that begins at an odd column of x, x begins one column earlier, and dy one
// pixel earlier, at a zero; so the pairs of x do not change.
//
// Sums: at most gradient_chain steps in one chain, then added up in float32.
// Bytes: x and dy read once per thread from memory, their copies written and read in cache.
// Measured: see benchmarks/results/conv_bn_relu-cpu-*.json.
#pragma once

#include "cpu/convolution/direct_kernels.h"
#include "cpu/convolution/pack_kernels.h"

// Steps in one chain of additions. Stock sums the few, long sums of a gradient in shorter chains
// than those of a convolution, and in still shorter ones on processors without AVX-512 (with 128,
// 126 pixels had 2.5 times its rms error there). For bfloat16 the length is negligible against the
// rounding of the result. Stock sums those of groups in the shortest (with 48, 56 pixels had 2.3
// times its largest error).
constexpr int64_t gradient_chain(int64_t pair, bool grouped = false) {
  return pair == 2 ? 512 : grouped ? 24 : FR_VECTOR_BYTES == 64 ? 128 : 48;
}

// Layout of what one thread copies at a time.
struct GradientPanel {
  int64_t rows;           // maximum number of output rows
  int64_t lead;           // zeros before each row of dy
  int64_t pitch;          // values of a row of dy
  int64_t output_stride;  // values between the rows of two outputs
  int64_t columns;        // of x per phase of the stride, padded for reads past the last
  int64_t phases;
  int64_t slots;  // rows of x
};

template <typename Dot>
FR_INLINE GradientPanel gradient_panel(const WeightGradient& g) {
  constexpr int64_t pair = Dot::pair;
  GradientPanel panel{};
  const int64_t pixels = gradient_pixels(pair) * pair;
  panel.rows = pixels / g.Q > 0 ? pixels / g.Q : 1;
  panel.lead = pair == 2 ? 2 : 0;
  panel.pitch = panel.lead + (g.Q + 2 * (pair - 1) + pair - 1) / pair * pair;
  // One more cache line: without it the rows of all outputs map to the same sets of the cache.
  panel.output_stride = (panel.rows * panel.pitch + 31) / 32 * 32 + 32 / static_cast<int64_t>(pair);
  panel.phases = g.S == 1 ? 1 : g.stride_w;
  const int64_t furthest = (g.S - 1) * g.dilation_w / g.stride_w + g.Q + 2 * (pair - 1);
  panel.columns = (furthest + 1) / 2 * 2;
  // Every image that the rows span adds its own rows of x around them.
  const int64_t images = g.P > 0 ? panel.rows / g.P + 2 : 1;
  const int64_t around = (g.R - 1) * g.dilation_h + 1;
  panel.slots = g.R == 1 ? panel.rows : panel.rows * g.stride_h + images * around;
  return panel;
}

// Rounded up to cache lines: dy's rows, x's rows, and the pointers to both.
FR_INLINE int64_t lines_of(int64_t bytes) { return (bytes + 127) / 64 * 64; }
template <typename Dot>
FR_INLINE int64_t gradient_dy_bytes(const GradientPanel& panel, int64_t outputs) {
  return lines_of(outputs * panel.output_stride * static_cast<int64_t>(sizeof(typename Dot::X::T)));
}
template <typename Dot>
FR_INLINE int64_t gradient_x_bytes(const GradientPanel& panel) {
  return lines_of(panel.slots * panel.phases * panel.columns * 256 / Dot::pair);
}

// Of `outputs`, those that are laid out at a time: of one group
FR_INLINE int64_t outputs_at_once(const WeightGradient& g, int64_t outputs) {
  return outputs < g.K / g.groups ? outputs : g.K / g.groups;
}
template <typename Dot>
int64_t weight_gradient_scratch(const WeightGradient& g, int64_t outputs) {
  const GradientPanel panel = gradient_panel<Dot>(g);
  return gradient_dy_bytes<Dot>(panel, outputs_at_once(g, outputs)) + gradient_x_bytes<Dot>(panel) +
         lines_of(g.R * panel.rows * 64) + 64;
}

// `count` pixels of dy, K apart, of 16 outputs from p on: each of to[16][...] is the pixels of one
// output.
template <typename Dot>
FR_INLINE void gather_outputs(const typename Dot::D::T* p, int64_t K, int64_t count, float* to,
                              int64_t output_stride) {
  for (int64_t q = 0; q < count; q += 16) {
    const int64_t chunk = count - q < 16 ? count - q : 16;
    const auto load = [&](int64_t i, int64_t k)
                          FR_LAMBDA { return Dot::D::load(p + (q + i) * K + k); };
    const auto store = [&](int64_t k, int64_t i, vf v)
                           FR_LAMBDA { store_any(to + k * output_stride + q + i, v); };
    if (chunk == 16) {
      transpose_16x16(load, store);
      continue;
    }
    transpose_16x16([&](int64_t i, int64_t k) FR_LAMBDA { return i < chunk ? load(i, k) : vf{}; },
                    [&](int64_t k, int64_t i, vf v) FR_LAMBDA {
                      if (i + kLanes <= chunk)
                        store(k, i, v);
                      else if (i < chunk)
                        __builtin_memcpy(to + k * output_stride + q + i, &v,
                                         static_cast<uint64_t>(chunk - i) * 4);
                    });
  }
}
#if FR_VECTOR_BYTES == 64
FR_INLINE vu load_32(const uint16_t* p) { return __builtin_convertvector(load_any<vh>(p), vu); }

template <typename Dot>
FR_INLINE void gather_outputs(const uint16_t* p, int64_t K, int64_t count, uint16_t* to,
                              int64_t output_stride) {
  for (int64_t q = 0; q < count; q += 32) {
    const int64_t chunk = count - q < 32 ? count - q : 32;
    vf t[16];
    for (int i = 0; i < 16; ++i) {
      const vu low = 2 * i < chunk ? load_32(p + (q + 2 * i) * K) : vu{};
      const vu high = 2 * i + 1 < chunk ? load_32(p + (q + 2 * i + 1) * K) : vu{};
      t[i] = (vf)(low | (high << 16));
    }
    transpose_square(t);
    for (int i = 0; i < 16; ++i)
      __builtin_memcpy(to + i * output_stride + q, &t[i], static_cast<uint64_t>(chunk) * 2);
  }
}
#endif

// dy's rows [first, first + rows) for outputs [k_begin, k_end): (output, row, pitch)
template <typename Dot>
FR_INLINE void gather_dy(const WeightGradient& g, const GradientPanel& panel, int64_t first,
                         int64_t rows, int64_t k_begin, int64_t k_end, typename Dot::X::T* to) {
  const auto* dy = static_cast<const typename Dot::D::T*>(g.dy);
  const int64_t output_stride = panel.output_stride;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t pixel = (first + row) * g.Q;
    const int64_t left = g.pixels - pixel, count = left < g.Q ? left : g.Q;
    for (int64_t k = k_begin; k < k_end; k += 16) {
      typename Dot::X::T* out = to + (k - k_begin) * output_stride + row * panel.pitch;
      for (int64_t i = 0; i < 16; ++i) {
        for (int64_t j = 0; j < panel.lead; ++j) out[i * output_stride + j] = 0;
        for (int64_t j = panel.lead + count; j < panel.pitch; ++j) out[i * output_stride + j] = 0;
      }
      gather_outputs<Dot>(dy + pixel * g.K + k, g.K, count, out + panel.lead, output_stride);
    }
  }
}

// One row of x, `vectors` vectors of channels from c on: (phase, column / pair, vectors, 16, pair)
template <typename Dot>
FR_INLINE void gather_x_row(const WeightGradient& g, const GradientPanel& panel, int64_t row,
                            int64_t c, int64_t vectors, char* to) {
  typedef typename Dot::D::T T;
  const auto* x = static_cast<const T*>(g.x) + row * g.W * g.C + c;
  const int64_t left = g.x_pixels - row * g.W, width = left < g.W ? left : g.W;
  const auto at = [&](int64_t phase, int64_t column) FR_LAMBDA {
    const int64_t w = column * g.stride_w + phase - g.pad_w;
    return static_cast<uint64_t>(w) < static_cast<uint64_t>(width) ? x + w * g.C : nullptr;
  };
  for (int64_t phase = 0; phase < panel.phases; ++phase)
    for (int64_t column = 0; column < panel.columns; column += Dot::pair) {
      const T* a = at(phase, column);
      if constexpr (Dot::pair == 1) {
        for (int64_t j = 0; j < vectors * 16; j += kLanes, to += kLanes * 4)
          store_any(to, a ? Dot::D::load(a + j) : vf{});
      } else {
        const T* b = at(phase, column + 1);
        for (int64_t v = 0; v < vectors; ++v, to += 64) {
          const vu low = a ? load_32(a + v * 16) : vu{}, high = b ? load_32(b + v * 16) : vu{};
          store_any(to, low | (high << 16));
        }
      }
    }
}

// Number of a weight gradient's outputs in tiles of kTilePixels; the others are in tiles of one
// less, so that none is summed twice (0.92 to 0.96 of the time at 64 outputs). With too few outputs
// for that, the last tile starts earlier.
FR_INLINE int64_t wide_outputs(int64_t outputs) {
  const int64_t narrow_tiles = (kTilePixels - outputs % kTilePixels) % kTilePixels;
  const int64_t wide = outputs - narrow_tiles * (kTilePixels - 1);
  return wide >= 0 ? wide : outputs;
}

// g with x (or dy) recomputed from row `top` of image n up to row `bottom` of image `last`, only
// rows inside these images.
FR_INLINE WeightGradient with_recomputed(const WeightGradient& g, int64_t n, int64_t top,
                                         int64_t last, int64_t bottom) {
  WeightGradient recomputed = g;
  if (!g.recompute) return recomputed;
  const int64_t first = n * g.H + (top > 0 ? top : 0);
  const int64_t end = last * g.H + (bottom < 0 ? 0 : bottom < g.H ? bottom + 1 : g.H);
  const int64_t pixels = end * g.W < g.x_pixels ? end * g.W : g.x_pixels;
  const void* found = g.recompute(g.context, first * g.W, pixels);
  (g.recomputes_dy ? recomputed.dy : recomputed.x) = found;
  return recomputed;
}

// What is laid out next, to be prefetched during the multiplication: rows of x, then dy.
struct GradientReads {
  Fetch::Stream x, dy;
  int64_t x_row, x_rows;  // bytes between rows; rows left

  Fetch::Stream next() {
    const Fetch::Stream found = x_rows > 0 ? x : dy;
    if (x_rows > 0)
      x.at += x_row, --x_rows;
    else
      dy.left = 0;
    return found;
  }
};

// `pixels` contiguous pixels of `channels` channels
template <typename T>
FR_INLINE Fetch::Stream stream_of(const void* at, int64_t pixels, int64_t channels) {
  const int64_t bytes = pixels * channels * static_cast<int64_t>(sizeof(T));
  return {static_cast<const char*>(at), 256, bytes / 256};
}

// What follows the rows [first, first + rows) of some channels: those from `channel` on, the next
// 256 bytes of every pixel, if `within`, else the next panel, from there on.
template <typename Dot>
FR_INLINE GradientReads gradient_reads(const WeightGradient& g, int64_t first, int64_t rows,
                                       int64_t end, int64_t channel, bool within,
                                       bool all_outputs) {
  typedef typename Dot::D::T T;
  constexpr int64_t size = sizeof(T), block = 256 / size;
  GradientReads reads{};
  if (within ? channel % block != 0 : first + rows >= end) return reads;
  const int64_t row = within ? first : first + rows;
  const int64_t pixel = (row / g.P * g.H + row % g.P * g.stride_h) * g.W;
  const auto* x = static_cast<const char*>(g.x) + (pixel * g.C + channel) * size;
  reads.x_rows = 1;
  if (g.R * g.S == 1 && g.stride_h * g.stride_w > 1) {
    reads.x = {x, g.stride_w * g.C * size, g.Q};
    reads.x_row = g.stride_h * g.W * g.C * size, reads.x_rows = rows;
  } else if (g.C > block) {
    reads.x = {x, g.C * size, rows * g.stride_h * g.W};
  } else {
    reads.x = stream_of<T>(x, rows * g.stride_h * g.W, g.C);
  }
  if (!within && all_outputs)
    reads.dy = stream_of<T>(static_cast<const T*>(g.dy) + row * g.Q * g.K, rows * g.Q, g.K);
  return reads;
}

// out (end, pitch) = or, with `accumulate`, += the sums of outputs [begin, end) of a tile; zeros if
// it has none
template <int vectors>
FR_INLINE void store_sums(const float* sum, bool has_sums, int64_t begin, int64_t end,
                          bool accumulate, float* out, int64_t pitch) {
  for (int64_t i = begin; i < end; ++i)
#pragma GCC unroll 8
    for (int64_t j = 0; j < vectors * 16; j += kLanes) {
      vf value = has_sums ? load_any<vf>(sum + 64 * i + j) : vf{};
      if (accumulate) value += load_any<vf>(out + i * pitch + j);
      store_any(out + i * pitch + j, value);
    }
}

// Adds the contribution of the panel's rows to `vectors` vectors of a group's channels from c on of
// the outputs [k_begin, k_end) of that group. table: 8
// pointers per row of every tap, as sum_rows reads them; those of the last pixel are set to null.
template <typename Dot, int vectors>
FR_INLINE void gradient_block(const WeightGradient& g, const GradientPanel& panel, int64_t rows,
                              int64_t c, int64_t k_begin, int64_t k_end, const char** table,
                              const int64_t* entries, bool accumulate, GradientReads reads,
                              float* out) {
  constexpr int64_t size = sizeof(typename Dot::X::T), pair = Dot::pair;
  const int64_t output_stride = panel.output_stride * size, outputs = k_end - k_begin;
  const int64_t inputs = g.C / g.groups;
  const int64_t wide = wide_outputs(outputs);
  Fetch fetch{};
  for (int64_t width = kTilePixels; width >= kTilePixels - 1; --width) {
    const bool narrow = width < kTilePixels;
    const int64_t first = narrow ? wide : 0, end = narrow ? outputs : wide;
    for (int64_t r = 0; r < g.R && narrow; ++r)
      for (int64_t i = 0; i < entries[r]; ++i)
        table[(r * panel.rows + i) * 8 + kTilePixels - 1] = nullptr;
    for (int64_t tap = 0; tap < g.R * g.S && first < end; ++tap) {
      const int64_t r = tap / g.S, right = tap % g.S * g.dilation_w;
      const int64_t phase = right % g.stride_w, column = right / g.stride_w;
      const int64_t odd = column % pair;
      const int64_t steps = (g.Q + odd + pair - 1) / pair;
      const int64_t offset =
          (phase * panel.columns + column - odd) / pair * static_cast<int64_t>(vectors) * 64;
      const int64_t chain = gradient_chain(pair, g.groups > 1);
      const int64_t at_once = steps < chain ? chain / steps : 1;
      const char* const* pointers = table + r * panel.rows * 8;
      for (int64_t k = first; k < end; k += width) {
        // A last tile that starts earlier skips the outputs of the previous one.
        const int64_t start = k + width <= end ? k : end - width;
        alignas(64) float sum[kSums];
        const int64_t channel = start * output_stride + (panel.lead - odd) * size;
        float* to = out + (start * g.R * g.S + tap) * inputs + c;
        const int64_t pitch = g.R * g.S * inputs;
        fetch.write = {reinterpret_cast<const char*>(to), pitch * 4, width};
        for (int64_t row = 0; row < entries[r]; row += at_once) {
          const int64_t chunk = entries[r] - row < at_once ? entries[r] - row : at_once;
          if (fetch.read.left <= 0) fetch.read = reads.next();
          sum_rows<Dot, vectors>(pointers + row * 8, chunk, steps, channel, offset, row > 0, fetch,
                                 sum);
        }
        store_sums<vectors>(sum, entries[r] > 0, k - start, width, accumulate, to, pitch);
      }
    }
  }
}

// out (k_end - k_begin, R, S, C / groups) <- the sum over output rows [begin, end) for outputs
// [k_begin, k_end); scratch: weight_gradient_scratch bytes, aligned to 64 bytes.
template <typename Dot>
void conv_weight_gradient(const WeightGradient& g, char* scratch, int64_t begin, int64_t end,
                          int64_t k_begin, int64_t k_end, float* out) {
  const GradientPanel panel = gradient_panel<Dot>(g);
  auto* dy = reinterpret_cast<typename Dot::X::T*>(scratch);
  char* x = scratch + gradient_dy_bytes<Dot>(panel, outputs_at_once(g, k_end - k_begin));
  auto** table = reinterpret_cast<const char**>(x + gradient_x_bytes<Dot>(panel));
  const int64_t output_stride = panel.output_stride;
  constexpr bool floats = sizeof(typename Dot::D::T) == 4;
  const bool reads_in_place = floats && g.R * g.S * g.stride_h * g.stride_w == 1 && g.pad_h == 0 &&
                              g.pad_w == 0 && g.C <= 64 && g.groups == 1;
  // Of a group, and of the groups of the outputs.
  const int64_t inputs = g.C / g.groups, group_outputs = g.K / g.groups;
  const int64_t c_begin = k_begin / group_outputs * inputs;
  const int64_t c_end = ((k_end - 1) / group_outputs + 1) * inputs;
  for (int64_t first = begin; first < end; first += panel.rows) {
    const int64_t rows = end - first < panel.rows ? end - first : panel.rows;
    // A shorter last row needs the zeros of a copy.
    const bool in_place = reads_in_place && (first + rows) * g.Q <= g.x_pixels;
    const int64_t last = first + rows - 1;
    const WeightGradient recomputed =
        with_recomputed(g, first / g.P, first % g.P * g.stride_h - g.pad_h, last / g.P,
                        last % g.P * g.stride_h - g.pad_h + (g.R - 1) * g.dilation_h);
    for (int64_t c = c_begin, vectors = 0; c < c_end; c += vectors * 16) {
      const int64_t group = c / inputs, left = ((group + 1) * inputs - c) / 16;
      vectors = left < 4 ? left : 4;
      const int64_t k = group * group_outputs, k_last = k + group_outputs;
      const int64_t own_begin = k > k_begin ? k : k_begin,
                    own_end = k_last < k_end ? k_last : k_end;
      if (c == group * inputs)
        gather_dy<Dot>(recomputed, panel, first, rows, own_begin, own_end, dy);
      const int64_t row_bytes = panel.phases * panel.columns / Dot::pair * vectors * 64;
      // Copies rows of x to slots, image by image, and collects for each r the pointers of its
      // rows.
      int64_t entries[kMaxPackedTaps] = {}, slot = 0, row = 0;
      while (row < rows) {
        const int64_t n = (first + row) / g.P, p = (first + row) % g.P;
        const int64_t chunk = rows - row < g.P - p ? rows - row : g.P - p;
        const int64_t top = p * g.stride_h - g.pad_h;
        const int64_t bottom = (p + chunk - 1) * g.stride_h - g.pad_h + (g.R - 1) * g.dilation_h;
        const int64_t low = top < 0 ? 0 : top, high = bottom < g.H ? bottom : g.H - 1;
        const int64_t step = g.R == 1 ? g.stride_h : 1;
        // With one row of taps, only the rows that it reads have slots.
        const int64_t origin = g.R == 1 && top < 0 ? top + (-top + step - 1) / step * step : low;
        const int64_t used = high < origin ? 0 : (high - origin) / step + 1;
        for (int64_t i = 0; i < used && !in_place; ++i)
          gather_x_row<Dot>(recomputed, panel, n * g.H + origin + i * step, c, vectors,
                            x + (slot + i) * row_bytes);
        for (int64_t r = 0; r < g.R; ++r)
          for (int64_t i = 0; i < chunk; ++i) {
            const int64_t h = (p + i) * g.stride_h - g.pad_h + r * g.dilation_h;
            if (static_cast<uint64_t>(h) >= static_cast<uint64_t>(g.H)) continue;
            const char** entry = table + (r * panel.rows + entries[r]++) * 8;
            for (int64_t j = 0; j < kTilePixels; ++j)
              entry[j] =
                  reinterpret_cast<const char*>(dy + j * output_stride + (row + i) * panel.pitch);
            entry[7] = in_place
                           ? static_cast<const char*>(recomputed.x) + (n * g.H + h) * g.W * g.C * 4
                           : x + (slot + (h - origin) / step) * row_bytes;
          }
        slot += used;
        row += chunk;
      }
      const auto run = vectors == 4   ? gradient_block<Dot, 4>
                       : vectors == 3 ? gradient_block<Dot, 3>
                       : vectors == 2 ? gradient_block<Dot, 2>
                                      : gradient_block<Dot, 1>;
      const bool within = c + vectors * 16 < c_end;
      const GradientReads reads = gradient_reads<Dot>(
          g, first, rows, end, within ? c + vectors * 16 : c_begin, within, k_end - k_begin == g.K);
      run(g, panel, rows, c - group * inputs, own_begin, own_end, table, entries, first > begin,
          reads, out + (own_begin - k_begin) * g.R * g.S * inputs);
    }
  }
}
