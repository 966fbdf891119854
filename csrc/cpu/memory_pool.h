// CPU memory pool. A training step allocates the same sizes at every step, and memory fresh from
// the system costs a page fault, including zeroing, per 4 KiB: a tenth of a ResNet-50 step at batch
// 8.
//
// A pooled tensor returns its block to the pool when its storage is freed; the next allocation of
// about that size reuses it. Blocks that stay unused for a while are returned to the system, as are
// all free blocks on release_pool().
#pragma once

#include "common.h"

namespace fused_resnet {

struct PoolState {
  int64_t used_bytes, free_bytes, peak_bytes;  // peak: of used_bytes, since reset_pool_peak()
};
PoolState pool_state();
void reset_pool_peak();

// Returns all free blocks to the system, and their size in bytes to the caller.
int64_t release_pool();

// Uninitialised CPU tensors. Below 1 MiB they come from PyTorch's allocator.
Tensor pooled_empty(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                    ScalarType dtype);
Tensor pooled_channels_last(int64_t N, int64_t C, int64_t H, int64_t W, ScalarType dtype);
Tensor pooled_like(const Tensor& dense);  // with its strides

// Scratch memory from the pool, page-aligned, returned by the destructor.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return static_cast<char*>(data_); }

 private:
  void* data_;
};

}  // namespace fused_resnet
