// Hopper's convolution in bfloat16.
#include "cuda/convolution/sm90/kernel.cuh"

namespace fused_resnet {
template struct Sm90Kernels<bfloat16_t>;
}  // namespace fused_resnet
