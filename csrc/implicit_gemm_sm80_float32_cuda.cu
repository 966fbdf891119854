// The sm_80 convolution of float32.
#include "implicit_gemm_sm80_launch.cuh"

namespace fused_resnet {
FUSED_RESNET_IMPLICIT_GEMM_SM80(, float)
}
