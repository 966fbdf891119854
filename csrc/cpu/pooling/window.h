// The window of a max pooling on the CPU, alone or with a stem's batch norm: its checks and sizes.
#pragma once

#include "common.h"
#include "cpu/isa/kernels.h"

namespace fused_resnet {

constexpr int64_t kMinPoolTaskElements = 16384;  // elements that justify another task

using Pair = std::array<int64_t, 2>;  // height, width

// x (N, C, H, W), channels_last; y is left to be set.
inline MaxPool max_pool_of(const char* op, const Tensor& x, Pair kernel, Pair stride,
                           Pair padding) {
  const Layout4d layout = layout_of(op, x);
  check(layout.channels_last || layout.C == 1, op, ": x must be channels_last, got strides ",
        strides_of(x), " for shape ", shape_of(x));
  const int64_t H = x.size(2), W = x.size(3);
  Pair out{};
  for (int d = 0; d < 2; ++d) {
    check(kernel[d] > 0 && stride[d] > 0, op, ": kernel_size and stride must be positive, got ",
          kernel[d], " and ", stride[d]);
    check(padding[d] >= 0 && 2 * padding[d] <= kernel[d], op,
          ": padding must be between 0 and half of kernel_size ", kernel[d], ", got ", padding[d]);
    const int64_t size = d == 0 ? H : W, room = size + 2 * padding[d] - kernel[d];
    check(size > 0 && room >= 0, op, ": x of size ", H, " x ", W, " is smaller than the kernel ",
          kernel[0], " x ", kernel[1], " with padding ", padding[0], " x ", padding[1]);
    out[d] = room / stride[d] + 1;
  }
  MaxPool pool{};
  pool.x = x.const_data_ptr();
  pool.C = layout.C, pool.H = H, pool.W = W, pool.P = out[0], pool.Q = out[1];
  pool.kernel_h = kernel[0], pool.kernel_w = kernel[1];
  pool.stride_h = stride[0], pool.stride_w = stride[1];
  pool.pad_h = padding[0], pool.pad_w = padding[1];
  return pool;
}

}  // namespace fused_resnet
