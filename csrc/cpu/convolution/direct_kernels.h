// y = activation(conv(x, weight) * scale[k] + shift[k] + residual), an implicit GEMM over
// channels_last tensors: x (N, H, W, C) in memory -> y (N, P, Q, K). relu(NaN) = NaN, -0.0 passes,
// one rounding.
//
// A tile is 7 pixels of y (AVX2: 6) by up to 64 channels; cpu/convolution/tile_avx512.h or
// cpu/convolution/tile_avx2.h computes its sums. 7 divides the number of pixels of every ResNet
// layer at 224 x 224 (49, 196, ...). A tile accumulates over all taps and input channels, so that y
// is written once, scaled, shifted, added to the residual and rounded. Of the taps in the padding,
// those of a whole tile and those of its first or last pixel are skipped (0.9 of the time at 7 x
// 7); others read zeros. cpu/convolution/conv_bn_relu.cpp orders the pixels of a dilated
// convolution so that most tiles lie in the padding as a whole or not at all.
//
// Weights: (blocks of K, taps, run / pair, vectors, 16, pair) in memory, pair = 2 adjacent input
// channels for bfloat16 (vdpbf16ps) and 1 for float32; run = input channels read per tap. The last
// channel of an odd run is paired with itself and half its weight, which is exact, also for Inf and
// NaN. Grouped: each vector of 16 outputs reads the channels of its group, which start at
// `first_channel`.
//
// Bytes: x and residual read once from memory, y written once; weights once per superblock of
// pixels (cpu/convolution/conv_bn_relu.cpp).
//
// Measured: see benchmarks/results/conv_bn_relu-cpu-*.json.
#pragma once

#include "cpu/isa/vec.h"

constexpr int kLanes = Float32::lanes;  // of a vector
constexpr int kTilePixels = FR_VECTOR_BYTES == 64 ? 7 : 6;
constexpr int kSums = 64 * kTilePixels;  // of a tile: (pixel, 4, 16) = (pixel, vector, lane)

// How products are computed. D: dtype of the tensors in memory; X: dtype of x and the weights in
// the multiplication. Widened: where the processor has no dot product of D, or one slower than the
// two float32 multiply-adds it replaces.
struct DotFloat32 {
  typedef Float32 D;
  typedef Float32 X;
  static constexpr int pair = 1;
  static constexpr ConvVariant variant = kFloat;
};
struct DotBFloat16 {
  typedef BFloat16 D;
  typedef BFloat16 X;
  static constexpr int pair = 2;
  static constexpr ConvVariant variant = kBFloatPairs;
};
template <typename D_, ConvVariant variant_>
struct DotWidened {
  typedef D_ D;
  typedef Float32 X;
  static constexpr int pair = 1;
  static constexpr ConvVariant variant = variant_;
};
typedef DotWidened<BFloat16, kBFloatWidened> DotWidenedBFloat16;
typedef DotWidened<Float16, kHalfWidened> DotWidenedFloat16;

