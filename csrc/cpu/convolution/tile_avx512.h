// The sums of a convolution's tile (cpu/convolution/direct_kernels.h) by AVX-512: 7 pixels by up to
// 64 outputs. 28 accumulators of 16 floats, 3 vectors of weights and one of x fill the 32
// registers; the 4th vector of weights stays in memory. Assembly, because compilers spill the
// accumulators (0.7 of the speed).
//
// Tried and rejected: x as each multiply-add's broadcast operand and 4 vectors of weights in
// registers (0.88 of the speed: 32 loads for 28 multiply-adds, where the processor does two of
// either a cycle), 6 x 64 with broadcasts in registers (0.97 of that one), 14 x 32 (0.85 of it).
// With one vector of weights, where both take a load per multiply-add, the broadcast operand takes
// 0.75 of the time (16 and 32 channels by 16 outputs, Zen 4).
#pragma once

// clang-format off
// One multiply-add: sums (zmm4 ... zmm31) += weights * one pixel's x in all lanes (zmm3). Of four
// vectors of weights three are in registers and the fourth is a memory operand: 3 + 7 + 7 loads a
// step, where broadcast operands would take 4 + 28, at two loads and two of the 28 multiply-adds a
// cycle.
#define FR_FMA(op, weight, sum) op " " weight ", %%zmm3, %%zmm" sum "\n\t"
#define FR_AT(d, n, v) "((" d "/4*" n "+" v ")*64)(%[weight])"
#define FR_WEIGHT(d, n, v) "vmovups " FR_AT(d, n, v) ", %%zmm" v "\n\t"
#define FR_LOAD_4 "vbroadcastss"
#define FR_LOAD_2 "vpbroadcastw"
#define FR_X(load, d, p) FR_LOAD_##load " " d "(%%r" p "), %%zmm3\n\t"
// A pixel: x, of `load` bytes, at `d` bytes from pointer `p` (r8 ... r14), times the vectors of
// weights.
#define FR_PIXEL_1_4(op, d, p, a) op " " d "(%%r" p ")%{1to16%}, %%zmm0, %%zmm" a "\n\t"
#define FR_PIXEL_1_2(op, d, p, a) FR_X(2, d, p) FR_FMA(op, "%%zmm0", a)
#define FR_PIXEL_1(op, load, d, p, a, b, c, e) FR_PIXEL_1_##load(op, d, p, a)
#define FR_PIXEL_2(op, load, d, p, a, b, c, e) \
  FR_X(load, d, p) FR_FMA(op, "%%zmm0", a) FR_FMA(op, "%%zmm1", b)
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
// A step: one input channel (or pair) of every pixel of the tap, times its weights. ALL pixels, or
// all but one whose tap lies in the padding: the FIRST at the left edge of the image, the LAST at
// its right edge.
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
// The steps of one tap, four at a time and then one at a time; then, for an odd run of 16-bit
// values, the last one twice, with halved weight. Uses label `i` and the five after it.
#define FR_STEPS(i, op, n, step) \
  "movq %[quads], %%rax\n\t" \
  "testq %%rax, %%rax\n\tjz " i "1f\n\t" \
  ".p2align 4\n\t" \
  i "0:\n\t" \
  step(op, 4, "0", n) FR_FETCH(i "4", "0", "prefetcht1") \
  step(op, 4, "4", n) step(op, 4, "8", n) \
  FR_FETCH(i "5", "24", "prefetchw") step(op, 4, "12", n) \
  FR_ADVANCE("16") "addq $(256*" #n "), %[weight]\n\t" \
  "decq %%rax\n\tjnz " i "0b\n\t" \
  i "1:\n\t" \
  "movq %[rest], %%rax\n\t" \
  "testq %%rax, %%rax\n\tjz " i "3f\n\t" \
  i "2:\n\t" \
  step(op, 4, "0", n) \
  FR_ADVANCE("4") "addq $(64*" #n "), %[weight]\n\t" \
  "decq %%rax\n\tjnz " i "2b\n\t" \
  i "3:\n\t" \
  "cmpq $0, %[single]\n\tje 5f\n\t" \
  step(op, 2, "0", n) \
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

