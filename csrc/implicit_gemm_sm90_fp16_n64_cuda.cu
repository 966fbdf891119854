// Hopper's convolution: float16, tiles of 64 outputs.
#include "implicit_gemm_sm90.cuh"

namespace fused_resnet {
template struct Sm90Kernels<half_t, 64>;
}  // namespace fused_resnet