// Stores a whole vector. The processor's conversion to bfloat16 is one instruction instead of the
// six of BFloat16::store; unlike that, it flushes subnormals to zero, as vdpbf16ps does.
template <typename Dot>
FR_INLINE void store_rounded(typename Dot::D::T* y, vf v) {
  if constexpr (Dot::pair == 2) {  // AVX-512 only
    vh rounded;
    asm("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(v));
    store_any(y, rounded);
  } else {
    Dot::D::store(y, v);
  }
}

// Memory that a tile's assembly prefetches for later tiles, a block of 256 bytes every four steps,
// so that loads overlap with multiply-adds instead of preceding them: memory to be read, into the
// second-level cache, and memory to be written. `pitch`: bytes from one block to the next; `left`:
// number of blocks.
struct Fetch {
  struct Stream {
    const char* at;
    int64_t pitch, left;
  } read, write;
};
// clang-format off
#define FR_FETCH(i, stream, prefetch) \
  "decq 16+" stream "(%[fetch])\n\tjs " i "f\n\t" \
  "movq " stream "(%[fetch]), %%rbx\n\t" \
  prefetch " (%%rbx)\n\t" prefetch " 64(%%rbx)\n\t" \
  prefetch " 128(%%rbx)\n\t" prefetch " 192(%%rbx)\n\t" \
  "addq 8+" stream "(%[fetch]), %%rbx\n\tmovq %%rbx, " stream "(%[fetch])\n\t" \
  i ":\n\t"
// clang-format on

// What an instruction set provides: `sum_tile`, `sum_rows` and `transpose_square`.
#if FR_VECTOR_BYTES == 64
#include "cpu/convolution/tile_avx512.h"
#else
#include "cpu/convolution/tile_avx2.h"
#endif

// Whether a tile from row p, column q on is in one row and reads no padding.
FR_INLINE bool lies_inside(const ConvBnRelu& c, int64_t p, int64_t q) {
  const int64_t top = p * c.stride_h - c.pad_h, left = q * c.stride_w - c.pad_w;
  return q + kTilePixels <= c.Q && top >= 0 && left >= 0 && top + (c.R - 1) * c.dilation_h < c.H &&
         left + (kTilePixels - 1) * c.stride_w + (c.S - 1) * c.dilation_w < c.W;
}

// `locate` for such a tile, of image n (0.84 to 0.98 of the time of 16 channels in and out).
template <typename T>
FR_INLINE int64_t locate_inside(const ConvBnRelu& c, int64_t n, int64_t p, int64_t q,
                                const char** pixel, uint8_t* tap) {
  const int64_t bytes = c.C * static_cast<int64_t>(sizeof(T)), step = c.stride_w * bytes;
  const int64_t row = c.dilation_h * c.W * bytes, column = c.dilation_w * bytes;
  const int64_t top = p * c.stride_h - c.pad_h, left = q * c.stride_w - c.pad_w;
  const char* from = static_cast<const char*>(c.x) + ((n * c.H + top) * c.W + left) * bytes;
  int64_t taps = 0;
  for (int64_t r = 0; r < c.R; ++r, from += row)
    for (int64_t s = 0; s < c.S; ++s, pixel += kTilePixels) {
      const char* at = from + s * column;
      for (int i = 0; i < kTilePixels; ++i) pixel[i] = at + i * step;
      tap[taps] = static_cast<uint8_t>(taps), ++taps;
    }
  return taps;
}

// Fills tap with the taps that a tile computes, and pixel[kTilePixels * i + j] with where tap[i]
// reads for output pixel first + j. Taps that lie in the padding for all pixels are skipped, but
// for the first if all do. After the last of `pixels`, the last is repeated. Returns the number of
// taps.
template <typename T>
FR_INLINE int64_t locate(const ConvBnRelu& c, int64_t first, int64_t pixels, const char** pixel,
                         uint8_t* tap) {
  const char* corner[kTilePixels];  // address of tap (0, 0), inside x or not
  int64_t top[kTilePixels], left[kTilePixels];
  int64_t n = first / (c.P * c.Q), p = first / c.Q % c.P, q = first % c.Q;
  if (pixels == kTilePixels && lies_inside(c, p, q))
    return locate_inside<T>(c, n, p, q, pixel, tap);
  for (int i = 0; i < kTilePixels; ++i) {
    top[i] = p * c.stride_h - c.pad_h;
    left[i] = q * c.stride_w - c.pad_w;
    corner[i] = static_cast<const char*>(c.x) +
                ((n * c.H + top[i]) * c.W + left[i]) * c.C * static_cast<int64_t>(sizeof(T));
    if (i + 1 < pixels && ++q == c.Q) {
      q = 0;
      if (++p == c.P) p = 0, ++n;
    }
  }
  int64_t taps = 0;
  for (int64_t r = 0; r < c.R; ++r)
    for (int64_t s = 0; s < c.S; ++s) {
      const int64_t down = r * c.dilation_h, right = s * c.dilation_w;
      const int64_t offset = (down * c.W + right) * c.C * static_cast<int64_t>(sizeof(T));
      bool any = false;
      for (int i = 0; i < kTilePixels; ++i) {
        const bool inside = static_cast<uint64_t>(top[i] + down) < static_cast<uint64_t>(c.H) &&
                            static_cast<uint64_t>(left[i] + right) < static_cast<uint64_t>(c.W);
        pixel[i] = inside ? corner[i] + offset : nullptr;
        any |= inside;
      }
      if (!any) continue;
      // The kernel can skip one pixel, the first or the last; any other reads zeros.
      for (int i = 1; i < kTilePixels; ++i)
        if (!pixel[i] && (i < kTilePixels - 1 || !pixel[0]))
          pixel[i] = static_cast<const char*>(c.zeros);
      tap[taps++] = static_cast<uint8_t>(r * c.S + s);
      pixel += kTilePixels;
    }
  if (taps > 0) return taps;
  for (int i = 0; i < kTilePixels; ++i) pixel[i] = static_cast<const char*>(c.zeros);
  tap[0] = 0;
  return 1;
}

// The same for the one tap of a pointwise convolution.
template <typename T>
FR_INLINE void locate_pointwise(const ConvBnRelu& c, int64_t first, int64_t pixels,
                                const char** pixel) {
  const int64_t bytes = c.C * static_cast<int64_t>(sizeof(T));
  const auto* x = static_cast<const char*>(c.x) + first * bytes;
  for (int64_t i = 0; i < kTilePixels; ++i) pixel[i] = x + (i < pixels ? i : pixels - 1) * bytes;
}

// Indices in y of the pixels from `first` on.
FR_INLINE void locate_outputs(const ConvBnRelu& c, int64_t first, int64_t* pixel) {
  if (c.y_column == 0) {
    for (int i = 0; i < kTilePixels; ++i) pixel[i] = first + i;
    return;
  }
  int64_t n = first / (c.P * c.Q), p = first / c.Q % c.P, q = first % c.Q;
  for (int i = 0; i < kTilePixels; ++i) {
    pixel[i] = n * c.y_image + p * c.y_row + q * c.y_column;
    if (++q == c.Q) {
      q = 0;
      if (++p == c.P) p = 0, ++n;
    }
  }
}

// The epilogue of a vector of sums for the outputs from channel k on. residual() loads the
// residual's vector.
template <typename Load>
FR_INLINE vf finished(const Epilogue& e, vf sum, int64_t k, Load residual) {
  if (e.scale) sum = sum * load_any<vf>(e.scale + k) + load_any<vf>(e.shift + k);
  if (e.residual) sum += residual();
  return activated(e.activation, sum);
}

// `finish` where the layer has all of these channels. Scale and shift stay in registers.
template <typename Dot, int vectors, bool adds>
FR_INLINE void finish_whole(const ConvBnRelu& c, const float* sum, int64_t k, const int64_t* pixel,
                            int64_t pixels) {
  typedef typename Dot::D D;
  constexpr int count = vectors * 16 / kLanes;
  const bool scales = c.scale;
  const Activation activation = c.activation;
  const int64_t K = c.K;
  auto* const y = static_cast<typename D::T*>(c.y) + k;
  const auto* const residual = static_cast<const typename D::T*>(c.residual) + k;
  vf scale[count] = {}, shift[count] = {};
  for (int v = 0; v < count && scales; ++v) {
    scale[v] = load_any<vf>(c.scale + k + v * kLanes);
    shift[v] = load_any<vf>(c.shift + k + v * kLanes);
  }
  for (int64_t i = 0; i < pixels; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < count; ++v) {
      const int64_t at = pixel[i] * K + v * kLanes;
      vf value = load_any<vf>(sum + 64 * i + v * kLanes);
      if (scales) value = value * scale[v] + shift[v];
      if constexpr (adds) value += D::load(residual + at);
      store_rounded<Dot>(y + at, activated(activation, value));
    }
}

// Stores a tile's outputs for `vectors` vectors of channels from k on.
template <typename Dot, int vectors>
FR_INLINE void finish(const ConvBnRelu& c, const float* sum, int64_t k, const int64_t* pixel,
                      int64_t pixels) {
  typedef typename Dot::D D;
  if (__builtin_expect(k + vectors * 16 <= c.K, 1))
    return c.residual ? finish_whole<Dot, vectors, true>(c, sum, k, pixel, pixels)
                      : finish_whole<Dot, vectors, false>(c, sum, k, pixel, pixels);
  for (int64_t i = 0; i < pixels; ++i) {
    const int64_t at = pixel[i] * c.K + k;
    auto* y = static_cast<typename D::T*>(c.y) + at;
    const auto* residual = static_cast<const typename D::T*>(c.residual) + at;
    for (int64_t j = 0; k + j < c.K; j += kLanes) {
      const int64_t lanes = c.K - k - j < kLanes ? c.K - k - j : kLanes;
      const auto load = [&]() FR_LAMBDA { return D::load_n(residual + j, lanes); };
      D::store_n(y + j, finished(c, load_any<vf>(sum + 64 * i + j), k + j, load), lanes);
    }
  }
}

// The sums of a tile over `taps` taps, tap[0] ..., in chains of at most kChainSteps steps that are
// then added up: a single float32 chain over thousands of products has twice the error of stock's
// blocked sums. A chain is of one tap or of consecutive ones.
template <typename Dot, int vectors>
FR_INLINE void sum_chains(const char* weight, const char* const* pixel, const uint8_t* tap,
                          int64_t taps, int64_t steps, int64_t single, int64_t channel,
                          Fetch& fetch, float* sum) {
  const int64_t taps_at_once = steps < kChainSteps ? kChainSteps / steps : 1;
  for (int64_t i = 0, chain_taps; i < taps; i += chain_taps) {
    for (chain_taps = 1; chain_taps < taps_at_once && i + chain_taps < taps &&
                         tap[i + chain_taps] == tap[i] + chain_taps;)
      ++chain_taps;
    const char* from = weight + tap[i] * (steps + single) * vectors * 64;
    for (int64_t begin = 0; begin < steps; begin += kChainSteps) {
      const int64_t count = steps - begin < kChainSteps ? steps - begin : kChainSteps;
      const int64_t last = begin + count == steps ? single : 0;
      sum_tile<Dot, vectors>(from, pixel + kTilePixels * i, chain_taps, count, last,
                             channel + begin * 4, i + begin > 0, fetch, sum);
      from += (count + last) * vectors * 64;
    }
  }
}

// Computes again the sums of `count` pixels and 16 outputs from k on that are non-finite, without
// the zeros between merged groups: 0 * Inf is NaN, and the other groups' inputs are no operands.
// weight: of these outputs; channel: bytes from a pixel to the first input of the merged groups.
template <typename Dot>
void sum_own_groups(const ConvBnRelu& c, const char* weight, const char* const* pixel,
                    const uint8_t* tap, int64_t taps, int64_t k, int64_t channel, int64_t count,
                    float* sum) {
  typedef typename Dot::X X;
  constexpr int64_t pair = Dot::pair;
  const auto* weights = reinterpret_cast<const typename X::T*>(weight);
  const int64_t inputs = c.run / c.merged, outputs = c.K / (c.groups * c.merged);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t lane = 0; lane < 16; ++lane) {
      float& result = sum[64 * i + lane];
      if (__builtin_isfinite(result)) continue;
      const int64_t begin = (k + lane) / outputs % c.merged * inputs;
      result = 0;
      for (int64_t t = 0; t < taps; ++t) {
        const auto* x = reinterpret_cast<const typename X::T*>(pixel[kTilePixels * t + i]);
        if (!x) continue;
        for (int64_t j = begin; j < begin + inputs; ++j) {
          const int64_t at = ((tap[t] * c.run + j) / pair * 16 + lane) * pair + j % pair;
          result +=
              X::get(x + channel / static_cast<int64_t>(sizeof(*x)) + j) * X::get(weights + at);
        }
      }
    }
}