// After a tap's pointers: its weights follow those of the previous tap or, in the weight gradient,
// are at the eighth pointer plus `offset`.
#define FR_FOLLOWING "addq $56, %[pixel]\n\t"
#define FR_POINTED "movq 56(%[pixel]), %[weight]\n\taddq %[offset], %[weight]\n\taddq $64, %[pixel]\n\t"

// All taps of a tile; the sums are stored to `out` or, with `accumulate`, added to it.
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
      "cmpq $0, %[accumulate]\n\tjne 4f\n\t"                                                           \
      FR_EACH(FR_SAVE) "jmp 9f\n\t"                                                               \
      "4:\n\t" FR_EACH(FR_ADD_SAVE)                                                              \
      "9:\n\t"                                                                                    \
      : [weight] "+r"(weight), [pixel] "+r"(pixel), [taps] "+r"(taps)                             \
      : [channel] "r"(channel), [quads] "m"(quads), [rest] "m"(rest), [single] "m"(single), [out] "m"(out), [accumulate] "m"(accumulate), [offset] "m"(offset), [fetch] "r"(&fetch) \
      : "rax", "rbx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "cc", "memory", "xmm0", "xmm1",     \
        "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",         \
        "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", \
        "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31")

#define FR_TILES(op, next) \
  if constexpr (vectors == 1) FR_TILE(op, 1, next); \
  if constexpr (vectors == 2) FR_TILE(op, 2, next); \
  if constexpr (vectors == 3) FR_TILE(op, 3, next); \
  if constexpr (vectors == 4) FR_TILE(op, 4, next);

// clang-format on

// out[64 i + 16 v + lane] = sum over taps and steps of pixel i and vector v; pixel: 7 pointers per
// tap, to which `channel` bytes are added. The first or the last of the 7 may be null: skipped.
template <typename Dot, int vectors>
FR_INLINE void sum_tile(const char* weight, const char* const* pixel, int64_t taps, int64_t steps,
                        int64_t single, int64_t channel, int64_t accumulate, Fetch& fetch,
                        float* out) {
  const int64_t quads = steps / 4, rest = steps % 4, offset = 0;
  if constexpr (Dot::pair == 1) {
    FR_TILES("vfmadd231ps", FR_FOLLOWING)
  } else {
    FR_TILES("vdpbf16ps", FR_FOLLOWING)
  }
}

// The same with 8 pointers per tap; the eighth, plus `offset`, replaces `weight`.
template <typename Dot, int vectors>
FR_INLINE void sum_rows(const char* const* pixel, int64_t taps, int64_t steps, int64_t channel,
                        int64_t offset, int64_t accumulate, Fetch& fetch, float* out) {
  const int64_t quads = steps / 4, rest = steps % 4, single = 0;
  const char* weight = nullptr;
  if constexpr (Dot::pair == 1) {
    FR_TILES("vfmadd231ps", FR_POINTED)
  } else {
    FR_TILES("vdpbf16ps", FR_POINTED)
  }
}

// t[j][i] <- t[i][j] of kLanes vectors.
FR_INLINE void transpose_square(vf* t) {
  __m512 a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm512_unpacklo_ps((__m512)t[2 * i], (__m512)t[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_ps((__m512)t[2 * i], (__m512)t[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[4 * i] = _mm512_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
    b[4 * i + 1] = _mm512_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
    b[4 * i + 2] = _mm512_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
    b[4 * i + 3] = _mm512_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_f32x4(b[i], b[4 + i], 0x88);
    a[4 + i] = _mm512_shuffle_f32x4(b[i], b[4 + i], 0xdd);
    a[8 + i] = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0x88);
    a[12 + i] = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = (vf)_mm512_shuffle_f32x4(a[i], a[8 + i], 0x88);
    t[4 + i] = (vf)_mm512_shuffle_f32x4(a[4 + i], a[12 + i], 0x88);
    t[8 + i] = (vf)_mm512_shuffle_f32x4(a[i], a[8 + i], 0xdd);
    t[12 + i] = (vf)_mm512_shuffle_f32x4(a[4 + i], a[12 + i], 0xdd);
  }
}
