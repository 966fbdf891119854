// A stem's training batch norm, ReLU and max pooling in one pass, and its gradient; channels_last.
//
//   y[n, p, q, c] = max over the window of relu((x - mean[c]) * scale[c] + shift[c])
//
// The ReLU's output, the largest activation of a network, is never written. Each of its values is
// rounded to the dtype, so that the same value wins as in separate passes. `index` holds the
// winning tap: the first of the largest in the order of rows, then columns, or the last NaN, as in
// torch.max_pool2d. Backward gathers: every pixel of x adds up dy of the windows that it won. Where
// y is zero, dy does not pass the ReLU, so no other mask is needed.
//
// Bytes: forward x read (its windows overlap in cache), y and one byte of index written; backward
// dy, y and index read, g written.
#pragma once

#include "cpu/isa/vec.h"

// Rounds a vector to the precision of the dtype in memory.
template <typename D>
FR_INLINE typename D::V rounded_to(typename D::V v) {
  if constexpr (sizeof(typename D::T) == sizeof(typename D::A)) return v;
  typename D::T memory[D::lanes];
  D::store(memory, v);
  return D::load(memory);
}

template <typename D>
struct TapVector {
  typedef decltype(typename D::V{} > typename D::V{}) V;  // integers as wide as the arithmetic
  static constexpr bool wide = sizeof(typename D::A) == 8;
  FR_INLINE V splat(int64_t tap) {
    if constexpr (wide)
      return V{} + tap;
    else
      return V{} + static_cast<int32_t>(tap);
  }
  typedef uint8_t Bytes __attribute__((vector_size(D::lanes)));

  FR_INLINE Bytes narrow(V v) {
#if FR_VECTOR_BYTES == 64 && defined(__x86_64__)
    if constexpr (!wide) return (Bytes)_mm512_cvtepi32_epi8((__m512i)v);  // not selected by GCC 12
#endif
    return __builtin_convertvector(v, Bytes);
  }
  FR_INLINE V widen(Bytes bytes) {
#if FR_VECTOR_BYTES == 64 && defined(__x86_64__)
    if constexpr (!wide) return (V)_mm512_cvtepu8_epi32((__m128i)bytes);
#endif
    return __builtin_convertvector(bytes, V);
  }
  template <typename Memory>
  FR_INLINE void store(uint8_t* p, V v, Memory memory) {
    const Bytes bytes = narrow(v);
    __builtin_memcpy(p, &bytes, static_cast<uint64_t>(memory.n));
  }
  template <typename Memory>
  FR_INLINE V load(const uint8_t* p, Memory memory) {
    Bytes bytes = {};
    __builtin_memcpy(&bytes, p, static_cast<uint64_t>(memory.n));
    return widen(bytes);
  }
};

// Rows [begin, end) of the N*P rows of output pixels.
template <typename D>
void bn_pool(const BnPool& pool, int64_t begin, int64_t end) {
  typedef typename D::T T;
  typedef typename D::A A;
  typedef typename D::V V;
  typedef typename TapVector<D>::V I;
  const MaxPool& g = pool.window;
  const auto* mean = static_cast<const A*>(pool.mean);
  const auto* scale = static_cast<const A*>(pool.scale);
  const auto* shift = static_cast<const A*>(pool.shift);
  for (int64_t row = begin; row < end; ++row) {
    const T* image = static_cast<const T*>(g.x) + row / g.P * g.H * g.W * g.C;
    const int64_t top = row % g.P * g.stride_h - g.pad_h;
    for (int64_t q = 0; q < g.Q; ++q) {
      const int64_t left = q * g.stride_w - g.pad_w;
      T* y = static_cast<T*>(g.y) + (row * g.Q + q) * g.C;
      uint8_t* index = pool.index + (row * g.Q + q) * g.C;
      for_vectors<D>(g.C, [&](int64_t j, auto memory) FR_LAMBDA {
        const V m = load_any<V>(mean + j), a = load_any<V>(scale + j), b = load_any<V>(shift + j);
        V best = V{} - 1;  // less than any value of a ReLU
        I which = {};
        for (int64_t r = 0; r < g.kernel_h; ++r) {
          const int64_t h = top + r;
          if (h < 0 || h >= g.H) continue;
          for (int64_t s = 0; s < g.kernel_w; ++s) {
            const int64_t w = left + s;
            if (w < 0 || w >= g.W) continue;
            const V x = memory.load(image + (h * g.W + w) * g.C + j);
            const V v = rounded_to<D>(relu_of((x - m) * a + b));
            const I wins = (v > best) | (v != v);
            best = wins ? v : best;
            which = wins ? TapVector<D>::splat(r * g.kernel_w + s) : which;
          }
        }
        memory.store(y + j, best, false);
        TapVector<D>::store(index + j, which, memory);
      });
    }
  }
}

// A window that contains a pixel of x: dy and index of its output, and the pixel's tap.
template <typename T>
struct PoolWindow {
  const T* dy;
  const uint8_t* index;
  int64_t tap;
};

// dx of one pixel. n: number of windows, or 0 if only `windows` holds it.
template <typename D, int n>
FR_INLINE void gather_windows(const PoolWindow<typename D::T>* window, int64_t windows, int64_t C,
                              typename D::T* dx) {
  typedef typename D::V V;
  typedef TapVector<D> Tap;
  for_vectors<D>(C, [&](int64_t j, auto memory) FR_LAMBDA {
    V sum = {};
    const int64_t count = n > 0 ? n : windows;
#pragma GCC unroll 4
    for (int64_t i = 0; i < count; ++i) {
      const auto which = Tap::load(window[i].index + j, memory);
      sum += which == Tap::splat(window[i].tap) ? memory.load(window[i].dy + j) : V{};
    }
    memory.store(dx + j, sum, false);
  });
}

// g = the gradient of the ReLU's input, for rows [begin, end) of the N*H rows of x's pixels; dy is
// already masked by the ReLU.
template <typename D>
void bn_pool_gradient(const BnPool& pool, int64_t begin, int64_t end) {
  typedef typename D::T T;
  const MaxPool& g = pool.window;
  PoolWindow<T> window[256];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / g.H, h = row % g.H + g.pad_h;
    const int64_t p_begin = h < g.kernel_h ? 0 : (h - g.kernel_h) / g.stride_h + 1;
    const int64_t p_end = h / g.stride_h + 1 < g.P ? h / g.stride_h + 1 : g.P;
    for (int64_t column = 0; column < g.W; ++column) {
      const int64_t w = column + g.pad_w;
      const int64_t q_begin = w < g.kernel_w ? 0 : (w - g.kernel_w) / g.stride_w + 1;
      const int64_t q_end = w / g.stride_w + 1 < g.Q ? w / g.stride_w + 1 : g.Q;
      int64_t windows = 0;
      for (int64_t p = p_begin; p < p_end; ++p)
        for (int64_t q = q_begin; q < q_end; ++q) {
          const int64_t at = ((n * g.P + p) * g.Q + q) * g.C;
          window[windows++] = {static_cast<const T*>(pool.dy) + at, pool.index + at,
                               (h - p * g.stride_h) * g.kernel_w + w - q * g.stride_w};
        }
      T* dx = static_cast<T*>(pool.dx) + (row * g.W + column) * g.C;
      const auto run = windows == 4   ? gather_windows<D, 4>
                       : windows == 2 ? gather_windows<D, 2>
                       : windows == 1 ? gather_windows<D, 1>
                                      : gather_windows<D, 0>;
      run(window, windows, g.C, dx);
    }
  }
}