// Whether the first 16 outputs of all pixels' sums are finite.
FR_INLINE bool has_finite_sums(const float* sum, int64_t count) {
  vf finite = {};
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < 16; j += kLanes)
      finite += load_any<vf>(sum + 64 * i + j) * 0;  // 0, or NaN
  return !has_nan(finite);
}

// A block of channels of pixels [first, first + count), count at most kTilePixels, whose indices in
// y are `y_pixel`.
template <typename Dot, int vectors>
FR_INLINE void conv_pixels(const ConvBnRelu& c, int64_t block, int64_t first, int64_t count,
                           const int64_t* y_pixel, Fetch& fetch) {
  typedef typename Dot::D D;
  const int64_t steps = c.run / Dot::pair, single = c.run % Dot::pair, k = block * 64;
  const int64_t vector_bytes = c.R * c.S * (steps + single) * 64;  // of one vector of outputs
  const char* weight = static_cast<const char*>(c.weight) + block * 4 * vector_bytes;
  const char* pixel[kTilePixels * kMaxTaps];
  uint8_t tap[kMaxTaps];
  tap[0] = 0;
  alignas(64) float sum[kSums];
  int64_t taps = 1;
  if (c.pointwise)
    locate_pointwise<typename Dot::X::T>(c, first, count, pixel);
  else
    taps = locate<typename Dot::X::T>(c, first, count, pixel, tap);
  if (c.residual && c.residual != c.y)
    for (int64_t i = 0; i < count; ++i) {
      const auto* residual = static_cast<const typename D::T*>(c.residual) + y_pixel[i] * c.K + k;
      for (int64_t j = 0; j < vectors * 16; j += 64 / static_cast<int64_t>(sizeof(typename D::T)))
        __builtin_prefetch(residual + j);
    }
  if (c.first_channel) {
    for (int v = 0; v < vectors; ++v) {
      const int64_t channel =
          c.first_channel[block * 4 + v] * static_cast<int64_t>(sizeof(typename Dot::X::T));
      const char* own = weight + v * vector_bytes;
      sum_chains<Dot, 1>(own, pixel, tap, taps, steps, single, channel, fetch, sum);
      if (c.merged > 1 && __builtin_expect(!has_finite_sums(sum, count), 0))
        sum_own_groups<Dot>(c, own, pixel, tap, taps, k + v * 16, channel, count, sum);
      finish<Dot, 1>(c, sum, k + v * 16, y_pixel, count);
    }
  } else {
    sum_chains<Dot, vectors>(weight, pixel, tap, taps, steps, single, 0, fetch, sum);
    finish<Dot, vectors>(c, sum, k, y_pixel, count);
  }
}

