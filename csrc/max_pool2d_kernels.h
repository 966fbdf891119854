// Max pooling of a channels_last tensor, x (N, H, W, C) in memory -> y (N, P, Q, C): for every
// output pixel the maximum over its window, vectorised over C; NaN propagates; padding never wins.
// And max |x|: the largest of the absolute values' bit patterns, which order as the values do, with
// Inf above all numbers and NaN above Inf.
// Bytes: x read once from memory (its windows overlap in cache), y written; abs_max reads x.
#pragma once

#include "cpu_vec.h"

// The larger, or NaN once there is one.
template <typename V>
FR_INLINE V max_or_nan(V best, V v) {
  best = v > best ? v : best;
  return v != v ? v : best;
}

template <typename D>
void max_pool2d(const MaxPool& pool, int64_t begin, int64_t end) {
  typedef typename D::V V;
  const int64_t C = pool.C;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / pool.P, p = row % pool.P;
    const int64_t top = p * pool.stride_h - pool.pad_h;
    const int64_t h_begin = top < 0 ? 0 : top;
    const int64_t h_end = top + pool.kernel_h < pool.H ? top + pool.kernel_h : pool.H;
    const auto* image = static_cast<const typename D::T*>(pool.x) + n * pool.H * pool.W * C;
    auto* y = static_cast<typename D::T*>(pool.y) + row * pool.Q * C;
    for (int64_t q = 0; q < pool.Q; ++q) {
      const int64_t left = q * pool.stride_w - pool.pad_w;
      const int64_t w_begin = left < 0 ? 0 : left;
      const int64_t w_end = left + pool.kernel_w < pool.W ? left + pool.kernel_w : pool.W;
      for_vectors<D>(C, [&](int64_t j, auto memory) FR_LAMBDA {
        V best = memory.load(image + (h_begin * pool.W + w_begin) * C + j);
        for (int64_t h = h_begin; h < h_end; ++h)
          for (int64_t w = w_begin; w < w_end; ++w)
            best = max_or_nan(best, memory.load(image + (h * pool.W + w) * C + j));
        memory.store(y + q * C + j, best, false);
      });
    }
  }
}

template <typename I>
struct IntegerVector {
  typedef I V __attribute__((vector_size(FR_VECTOR_BYTES)));
};

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
