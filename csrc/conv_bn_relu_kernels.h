// y = relu(conv(x, weight) * scale[k] + shift[k] + residual), an implicit GEMM over channels_last
// tensors: x (N, H, W, C) in memory -> y (N, P, Q, K). relu(NaN) = NaN, -0.0 passes, one rounding.
//
// A tile is 7 pixels of y by up to 64 channels: 28 accumulators of 16 floats, which with 3 vectors
// of weights and one of x fill the 32 registers; the 4th vector of weights stays in memory. 7
// divides the pixels of every ResNet layer at 224 x 224 (49, 196, 784, ...). A tile runs over all
// taps and input channels, so that y is written once, scaled, shifted, added to the residual and
// rounded. Of the taps in the padding, rows of them for a whole tile and those of its first or last
// pixel are left out (0.9 of the time at 7 x 7); others read zeros. The loop is assembly, since
// compilers spill the accumulators (0.7 of the speed).
//
// Weights: (blocks of K, taps, run / pair, vectors, 16, pair) in memory, pair = 2 adjacent input
// channels for bfloat16 (vdpbf16ps) and 1 for float32; run = input channels read per tap. The last
// of an odd run is paired with itself and half its weight, exact for Inf and NaN as for numbers.
// Grouped: each vector of 16 outputs reads the channels of its group, which start at
// `first_channel`.
//
// Bytes: x and residual read once from memory, y written once; weights once per superblock of
// pixels (conv_bn_relu_cpu.cpp).
//
// Measured: see benchmarks/results/conv_bn_relu-cpu-*.json. Tried and rejected: x as
// each multiply-add's broadcast operand and 4 vectors of weights in registers (0.88 of the speed:
// 32 loads for 28 multiply-adds, where the processor does two of either a cycle), 6 x 64 with
// broadcasts in registers (0.97 of that one), 14 x 32 (0.85 of it).
#pragma once

#include "cpu_vec.h"

constexpr int64_t kMostTaps = 128;  // R * S of a convolution served
constexpr int64_t kPiece = 256;     // steps in one chain of additions

// How products are made. D: of the tensors in memory; X: of x and the weights as they are
// multiplied. Widened: where the processor's dot product of bfloat16 is slower than the two
// multiply-adds of float32 that it stands for, or missing.
struct DotFloat32 {
  typedef Float32 D;
  typedef Float32 X;
  static constexpr int pair = 1;
};
struct DotBFloat16 {
  typedef BFloat16 D;
  typedef BFloat16 X;
  static constexpr int pair = 2;
};
struct DotWidened {
  typedef BFloat16 D;
  typedef Float32 X;
  static constexpr int pair = 1;
};

