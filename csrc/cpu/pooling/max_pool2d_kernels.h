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

// A dtype's values as signed integers of its width. infinity_: the bits of Inf.
template <typename I_, I_ infinity_>
struct Ordered {
  typedef I_ I;
  typedef I V __attribute__((vector_size(FR_VECTOR_BYTES)));
  static constexpr int64_t lanes = FR_VECTOR_BYTES / sizeof(I);
  static constexpr I infinity = infinity_;
  static constexpr I magnitude = static_cast<I>(~(I{1} << (8 * sizeof(I) - 1)));  // but the sign

  FR_INLINE V larger(V a, V b) { return a > b ? a : b; }
  FR_INLINE V key(V v) {
    const V size = v & magnitude;
    return size > infinity ? size : value(v);
  }
  FR_INLINE V value(V key) { return key ^ ((key < 0 ? V{} - 1 : V{}) & magnitude); }
};
template <typename D>
struct OrderedOf;
template <>
struct OrderedOf<Float32> : Ordered<int32_t, 0x7f800000> {};
template <>
struct OrderedOf<BFloat16> : Ordered<int16_t, 0x7f80> {};
template <>
struct OrderedOf<Float16> : Ordered<int16_t, 0x7c00> {};
template <>
struct OrderedOf<Float64> : Ordered<int64_t, 0x7ff0000000000000> {};

template <typename D>
void max_pool2d(const MaxPool& pool, int64_t begin, int64_t end) {
  typedef OrderedOf<D> Order;
  typedef typename Order::I I;
  typedef typename Order::V V;
  constexpr int64_t L = Order::lanes;
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
        if (left >= L) return Order::key(load_any<V>(at));
        V v = {};
        __builtin_memcpy(&v, at, static_cast<uint64_t>(left) * sizeof(I));
        return Order::key(v);
      };
      V best = load(h_begin);
      for (int64_t h = h_begin + 1; h < h_end; ++h) best = Order::larger(load(h), best);
      store_any(lines + j, best);
    }
    for (int64_t q = 0; q < pool.Q; ++q) {
      const int64_t left = q * pool.stride_w - pool.pad_w;
      const int64_t w_begin = left < 0 ? 0 : left;
      const int64_t w_end = left + pool.kernel_w < pool.W ? left + pool.kernel_w : pool.W;
      for (int64_t j = 0; j < C; j += L) {
        V best = load_any<V>(lines + w_begin * C + j);
        for (int64_t w = w_begin + 1; w < w_end; ++w)
          best = Order::larger(load_any<V>(lines + w * C + j), best);
        best = Order::value(best);
        const int64_t count = C - j < L ? C - j : L;
        __builtin_memcpy(y + q * C + j, &best, static_cast<uint64_t>(count) * sizeof(I));
      }
    }
  }
}

template <typename D>
double abs_max(const void* x_ptr, int64_t n) {
  typedef OrderedOf<D> Order;
  typedef typename Order::V V;
  constexpr int64_t L = Order::lanes;
  const auto* x = static_cast<const typename Order::I*>(x_ptr);
  V best[4] = {};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L)
    for (int k = 0; k < 4; ++k)
      best[k] = Order::larger(load_any<V>(x + i + k * L) & Order::magnitude, best[k]);
  typename Order::I largest = 0;
  for (int k = 0; k < 4; ++k)
    for (int64_t lane = 0; lane < L; ++lane)
      if (best[k][lane] > largest) largest = best[k][lane];
  for (; i < n; ++i) {
    const typename Order::I v = x[i] & Order::magnitude;
    if (v > largest) largest = v;
  }
  return D::get(reinterpret_cast<const typename D::T*>(&largest));
}
