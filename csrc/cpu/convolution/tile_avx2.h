// The sums of a convolution's tile (cpu/convolution/direct_kernels.h) by AVX2, 16 outputs at a
// time: 6 pixels by 2 vectors of 8 are 12 accumulators, which with both vectors of weights and two
// broadcasts of x fill the 16 registers. A step of 12 multiply-adds, 6 cycles at two a cycle, loads
// 2 + 6 times. For 64 outputs, x is read four times from the first-level cache. Measured on Zen 3,
// data in cache: the processor's peak rate of multiply-adds. Tried and rejected: 7 pixels, whose 14
// accumulators leave one vector of weights as a memory operand of each multiply-add: 15 loads a
// step, 0.87 of the speed.
#pragma once

// clang-format off
// A pixel: x at `d` bytes from pointer `p` (r8 ... r13), times both vectors of weights.
#define FR_PIXEL(d, p, x, a, b) \
  "vbroadcastss " d "(%%r" p "), %%ymm" x "\n\t" \
  "vfmadd231ps %%ymm0, %%ymm" x ", %%ymm" a "\n\t" \
  "vfmadd231ps %%ymm1, %%ymm" x ", %%ymm" b "\n\t"
#define FR_WEIGHTS(w) \
  "vmovups %c[" w "](%[weight]), %%ymm0\n\t" \
  "vmovups %c[" w "]+32(%[weight]), %%ymm1\n\t"
#define FR_FIRST(d) FR_PIXEL(d, "8", "2", "4", "5")
#define FR_MIDDLE(d) \
  FR_PIXEL(d, "9", "3", "6", "7") FR_PIXEL(d, "10", "2", "8", "9") \
  FR_PIXEL(d, "11", "3", "10", "11") FR_PIXEL(d, "12", "2", "12", "13")
#define FR_LAST(d) FR_PIXEL(d, "13", "3", "14", "15")
// A step: one input channel of every pixel of the tap, with the weights at `w`. ALL pixels, or all
// but one whose tap lies in the padding: the FIRST at the left edge of the image, the LAST at its
// right edge.
#define FR_ALL(d, w) FR_WEIGHTS(w) FR_FIRST(d) FR_MIDDLE(d) FR_LAST(d)
#define FR_BUT_FIRST(d, w) FR_WEIGHTS(w) FR_MIDDLE(d) FR_LAST(d)
#define FR_BUT_LAST(d, w) FR_WEIGHTS(w) FR_FIRST(d) FR_MIDDLE(d)

#define FR_POINTER(i, p) "movq 8*" i "(%[pixel]), %%r" p "\n\t"
#define FR_CHANNEL(p) "addq %[channel], %%r" p "\n\t"
#define FR_ADVANCE_BY(bytes, p) "addq $" bytes ", %%r" p "\n\t"
#define FR_ADVANCE(bytes) \
  FR_ADVANCE_BY(bytes, "8") FR_ADVANCE_BY(bytes, "9") FR_ADVANCE_BY(bytes, "10") \
  FR_ADVANCE_BY(bytes, "11") FR_ADVANCE_BY(bytes, "12") FR_ADVANCE_BY(bytes, "13")
// The steps of one tap, four at a time and then one at a time. Uses label `i` and the five after
// it.
#define FR_STEPS(i, step) \
  "movq %[quads], %%rax\n\t" \
  "testq %%rax, %%rax\n\tjz " i "1f\n\t" \
  ".p2align 4\n\t" \
  i "0:\n\t" \
  step("0", "w0") FR_FETCH(i "4", "0", "prefetcht1") step("4", "w1") step("8", "w2") \
  FR_FETCH(i "5", "24", "prefetchw") step("12", "w3") \
  FR_ADVANCE("16") "addq %[w4], %[weight]\n\t" \
  "decq %%rax\n\tjnz " i "0b\n\t" \
  i "1:\n\t" \
  "movq %[rest], %%rax\n\t" \
  "testq %%rax, %%rax\n\tjz 5f\n\t" \
  i "2:\n\t" \
  step("0", "w0") \
  FR_ADVANCE("4") "addq %[w1], %[weight]\n\t" \
  "decq %%rax\n\tjnz " i "2b\n\t"
#define FR_ZERO(y) "vxorps %%ymm" y ", %%ymm" y ", %%ymm" y "\n\t"
#define FR_ZERO_2(a, b) FR_ZERO(a) FR_ZERO(b)
#define FR_SAVE(i, h, y) "vmovaps %%ymm" y ", 256*" i "+" h "(%%rax)\n\t"
#define FR_ADD_SAVE(i, h, y) \
  "vaddps 256*" i "+" h "(%%rax), %%ymm" y ", %%ymm" y "\n\t" FR_SAVE(i, h, y)
#define FR_BOTH(end, i, a, b) end(i, "0", a) end(i, "32", b)
#define FR_EACH(end) \
  FR_BOTH(end, "0", "4", "5") FR_BOTH(end, "1", "6", "7") FR_BOTH(end, "2", "8", "9") \
  FR_BOTH(end, "3", "10", "11") FR_BOTH(end, "4", "12", "13") FR_BOTH(end, "5", "14", "15")

// After a tap's pointers: its weights follow those of the previous tap or, in the weight gradient,
// are at the last of eight pointers plus `offset`.
#define FR_FOLLOWING "addq $48, %[pixel]\n\t"
#define FR_POINTED "movq 56(%[pixel]), %[weight]\n\taddq %[offset], %[weight]\n\taddq $64, %[pixel]\n\t"

