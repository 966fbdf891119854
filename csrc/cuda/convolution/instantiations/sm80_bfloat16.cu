// The sm_80 convolution of bfloat16.
#include "cuda/convolution/sm80/launch.cuh"

namespace fused_resnet {
FUSED_RESNET_IMPLICIT_GEMM_SM80(, bfloat16_t)
}
