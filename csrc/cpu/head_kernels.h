// A network's head: m = mean of x over its pixels, x (N, H, W, C) in memory; y = m weight^T + bias,
// weight (K, C). Means and sums in float (double for float64), one rounding at the end. Bytes: x
// and the weight read once, which is nearly all of the time at small batches.
#pragma once

#include "cpu/isa/vec.h"

constexpr int64_t kMeanChain = 64;  // pixels in one chain of additions

// mean (C,), of one image, for channels [begin, end)
template <typename D>
void mean_pixels(const void* x, void* mean, int64_t C, int64_t pixels, int64_t begin, int64_t end) {
  const auto* from = static_cast<const typename D::T*>(x) + begin;
  auto* to = static_cast<typename D::A*>(mean) + begin;
  for_vectors<D>(end - begin, [&](int64_t j, auto memory) FR_LAMBDA {
    typename D::V total{};
    for (int64_t i = 0; i < pixels; i += kMeanChain) {
      const int64_t stop = pixels - i < kMeanChain ? pixels : i + kMeanChain;
      typename D::V sum{};
      for (int64_t p = i; p < stop; ++p) sum += memory.load(from + p * C + j);
      total += sum;
    }
    total /= D::splat(static_cast<typename D::A>(pixels));
    for (int64_t i = 0; i < memory.n; ++i) to[j + i] = total[i];
  });
}

// y[n, k] of `rows` outputs from k on, of one image
template <typename D, int rows>
FR_INLINE void linear_rows(const typename D::A* mean, const typename D::T* weight,
                           const typename D::T* bias, typename D::T* y, int64_t C) {
  typename D::V sum[rows] = {};
  int64_t j = 0;
  for (; j + D::lanes <= C; j += D::lanes) {
    const auto m = load_any<typename D::V>(mean + j);
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) sum[i] += m * D::load(weight + i * C + j);
  }
  if (j < C) {
    typename D::V m{};
    for (int64_t i = 0; j + i < C; ++i) m[i] = mean[j + i];
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) sum[i] += m * D::load_n(weight + i * C + j, C - j);
  }
#pragma GCC unroll 4
  for (int i = 0; i < rows; ++i) {
    auto value = static_cast<typename D::A>(sum_lanes<D>(sum[i]));
    if (bias) value += D::get(bias + i);
    D::store_n(y + i, D::splat(value), 1);
  }
}

// y (N, K) for outputs [begin, end); mean (N, C); bias (K,) or null
template <typename D>
void linear(const void* mean, const void* weight, const void* bias, void* y, int64_t N, int64_t C,
            int64_t K, int64_t begin, int64_t end) {
  const auto* m = static_cast<const typename D::A*>(mean);
  const auto* w = static_cast<const typename D::T*>(weight);
  const auto* b = static_cast<const typename D::T*>(bias);
  auto* out = static_cast<typename D::T*>(y);
  const auto rows = [&](auto count, int64_t k) FR_LAMBDA {
    for (int64_t n = 0; n < N; ++n)
      linear_rows<D, decltype(count)::count>(m + n * C, w + k * C, b ? b + k : nullptr,
                                             out + n * K + k, C);
  };
  int64_t k = begin;
  for (; k + 4 <= end; k += 4) rows(Group<4>{}, k);
  for (; k < end; ++k) rows(Group<1>{}, k);
}