// All taps of a tile; the sums are stored to `out` or, with `accumulate`, added to it.
#define FR_TILE(next) \
  asm volatile(                                                                                   \
      FR_ZERO_2("4", "5") FR_ZERO_2("6", "7") FR_ZERO_2("8", "9") FR_ZERO_2("10", "11")           \
      FR_ZERO_2("12", "13") FR_ZERO_2("14", "15")                                                 \
      "1:\n\t"                                                                                    \
      FR_POINTER("0", "8") FR_POINTER("1", "9") FR_POINTER("2", "10") FR_POINTER("3", "11")       \
      FR_POINTER("4", "12") FR_POINTER("5", "13")                                                 \
      FR_CHANNEL("9") FR_CHANNEL("10") FR_CHANNEL("11") FR_CHANNEL("12")                          \
      next                                                                                        \
      "testq %%r8, %%r8\n\tjz 2f\n\t"                                                             \
      FR_CHANNEL("8")                                                                             \
      "testq %%r13, %%r13\n\tjz 3f\n\t"                                                           \
      FR_CHANNEL("13")                                                                            \
      FR_STEPS("6", FR_ALL) "jmp 5f\n\t"                                                          \
      "2:\n\t" FR_CHANNEL("13")                                                                   \
      FR_STEPS("7", FR_BUT_FIRST) "jmp 5f\n\t"                                                    \
      "3:\n\t"                                                                                    \
      FR_STEPS("8", FR_BUT_LAST)                                                                  \
      "5:\n\t"                                                                                    \
      "decq %[taps]\n\tjnz 1b\n\t"                                                                \
      "movq %[out], %%rax\n\t"                                                                    \
      "cmpq $0, %[accumulate]\n\tjne 4f\n\t"                                                           \
      FR_EACH(FR_SAVE) "jmp 9f\n\t"                                                               \
      "4:\n\t" FR_EACH(FR_ADD_SAVE)                                                               \
      "9:\n\t"                                                                                    \
      : [weight] "+r"(weight), [pixel] "+r"(pixel), [taps] "+r"(taps)                             \
      : [channel] "r"(channel), [quads] "m"(quads), [rest] "m"(rest), [out] "m"(out),             \
        [accumulate] "m"(accumulate), [offset] "m"(offset), [fetch] "r"(&fetch),              \
        [w0] "i"(0), [w1] "i"(vectors * 64), [w2] "i"(vectors * 128), [w3] "i"(vectors * 192), [w4] "i"(vectors * 256)                 \
      : "rax", "rbx", "r8", "r9", "r10", "r11", "r12", "r13", "cc", "memory", "xmm0", "xmm1",     \
        "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",         \
        "xmm12", "xmm13", "xmm14", "xmm15")
// clang-format on

// One vector of 16 outputs; a step has `vectors` vectors of weights, which begin at `weight` or, if
// that is null, are pointed to.
template <int vectors, bool pointed>
FR_INLINE void sum_vector(const char* weight, const char* const* pixel, int64_t taps, int64_t steps,
                          int64_t channel, int64_t offset, int64_t accumulate, Fetch& fetch,
                          float* out) {
  const int64_t quads = steps / 4, rest = steps % 4;
  if constexpr (pointed)
    FR_TILE(FR_POINTED);
  else
    FR_TILE(FR_FOLLOWING);
}

// out[64 i + 16 v + lane] = sum over taps and steps of pixel i and vector v; pixel: 6 pointers per
// tap, to which `channel` bytes are added. The first or the last of the 6 may be null: skipped.
// `single` is unused: there are no pairs here.
template <typename Dot, int vectors>
FR_INLINE void sum_tile(const char* weight, const char* const* pixel, int64_t taps, int64_t steps,
                        int64_t, int64_t channel, int64_t accumulate, Fetch& fetch, float* out) {
  static_assert(Dot::pair == 1);
  for (int64_t v = 0; v < vectors; ++v)
    sum_vector<vectors, false>(weight + v * 64, pixel, taps, steps, channel, 0, accumulate, fetch,
                               out + v * 16);
}

// The same with 8 pointers per tap; the last, plus `offset`, replaces `weight`.
template <typename Dot, int vectors>
FR_INLINE void sum_rows(const char* const* pixel, int64_t taps, int64_t steps, int64_t channel,
                        int64_t offset, int64_t accumulate, Fetch& fetch, float* out) {
  static_assert(Dot::pair == 1);
  for (int64_t v = 0; v < vectors; ++v)
    sum_vector<vectors, true>(nullptr, pixel, taps, steps, channel, offset + v * 64, accumulate,
                              fetch, out + v * 16);
}

// t[j][i] <- t[i][j] of kLanes vectors.
FR_INLINE void transpose_square(vf* t) {
  __m256 a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_ps((__m256)t[2 * i], (__m256)t[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_ps((__m256)t[2 * i], (__m256)t[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    b[4 * i] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
    b[4 * i + 1] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
    b[4 * i + 2] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
    b[4 * i + 3] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = (vf)_mm256_permute2f128_ps(b[i], b[4 + i], 0x20);
    t[4 + i] = (vf)_mm256_permute2f128_ps(b[i], b[4 + i], 0x31);
  }
}
