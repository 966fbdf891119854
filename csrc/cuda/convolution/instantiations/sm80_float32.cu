// The sm_80 convolution of float32, multiplied as TF32.
#include "cuda/convolution/sm80/launch.cuh"

namespace fused_resnet {
FUSED_RESNET_IMPLICIT_GEMM_SM80(, float)
}  // namespace fused_resnet