// Stores of whole vectors. The processor's own rounding to bfloat16 is one instruction to the six
// of BFloat16::store, of which it differs in flushing subnormal numbers to zero, as vdpbf16ps does.
template <typename Dot>
FR_INLINE void store_rounded(typename Dot::D::T* y, vf v) {
  if constexpr (Dot::pair == 2) {
    vh rounded;
    asm("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(v));
    store_any(y, rounded);
  } else {
    Dot::D::store(y, v);
  }
}

// clang-format off
// One multiply-add: sums (zmm4 ... zmm31) += weights * one pixel's x in all lanes (zmm3). Of four
// vectors of weights three are registers and the fourth is read by each instruction: 3 + 7 + 7 loads
// a step, where a broadcast by each would take 4 + 28, two a cycle beside 28 multiply-adds at two a
// cycle.
#define FR_FMA(op, weight, sum) op " " weight ", %%zmm3, %%zmm" sum "\n\t"
#define FR_AT(d, n, v) "((" d "/4*" n "+" v ")*64)(%[weight])"
#define FR_WEIGHT(d, n, v) "vmovups " FR_AT(d, n, v) ", %%zmm" v "\n\t"
#define FR_X(load, d, p) load " " d "(%%r" p "), %%zmm3\n\t"
// A pixel: its x at `d` bytes from pointer `p` (r8 ... r14), times the vectors of weights.
#define FR_PIXEL_1(op, load, d, p, a, b, c, e) FR_X(load, d, p) FR_FMA(op, "%%zmm0", a)
#define FR_PIXEL_2(op, load, d, p, a, b, c, e) FR_PIXEL_1(op, load, d, p, a, b, c, e) FR_FMA(op, "%%zmm1", b)
#define FR_PIXEL_3(op, load, d, p, a, b, c, e) FR_PIXEL_2(op, load, d, p, a, b, c, e) FR_FMA(op, "%%zmm2", c)
#define FR_PIXEL_4(op, load, d, p, a, b, c, e) \
  FR_PIXEL_3(op, load, d, p, a, b, c, e) FR_FMA(op, FR_AT(d, "4", "3"), e)
#define FR_WEIGHTS_1(d) FR_WEIGHT(d, "1", "0")
#define FR_WEIGHTS_2(d) FR_WEIGHT(d, "2", "0") FR_WEIGHT(d, "2", "1")
#define FR_WEIGHTS_3(d) FR_WEIGHT(d, "3", "0") FR_WEIGHT(d, "3", "1") FR_WEIGHT(d, "3", "2")
#define FR_WEIGHTS_4(d) FR_WEIGHT(d, "4", "0") FR_WEIGHT(d, "4", "1") FR_WEIGHT(d, "4", "2")
#define FR_FIRST(op, load, d, n) FR_PIXEL_##n(op, load, d, "8", "4", "5", "6", "7")
#define FR_MIDDLE(op, load, d, n) \
  FR_PIXEL_##n(op, load, d, "9", "8", "9", "10", "11") \
  FR_PIXEL_##n(op, load, d, "10", "12", "13", "14", "15") \
  FR_PIXEL_##n(op, load, d, "11", "16", "17", "18", "19") \
  FR_PIXEL_##n(op, load, d, "12", "20", "21", "22", "23") \
  FR_PIXEL_##n(op, load, d, "13", "24", "25", "26", "27")
#define FR_LAST(op, load, d, n) FR_PIXEL_##n(op, load, d, "14", "28", "29", "30", "31")
// A step: one input channel (or pair) of every pixel that the tap reads for, times its weights. ALL
// pixels, or all but one whose tap lies in the padding: the FIRST at the left edge of the image, the
// LAST at its right.
#define FR_ALL(op, load, d, n) FR_WEIGHTS_##n(d) FR_FIRST(op, load, d, n) FR_MIDDLE(op, load, d, n) FR_LAST(op, load, d, n)
#define FR_BUT_FIRST(op, load, d, n) FR_WEIGHTS_##n(d) FR_MIDDLE(op, load, d, n) FR_LAST(op, load, d, n)
#define FR_BUT_LAST(op, load, d, n) FR_WEIGHTS_##n(d) FR_FIRST(op, load, d, n) FR_MIDDLE(op, load, d, n)

#define FR_POINTER(i, p) "movq 8*" i "(%[pixel]), %%r" p "\n\t"
#define FR_CHANNEL(p) "addq %[channel], %%r" p "\n\t"
#define FR_ADVANCE_BY(bytes, p) "addq $" bytes ", %%r" p "\n\t"
#define FR_ADVANCE(bytes) \
  FR_ADVANCE_BY(bytes, "8") FR_ADVANCE_BY(bytes, "9") FR_ADVANCE_BY(bytes, "10") \
  FR_ADVANCE_BY(bytes, "11") FR_ADVANCE_BY(bytes, "12") FR_ADVANCE_BY(bytes, "13") \
  FR_ADVANCE_BY(bytes, "14")
// The steps of one tap, four at a time and then one at a time; then, of a run with an odd number of
// 16-bit values, the last one twice, its weight having been halved. Label `i` and the three after it.
#define FR_STEPS(i, op, n, step) \
  "movq %[quads], %%rax\n\t" \
  "testq %%rax, %%rax\n\tjz " i "1f\n\t" \
  ".p2align 4\n\t" \
  i "0:\n\t" \
  step(op, "vbroadcastss", "0", n) step(op, "vbroadcastss", "4", n) \
  step(op, "vbroadcastss", "8", n) step(op, "vbroadcastss", "12", n) \
  FR_ADVANCE("16") "addq $(256*" #n "), %[weight]\n\t" \
  "decq %%rax\n\tjnz " i "0b\n\t" \
  i "1:\n\t" \
  "movq %[rest], %%rax\n\t" \
  "testq %%rax, %%rax\n\tjz " i "3f\n\t" \
  i "2:\n\t" \
  step(op, "vbroadcastss", "0", n) \
  FR_ADVANCE("4") "addq $(64*" #n "), %[weight]\n\t" \
  "decq %%rax\n\tjnz " i "2b\n\t" \
  i "3:\n\t" \
  "cmpq $0, %[single]\n\tje 5f\n\t" \
  step(op, "vpbroadcastw", "0", n) \
  "addq $(64*" #n "), %[weight]\n\t"
#define FR_ZERO(z) "vpxord %%zmm" z ", %%zmm" z ", %%zmm" z "\n\t"
#define FR_ZERO_4(a, b, c, d) FR_ZERO(a) FR_ZERO(b) FR_ZERO(c) FR_ZERO(d)
#define FR_SAVE(i, z) "vmovaps %%zmm" z ", 64*" i "(%%rax)\n\t"
#define FR_ADD(i, z) "vaddps 64*" i "(%%rax), %%zmm" z ", %%zmm" z "\n\t"
#define FR_ADD_SAVE(i, z) FR_ADD(i, z) FR_SAVE(i, z)
#define FR_EACH_4(end, i, j, k, l, a, b, c, d) end(i, a) end(j, b) end(k, c) end(l, d)
#define FR_EACH(end) \
  FR_EACH_4(end, "0", "1", "2", "3", "4", "5", "6", "7") \
  FR_EACH_4(end, "4", "5", "6", "7", "8", "9", "10", "11") \
  FR_EACH_4(end, "8", "9", "10", "11", "12", "13", "14", "15") \
  FR_EACH_4(end, "12", "13", "14", "15", "16", "17", "18", "19") \
  FR_EACH_4(end, "16", "17", "18", "19", "20", "21", "22", "23") \
  FR_EACH_4(end, "20", "21", "22", "23", "24", "25", "26", "27") \
  FR_EACH_4(end, "24", "25", "26", "27", "28", "29", "30", "31")

// After a tap's pointers: its weights follow those of the tap before, or, in the gradient of the
// weights, where an eighth pointer says, plus `offset`.
#define FR_FOLLOWING "addq $56, %[pixel]\n\t"
#define FR_POINTED "movq 56(%[pixel]), %[weight]\n\taddq %[offset], %[weight]\n\taddq $64, %[pixel]\n\t"

// All taps of a tile; the sums end in `out`, or, `again`, are added to what is there.
#define FR_TILE(op, n, next) \
  asm volatile(                                                                                   \
      FR_ZERO_4("4", "5", "6", "7") FR_ZERO_4("8", "9", "10", "11")                               \
      FR_ZERO_4("12", "13", "14", "15") FR_ZERO_4("16", "17", "18", "19")                         \
      FR_ZERO_4("20", "21", "22", "23") FR_ZERO_4("24", "25", "26", "27")                         \
      FR_ZERO_4("28", "29", "30", "31")                                                           \
      "1:\n\t"                                                                                    \
      FR_POINTER("0", "8") FR_POINTER("1", "9") FR_POINTER("2", "10") FR_POINTER("3", "11")       \
      FR_POINTER("4", "12") FR_POINTER("5", "13") FR_POINTER("6", "14")                           \
      FR_CHANNEL("9") FR_CHANNEL("10") FR_CHANNEL("11") FR_CHANNEL("12") FR_CHANNEL("13")         \
      next                                                                                        \
      "testq %%r8, %%r8\n\tjz 2f\n\t"                                                            \
      FR_CHANNEL("8")                                                                             \
      "testq %%r14, %%r14\n\tjz 3f\n\t"                                                          \
      FR_CHANNEL("14")                                                                            \
      FR_STEPS("6", op, n, FR_ALL) "jmp 5f\n\t"                                            \
      "2:\n\t" FR_CHANNEL("14")                                                                   \
      FR_STEPS("7", op, n, FR_BUT_FIRST) "jmp 5f\n\t"                                      \
      "3:\n\t"                                                                                    \
      FR_STEPS("8", op, n, FR_BUT_LAST)                                                     \
      "5:\n\t"                                                                                    \
      "decq %[taps]\n\tjnz 1b\n\t"                                                                \
      "movq %[out], %%rax\n\t"                                                                    \
      "cmpq $0, %[again]\n\tjne 4f\n\t"                                                           \
      FR_EACH(FR_SAVE) "jmp 9f\n\t"                                                               \
      "4:\n\t" FR_EACH(FR_ADD_SAVE)                                                              \
      "9:\n\t"                                                                                    \
      : [weight] "+r"(weight), [pixel] "+r"(pixel), [taps] "+r"(taps)                             \
      : [channel] "r"(channel), [quads] "m"(quads), [rest] "m"(rest), [single] "m"(single), [out] "m"(out), [again] "m"(again), [offset] "m"(offset) \
      : "rax", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "cc", "memory", "xmm0", "xmm1",     \
        "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",         \
        "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", \
        "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31")

#define FR_TILES(op, next) \
  if constexpr (vectors == 1) FR_TILE(op, 1, next); \
  if constexpr (vectors == 2) FR_TILE(op, 2, next); \
  if constexpr (vectors == 3) FR_TILE(op, 3, next); \
  if constexpr (vectors == 4) FR_TILE(op, 4, next);

// clang-format on

// out[4 i + v] = sum over taps and steps of pixel i and vector v; pixel: 7 pointers per tap, to
// which `channel` bytes are added. The first of the 7, or else the last, may be null: left out.
template <typename Dot, int vectors>
FR_INLINE void sum_tile(const char* weight, const char* const* pixel, int64_t taps, int64_t steps,
                        int64_t single, int64_t channel, int64_t again, vf* out) {
  const int64_t quads = steps / 4, rest = steps % 4, offset = 0;
  if constexpr (Dot::pair == 1) {
    FR_TILES("vfmadd231ps", FR_FOLLOWING)
  } else {
    FR_TILES("vdpbf16ps", FR_FOLLOWING)
  }
}

// The same with 8 pointers per tap, the eighth, plus `offset`, to what `weight` is above.
template <typename Dot, int vectors>
FR_INLINE void sum_rows(const char* const* pixel, int64_t taps, int64_t steps, int64_t channel,
                        int64_t offset, int64_t again, vf* out) {
  const int64_t quads = steps / 4, rest = steps % 4, single = 0;
  const char* weight = nullptr;
  if constexpr (Dot::pair == 1) {
    FR_TILES("vfmadd231ps", FR_POINTED)
  } else {
    FR_TILES("vdpbf16ps", FR_POINTED)
  }
}

// Fills pixel[7 * tap + i], for taps of the rows [*begin, *end): where tap reads for output pixel
// first + i. Rows of taps that lie in the padding for all pixels are left out. Past the last of
// `pixels`, the last again.
template <typename T>
FR_INLINE void locate(const ConvBnRelu& c, int64_t first, int64_t pixels, const char** pixel,
                      int64_t* begin, int64_t* end) {
  const char* corner[kTilePixels];  // where tap (0, 0) reads, inside x or not
  int64_t top[kTilePixels], left[kTilePixels];
  int64_t n = first / (c.P * c.Q), p = first / c.Q % c.P, q = first % c.Q;
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
  int64_t highest = top[0], lowest = top[0];
  for (int i = 1; i < kTilePixels; ++i) {
    highest = top[i] < highest ? top[i] : highest;
    lowest = top[i] > lowest ? top[i] : lowest;
  }
  *begin = 0, *end = c.R;
  while (*end > 1 && highest + (*end - 1) * c.dilation_h >= c.H) --*end;
  while (*begin + 1 < *end && lowest + *begin * c.dilation_h < 0) ++*begin;
  for (int64_t r = *begin; r < *end; ++r)
    for (int64_t s = 0; s < c.S; ++s) {
      const int64_t down = r * c.dilation_h, right = s * c.dilation_w;
      const int64_t offset = (down * c.W + right) * c.C * static_cast<int64_t>(sizeof(T));
      for (int i = 0; i < kTilePixels; ++i) {
        const bool inside = static_cast<uint64_t>(top[i] + down) < static_cast<uint64_t>(c.H) &&
                            static_cast<uint64_t>(left[i] + right) < static_cast<uint64_t>(c.W);
        pixel[i] = inside ? corner[i] + offset : nullptr;
      }
      // The kernel leaves out one pixel, the first or the last; any other reads zeros.
      for (int i = 1; i < kTilePixels; ++i)
        if (!pixel[i] && (i < kTilePixels - 1 || !pixel[0]))
          pixel[i] = static_cast<const char*>(c.zeros);
      pixel += kTilePixels;
    }
}

// The same for a pointwise convolution's one tap.
template <typename T>
FR_INLINE void follow(const ConvBnRelu& c, int64_t first, int64_t pixels, const char** pixel) {
  const int64_t bytes = c.C * static_cast<int64_t>(sizeof(T));
  const auto* x = static_cast<const char*>(c.x) + first * bytes;
  for (int64_t i = 0; i < kTilePixels; ++i) pixel[i] = x + (i < pixels ? i : pixels - 1) * bytes;
}

// Where the pixels from `first` on lie in y.
FR_INLINE void place(const ConvBnRelu& c, int64_t first, int64_t* pixel) {
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

// y = relu(sum * scale + shift + residual) for `vectors` vectors of channels from k on
template <typename Dot, int vectors>
FR_INLINE void finish(const ConvBnRelu& c, const vf* sum, int64_t k, const int64_t* pixel,
                      int64_t pixels) {
  typedef typename Dot::D D;
  const bool whole = k + vectors * 16 <= c.K;
  for (int64_t i = 0; i < pixels; ++i) {
    const int64_t at = pixel[i] * c.K + k;
    auto* y = static_cast<typename D::T*>(c.y) + at;
    const auto* residual = static_cast<const typename D::T*>(c.residual) + at;
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const int64_t j = v * 16;
      vf value = sum[4 * i + v] * load_any<vf>(c.scale + k + j) + load_any<vf>(c.shift + k + j);
      if (__builtin_expect(whole, 1)) {
        if (c.residual) value += D::load(residual + j);
        store_rounded<Dot>(y + j, c.relu ? relu_of(value) : value);
      } else if (k + j < c.K) {
        const int64_t lanes = c.K - k - j < 16 ? c.K - k - j : 16;
        if (c.residual) value += D::load_n(residual + j, lanes);
        D::store_n(y + j, c.relu ? relu_of(value) : value, lanes);
      }
    }
  }
}

// The sums of a tile over all taps, in pieces of at most kPiece steps that are added up one by one:
// a single float32 chain over thousands of products would lose twice what stock's blocked sums do.
template <typename Dot, int vectors>
FR_INLINE void sum_pieces(const char* weight, const char* const* pixel, int64_t taps, int64_t steps,
                          int64_t single, int64_t channel, vf* sum) {
  const int64_t taps_at_once = steps < kPiece ? kPiece / steps : 1;
  for (int64_t tap = 0; tap < taps; tap += taps_at_once) {
    const int64_t some = taps - tap < taps_at_once ? taps - tap : taps_at_once;
    for (int64_t begin = 0; begin < steps; begin += kPiece) {
      const int64_t count = steps - begin < kPiece ? steps - begin : kPiece;
      const int64_t last = begin + count == steps ? single : 0;
      sum_tile<Dot, vectors>(weight, pixel + kTilePixels * tap, some, count, last,
                             channel + begin * 4, tap + begin > 0, sum);
      weight += some * (count + last) * vectors * 64;
    }
  }
}

// A block of channels of pixels [first, first + count), count at most 7.
template <typename Dot, int vectors>
FR_INLINE void conv_pixels(const ConvBnRelu& c, int64_t block, int64_t first, int64_t count) {
  typedef typename Dot::D D;
  const int64_t steps = c.run / Dot::pair, single = c.run % Dot::pair, k = block * 64;
  const int64_t vector_bytes = c.R * c.S * (steps + single) * 64;  // of one vector of outputs
  const char* weight = static_cast<const char*>(c.weight) + block * 4 * vector_bytes;
  const char* pixel[kTilePixels * kMostTaps];
  alignas(64) vf sum[4 * kTilePixels];
  int64_t row = 0, row_end = 1, written[kTilePixels];
  place(c, first, written);
  if (c.pointwise)
    follow<typename Dot::X::T>(c, first, count, pixel);
  else
    locate<typename Dot::X::T>(c, first, count, pixel, &row, &row_end);
  const int64_t taps = (row_end - row) * c.S;
  const int64_t skipped = row * c.S * (steps + single) * 64;
  // The lines that are written last are fetched first.
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = written[i] * c.K + k;
    for (int64_t j = 0; j < vectors * 16; j += 64 / static_cast<int64_t>(sizeof(typename D::T))) {
      if (c.residual != c.y) __builtin_prefetch(static_cast<typename D::T*>(c.y) + at + j, 1);
      if (c.residual) __builtin_prefetch(static_cast<const typename D::T*>(c.residual) + at + j);
    }
  }
  if (c.first_channel) {
    for (int v = 0; v < vectors; ++v) {
      const int64_t channel = c.first_channel[block * 4 + v];
      sum_pieces<Dot, 1>(weight + v * vector_bytes + skipped, pixel, taps, steps, single,
                         channel * static_cast<int64_t>(sizeof(typename Dot::X::T)), sum);
      finish<Dot, 1>(c, sum, k + v * 16, written, count);
    }
  } else {
    sum_pieces<Dot, vectors>(weight + skipped * vectors, pixel, taps, steps, single, 0, sum);
    finish<Dot, vectors>(c, sum, k, written, count);
  }
}

template <typename Dot, int vectors>
void conv_tiles(const ConvBnRelu& c, int64_t block, int64_t begin, int64_t end) {
  const int64_t pixels = c.N * c.P * c.Q;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * kTilePixels, left = pixels - first;
    conv_pixels<Dot, vectors>(c, block, first, left < kTilePixels ? left : kTilePixels);
  }
}

void widen(const void* from, float* to, int64_t n) {
  const auto* x = static_cast<const uint16_t*>(from);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store_any(to + i, BFloat16::load(x + i));
  for (; i < n; ++i) to[i] = BFloat16::get(x + i);
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