// The same without prefetching.
template <typename Dot, int vectors>
FR_INLINE void conv_pixels(const ConvBnRelu& c, int64_t block, int64_t first, int64_t count) {
  int64_t y_pixel[kTilePixels];
  locate_outputs(c, first, y_pixel);
  Fetch none{};
  conv_pixels<Dot, vectors>(c, block, first, count, y_pixel, none);
}

template <typename Dot, int vectors>
void conv_tiles(const ConvBnRelu& c, int64_t block, int64_t begin, int64_t end) {
  constexpr int64_t size = sizeof(typename Dot::D::T);
  const int64_t pixels = c.N * c.P * c.Q, step = c.y_column == 0 ? 1 : c.y_column;
  auto* y = static_cast<const char*>(c.y) + block * 64 * size;
  // The x of a pointwise convolution is prefetched during its last block of channels: two tiles
  // ahead or, as several blocks read x one after another, the tiles after this range.
  const bool last = c.pointwise && (block + 1) * 64 >= c.K;
  // Not beyond its end: there, and in other blocks, what is read after this range.
  const bool fetches_x = last && sizeof(typename Dot::X::T) == size && end * kTilePixels < pixels;
  const int64_t ahead = c.after.bytes / 256;
  const int64_t distance = c.K <= 64 ? 2 : end - begin;
  const int64_t tile_bytes = kTilePixels * c.C * size;
  int64_t y_pixel[kTilePixels];
  locate_outputs(c, begin * kTilePixels, y_pixel);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * kTilePixels, left = pixels - first;
    int64_t next[kTilePixels];
    locate_outputs(c, first + kTilePixels, next);
    Fetch fetch{};
    if (tile + 1 < end) fetch.write = {y + next[0] * c.K * size, step * c.K * size, kTilePixels};
    if (fetches_x)
      fetch.read = {static_cast<const char*>(c.x) + (tile + distance) * tile_bytes, 256,
                    tile_bytes / 256};
    else if (ahead > 0) {
      const int64_t from = ahead * (tile - begin) / (end - begin);
      const int64_t to = ahead * (tile + 1 - begin) / (end - begin);
      fetch.read = {c.after.at + from * 256, 256, to - from};
    }
    conv_pixels<Dot, vectors>(c, block, first, left < kTilePixels ? left : kTilePixels, y_pixel,
                              fetch);
    for (int i = 0; i < kTilePixels; ++i) y_pixel[i] = next[i];
  }
}

template <typename Dot>
void widen(const void* from, float* to, int64_t n) {
  typedef typename Dot::D D;
  const auto* x = static_cast<const typename D::T*>(from);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_any(to + i, D::load(x + i));
  for (; i < n; ++i) to[i] = D::get(x + i);
}

template <typename Dot>
void conv_bn_relu(const ConvBnRelu& c, int64_t block, int64_t begin, int64_t end) {
  const int64_t vectors = (c.K + 15) / 16 - block * 4;
  const auto run = vectors >= 4   ? conv_tiles<Dot, 4>
                   : vectors == 3 ? conv_tiles<Dot, 3>
                   : vectors == 2 ? conv_tiles<Dot, 2>
                                  : conv_tiles<Dot, 1>;
  run(c, block, begin, end);
}
