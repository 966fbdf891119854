// Hopper's convolution in bfloat16.
#include "implicit_gemm_sm90.cuh"

namespace fused_resnet {
template struct Sm90Kernels<bfloat16_t>;
}  // namespace fused_resnet
