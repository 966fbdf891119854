// Hopper's convolution in float16.
#include "implicit_gemm_sm90.cuh"

namespace fused_resnet {
template struct Sm90Kernels<half_t>;
}  // namespace fused_resnet
