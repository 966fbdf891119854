// Hopper's convolution: bfloat16, tiles of 256 outputs.
#include "implicit_gemm_sm90.cuh"

namespace fused_resnet {
template struct Sm90Kernels<bfloat16_t, 256>;
}  // namespace fused_resnet
