// Hopper's convolution in float16.
#include "cuda/convolution/sm90/kernel.cuh"

namespace fused_resnet {
template struct Sm90Kernels<half_t>;
}  // namespace fused_resnet
