// Max pooling of a channels_last tensor, x (N, H, W, C) in memory -> y (N, P, Q, C): for every
// output pixel the maximum over its window, vectorised over C; NaN propagates; padding never wins.
// And max |x|: the largest of the absolute values' bit patterns, which order as the values do, with
// Inf above all finite values and NaN above Inf. Maxima are taken over integers that order as the
// values do: the magnitude bits of negative values inverted, NaN above everything. A row of windows
// is first reduced over its lines, into `lines` (one line of x, in cache), then over the columns of
// each window. Bytes: x read once from memory (its windows overlap in cache), y written; abs_max
// reads x.
#pragma once

#include "cpu/isa/vec.h"

template <typename I>
struct IntegerVector {
  typedef I V __attribute__((vector_size(FR_VECTOR_BYTES)));
};

// I: the signed integer as wide as the dtype. magnitude: all its bits but the sign; infinity: the
// bits of Inf.
template <typename I>
struct Ordered {
  typedef typename IntegerVector<I>::V V;
  static constexpr int64_t lanes = FR_VECTOR_BYTES / sizeof(I);
  I magnitude, infinity;
  FR_INLINE V larger(V a, V b) { return a > b ? a : b; }
  inline __attribute__((always_inline)) V key(V v) const {
    const V size = v & magnitude;
    const V ordered = v ^ ((v < 0 ? V{} - 1 : V{}) & magnitude);
    return size > infinity ? size : ordered;
  }
  inline __attribute__((always_inline)) V value(V key) const {
    return key ^ ((key < 0 ? V{} - 1 : V{}) & magnitude);
  }
};

template <typename I>
FR_INLINE typename IntegerVector<I>::V load_some(const I* p, int64_t n) {
  typename IntegerVector<I>::V v = {};
  __builtin_memcpy(&v, p, static_cast<uint64_t>(n) * sizeof(I));
  return v;
}

template <typename I>
FR_INLINE void max_pool2d(const MaxPool& pool, int64_t begin, int64_t end, Ordered<I> order) {
  typedef typename IntegerVector<I>::V V;
  constexpr int64_t L = FR_VECTOR_BYTES / sizeof(I);
  const int64_t C = pool.C, line = pool.W * C;
  I* lines = static_cast<I*>(pool.lines);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / pool.P, p = row % pool.P;
    const int64_t top = p * pool.stride_h - pool.pad_h;
    const int64_t h_begin = top < 0 ? 0 : top;
    const int64_t h_end = top + pool.kernel_h < pool.H ? top + pool.kernel_h : pool.H;
    const I* image = static_cast<const I*>(pool.x) + n * pool.H * line;
    I* y = static_cast<I*>(pool.y) + row * pool.Q * C;
    for (int64_t j = 0; j < line; j += L) {
      const int64_t left = line - j;
      const auto load = [&](int64_t h) FR_LAMBDA {
        const I* at = image + h * line + j;
        return order.key(left >= L ? load_any<V>(at) : load_some<I>(at, left));
      };
      V best = load(h_begin);
      for (int64_t h = h_begin + 1; h < h_end; ++h) best = order.larger(load(h), best);
      store_any(lines + j, best);
    }
    for (int64_t q = 0; q < pool.Q; ++q) {
      const int64_t left = q * pool.stride_w - pool.pad_w;
      const int64_t w_begin = left < 0 ? 0 : left;
      const int64_t w_end = left + pool.kernel_w < pool.W ? left + pool.kernel_w : pool.W;
      for (int64_t j = 0; j < C; j += L) {
        V best = load_any<V>(lines + w_begin * C + j);
        for (int64_t w = w_begin + 1; w < w_end; ++w)
          best = order.larger(load_any<V>(lines + w * C + j), best);
        best = order.value(best);
        const int64_t count = C - j < L ? C - j : L;
        __builtin_memcpy(y + q * C + j, &best, static_cast<uint64_t>(count) * sizeof(I));
      }
    }
  }
}

// I is the signed integer as wide as the dtype, magnitude the mask of all its bits but the sign.
template <typename I>
FR_INLINE I largest_magnitude(const I* x, int64_t n, I magnitude) {
  typedef typename IntegerVector<I>::V V;
  constexpr int64_t L = FR_VECTOR_BYTES / sizeof(I);
  V best[4] = {};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L)
    for (int k = 0; k < 4; ++k) {
      const V v = load_any<V>(x + i + k * L) & magnitude;
      best[k] = v > best[k] ? v : best[k];
    }
  I largest = 0;
  for (int k = 0; k < 4; ++k)
    for (int64_t lane = 0; lane < L; ++lane)
      if (best[k][lane] > largest) largest = best[k][lane];
  for (; i < n; ++i) {
    const I v = x[i] & magnitude;
    if (v > largest) largest = v;
  }
  return largest;
}

double abs_max_float32(const void* x, int64_t n) {
  const int32_t bits = largest_magnitude(static_cast<const int32_t*>(x), n, int32_t{0x7fffffff});
  return Float32::get(reinterpret_cast<const float*>(&bits));
}
double abs_max_float64(const void* x, int64_t n) {
  const int64_t bits =
      largest_magnitude(static_cast<const int64_t*>(x), n, int64_t{0x7fffffffffffffff});
  return Float64::get(reinterpret_cast<const double*>(&bits));
}
template <typename D>
double abs_max_16bit(const void* x, int64_t n) {
  const int16_t bits = largest_magnitude(static_cast<const int16_t*>(x), n, int16_t{0x7fff});
  return D::get(reinterpret_cast<const uint16_t*>(&bits));
}

void max_pool2d_float32(const MaxPool& pool, int64_t begin, int64_t end) {
  max_pool2d(pool, begin, end, Ordered<int32_t>{0x7fffffff, 0x7f800000});
}
void max_pool2d_bfloat16(const MaxPool& pool, int64_t begin, int64_t end) {
  max_pool2d(pool, begin, end, Ordered<int16_t>{0x7fff, 0x7f80});
}
void max_pool2d_float16(const MaxPool& pool, int64_t begin, int64_t end) {
  max_pool2d(pool, begin, end, Ordered<int16_t>{0x7fff, 0x7c00});
}
void max_pool2d_float64(const MaxPool& pool, int64_t begin, int64_t end) {
  max_pool2d(pool, begin, end, Ordered<int64_t>{0x7fffffffffffffff, 0x7ff0000000000000});
}
