// All sm_80 convolutions of float16: inference, training with statistics, with the gradient
// epilogue, and with the batch norm prologue.
#include "cuda/convolution/sm80/gradient.cuh"
#include "cuda/convolution/sm80/launch.cuh"
#include "cuda/convolution/sm80/prologue.cuh"

namespace fused_resnet {
FUSED_RESNET_IMPLICIT_GEMM_SM80(, float16_t)
template struct Sm80Gradient<float16_t>;
template struct Sm80Prologues<float16_t>;
}  // namespace fused_resnet
