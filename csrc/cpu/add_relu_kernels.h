// y = max(x + residual, 0), and its backward dx = dy where y > 0. All tensors share one shape and
// one memory order, so both are loops over n elements. The backward of a convolution's epilogue,
// y = max(z * scale[c] + shift[c] + residual, 0), also multiplies by scale: dz = scale[c] * dx.
// Arithmetic in float32 (double for float64), one rounding; relu(NaN) = NaN.
// Bytes: 3 elements per element of y, two read and one written. A cached store also reads the line
// it overwrites (4 in all), which `stream` avoids.
#pragma once

#include "cpu/isa/vec.h"

template <typename D>
void add_relu(const void* x_ptr, const void* residual_ptr, void* y_ptr, int64_t n, bool stream) {
  const auto* x = static_cast<const typename D::T*>(x_ptr);
  const auto* residual = static_cast<const typename D::T*>(residual_ptr);
  auto* y = static_cast<typename D::T*>(y_ptr);
  for_vectors<D>(n, [&](int64_t i, auto memory) FR_LAMBDA {
    memory.store(y + i, relu_of(memory.load(x + i) + memory.load(residual + i)), stream);
  });
}

// A NaN in y passes the gradient, as in torch's threshold_backward.
template <typename D>
void add_relu_backward(const void* dy_ptr, const void* y_ptr, void* dx_ptr, int64_t n,
                       bool stream) {
  const auto* dy = static_cast<const typename D::T*>(dy_ptr);
  const auto* y = static_cast<const typename D::T*>(y_ptr);
  auto* dx = static_cast<typename D::T*>(dx_ptr);
  for_vectors<D>(n, [&](int64_t i, auto memory) FR_LAMBDA {
    memory.store(dx + i, masked_by(memory.load(dy + i), memory.load(y + i)), stream);
  });
}

template <typename D>
void add(const void* x_ptr, void* y_ptr, int64_t n) {
  const auto* x = static_cast<const typename D::T*>(x_ptr);
  auto* y = static_cast<typename D::T*>(y_ptr);
  for_vectors<D>(n, [&](int64_t i, auto memory) FR_LAMBDA {
    memory.store(y + i, memory.load(y + i) + memory.load(x + i), false);
  });
}

template <typename D>
void epilogue_gradient(const void* dy_ptr, const void* y_ptr, const void* scale_ptr, void* g_ptr,
                       void* dz_ptr, int64_t C, int64_t begin, int64_t end) {
  typedef typename D::T T;
  typedef typename D::V V;
  const auto* scale = static_cast<const typename D::A*>(scale_ptr);
  for (int64_t row = begin; row < end; ++row) {
    const T* dy = static_cast<const T*>(dy_ptr) + row * C;
    const T* y = y_ptr ? static_cast<const T*>(y_ptr) + row * C : nullptr;
    T* kept = g_ptr ? static_cast<T*>(g_ptr) + row * C : nullptr;
    T* dz = static_cast<T*>(dz_ptr) + row * C;
    for_vectors<D>(C, [&](int64_t c, auto memory) FR_LAMBDA {
      V g = memory.load(dy + c);
      if (y) g = masked_by(g, memory.load(y + c));
      if (kept) memory.store(kept + c, g, false);
      memory.store(dz + c, g * load_any<V>(scale + c), false);
    });
  }
}
