// CPU memory that comes back: what a training step saves, passes on and returns has the same sizes
// at every step, and memory fresh from the system costs a page fault, and its zeroing, per 4 KiB. A
// ResNet-50 step at batch 8 spends a tenth of its time on that.
//
// A tensor from here gives its block back when its storage dies; the next one of about that size
// takes it. Blocks that nobody has taken for a while go back to the system, as all of them do on
// release().
#pragma once

#include "common.h"

namespace fused_resnet {

struct PoolState {
  int64_t used_bytes, free_bytes, peak_bytes;  // peak: of what was used, since reset_pool_peak()
};
PoolState pool_state();
void reset_pool_peak();

// Gives every block that no tensor lives in back to the system; the bytes given back.
int64_t release_pool();

// Uninitialised CPU tensors; below 1 MiB from PyTorch's own allocator.
Tensor pooled_empty(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                    ScalarType dtype);
Tensor pooled_channels_last(int64_t N, int64_t C, int64_t H, int64_t W, ScalarType dtype);
Tensor pooled_like(const Tensor& dense);  // of its strides

// Scratch memory for the length of a call, aligned to a page, from the same blocks.
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
